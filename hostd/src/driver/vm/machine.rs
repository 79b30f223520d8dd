//! A VM's machine: what its VMM is given, and the walls around it. Pure.
//!
//! The VMM lives in an empty root and opens nothing: every file, device and socket reaches it as a
//! descriptor that the monitor opened before the walls went up.

use std::path::PathBuf;

use agent::protocol::{KERNEL_ARGUMENTS, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use container::monitor::protocol::Descriptor;
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};
use vmm::spec::{
    Balloon, Boot, Console, ConsoleTarget, Cpus, Disk, DiskFormat, DiskLimits, Memory, Net,
    NetLimits, OneOrMany, Spec, StreamDirection, Transport, Vsock, VsockStream,
};
use vmm::virtio::mem::BLOCK_BYTES;

use crate::api::types::{self, Limits};
use crate::limits::{self, MIB};

/// Serial numbers by which the agent tells the disks apart.
pub(super) const IMAGE_SERIAL: &str = "image";
pub(super) const WRITABLE_SERIAL: &str = "writable";

/// The position of the writable disk among the machine's disks.
pub(super) const WRITABLE_DISK: usize = 1;

/// No two machines of a host share a kernel's vsock, so that all guests can have the same address.
const GUEST_CID: u32 = 3;

/// The first descriptor after the standard streams.
const DESCRIPTOR_FIRST: usize = 3;

/// Threads of a VMM beside its virtual processors'.
const VMM_THREADS_MAX: u32 = 32;

/// Users of the host under which VMMs run, one each.
const UID_FIRST: u32 = 900_000;

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    /// The instance's own segment, with the agent's configuration.
    pub(super) segment: PathBuf,
    pub(super) image: PathBuf,
    pub(super) writable: PathBuf,
    /// A tap and the guest's hardware address.
    pub(super) net: Option<(String, String)>,
    /// The run directory, for sockets and what the VMM writes.
    pub(super) run: PathBuf,
}

/// Sockets and files of a run.
pub(super) fn control_socket(run: &std::path::Path) -> PathBuf {
    run.join("vmm.sock")
}

pub(super) fn agent_socket(run: &std::path::Path) -> PathBuf {
    run.join("vsock.sock")
}

pub(super) fn machine_file(run: &std::path::Path) -> PathBuf {
    run.join("vmm.json")
}

pub(super) fn console_file(run: &std::path::Path) -> PathBuf {
    run.join("console.log")
}

pub(super) fn exit_file(run: &std::path::Path) -> PathBuf {
    run.join("vmm-exit.json")
}

/// The user that the VMM of the instance with this index runs as.
pub(super) fn uid(index: u32) -> u32 {
    UID_FIRST.saturating_add(index)
}

/// Descriptors in the order in which they are numbered.
#[derive(Default)]
pub(super) struct Descriptors(Vec<Descriptor>);

impl Descriptors {
    /// Adds one; returns the path by which the VMM knows it.
    fn add(&mut self, descriptor: Descriptor) -> PathBuf {
        self.0.push(descriptor);
        format!("fd:{}", DESCRIPTOR_FIRST + self.0.len() - 1).into()
    }

    pub(super) fn file(&mut self, path: impl Into<PathBuf>, write: bool) -> PathBuf {
        self.add(Descriptor::File {
            path: path.into(),
            write,
        })
    }

    /// Has another one take the place of the first, which is what the VMM reads first.
    pub(super) fn replace_first(&mut self, descriptor: Descriptor) {
        if let Some(first) = self.0.first_mut() {
            *first = descriptor;
        }
    }

    pub(super) fn into_inner(self) -> Vec<Descriptor> {
        self.0
    }
}

