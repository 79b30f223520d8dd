//! The seam that hostd sees every kind of instance through.
//!
//! Everything that a driver must remember lives in the instance's directories and in what runs, so
//! any hostd process can pick up where another left off.

mod confined;
pub mod container;
mod copy;
pub mod fake;
mod machine_id;
mod monitor;
mod mounts;
mod session;
mod snapshots;
mod stdin;
pub mod vm;
mod workload;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use agent::protocol::{self, Frame};
use futures::future::BoxFuture;
use jiff::Timestamp;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use crate::api::types::{ExecRequest, Exit, Isolation, Limits, Stats};
use crate::limits::Rules;
use crate::network::{AttachRequest, Endpoint};
use crate::store::Record;
use crate::validate::FieldError;

pub use self::confined::Engine;
pub use self::snapshots::{SnapshotName, Snapshots};

/// Starts, finds again, steers and removes instances of one kind.
pub trait Driver: Snapshots {
    /// Returns once a monitor owns the workload; from then on hostd may die. A failure leaves
    /// nothing behind but the instance's own state. With `await_client` a client will attach at
    /// once, and is to hear the workload's first word.
    fn start<'a>(
        &'a self,
        record: &'a Record,
        await_client: bool,
    ) -> BoxFuture<'a, Result<Running, DriverError>>;

    /// Looks at what an earlier hostd left behind. Starts nothing.
    ///
    /// Not knowing is an error, never a guess: an instance taken for dead would be started twice.
    fn recover<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Recovered, DriverError>>;

    /// Acts on a running instance.
    fn control<'a>(
        &'a self,
        record: &'a Record,
        control: Control,
    ) -> BoxFuture<'a, Result<(), DriverError>>;

    /// Opens a conversation with a running instance.
    fn open<'a>(
        &'a self,
        record: &'a Record,
        channel: Channel,
    ) -> BoxFuture<'a, Result<Session, DriverError>>;

    /// What a running instance uses.
    fn stats<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Stats, DriverError>>;

    /// Ends what runs and removes its traces. Calling it twice is calling it once.
    fn destroy<'a>(
        &'a self,
        record: &'a Record,
        extent: Extent,
    ) -> BoxFuture<'a, Result<(), DriverError>>;
}

/// A driver and what is fixed about its kind.
#[derive(Clone)]
pub struct Kind {
    pub rules: &'static Rules,
    pub driver: Arc<dyn Driver>,
}

impl fmt::Debug for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Kind")
            .field("rules", &self.rules)
            .finish_non_exhaustive()
    }
}

/// What the network is to know of an instance; `None` if it wants no network.
pub fn attach_request(record: &Record) -> Option<AttachRequest> {
    let endpoint = match record.instance.spec.isolation {
        Isolation::Container => Endpoint::Namespace,
        Isolation::Vm => Endpoint::Tap,
    };
    confined::attach_request(record, endpoint)
}

/// The kinds there are.
#[derive(Clone, Debug)]
pub struct Kinds {
    pub container: Kind,
    pub vm: Kind,
}

impl Kinds {
    pub fn of(&self, isolation: Isolation) -> &Kind {
        match isolation {
            Isolation::Container => &self.container,
            Isolation::Vm => &self.vm,
        }
    }
}

/// An instance whose workload, or the machine that will run it, has been started.
pub struct Running {
    /// The workload's first process or its VMM, in the host's pid namespace.
    pub pid: i32,
    pub paused: bool,
    /// What each phase of the start took, in microseconds, by its name.
    pub start_us: BTreeMap<String, u64>,
    /// Done once the workload itself runs.
    pub ready: BoxFuture<'static, Result<(), DriverError>>,
    /// Done once everything has ended.
    pub ended: BoxFuture<'static, Ended>,
}

impl fmt::Debug for Running {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Running")
            .field("pid", &self.pid)
            .field("paused", &self.paused)
            .finish_non_exhaustive()
    }
}

