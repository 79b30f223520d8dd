//! The wire form of a machine: what `hostd-vmm --config FILE.json` reads. Data only; the checks are
//! in `plan`.
//!
//! Wherever a path stands, `fd:N` means the inherited descriptor N, so that a VMM can run in an
//! empty root with nothing but what it was handed. Each can be named once, but for the standard
//! streams, of which the VMM keeps a duplicate for itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A machine as asked for.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// `/dev/kvm` if absent.
    #[serde(default)]
    pub kvm: Option<PathBuf>,
    pub boot: Boot,
    #[serde(default)]
    pub cpus: Cpus,
    #[serde(default)]
    pub memory: Memory,
    #[serde(default)]
    pub disks: Vec<Disk>,
    #[serde(default)]
    pub nets: Vec<Net>,
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// How the guest finds its devices.
    #[serde(default)]
    pub transport: Transport,
    /// virtio-rng is there unless this is false.
    #[serde(default = "yes")]
    pub rng: bool,
    /// A balloon with reports of free pages is there unless this is null.
    #[serde(default = "balloon")]
    pub balloon: Option<Balloon>,
    /// Files that the guest sees as memory, and shares with all machines that have the same ones.
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    /// The first serial port. Without it, what the guest writes there is dropped.
    #[serde(default)]
    pub console: Option<Console>,
    /// Where to listen for control requests: a path, or `fd:N` of a listening socket.
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// Where to write, at the end, why the machine ended (`control::ExitStatus` as JSON).
    #[serde(default)]
    pub exit_status: Option<PathBuf>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// A bzImage or an ELF vmlinux.
    pub kernel: PathBuf,
    /// One archive, or several that are laid end to end in memory (each padded to 4 bytes).
    #[serde(default)]
    pub initramfs: Option<OneOrMany>,
    /// At most 2047 bytes with what the VMM appends.
    #[serde(default)]
    pub cmdline: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Cpus {
    /// 1 to 32.
    pub count: u8,
    /// What guests see of the host's processor.
    #[serde(default)]
    pub template: CpuTemplate,
    /// The guest may run machines of its own, with the template `host` on a host that allows it. There
    /// are no snapshots of such a machine.
    #[serde(default)]
    pub nested: bool,
}

impl Default for Cpus {
    fn default() -> Self {
        Self {
            count: 1,
            template: CpuTemplate::Host,
            nested: false,
        }
    }
}

/// A set of processor features. What the host does not have of it is left out with a warning.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum CpuTemplate {
    /// All that KVM offers on this host.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// Every server since about 2009: up to SSE4.2 and POPCNT.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// Every server since about 2015: AVX2, BMI2, FMA, AES, SMEP and SMAP as well.
    #[serde(rename = "x86-64-v3")]
    V3,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// What there is from the start, at least 16.
    pub size_mib: u64,
    /// How much there can be once more is plugged in, at least `size_mib`; as much as that, and no
    /// device for it, if absent.
    #[serde(default)]
    pub max_mib: Option<u64>,
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Track what the guest writes, which diff snapshots need, and which makes its memory slower.
    #[serde(default)]
    pub track_dirty: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            size_mib: 128,
            max_mib: None,
            huge_pages: HugePages::default(),
            track_dirty: false,
        }
    }
}

/// How a guest finds its virtio devices and speaks to them.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// By registers in memory, where the ACPI tables and the kernel's command line say.
    #[default]
    Mmio,
    /// As functions of a PCI bus, which interrupt by messages (MSI-X).
    Pci,
}

/// In what pages the host keeps the guest's memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    /// In huge ones where the host finds some, and in small ones elsewhere.
    #[default]
    Transparent,
    /// In pages of 2 MiB that the host's administrator has set aside, and in no others. They are
    /// reserved for the machine from the start, and nothing comes back before its end.
    Hugetlbfs,
    /// In small ones.
    None,
}

/// A disk; its size is rounded down to sectors of 512 bytes.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub path: PathBuf,
    /// Of the file at `path`. It is never guessed.
    #[serde(default)]
    pub format: DiskFormat,
    /// The images that a qcow2 one refers to, of which each refers to the next. All must be named:
    /// what an image says of others is not believed.
    #[serde(default)]
    pub backing: Vec<Backing>,
    #[serde(default)]
    pub read_only: bool,
    /// At most 20 bytes, what the guest sees as the disk's serial number.
    #[serde(default)]
    pub serial: Option<String>,
    #[serde(default)]
    pub limits: DiskLimits,
}

