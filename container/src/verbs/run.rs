//! `run`: creates and starts a container, passes signals and the terminal through, and waits for it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{getpid, set_child_subreaper};

use crate::create::{CreateError, CreateOptions, Created, create_started};
use crate::footprint;
use crate::process::{Exit, Process};
use crate::readiness::{self, Proxy};
use crate::relay::Relay;
use crate::rights::is_host_root;
use crate::verbs::delete::{DeleteError, DeleteOptions, delete};

/// Why a container could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Delete(#[from] DeleteError),
    #[error("cannot wait for the process")]
    Wait(#[source] io::Error),
}

/// What becomes of the container once its program runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunMode {
    /// Return as soon as the program runs.
    pub detach: bool,
    /// Do not delete the container at its end.
    pub keep: bool,
    /// Leave processes that lose their parent, where they are of the caller's own pid namespace, to
    /// somebody else.
    pub no_subreaper: bool,
}

/// Runs a container in the foreground, and deletes it. Nothing is returned for one that was detached.
///
/// # Errors
/// Those of [`RunError`]; the container is then gone.
pub fn run(options: CreateOptions, mode: RunMode) -> Result<Option<Exit>, RunError> {
    let (root, id) = (options.root.clone(), options.id.clone());
    run_made(root, id, mode, || create_started(options))
}

/// As [`run`], whichever way the container is made.
pub(crate) fn run_made(
    root: PathBuf,
    id: String,
    mode: RunMode,
    make: impl FnOnce() -> Result<Created, CreateError>,
) -> Result<Option<Exit>, RunError> {
    // Before there is a child, so that no signal for it is lost.
    let signals = if mode.detach {
        None
    } else {
        let mut signals = Signals::block().map_err(RunError::Wait)?;
        if !mode.no_subreaper {
            signals.adopt_orphans().map_err(RunError::Wait)?;
        }
        Some(signals)
    };
    let created = make()?;
    for warning in &created.warnings {
        crate::log::warn(warning);
    }
    let Some(signals) = signals else {
        if let Some(proxy) = created.proxy {
            proxy.conduct(&created.process);
        }
        return Ok(None);
    };
    let exit = attend(&created.process, &signals, created.console, created.proxy);
    if !mode.keep {
        let force = exit.is_err();
        for warning in delete(&DeleteOptions { root, id, force })? {
            crate::log::warn(&warning);
        }
    }
    exit.map(Some).map_err(RunError::Wait)
}

/// The signals that are passed to the process, as a descriptor.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    /// Whether this process is the parent of those that lose theirs.
    adopts: bool,
}

impl Signals {
    /// From now on signals wait to be read. A child that is made starts with none blocked.
    ///
    /// # Errors
    /// The system calls'.
    pub fn block() -> io::Result<Self> {
        let mut set = SigSet::all();
        // These tell of this program's own faults.
        for own in [
            Signal::SIGSEGV,
            Signal::SIGBUS,
            Signal::SIGILL,
            Signal::SIGFPE,
            Signal::SIGABRT,
        ] {
            set.remove(own);
        }
        set.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self {
            descriptor: SignalFd::with_flags(&set, flags)?,
            adopts: false,
        })
    }

    /// Makes this process the parent of those below it that lose theirs, and reaps them when they end.
    fn adopt_orphans(&mut self) -> io::Result<()> {
        set_child_subreaper(Some(getpid()))?;
        self.adopts = true;
        Ok(())
    }

    fn pass_to(&self, process: &Process, relay: Option<&Relay>) -> io::Result<()> {
        while let Some(info) = self.descriptor.read_signal()? {
            let number = info.ssi_signo.cast_signed();
            match number {
                libc::SIGCHLD if self.adopts => reap_others(process)?,
                // The end of the process is seen by its descriptor. SIGURG and SIGPIPE concern this
                // program.
                libc::SIGCHLD | libc::SIGURG | libc::SIGPIPE => {}
                libc::SIGWINCH if relay.is_some() => relay.map_or(Ok(()), Relay::resize)?,
                // It may end at this moment.
                _ => drop(process.signal(number)),
            }
        }
        Ok(())
    }
}

/// Reaps children that have ended, up to `process`, which is waited for elsewhere.
fn reap_others(process: &Process) -> io::Result<()> {
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    loop {
        match waitid(Id::All, ended | WaitPidFlag::WNOWAIT).map(|status| status.pid()) {
            Ok(Some(other)) if other.as_raw() != process.pid() => {
                waitid(Id::Pid(other), ended)?;
            }
            Ok(_) | Err(Errno::ECHILD) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A process that runs for longer is waited for with as little memory as that takes.
const SHORT_RUN_SECONDS: i64 = 1;

/// Waits for a child to end, passing signals, the terminal's bytes, and word that it is ready, meanwhile.
///
/// # Errors
/// When it cannot be waited for; it may still run then.
pub fn attend(
    process: &Process,
    signals: &Signals,
    console: Option<OwnedFd>,
    mut proxy: Option<Proxy>,
) -> io::Result<Exit> {
    let mut relay = console.map(Relay::new).transpose()?;
    let mut patience = Some(Timespec {
        tv_sec: SHORT_RUN_SECONDS,
        tv_nsec: 0,
    });
    loop {
        let mut fds = vec![
            PollFd::new(process, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.descriptor.as_fd(), PollFlags::IN),
        ];
        if let Some(proxy) = &proxy {
            fds.push(PollFd::new(proxy.socket(), PollFlags::IN));
        }
        if let Some(relay) = &relay {
            fds.extend(relay.poll_fds());
        }
        match poll(&mut fds, patience.as_ref()) {
            Ok(0) => {
                footprint::forget_code();
                patience = None;
                continue;
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[1] {
            signals.pass_to(process, relay.as_ref())?;
        }
        // Also what it sent before it ended.
        if let Some(Err(error)) = proxy.as_mut().map(Proxy::turn) {
            readiness::warn(&error);
            proxy = None;
        }
        if let Some(relay) = &mut relay {
            relay.turn()?;
        }
        if ready[0] {
            if let Some(relay) = &mut relay {
                relay.drain();
            }
            if let Some(Err(error)) = proxy.map(Proxy::finish) {
                readiness::warn(&error);
            }
            return process.wait();
        }
    }
}

/// The directory of states that is used if none is given: a user's own where this program has not the
/// rights of the host's root, if the session has one.
pub fn default_root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let directory =
            std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty());
        match directory {
            Some(directory) if !is_host_root() => Path::new(&directory).join("hostd-oci"),
            _ => PathBuf::from("/run/hostd-oci"),
        }
    })
}
