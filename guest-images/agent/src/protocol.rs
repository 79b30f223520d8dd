//! What a host says to the agent and what it hears back. Types only.
//!
//! The agent listens on vsock port [`PORT`]. A connection carries one request: a JSON object on a
//! line of its own. `exec` is followed by [`Frame`]s, a line each, in both directions, until an
//! `exit` or `error` frame; every other request is answered by one [`Response`] line. A host that
//! closes an exec's connection, if only for writing, ends the process. The same frames travel over
//! hostd's API, so hostd passes them on unread.
//!
//! The agent finds its [`Config`] at [`CONFIG_PATH`] in the initramfs.

use serde::{Deserialize, Serialize};

/// The vsock port that the agent listens on.
pub const PORT: u32 = 1024;

/// Ports on the host (CID 2) that the agent connects to for the workload's standard streams.
/// The VMM joins them to descriptors of its own.
pub const STDIN_PORT: u32 = 1000;
pub const STDOUT_PORT: u32 = 1001;
pub const STDERR_PORT: u32 = 1002;

/// A line longer than this is refused, in both directions.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// The most data that one frame carries, before base64.
pub const FRAME_DATA_BYTES_MAX: usize = 64 * 1024;

/// The exit codes, and those of an exec's error, of a program that does not exist and of one that
/// cannot be executed: a shell's.
pub const NOT_FOUND: u8 = 127;
pub const NOT_EXECUTABLE: u8 = 126;

/// Where the initramfs holds the agent's [`Config`] as JSON.
pub const CONFIG_PATH: &str = "/hostd/config.json";

/// What belongs on the kernel's command line: the console, few words on it, and the end of the
/// machine at a panic. hostd-vmm has no PCI; the self-test of the timer fails by chance on a busy
/// host, and that of ciphers takes time.
pub const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 pci=off no_timer_check \
    random.trust_cpu=on cryptomgr.notests \
    memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// What the agent is to set up and run. Written by hostd into the VM's initramfs.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub hostname: String,
    pub process: Process,
    /// The serial number (virtio-blk id) of the read-only image disk.
    pub image_serial: String,
    /// File system of the image disk, e.g. `erofs`.
    pub image_fs: String,
    /// The serial number of the writable ext4 disk, which holds overlayfs' upper directory.
    pub writable_serial: String,
    #[serde(default)]
    pub network: Option<Network>,
    /// Processes and threads of the workload.
    #[serde(default)]
    pub pids_max: Option<u32>,
    /// The host's wall clock at launch, in nanoseconds since the epoch.
    #[serde(default)]
    pub clock_ns: Option<i64>,
    /// The signal that asks the workload to stop, when the power button is pressed; SIGTERM if absent.
    #[serde(default)]
    pub stop_signal: Option<i32>,
    /// What an image or a snapshot that has a `/etc/machine-id` is to have there, if it is not to stay:
    /// 32 hexadecimal digits.
    #[serde(default)]
    pub machine_id: Option<String>,
}

/// Who a machine is from now on that goes on from the memory of another.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Renewal {
    pub hostname: String,
    #[serde(default)]
    pub network: Option<Network>,
    /// As in [`Config`].
    #[serde(default)]
    pub machine_id: Option<String>,
}

/// A static IPv4 set-up of the guest's only NIC.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub mac: String,
    pub address: std::net::Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: std::net::Ipv4Addr,
    pub dns: Vec<std::net::IpAddr>,
    /// Lines of /etc/hosts beyond localhost's: address and name.
    #[serde(default)]
    pub hosts: Vec<(std::net::IpAddr, String)>,
}

/// A process to run, as the OCI image configuration describes it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// The program and its arguments; a program without `/` is looked up in the environment's PATH.
    pub args: Vec<String>,
    /// `NAME=value` each.
    #[serde(default)]
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`, resolved in the image; root if absent.
    #[serde(default)]
    pub user: Option<String>,
    /// `/` if absent.
    #[serde(default)]
    pub working_dir: Option<String>,
    #[serde(default)]
    pub tty: bool,
    /// Whether standard input is connected; otherwise the process reads end of file.
    #[serde(default)]
    pub stdin: bool,
}

/// The first line of a connection.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Answered once the workload has been started.
    Ping {},
    /// Runs a process beside the workload; frames follow. Its environment is added to the
    /// workload's, and the user and working directory are the workload's if absent.
    Exec(Process),
    /// Sends a signal to the workload.
    Signal {
        signal: i32,
    },
    /// Sets the size of the workload's terminal.
    Resize {
        rows: u16,
        cols: u16,
    },
    Stats {},
    /// Changes the limit on the workload's processes; `None` takes it away.
    SetPidsMax {
        max: Option<u32>,
    },
    /// Changes the workload's share of memory to that of a machine with `now_bytes` of it, which had
    /// `at_start_bytes`.
    SetMemory {
        at_start_bytes: u64,
        now_bytes: u64,
    },
    /// Stops the workload and what exec started where they are; with `sync`, also writes to the disk
    /// what they have written to files. Answered once that has come about.
    Hold {
        #[serde(default = "yes")]
        sync: bool,
    },
    /// Lets them go on. A machine that goes on from a snapshot is told before who and when it is.
    Release {
        #[serde(default)]
        renewal: Option<Renewal>,
        /// The host's wall clock, in nanoseconds since the epoch.
        #[serde(default)]
        clock_ns: Option<i64>,
    },
}

fn yes() -> bool {
    true
}

/// The answer to every request but `exec`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Done {},
    Stats {
        pids: u64,
        memory_used_bytes: u64,
        memory_total_bytes: u64,
    },
    Error {
        message: String,
    },
}

/// One line of an exec's conversation. Data is base64.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Frame {
    /// Towards the process; empty data means end of file.
    Stdin(String),
    /// Towards the process: the size of its terminal.
    Resize {
        rows: u16,
        cols: u16,
    },
    /// Towards the process.
    Signal(i32),
    /// From the process.
    Stdout(String),
    Stderr(String),
    /// The last frame. Exactly one of `code` and `signal` is set.
    Exit {
        code: Option<i32>,
        signal: Option<i32>,
        oom: bool,
    },
    /// The last frame: the process could not be run. `code` is 127 (no such program), 126 (it
    /// cannot be executed) or 125 (anything else).
    Error {
        code: i32,
        message: String,
    },
}
