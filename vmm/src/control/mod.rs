//! What a running machine can be asked, and what it says at its end. Data only: [`server`] speaks
//! with clients, [`controls`] does what they ask.
//!
//! On the control socket each line is one JSON [`Request`], answered by one line of JSON
//! [`Response`], in order. A line longer than [`REQUEST_BYTES_MAX`] closes the connection. One request,
//! [`Request::Console`], makes the connection something else.

pub mod console;
pub mod controls;
pub mod memory;
pub mod server;

use serde::{Deserialize, Serialize};

pub use self::memory::{BalloonStats, GuestMemory, MemStats, MemoryStats};
use crate::plan::BACKING_FILES_MAX;
use crate::snapshot::file::Kind;
use crate::spec::{Disk, DiskLimits, Net, NetLimits};

/// The most bytes of guest output that a console file takes; what comes after is dropped.
pub const CONSOLE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The longest request line, newline included.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// The most descriptors that a client can have sent for requests to come; more are closed. A disk may
/// take as many.
pub const DESCRIPTORS_MAX: usize = 1 + BACKING_FILES_MAX;

/// The most clients at a time; one more is closed at once.
pub const CLIENTS_MAX: usize = 16;

/// How the message of a refusal begins that will not be one once somebody else is done.
pub const BUSY: &str = "busy";

/// One line to the machine.
///
/// Variants without fields are written as structs, since serde refuses unknown fields only there.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Answered with [`Response::State`].
    State {},
    /// Answered with [`Response::Done`] once the guest has reported that it is ready, which may be
    /// never. The client's later requests wait behind it.
    WaitReady {},
    /// Presses the power button; a guest that handles it shuts down.
    PowerButton {},
    /// Answered with [`Response::Done`] when no virtual processor runs guest code any more.
    Pause {},
    /// The opposite of pause.
    Resume {},
    /// Answered with [`Response::Stats`].
    Stats {},
    /// Replaces the limits of a disk; an absent limit is none.
    SetDiskLimits {
        /// The number in its name, from 0: the position in `Spec::disks` unless it came later.
        disk: usize,
        /// Bytes and operations per second.
        limits: DiskLimits,
    },
    /// Replaces the limits of a network interface; an absent limit is none.
    SetNetLimits {
        /// The number in its name, from 0: the position in `Spec::nets` unless it came later.
        net: usize,
        /// Bytes and frames per second.
        limits: NetLimits,
    },
    /// Asks the guest to have so much memory in all: more than it started with by plugging in, less
    /// by the balloon, which this sets. How far it has come is in [`Stats::memory`] and
    /// [`Stats::balloon`].
    Memory {
        /// At most `Memory::max_mib`.
        size_mib: u64,
    },
    /// Asks the guest to give up so much memory, or, with less than before, lets it have some back.
    /// How far it has come is in [`Stats::balloon`].
    Balloon {
        /// At most the memory that the guest has.
        target_mib: u64,
    },
    /// Writes a snapshot of the paused machine to two files, whose descriptors (SCM_RIGHTS) have
    /// come with this request or before: the state file's, then the memory file's, both empty and
    /// open for writing. `snapshot::client` does that. Answered with [`Response::Snapshot`].
    Snapshot {
        /// All memory, or what was written since the last snapshot.
        kind: Kind,
    },
    /// Attaches a disk to a machine with PCI, whose guest is told. Its file, and then those of
    /// `backing` in their order, are descriptors (SCM_RIGHTS) that have come with this request or
    /// before; `hotplug::client` opens and sends them. What paths say is what a snapshot records.
    /// Answered with [`Response::Attached`].
    AttachDisk { disk: Disk },
    /// As `AttachDisk`, with the descriptor of a tap (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR).
    AttachNet { net: Net },
    /// Asks the guest to let go of a disk or network interface, and once more if it was asked before.
    /// Answered with [`Response::Done`] when the device is gone and its descriptors are closed, which
    /// may be never: a guest need not listen, unless `force` is set.
    Detach {
        /// As in [`DeviceStats::name`].
        name: String,
        /// Takes the device away at once, as pulling a drive from its bay does; the guest loses what it
        /// had not written yet. Its place stays empty until the guest has let go of it.
        #[serde(default)]
        force: bool,
    },
    /// Makes the connection the guest's console. Answered with [`Response::Console`], behind which comes
    /// what the guest has written to its serial port of late and what it writes from then on, byte for
    /// byte. A client that does not keep up misses some, and is told in brackets how much.
    Console {
        /// What comes from the client is typed, too; one at a time may. It may come once the request
        /// has been answered.
        #[serde(default)]
        input: bool,
    },
    /// Ends the machine at once, as pulling the plug does.
    Kill {},
}

