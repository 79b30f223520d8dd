//! From what was asked for to what will be done: every number in range, every file open, every
//! address given. Nothing on the host is changed but for opened files.

mod disk;
mod handed;
mod memory;
mod opener;
mod places;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

pub use self::disk::{BACKING_FILES_MAX, DiskPlan, SERIAL_BYTES_MAX};
use self::opener::{Access, Opener};
pub use self::places::Places;
use crate::boot::{self, CmdlineError};
use crate::descriptors::DescriptorError;
use crate::devices::serial::Output;
use crate::memory::{Image, MemoryPlan};
use crate::snapshot::load::{LoadError, Loaded, OpenFiles, load};
use crate::snapshot::restore::{ClockPolicy, OverrideError, Restore};
use crate::snapshot::state::State;
use crate::spec::{Balloon, CpuTemplate, Cpus, Net, NetLimits, OneOrMany, Spec, Transport};
use crate::virtio::transport::Window;
use crate::virtio::vsock::HostStream;

/// The most processors: local APIC numbers fit in every table.
pub const CPUS_MAX: u8 = 32;
/// The least memory in MiB: below, not even a small kernel starts.
pub const MEMORY_MIB_MIN: u64 = 16;
/// The most memory in MiB: 4 TiB, which 42 bits of physical address reach.
pub const MEMORY_MIB_MAX: u64 = 4 << 20;
/// The largest image in MiB, for the same reason.
pub const IMAGE_MIB_MAX: u64 = 1 << 20;
/// The least MTU (virtio 1.2, section 5.1.4.1).
pub const MTU_MIN: u16 = 68;
/// The most initramfs files.
pub const INITRAMFS_FILES_MAX: usize = 16;
/// The least context id of a guest: those below have meanings of their own.
pub const CID_MIN: u32 = 3;