/// The machine, and the descriptors that it names. The first descriptor is to be the machine's own
/// description. With time it can have up to `host_memory_bytes`, of which it pays for what it uses.
pub(super) fn machine(
    parts: Parts,
    limits: &Limits,
    host_memory_bytes: u64,
) -> (Spec, Descriptors) {
    let mut fds = Descriptors::default();
    fds.file(machine_file(&parts.run), false);
    let memory = memory_bytes(limits);
    let spec = Spec {
        transport: Transport::default(),
        kvm: Some(fds.file("/dev/kvm", true)),
        boot: Boot {
            kernel: fds.file(parts.kernel, false),
            initramfs: Some(OneOrMany::Many(vec![
                fds.file(parts.initramfs, false),
                fds.file(parts.segment, false),
            ])),
            cmdline: KERNEL_ARGUMENTS.to_owned(),
        },
        cpus: Cpus {
            count: limits::vcpu_count(limits),
            ..Cpus::default()
        },
        memory: Memory {
            size_mib: memory / MIB,
            max_mib: Some((memory + whole_blocks(host_memory_bytes.saturating_sub(memory))) / MIB),
            ..Memory::default()
        },
        disks: disks(&mut fds, parts.image, parts.writable, &limits.disk),
        nets: parts
            .net
            .into_iter()
            .map(|(name, mac)| Net {
                tap: fds.add(Descriptor::Tap { name }).display().to_string(),
                mac: Some(mac),
                mtu: None,
                vhost: None,
                limits: NetLimits::default(),
            })
            .collect(),
        vsock: Some(Vsock {
            cid: GUEST_CID,
            path: fds.add(Descriptor::Listener {
                path: agent_socket(&parts.run),
            }),
            streams: streams(),
        }),
        rng: true,
        balloon: Some(Balloon::default()),
        pmem: Vec::new(),
        console: Some(Console::Target(ConsoleTarget::Path(fds.add(
            Descriptor::Create {
                path: console_file(&parts.run),
            },
        )))),
        control: Some(fds.add(Descriptor::Listener {
            path: control_socket(&parts.run),
        })),
        exit_status: Some(fds.add(Descriptor::Create {
            path: exit_file(&parts.run),
        })),
    };
    (spec, fds)
}

/// The image, and the disk on which the instance writes, in the order that [`WRITABLE_DISK`] counts in.
fn disks(
    fds: &mut Descriptors,
    image: PathBuf,
    writable: PathBuf,
    limits: &types::DiskLimits,
) -> Vec<Disk> {
    vec![
        Disk {
            path: fds.file(image, false),
            format: DiskFormat::Raw,
            backing: Vec::new(),
            read_only: true,
            serial: Some(IMAGE_SERIAL.to_owned()),
            limits: DiskLimits::default(),
        },
        Disk {
            path: fds.file(writable, true),
            format: DiskFormat::Raw,
            backing: Vec::new(),
            read_only: false,
            serial: Some(WRITABLE_SERIAL.to_owned()),
            limits: disk_limits(limits),
        },
    ]
}

/// The workload's standard streams are the VMM's own, so that its monitor has them.
fn streams() -> Vec<VsockStream> {
    [
        (STDIN_PORT, 0, StreamDirection::ToGuest),
        (STDOUT_PORT, 1, StreamDirection::FromGuest),
        (STDERR_PORT, 2, StreamDirection::FromGuest),
    ]
    .into_iter()
    .map(|(port, fd, direction)| VsockStream {
        port,
        path: format!("fd:{fd}").into(),
        direction,
    })
    .collect()
}

/// The guest's memory, in whole MiB.
pub(super) fn memory_bytes(limits: &Limits) -> u64 {
    let wanted = limits.memory.max.unwrap_or(super::MEMORY_DEFAULT_BYTES);
    wanted / MIB * MIB
}

pub(super) fn disk_limits(limits: &types::DiskLimits) -> DiskLimits {
    DiskLimits {
        read_bps: limits.read_bps,
        write_bps: limits.write_bps,
        read_iops: limits.read_iops,
        write_iops: limits.write_iops,
    }
}

/// The guest's memory as near as the machine that runs can come to it: more is plugged in by blocks.
pub(super) fn reachable_memory_bytes(running: &Spec, limits: &Limits) -> u64 {
    let (at_start, wanted) = (running.memory.size_mib * MIB, memory_bytes(limits));
    match wanted.checked_sub(at_start) {
        Some(more) => at_start + whole_blocks(more),
        None => wanted,
    }
}

fn whole_blocks(bytes: u64) -> u64 {
    bytes / BLOCK_BYTES * BLOCK_BYTES
}

/// The limits on the cgroup of a VMM with `vcpus`, whose number cannot change while it runs, and with
/// `memory` bytes for the guest.
pub(super) fn cgroup_limits(limits: &Limits, vcpus: u8, memory: u64) -> Limits {
    let mut limits = limits.clone();
    limits.memory.max = Some(memory);
    // The workload's own processes are counted in the guest.
    limits.pids.max = Some(u32::from(vcpus) + VMM_THREADS_MAX);
    // The device itself keeps the rates of the disk.
    limits.disk = types::DiskLimits::default();
    limits
}