/// One line from the machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "result", rename_all = "snake_case", deny_unknown_fields)]
pub enum Response {
    /// It was done.
    Done {},
    /// How the machine is.
    State {
        /// Running or paused.
        state: MachineState,
        /// The guest has reported that it is ready.
        ready: bool,
    },
    /// What the machine has done so far.
    Stats {
        /// Counters since the start.
        stats: Box<Stats>,
    },
    /// A snapshot is in its files. Whoever opened them makes it durable (fsync).
    Snapshot {
        /// What it is.
        snapshot: SnapshotReport,
    },
    /// The guest has the device, or will see it when it looks.
    Attached {
        /// `disk` or `net` and the lowest number that was free.
        name: String,
    },
    /// Behind this line the connection is the guest's console.
    Console {},
    /// It was not done, and nothing has changed.
    Error {
        /// For people.
        message: String,
    },
}

/// A snapshot that was taken.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotReport {
    /// 32 hexadecimal digits.
    pub id: String,
    /// The snapshot that a difference lies over.
    pub parent: Option<String>,
    pub kind: Kind,
    /// The size of the state file.
    pub state_bytes: u64,
    /// What of the memory file is not a hole.
    pub memory_bytes: u64,
}

/// Whether virtual processors run.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// They may run.
    Running,
    /// None runs guest code.
    Paused,
}

/// Counters since the start of the machine; they wrap at 2^64.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    /// For each virtual processor: how often it left guest mode for this process.
    pub vcpu_exits: Vec<u64>,
    /// The same by what for.
    #[serde(default)]
    pub vcpu_exit_reasons: Vec<VcpuExits>,
    /// For each virtual processor: where its time went. Absent if the kernel did not tell, as in a root
    /// without `/proc`.
    #[serde(default)]
    pub vcpu_times: Option<Vec<VcpuTimes>>,
    /// Disks, network interfaces, and the others.
    pub devices: Vec<DeviceStats>,
    /// In the order in which `devices` has them, as `Spec::disks` did.
    pub disks: Vec<DiskStats>,
    /// In the order in which `devices` has them, as `Spec::nets` did.
    pub nets: Vec<NetStats>,
    #[serde(default)]
    pub memory: MemoryStats,
    /// If the machine has one, as are those that follow.
    #[serde(default)]
    pub balloon: Option<BalloonStats>,
    #[serde(default)]
    pub mem: Option<MemStats>,
    #[serde(default)]
    pub vsock: Option<VsockStats>,
    #[serde(default)]
    pub rng: Option<RngStats>,
}

/// How often a virtual processor left guest mode, by what for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuExits {
    pub port_reads: u64,
    pub port_writes: u64,
    /// Of registers of devices.
    pub memory_reads: u64,
    pub memory_writes: u64,
    /// By the machine itself, to pause it.
    pub interruptions: u64,
    /// A processor that was switched off was woken.
    pub others: u64,
}

impl VcpuExits {
    /// All of them.
    pub fn sum(&self) -> u64 {
        let all = [
            self.port_reads,
            self.port_writes,
            self.memory_reads,
            self.memory_writes,
            self.interruptions,
            self.others,
        ];
        all.into_iter().fold(0, u64::wrapping_add)
    }
}

/// Where a virtual processor's time went.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuTimes {
    /// On processors of the host's.
    pub run_ns: u64,
    /// It could have run, and the host's processors did something else: the guest sees it as stolen.
    pub wait_ns: u64,
}

/// What the vsock device has done, as the guest sees it. Bytes are those of connections.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockStats {
    /// Connections that were made, by either side.
    pub connections: u64,
    /// Those of them that there are now.
    pub open: u64,
    /// Connections that the guest asked for, and nobody was there, or no room.
    pub refused: u64,
    pub received_packets: u64,
    pub received_bytes: u64,
    pub sent_packets: u64,
    pub sent_bytes: u64,
}