/// What is wrong with a specification. Each names the field as a JSON pointer.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("`{field}` is {found}; it must be {wanted}")]
    Range {
        field: String,
        found: String,
        wanted: String,
    },
    #[error("`{field}`: {remedy}")]
    File {
        field: String,
        remedy: &'static str,
        source: DescriptorError,
    },
    #[error("`{field}` is in use by another machine; stop that, or use a copy")]
    InUse { field: String },
    #[error("`{field}`: cannot be examined")]
    Examine { field: String, source: io::Error },
    #[error("{devices} virtio devices were asked for; at most {most} are possible")]
    Devices { devices: usize, most: usize },
    #[error("device {name:?} of the snapshot, number {number}, is not where a device can be")]
    Place { name: String, number: u32 },
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    #[error("`/snapshots`")]
    Snapshots(#[source] LoadError),
    #[error(transparent)]
    Override(#[from] OverrideError),
}

/// A machine as it will be.
#[derive(Debug)]
pub struct Plan {
    /// What was asked for.
    pub spec: Spec,
    pub kvm: File,
    pub origin: Origin,
    pub cpus: Cpus,
    pub memory: MemoryPlan,
    /// One for each virtio device, in the order disks, nets, vsock, rng, balloon, mem, pmem.
    pub windows: Vec<Window>,
    pub disks: Vec<DiskPlan>,
    pub nets: Vec<NetPlan>,
    pub vsock: Option<VsockPlan>,
    pub rng: bool,
    pub balloon: Option<Balloon>,
    pub images: Vec<Image>,
    pub console: ConsolePlan,
    pub control: Option<ListenPlan>,
    pub exit_status: Option<File>,
}

/// Where the machine comes from.
#[derive(Debug)]
pub enum Origin {
    Kernel(KernelPlan),
    Snapshot(SnapshotPlan),
}

/// A machine that boots.
#[derive(Debug)]
pub struct KernelPlan {
    pub kernel: File,
    /// In the order in which they are laid end to end.
    pub initramfs: Vec<File>,
    /// With the devices' addresses.
    pub cmdline: String,
}

/// A machine that goes on.
#[derive(Debug)]
pub struct SnapshotPlan {
    pub loaded: Loaded,
    pub clock: ClockPolicy,
    /// It waits to be resumed.
    pub paused: bool,
}

/// A network interface.
#[derive(Debug)]
pub struct NetPlan {
    /// As in the machine's statistics.
    pub name: String,
    pub tap: TapPlan,
    pub mac: [u8; 6],
    pub mtu: Option<u16>,
    pub limits: NetLimits,
    /// /dev/vhost-net, if the kernel is to serve it.
    pub vhost: Option<File>,
}

/// Where frames go.
#[derive(Debug)]
pub enum TapPlan {
    /// An interface of this name.
    Name(String),
    /// One that is open.
    Open(OwnedFd),
}

/// A socket to listen on; it is made when the machine is.
#[derive(Debug)]
pub enum ListenPlan {
    Path(PathBuf),
    Open(UnixListener),
}

/// The vsock device.
#[derive(Debug)]
pub struct VsockPlan {
    pub cid: u32,
    pub listen: ListenPlan,
    pub streams: Vec<HostStream>,
}

/// The serial port's other end.
#[derive(Debug)]
pub struct ConsolePlan {
    pub output: Output,
    pub input: Option<File>,
}

impl Plan {
    /// Checks `spec` and opens what it names.
    pub fn new(spec: &Spec) -> Result<Plan, PlanError> {
        let places = Places::new(spec)?;
        let named = match spec.transport {
            Transport::Mmio => &places.windows[..],
            // A guest finds them by itself.
            Transport::Pci => &[],
        };
        let cmdline = boot::cmdline(&spec.boot.cmdline, named)?;
        let initramfs = initramfs_paths(spec)?;
        let mut open = Opener::default();
        let origin = Origin::Kernel(KernelPlan {
            kernel: open.file("/boot/kernel", &spec.boot.kernel, Access::Read)?,
            initramfs: open.each("/boot/initramfs", &initramfs, |open, field, path| {
                open.file(field, path, Access::Read)
            })?,
            cmdline,
        });
        Plan::with_origin(spec, places, origin, open)
    }

    /// Reads the snapshots that `restore` names, and opens what the machine in them needs.
    pub fn restore(restore: &Restore) -> Result<Plan, PlanError> {
        let mut open = Opener::default();
        let files = open.each("/snapshots", &restore.snapshots, |open, field, files| {
            let mut file = |name, path| open.file(&format!("{field}/{name}"), path, Access::Read);
            Ok(OpenFiles {
                state: file("state", &files.state)?,
                memory: file("memory", &files.memory)?,
            })
        })?;
        let loaded = load(files).map_err(PlanError::Snapshots)?;
        let places = Places::saved(&loaded.state)?;
        let spec = restore.apply(loaded.state.machine.clone(), &places)?;
        let origin = Origin::Snapshot(SnapshotPlan {
            loaded,
            clock: restore.clock,
            paused: restore.paused,
        });
        Plan::with_origin(&spec, places, origin, open)
    }

    /// The state that the machine is to go on from.
    pub fn saved(&self) -> Option<&State> {
        match &self.origin {
            Origin::Kernel(_) => None,
            Origin::Snapshot(snapshot) => Some(&snapshot.loaded.state),
        }
    }

    fn with_origin(
        spec: &Spec,
        places: Places,
        origin: Origin,
        mut open: Opener,
    ) -> Result<Plan, PlanError> {
        check_cpus(&spec.cpus)?;
        let memory = memory::plan(&spec.memory)?;
        if let Some(balloon) = spec.balloon {
            let size = spec.memory.size_mib;
            in_range("/balloon/target_mib", balloon.target_mib, 0, size)?;
        }
        let kvm = spec.kvm.as_deref().unwrap_or_else(|| Path::new("/dev/kvm"));
        Ok(Plan {
            spec: spec.clone(),
            kvm: open.file("/kvm", kvm, Access::Device)?,
            origin,
            cpus: spec.cpus.clone(),
            memory,
            disks: open.numbered("/disks", &places.disks, &spec.disks, Opener::disk)?,
            nets: {
                check_vhost(spec)?;
                open.numbered("/nets", &places.nets, &spec.nets, Opener::net)?
            },
            windows: places.windows,
            vsock: match &spec.vsock {
                Some(vsock) => Some(open.vsock(vsock)?),
                None => None,
            },
            rng: spec.rng,
            balloon: spec.balloon,
            images: open.images(&memory, &spec.pmem)?,
            console: open.console(spec.console.as_ref())?,
            control: match &spec.control {
                Some(path) => Some(open.listen("/control", path)?),
                None => None,
            },
            exit_status: match &spec.exit_status {
                Some(path) => Some(open.file("/exit_status", path, Access::Create)?),
                None => None,
            },
        })
    }
}

/// The kernel does not tell which pages it writes to for a network device, and lets everything through.
fn check_vhost(spec: &Spec) -> Result<(), PlanError> {
    let limited = |net: &Net| net.vhost.is_some() && net.limits != NetLimits::default();
    if let Some(index) = spec.nets.iter().position(limited) {
        let field = format!("/nets/{index}/limits");
        let wanted = "absent, or `vhost` be: the kernel lets everything through";
        return Err(range(&field, "set".to_owned(), wanted));
    }
    match spec.nets.iter().position(|net| net.vhost.is_some()) {
        Some(index) if spec.memory.track_dirty => {
            let wanted = "absent where `/memory/track_dirty` is true";
            Err(range(
                &format!("/nets/{index}/vhost"),
                "set".to_owned(),
                wanted,
            ))
        }
        _ => Ok(()),
    }
}

fn check_cpus(cpus: &Cpus) -> Result<(), PlanError> {
    in_range("/cpus/count", cpus.count, 1, CPUS_MAX)?;
    if cpus.nested && cpus.template != CpuTemplate::Host {
        let wanted = "absent: no template but `host` has virtualization";
        return Err(range("/cpus/nested", "true".to_owned(), wanted));
    }
    Ok(())
}

fn initramfs_paths(spec: &Spec) -> Result<Vec<PathBuf>, PlanError> {
    let paths = match &spec.boot.initramfs {
        None => Vec::new(),
        Some(OneOrMany::One(path)) => vec![path.clone()],
        Some(OneOrMany::Many(paths)) => paths.clone(),
    };
    let most = format!("at most {INITRAMFS_FILES_MAX} files");
    if paths.len() > INITRAMFS_FILES_MAX {
        let found = format!("{} files", paths.len());
        return Err(range("/boot/initramfs", found, most));
    }
    Ok(paths)
}

fn in_range<T>(field: &str, value: T, least: T, most: T) -> Result<T, PlanError>
where
    T: Copy + PartialOrd + std::fmt::Display,
{
    if least <= value && value <= most {
        Ok(value)
    } else {
        let wanted = format!("from {least} to {most}");
        Err(range(field, value.to_string(), wanted))
    }
}

fn range(field: &str, found: String, wanted: impl Into<String>) -> PlanError {
    PlanError::Range {
        field: field.to_owned(),
        found,
        wanted: wanted.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde_json::{Value, json};

    use super::*;
    use crate::layout;

    /// A specification that is all right, with one field changed.
    pub(super) fn plan(pointer: &str, value: Value) -> Result<Plan, PlanError> {
        let mut kernel = tempfile::NamedTempFile::new().unwrap();
        kernel.write_all(b"kernel").unwrap();
        let mut spec = json!({
            "kvm": "/dev/null",
            "boot": {"kernel": kernel.path(), "initramfs": null, "cmdline": ""},
            "cpus": {"count": 1},
            "memory": {"size_mib": 16},
            "disks": [{"path": kernel.path(), "serial": null}],
            "nets": [{"tap": "tap0", "mac": null, "mtu": 9000}],
            "vsock": {"cid": 3, "path": "/run/vsock", "streams": []},
            "rng": true,
            "balloon": {"target_mib": 0},
            "pmem": [],
            "console": null,
            "control": null,
        });
        *spec.pointer_mut(pointer).unwrap() = value;
        Plan::new(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn a_plan_has_an_address_for_each_device() {
        let plan = plan("/rng", json!(true)).unwrap();
        assert_eq!(plan.windows, [0, 1, 2, 3, 4].map(Window::nth));
        assert_eq!(plan.nets[0].mac, [2, 0, 0, 0, 0, 1]);
        let Origin::Kernel(kernel) = &plan.origin else {
            panic!("it boots");
        };
        assert_eq!(kernel.cmdline.matches("virtio_mmio.device=").count(), 5);
    }

    #[test]
    fn what_cannot_be_is_refused_by_field_and_with_a_remedy() {
        let long = "x".repeat(21);
        for (pointer, value, want) in [
            (
                "/cpus/count",
                json!(0),
                "`/cpus/count` is 0; it must be from 1 to 32",
            ),
            ("/cpus/count", json!(33), "`/cpus/count` is 33"),
            (
                "/memory/size_mib",
                json!(15),
                "`/memory/size_mib` is 15; it must be from 16",
            ),
            ("/memory/size_mib", json!(u64::MAX), "`/memory/size_mib`"),
            (
                "/boot/kernel",
                json!("/nowhere/vmlinuz"),
                "`/boot/kernel`: name a file",
            ),
            ("/boot/kernel", json!("fd:1000000"), "`/boot/kernel`"),
            (
                "/boot/initramfs",
                json!(["/nowhere/a"]),
                "`/boot/initramfs/0`",
            ),
            (
                "/boot/initramfs",
                json!(vec!["/dev/null"; 17]),
                "`/boot/initramfs` is 17 files",
            ),
            (
                "/boot/cmdline",
                json!("x".repeat(2048)),
                "`/boot/cmdline` takes",
            ),
            (
                "/disks/0/path",
                json!("/nowhere/disk"),
                "`/disks/0/path`: name a file",
            ),
            (
                "/disks/0/serial",
                json!(long),
                "`/disks/0/serial` is 21 bytes long",
            ),
            ("/nets/0/mac", json!("02:00:00:00:00"), "`/nets/0/mac`"),
            ("/nets/0/mac", json!("01:00:00:00:00:01"), "not a group's"),
            ("/nets/0/mac", json!("02:00:00:00:00:+1"), "`/nets/0/mac`"),
            ("/nets/0/tap", json!(""), "`/nets/0/tap`"),
            ("/nets/0/tap", json!("fd:x"), "`/nets/0/tap`"),
            (
                "/vsock/cid",
                json!(2),
                "`/vsock/cid` is 2; it must be from 3",
            ),
            ("/console", json!("tty"), "`/console` is \"tty\""),
            (
                "/console",
                json!({"path": "/nowhere/log"}),
                "`/console/path`",
            ),
            (
                "/kvm",
                json!("/nowhere/kvm"),
                "`/kvm`: load kvm_intel or kvm_amd",
            ),
        ] {
            let error = plan(pointer, value.clone()).unwrap_err().to_string();
            assert!(error.contains(want), "{value}: {error}");
        }
    }

    #[test]
    fn a_template_without_virtualization_cannot_have_machines_within() {
        let cpus = json!({"count": 1, "template": "x86-64-v3", "nested": true});
        let error = plan("/cpus", cpus).unwrap_err().to_string();
        assert!(error.contains("`/cpus/nested` is true"), "{error}");
        let plan = plan("/cpus", json!({"count": 1, "nested": true})).unwrap();
        assert!(plan.cpus.nested);
    }

    #[test]
    fn the_port_of_reports_is_the_machines_own() {
        let stream = json!({"port": 0x610, "path": "/dev/null", "direction": "from_guest"});
        let error = plan("/vsock/streams", json!([stream])).unwrap_err();
        let want = "`/vsock/streams/0/port` is 1552";
        assert!(error.to_string().starts_with(want), "{error}");
    }

    #[test]
    fn the_kernel_serves_a_network_if_it_can_and_all_writes_need_not_be_known() {
        let nowhere = json!([{"tap": "tap0", "vhost": "/nowhere/vhost"}]);
        let error = plan("/nets", nowhere).unwrap_err().to_string();
        assert!(
            error.starts_with("`/nets/0/vhost`: load vhost_net"),
            "{error}"
        );

        let nets = json!([{"tap": "tap0"}, {"tap": "tap1", "vhost": "/dev/null"}]);
        assert!(plan("/nets", nets.clone()).unwrap().nets[1].vhost.is_some());
        let mut spec = plan("/nets", nets).unwrap().spec;
        spec.memory.track_dirty = true;
        let error = check_vhost(&spec).unwrap_err().to_string();
        assert!(
            error.starts_with("`/nets/1/vhost` is set; it must be absent"),
            "{error}"
        );
        spec.nets[1].limits.send_bps = Some(1);
        let error = check_vhost(&spec).unwrap_err().to_string();
        assert!(error.starts_with("`/nets/1/limits` is set"), "{error}");
    }

    #[test]
    fn an_mtu_is_one_that_a_driver_accepts() {
        assert_eq!(
            plan("/nets/0/mtu", json!(68)).unwrap().nets[0].mtu,
            Some(68)
        );
        let error = plan("/nets/0/mtu", json!(67)).unwrap_err();
        let want = "`/nets/0/mtu` is 67; it must be from 68 to 65535";
        assert_eq!(error.to_string(), want);
    }

    #[test]
    fn a_balloon_is_no_larger_than_the_memory() {
        plan("/balloon/target_mib", json!(16)).unwrap();
        let error = plan("/balloon/target_mib", json!(17)).unwrap_err();
        let want = "`/balloon/target_mib` is 17; it must be from 0 to 16";
        assert_eq!(error.to_string(), want);
        assert_eq!(plan("/balloon", json!(null)).unwrap().windows.len(), 4);
    }

    #[test]
    fn there_are_no_more_devices_than_interrupt_lines() {
        let nets = |count| json!(vec![json!({"tap": "tap0"}); count]);
        plan("/nets", nets(layout::VIRTIO_DEVICES_MAX - 4)).unwrap();
        let error = plan("/nets", nets(layout::VIRTIO_DEVICES_MAX - 3)).unwrap_err();
        assert!(error.to_string().contains("19 virtio devices"), "{error}");
    }

    #[test]
    fn images_of_a_disk_are_named_one_by_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let top = tempfile::NamedTempFile::new().unwrap();
        let with_top = |format: &str, count| {
            let backing = vec![json!({"path": file.path(), "format": "qcow2"}); count];
            let disk = json!({"path": top.path(), "format": format, "backing": backing});
            plan("/disks", json!([disk]))
        };
        assert_eq!(with_top("qcow2", 2).unwrap().disks[0].backing.len(), 2);
        for (format, count, want) in [
            ("raw", 1, "`/disks/0/backing` is 1 files; it must be absent"),
            (
                "qcow2",
                17,
                "`/disks/0/backing` is 17 files; it must be at most 16",
            ),
        ] {
            let error = with_top(format, count).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn a_disk_that_another_machine_writes_is_refused() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        let disks = |read_only| json!([{"path": disk.path(), "read_only": read_only}]);
        let writer = plan("/disks", disks(false)).unwrap();
        for read_only in [false, true] {
            let error = plan("/disks", disks(read_only)).unwrap_err();
            assert!(
                error.to_string().contains("`/disks/0/path` is in use"),
                "{error}"
            );
        }
        drop(writer);
        let _readers =
            [plan("/disks", disks(true)), plan("/disks", disks(true))].map(Result::unwrap);
    }
}