/// What a file of a disk holds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The disk's sectors, or it is a block device.
    #[default]
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// A file that a disk's image refers to; it is only read.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Backing {
    pub path: PathBuf,
    #[serde(default)]
    pub format: DiskFormat,
}

/// Token buckets of a disk; an absent limit is none, and none is 0. Bytes or operations per second;
/// flushes, discards and zeroes are operations that write.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    #[serde(default)]
    pub read_bps: Option<u64>,
    #[serde(default)]
    pub write_bps: Option<u64>,
    #[serde(default)]
    pub read_iops: Option<u64>,
    #[serde(default)]
    pub write_iops: Option<u64>,
}

impl DiskLimits {
    /// The name of a limit that lets nothing through, if there is one.
    pub fn zero(&self) -> Option<&'static str> {
        let limits = [
            ("read_bps", self.read_bps),
            ("write_bps", self.write_bps),
            ("read_iops", self.read_iops),
            ("write_iops", self.write_iops),
        ];
        let zero = limits.into_iter().find(|(_, limit)| *limit == Some(0));
        zero.map(|(name, _)| name)
    }
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The name of a tap interface, or `fd:N` of one opened with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
    pub tap: String,
    /// `02:00:00:00:00:01`; made up from the position if absent.
    #[serde(default)]
    pub mac: Option<String>,
    /// The largest packet that the guest is to send, in bytes, 68 or more; the guest's to choose if
    /// absent. That the tap takes as much is somebody else's care.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// `/dev/vhost-net`, or `fd:N` of it: the host's kernel serves the queues, and the guest speaks to
    /// more of it. The VMM itself if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<PathBuf>,
    #[serde(default)]
    pub limits: NetLimits,
}

/// Token buckets of a network interface; an absent limit is none. Bytes, without virtio's headers, or
/// frames per second. A frame that the host's stack cuts into packets of the wire counts as one.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetLimits {
    /// What the guest receives.
    #[serde(default)]
    pub receive_bps: Option<u64>,
    #[serde(default)]
    pub receive_pps: Option<u64>,
    /// What the guest sends.
    #[serde(default)]
    pub send_bps: Option<u64>,
    #[serde(default)]
    pub send_pps: Option<u64>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// The unix socket for host-initiated connections: the client sends `CONNECT PORT\n` and is
    /// answered `OK HOST_PORT\n`. Guest-initiated connections to port P go to `PATH_P`; there are
    /// none if this is `fd:N` of a listening socket.
    pub path: PathBuf,
    /// Guest-initiated connections that end at a descriptor instead of a socket.
    #[serde(default)]
    pub streams: Vec<VsockStream>,
}

/// A guest's connection to `port` of CID 2 is joined to one descriptor.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockStream {
    /// Not that of `guest_status`.
    pub port: u32,
    /// `fd:N` or a path.
    pub path: PathBuf,
    pub direction: StreamDirection,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamDirection {
    /// What is read from the descriptor goes to the guest; end of file shuts the connection down.
    ToGuest,
    /// What the guest sends is written to the descriptor; a guest that shuts down its side is
    /// answered with a reset once all has been written.
    FromGuest,
}

/// A file as memory (virtio-pmem). What the guest writes there is its own, and gone with it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Must not become shorter while the machine runs.
    pub path: PathBuf,
}

/// How the guest gives memory back.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// How much the guest is asked to give up from the start, at most `Memory::size_mib`.
    #[serde(default)]
    pub target_mib: u64,
    /// A guest that is short of memory takes some out of the balloon instead of killing processes.
    #[serde(default = "yes")]
    pub deflate_on_oom: bool,
    /// The guest tells which memory it does not use, and the host takes it until it is used again.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
}

impl Default for Balloon {
    fn default() -> Self {
        Self {
            target_mib: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
        }
    }
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ConsoleTarget {
    /// A file that the output is appended to, up to `control::CONSOLE_BYTES_MAX`.
    Path(PathBuf),
}

/// `{"path": FILE}` or `"stdio"`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Console {
    Target(ConsoleTarget),
    /// Only `stdio` is allowed: the VMM's own standard input and output.
    Name(String),
}

fn yes() -> bool {
    true
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn balloon() -> Option<Balloon> {
    Some(Balloon::default())
}