/// How an instance's run came to its end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Ended {
    Exited {
        exit: Exit,
        at: Timestamp,
        /// Why the workload did not end by its own doing, if it did not.
        error: Option<String>,
    },
    /// What ran it is gone and left no record.
    Lost,
}

/// What an earlier hostd left behind.
#[derive(Debug)]
pub enum Recovered {
    Live(Running),
    Ended(Ended),
}

/// What can be done to a running instance.
#[derive(Clone, Debug, PartialEq)]
pub enum Control {
    /// Sends the workload the signal by which its image wants to be stopped.
    AskToStop,
    /// Sends the workload this signal.
    Signal(Signal),
    /// Ends it without asking.
    Kill,
    Pause,
    Resume,
    /// Puts these limits in force, as far as they can be changed while it runs.
    Apply(Box<Limits>),
}

/// A conversation with a running instance.
#[derive(Clone, Debug)]
pub enum Channel {
    /// A process beside the workload.
    Exec(Box<ExecRequest>),
    /// The workload's own streams from now on; with `stdin` also its input.
    Attach { stdin: bool },
    /// The console of the instance's machine; with `input` also its keyboard. The session ends with
    /// the machine, or when it is sent a signal.
    Console { input: bool },
}

/// Frames in both directions; the last one received is [`Frame::Exit`] or [`Frame::Error`].
#[derive(Debug)]
pub struct Session {
    /// Dropping it leaves the process running without input.
    pub input: mpsc::Sender<Frame>,
    pub output: mpsc::Receiver<Frame>,
}

/// Frames that wait in one direction of a [`Session`] before the sender is held up.
pub const SESSION_FRAMES_MAX: usize = 16;

/// How much `destroy` removes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Extent {
    /// What one run needed: processes, cgroups, mounts, interfaces, the run directory.
    Run,
    /// The writable layer or disk and the log as well.
    Everything,
}

/// Why a driver could not do what was asked, by whose part it is to mend it.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The spec asks for what the image or the host does not have.
    #[error("the instance cannot be started as it was asked for")]
    Field(#[source] FieldError),
    /// The workload could not be run: no such directory, no such device.
    #[error("the workload could not be started: {message}")]
    Workload { message: String },
    #[error("the workload could not be started: {message}")]
    NoSuchProgram { message: String },
    /// It has no permission to be executed, or is no program.
    #[error("the workload could not be started: {message}")]
    NotExecutable { message: String },
    /// The host lacks something that every instance of this kind needs.
    #[error("this host cannot run it: {message}")]
    Unavailable { message: String, hint: &'static str },
    #[error("it did not answer within {seconds} s")]
    Timeout { seconds: u64 },
    #[error("nothing of that name runs")]
    NotRunning,
    /// It would have to do something for what was asked.
    #[error("it is paused")]
    Paused,
    #[error("{0}")]
    NoConsole(&'static str),
    #[error("somebody else types at the console")]
    ConsoleTaken,
    #[error("the console has as many clients as it can have, {most}")]
    ConsolesFull { most: usize },
    /// A guest has not come to the size that it was asked to have; it is asked to go back.
    #[error("the guest was to have {wanted_mib} MiB of memory and is at {has_mib} MiB")]
    Memory { wanted_mib: u64, has_mib: u64 },
    #[error("{action} failed")]
    Io { action: String, source: io::Error },
    #[error("{action} failed: {message}")]
    Helper { action: String, message: String },
}

impl DriverError {
    /// For a workload that could not be run, by the code that a shell would give.
    fn of_workload(code: Option<u8>, message: String) -> Self {
        match code {
            Some(protocol::NOT_FOUND) => Self::NoSuchProgram { message },
            Some(protocol::NOT_EXECUTABLE) => Self::NotExecutable { message },
            _ => Self::Workload { message },
        }
    }

    /// For `map_err`: an input or output error while doing `action`.
    pub fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}

/// The error and what is behind it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