/// The `config.json` of the VMM's container.
pub(super) fn config(uid: u32, cgroup_path: &str, resources: &LinuxResources) -> Value {
    let mut resources =
        serde_json::to_value(resources).expect("resources have only string keys and plain values");
    // It gets /dev/kvm as a descriptor; KVM itself asks no more.
    resources["devices"] = json!([{"allow": false, "access": "rwm"}]);
    json!({
        "ociVersion": "1.2.0",
        "hostname": "vmm",
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "user": {"uid": uid, "gid": uid},
            "args": ["hostd-vmm", "--config", format!("fd:{DESCRIPTOR_FIRST}")],
            "env": [],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": true,
        },
        "mounts": [],
        "linux": {
            "cgroupsPath": cgroup_path,
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"},
                {"type": "network"}, {"type": "cgroup"},
            ],
            "resources": resources,
        },
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime;

    use super::*;

    fn parts() -> Parts {
        Parts {
            kernel: "/guest/kernel".into(),
            initramfs: "/guest/initramfs.cpio".into(),
            segment: "/run/segment.cpio".into(),
            image: "/images/disk".into(),
            writable: "/state/disk".into(),
            net: Some(("tap0".to_owned(), "02:00:00:00:00:01".to_owned())),
            run: "/run".into(),
        }
    }

    #[test]
    fn every_descriptor_is_named_once_and_in_order() {
        let (spec, descriptors) = machine(parts(), &Limits::default(), 1 << 30);
        let descriptors = descriptors.into_inner();
        let text = serde_json::to_string(&spec).unwrap();
        for number in 1..descriptors.len() {
            let name = format!("\"fd:{}\"", DESCRIPTOR_FIRST + number);
            assert_eq!(text.matches(&name).count(), 1, "{name} in {text}");
        }
        let named = |path: &str| {
            let number: usize = path.strip_prefix("fd:").unwrap().parse().unwrap();
            descriptors[number - DESCRIPTOR_FIRST].clone()
        };
        let kernel = named(spec.boot.kernel.to_str().unwrap());
        let path = "/guest/kernel".into();
        assert_eq!(kernel, Descriptor::File { path, write: false });
        let name = "tap0".to_owned();
        assert_eq!(named(&spec.nets[0].tap), Descriptor::Tap { name });
        assert!(!spec.disks[1].read_only && spec.disks[0].read_only);
    }

    #[test]
    fn the_cgroup_counts_what_the_vmm_is_and_not_the_workload() {
        let mut limits = Limits::default();
        limits.memory.max = Some(512 * MIB);
        limits.pids.max = Some(5);
        let applied = cgroup_limits(&limits, 1, 256 * MIB);
        assert_eq!(applied.memory.max, Some(256 * MIB));
        assert_eq!(applied.pids.max, Some(1 + VMM_THREADS_MAX));
    }

    #[test]
    fn a_machine_grows_by_blocks_up_to_the_host_and_shrinks_by_mebibytes() {
        let of = |mib: u64| {
            let mut limits = Limits::default();
            limits.memory.max = Some(mib * MIB);
            limits
        };
        let (running, _) = machine(parts(), &of(255), 1 << 30);
        assert_eq!(running.memory.max_mib, Some(1023));
        for (wanted, reached) in [(255, 255), (256, 255), (258, 257), (1023, 1023), (100, 100)] {
            assert_eq!(
                reachable_memory_bytes(&running, &of(wanted)),
                reached * MIB,
                "{wanted}"
            );
        }
        let (full, _) = machine(parts(), &of(1024), 1 << 30);
        assert_eq!(full.memory.max_mib, Some(1024));
    }

    #[test]
    fn the_walls_are_ones_that_the_specification_knows() {
        let value = config(900_001, "/hostd/a", &LinuxResources::default());
        let spec: runtime::Spec = serde_json::from_value(value).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.user().uid(), 900_001);
        assert!(
            process
                .capabilities()
                .as_ref()
                .unwrap()
                .bounding()
                .is_none()
        );
    }
}