/// What the entropy device has done.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RngStats {
    pub requests: u64,
    pub bytes: u64,
}

/// What a disk has done. Requests that failed are counted as failures alone.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskStats {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    /// Discards and write-zeroes.
    pub zeroes: u64,
    pub failures: u64,
    /// Requests that had to wait for a limit.
    pub throttled: u64,
}

/// What a network interface has done, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetStats {
    pub received_frames: u64,
    pub received_bytes: u64,
    /// Frames that did not fit the guest's buffers.
    pub received_dropped: u64,
    pub sent_frames: u64,
    pub sent_bytes: u64,
    /// Frames that were malformed, or that the tap refused.
    pub sent_dropped: u64,
}

/// Counters of one virtio device.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStats {
    /// `disk0`, `net0`, `vsock`, `rng`, `balloon`, `mem`, `pmem0`.
    pub name: String,
    /// Times the driver kicked a queue.
    pub kicks: u64,
    /// Interrupts sent to the driver.
    pub interrupts: u64,
    /// Times the device had to ask for a reset, because the driver broke the rules.
    pub failures: u64,
}

/// Why a machine ended: the content of `Spec::exit_status`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ExitStatus {
    /// What ended it.
    pub reason: ExitReason,
    /// What the guest reported as its workload's exit code, if it did.
    pub code: Option<u8>,
    /// The guest reported that its workload was killed for want of memory.
    pub oom: bool,
    /// With [`ExitReason::Error`], what went wrong, causes included; with [`ExitReason::Reset`], why,
    /// if the guest did not ask for it.
    pub error: Option<String>,
}

/// What ended a machine.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset, or crashed so that a real processor would reset.
    Reset,
    /// The guest reported its workload's exit (`guest_status`).
    GuestExit,
    /// SIGTERM, SIGINT, or a `kill` request.
    Killed,
    /// The machine could not go on; see `error`.
    Error,
}

impl ExitStatus {
    /// The process's exit status when the machine itself failed.
    pub const FAILURE_CODE: u8 = 125;

    /// The process's exit status when the machine was killed without a report of its guest: the
    /// shell's for SIGKILL.
    pub const KILLED_CODE: u8 = 137;

    /// An end without a report from the guest.
    pub fn new(reason: ExitReason) -> Self {
        Self {
            reason,
            code: None,
            oom: false,
            error: None,
        }
    }

    /// What the process exits with: the guest's code if it reported one, otherwise 0 for an end the
    /// guest chose.
    pub fn process_code(&self) -> u8 {
        match (self.code, self.reason) {
            (Some(code), _) => code,
            (None, ExitReason::PowerOff | ExitReason::Reset | ExitReason::GuestExit) => 0,
            (None, ExitReason::Killed) => Self::KILLED_CODE,
            (None, ExitReason::Error) => Self::FAILURE_CODE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_one_spelling_and_unknown_fields_are_refused() {
        let limits = DiskLimits {
            read_bps: Some(1000),
            ..DiskLimits::default()
        };
        let table = [
            (r#"{"action":"state"}"#, Some(Request::State {})),
            (r#"{"action":"wait_ready"}"#, Some(Request::WaitReady {})),
            (
                r#"{"action":"set_disk_limits","disk":1,"limits":{"read_bps":1000}}"#,
                Some(Request::SetDiskLimits { disk: 1, limits }),
            ),
            (
                r#"{"action":"console"}"#,
                Some(Request::Console { input: false }),
            ),
            (r#"{"action":"state","now":true}"#, None),
            (r#"{"action":"explode"}"#, None),
            (r#"{}"#, None),
        ];
        for (line, want) in table {
            assert_eq!(serde_json::from_str(line).ok(), want, "{line}");
        }
    }

    #[test]
    fn the_guests_code_wins_over_the_reason() {
        let table = [
            (ExitReason::PowerOff, None, 0),
            (ExitReason::Reset, None, 0),
            (ExitReason::Killed, None, 137),
            (ExitReason::Error, None, 125),
            (ExitReason::GuestExit, Some(7), 7),
            (ExitReason::Killed, Some(0), 0),
        ];
        for (reason, code, want) in table {
            let status = ExitStatus {
                code,
                ..ExitStatus::new(reason)
            };
            assert_eq!(status.process_code(), want, "{status:?}");
        }
    }
}
