//! What the monitor is told, what it answers and what it leaves behind. Types only.
//!
//! A monitor is `hostd-oci monitor --dir RUN_DIR`. It reads [`MonitorSpec`] from
//! `RUN_DIR/monitor.json`, creates and starts the container, prints one [`Ready`] line on its
//! standard output and closes it. From then on it answers on `RUN_DIR/monitor.sock`: a JSON
//! [`Request`] line per connection, answered by one [`Response`] line; after `attach`, frames
//! follow in both directions. When the container's process has ended it writes `RUN_DIR/exit.json`
//! ([`ExitRecord`]) atomically, tells who waits or is attached, removes the container, and goes.
//!
//! What an observer finds tells what happened, whenever it looks and whoever crashed:
//!
//! | `exit.json` | `monitor.json` locked | meaning |
//! |---|---|---|
//! | absent | yes | starting or running; the socket answers once it runs |
//! | present | yes | ended as it says; the container is being removed |
//! | present | no | ended as it says, and nothing is left |
//! | absent | no | never started, or the monitor was killed |
//!
//! The lock is flock(2), taken exclusively for as long as the monitor lives: who can take it shared
//! (`LOCK_SH | LOCK_NB`) knows that there is none. A monitor that was killed leaves its container
//! running, for killing a workload is not for an accident to decide. But its log and its exit
//! status are lost, and its next output ends it with SIGPIPE, so an observer that finds the last
//! case deletes the container by force. A monitor takes SIGTERM, SIGINT, SIGHUP and SIGQUIT for
//! accidents too (a service manager that stops a daemon sends them to all of its processes), and
//! ignores them: only `kill` ends a workload.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A line longer than this is refused.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// `RUN_DIR/monitor.json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MonitorSpec {
    /// The container's id.
    pub id: String,
    /// The directory that holds the OCI states, as `hostd-oci --root`.
    pub root: PathBuf,
    /// The directory that holds `config.json`.
    pub bundle: PathBuf,
    pub log: LogSpec,
    /// Keeps standard input open for `attach`; otherwise the process reads end of file.
    #[serde(default)]
    pub stdin: bool,
    /// Leaves the output unread until a client attaches, or for some seconds if none does: so a
    /// client that is known to come hears the workload's first word, however short its life.
    #[serde(default)]
    pub await_client: bool,
    /// Program of the host to execute in place of looking up `process.args[0]` in the root file
    /// system, so that the root may be empty. It must be statically linked.
    #[serde(default)]
    pub executable: Option<PathBuf>,
    /// Opened on the host before the container is made, and handed to its process as descriptors
    /// 3, 4, …, in this order.
    #[serde(default)]
    pub descriptors: Vec<Descriptor>,
}

/// Something of the host that the confined process gets as an open descriptor.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Descriptor {
    /// A file or device that exists.
    File { path: PathBuf, write: bool },
    /// A file that is made, or emptied, with mode 0600.
    Create { path: PathBuf },
    /// A persistent tap interface that exists (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) of the network namespace
    /// that the monitor was started in.
    Tap { name: String },
    /// A listening unix stream socket, mode 0600; a leftover socket file is replaced.
    Listener { path: PathBuf },
}

/// Where the process's output goes: lines of JSON `{"at","stream","text"}`. The text ends with the
/// line end if the line had one; a line longer than 16 KiB is in several. Bytes that are no UTF-8
/// are replaced. A line that does not end for long is logged when it does, or when the process
/// ends.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LogSpec {
    pub path: PathBuf,
    /// At this size the file is renamed to `PATH.1`, replacing the one before.
    pub bytes_max: u64,
}

/// The monitor's one line on standard output.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ready {
    /// The process runs. The pid is the container's init in the monitor's pid namespace; the start
    /// time is field 22 of /proc/PID/stat.
    Running {
        pid: i32,
        start_time: u64,
        monitor_pid: i32,
    },
    /// Nothing runs and nothing is left behind.
    Failed {
        message: String,
        /// 127 if there is no such program, 126 if it cannot be executed, as a shell has it; nothing
        /// if it is about something else.
        exit_code: Option<u8>,
    },
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    State {},
    /// Answered when the process has ended. The connection closes when the container is removed
    /// too: who wants to use its id again waits for that.
    Wait {},
    /// Signals the init process.
    Kill {
        signal: i32,
    },
    /// Sets the size of the terminal.
    Resize {
        rows: u16,
        cols: u16,
    },
    /// Follows the output from now on; with `stdin`, frames from the client are its input. One
    /// client at a time has the input; it may resize the terminal and send signals in any case.
    ///
    /// A client that reads too slowly holds the process up for some seconds and is then dropped:
    /// its connection closes without an `exit` frame.
    Attach {
        stdin: bool,
    },
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Done {},
    Running { pid: i32, start_time: u64 },
    Exited(ExitRecord),
    Error { message: String },
}

/// What follows `attach`, a line each. The names and meanings are those of the API's exec frames.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Frame {
    /// Towards the process, base64; empty data means end of file, which a terminal is told with the
    /// character for it (Ctrl-D).
    Stdin(String),
    Resize {
        rows: u16,
        cols: u16,
    },
    Signal(i32),
    /// From the process, base64.
    Stdout(String),
    Stderr(String),
    /// The last frame.
    Exit {
        code: Option<i32>,
        signal: Option<i32>,
        oom: bool,
    },
}

/// `RUN_DIR/exit.json`: how the container's process ended. Exactly one of `code` and `signal` is set.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ExitRecord {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// The kernel killed a process of the cgroup for want of memory under its limit, and init died
    /// of SIGKILL or with 137.
    pub oom: bool,
    pub finished_at: Timestamp,
}
