//! The wire form of what an instance uses.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /v1/instances/{name}/stats`. What both kinds have is counted by the host's kernel, at the
/// control group and the interface on the bridge: for a VM it is what its whole VMM uses of the host,
/// but for `pids`, which the guest's agent counts. All is zero for an instance that does not run, and
/// counters begin anew with each start.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Stats {
    pub cpu_usage_us: u64,
    pub cpu_throttled_us: u64,
    pub memory_bytes: u64,
    pub memory_peak_bytes: u64,
    pub memory_limit_bytes: Option<u64>,
    pub oom_kills: u64,
    pub pids: u64,
    pub pids_limit: Option<u64>,
    /// From the host's disks: what its page cache has is not read from there.
    pub disk_read_bytes: u64,
    pub disk_write_bytes: u64,
    pub disk_read_ops: u64,
    pub disk_write_ops: u64,
    /// Towards the instance.
    pub network_ingress_bytes: u64,
    /// From the instance.
    pub network_egress_bytes: u64,
    pub network_ingress_packets: u64,
    pub network_egress_packets: u64,
    /// Packets that the interface could not take, as when a guest does not empty its queue.
    #[serde(default)]
    pub network_ingress_dropped: u64,
    #[serde(default)]
    pub network_egress_dropped: u64,
    /// What only a VM has. Absent for a container, and while a VMM does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmStats>,
}

/// What only a VM has. But for the times of `vcpus`, which the host's kernel tells, it is the VMM's own
/// word, and some of it the guest's: to be shown, not to be relied on. Counters begin anew when a VM goes
/// on from the memory of a snapshot.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct VmStats {
    /// By their numbers.
    pub vcpus: Vec<VcpuStats>,
    pub memory: VmMemoryStats,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonStats>,
    /// By their ids: `disk0` (the image), `disk1` (what the instance writes to), `net0`, `vsock`, `rng`,
    /// `balloon`, `mem`.
    pub devices: BTreeMap<String, DeviceStats>,
}

/// A virtual processor.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct VcpuStats {
    /// How long it ran on a processor of the host's. Absent if the host's kernel does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_us: Option<u64>,
    /// How long it could have run while the host's processors did something else: the guest sees it as
    /// stolen time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steal_us: Option<u64>,
    /// How often it left guest mode for the VMM.
    pub exits: VcpuExits,
}

/// How often a virtual processor left guest mode for the VMM, by what for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct VcpuExits {
    pub total: u64,
    /// Reads and writes of I/O ports.
    pub port_reads: u64,
    pub port_writes: u64,
    /// Reads and writes of devices' registers in memory.
    pub mmio_reads: u64,
    pub mmio_writes: u64,
    /// Signals of the VMM to itself, to pause it.
    pub interruptions: u64,
}

/// The size of a guest's memory; what is in the balloon counts.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct VmMemoryStats {
    pub size_bytes: u64,
    /// What the guest was asked to have, without what it was asked to put into the balloon.
    pub requested_bytes: u64,
    /// What it can be given while it runs.
    pub max_bytes: u64,
}

/// Memory that a guest gave back.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct BalloonStats {
    /// How much it was asked to give up.
    pub target_bytes: u64,
    /// How much it says that it has given up.
    pub actual_bytes: u64,
    /// How much came back through reports of free pages; what was used in between counts again.
    pub reported_bytes: u64,
    /// What the guest last told of its memory. Each look asks it for the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestMemoryStats>,
}

/// A guest's memory as it sees it. What it does not tell is absent.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct GuestMemoryStats {
    /// How long ago it told.
    pub age_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// Could be had without swapping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Holds files that could be read again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caches_bytes: Option<u64>,
    /// Since the guest started, as is all that follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swapped_in_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swapped_out_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
}

/// A virtio device. Of `disk`, `net`, `vsock`, `rng` and `mem` it has the one of its type, if any.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct DeviceStats {
    /// Times the driver kicked a queue.
    pub kicks: u64,
    /// Interrupts sent to the driver.
    pub interrupts: u64,
    /// Times the device had to ask for a reset, because the driver broke the rules.
    pub failures: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskStats>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<NetStats>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockStats>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngStats>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem: Option<MemStats>,
}

/// What a guest has done with a disk, whatever of it reached the host's.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct DiskStats {
    pub read_ops: u64,
    pub read_bytes: u64,
    pub write_ops: u64,
    pub write_bytes: u64,
    pub flush_ops: u64,
    /// Discards and writes of zeroes.
    pub discard_ops: u64,
    /// Requests that failed, which count nowhere else.
    pub failed_ops: u64,
    /// Requests that had to wait for a limit.
    pub throttled_ops: u64,
}

/// What passed through a network interface of a guest's.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct NetStats {
    pub ingress_packets: u64,
    pub ingress_bytes: u64,
    /// Frames that did not fit the guest's buffers.
    pub ingress_dropped: u64,
    pub egress_packets: u64,
    pub egress_bytes: u64,
    /// Frames that were malformed, or that the tap refused.
    pub egress_dropped: u64,
}

/// What passed over vsock, by which the agent in the guest is spoken to. Bytes are those of connections.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct VsockStats {
    /// Connections that were made, by either side.
    pub connections: u64,
    /// Those of them that there are now.
    pub open: u64,
    /// Connections that the guest asked for in vain.
    pub refused: u64,
    pub ingress_packets: u64,
    pub ingress_bytes: u64,
    pub egress_packets: u64,
    pub egress_bytes: u64,
}

/// What the entropy device gave.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct RngStats {
    pub requests: u64,
    pub bytes: u64,
}

/// Memory that a guest can plug in beside what it had from the start.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct MemStats {
    /// What there is to plug in.
    pub size_bytes: u64,
    /// What the guest was asked to have plugged in.
    pub requested_bytes: u64,
    /// What it has plugged in.
    pub plugged_bytes: u64,
}
