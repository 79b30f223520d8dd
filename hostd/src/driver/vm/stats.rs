//! What a VM uses: what the host's kernel counts, and what its VMM tells.
//!
//! A guest that has taken its VMM over tells what it likes. So its numbers stand in a part of their own,
//! nothing is decided by them, there are no more of them than of what hostd gave the machine, and names
//! of devices are letters and digits.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use agent::protocol::{self, Request as GuestRequest};
use nix::unistd::Pid;
use tokio::join;
use vmm::control::{self as told, Request as MachineRequest, Response as MachineResponse};
use vmm::plan::CPUS_MAX;
use vmm::vcpu::{VcpuTimes, thread_name};

use super::{VmDriver, control, machine};
use crate::api::types::{
    BalloonStats, DeviceStats, DiskStats, GuestMemoryStats, InstanceState, MemStats, NetStats,
    RngStats, Stats, VcpuExits, VcpuStats, VmMemoryStats, VmStats, VsockStats,
};
use crate::driver::DriverError;
use crate::store::Record;

/// More than a machine has places for.
const DEVICES_MAX: usize = 32;

/// No device of ours has a longer name.
const DEVICE_NAME_BYTES_MAX: usize = 16;

/// Threads that are looked at: more than the control group lets a VMM have.
const THREADS_MAX: usize = 256;

impl VmDriver {
    /// The host sees the whole VMM; what its devices do the VMM knows, and how many processes the
    /// workload has only the guest.
    pub(super) async fn count(&self, record: &Record) -> Result<Stats, DriverError> {
        let mut stats = self.engine.stats(record).await?;
        stats.pids_limit = record.instance.spec.limits.pids.max.map(u64::from);
        let (vm, pids) = join!(self.vm_stats(record), self.guest_pids(record));
        match vm {
            Ok(vm) => stats.vm = Some(vm),
            Err(error) => tracing::debug!(
                name = record.instance.name,
                error = crate::driver::chain(&error),
                "the VMM tells nothing of itself"
            ),
        }
        stats.pids = pids.unwrap_or(stats.pids);
        Ok(stats)
    }

    /// A paused guest cannot answer.
    async fn guest_pids(&self, record: &Record) -> Option<u64> {
        if record.instance.state != InstanceState::Running {
            return None;
        }
        match self.ask_guest(record, &GuestRequest::Stats {}).await {
            Ok(protocol::Response::Stats { pids, .. }) => Some(pids),
            Ok(_) | Err(_) => None,
        }
    }

    async fn vm_stats(&self, record: &Record) -> Result<VmStats, DriverError> {
        let told = self.machine_stats(record).await?;
        let vcpus = usize::from(self.running(record)?.cpus.count).min(CPUS_MAX.into());
        let name = &record.instance.name;
        let times = self
            .engine
            .with_cgroup(name, "reading its threads", move |cgroup| {
                let pids = cgroup.pids()?;
                Ok(vcpu_times(Path::new("/proc"), &pids, vcpus))
            });
        Ok(vm_stats(told, &times.await?))
    }

    /// What the machine tells of itself.
    pub(super) async fn machine_stats(&self, record: &Record) -> Result<told::Stats, DriverError> {
        let socket = machine::control_socket(&self.run(record));
        let answer = control::ask(&socket, &MachineRequest::Stats {}).await?;
        let MachineResponse::Stats { stats } = answer else {
            return Err(control::unexpected(&answer));
        };
        Ok(*stats)
    }
}

/// Where the time of each virtual processor went, by its thread's name, if the kernel tells. The jail
/// of the VMM has no `/proc`, so that it cannot know by itself.
fn vcpu_times(proc: &Path, pids: &[Pid], vcpus: usize) -> Vec<Option<VcpuTimes>> {
    let names: Vec<String> = (0..=u8::MAX).take(vcpus).map(thread_name).collect();
    let mut times = vec![None; names.len()];
    let tasks = pids
        .iter()
        .filter_map(|pid| fs::read_dir(proc.join(format!("{pid}/task"))).ok());
    for task in tasks.flatten().flatten().take(THREADS_MAX) {
        let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        // It may have ended meanwhile, and then has no name.
        let name = read("comm");
        let number = names.iter().position(|wanted| wanted == name.trim_end());
        if let Some(time) = number.and_then(|number| times.get_mut(number)) {
            *time = time.or_else(|| VcpuTimes::parse(&read("schedstat")));
        }
    }
    times
}

/// What the machine told, with the times of as many processors as it has.
fn vm_stats(told: told::Stats, times: &[Option<VcpuTimes>]) -> VmStats {
    let reasons = told.vcpu_exit_reasons.into_iter().map(Some);
    let totals = told.vcpu_exits.into_iter().map(Some);
    let exits = totals.chain([None].into_iter().cycle());
    let exits = exits.zip(reasons.chain([None].into_iter().cycle()));
    VmStats {
        vcpus: times
            .iter()
            .zip(exits)
            .map(|(times, (total, reasons))| vcpu(*times, total, reasons))
            .collect(),
        memory: VmMemoryStats {
            size_bytes: told.memory.size_bytes,
            requested_bytes: told.memory.requested_bytes,
            max_bytes: told.memory.most_bytes,
        },
        balloon: told.balloon.map(|balloon| BalloonStats {
            target_bytes: balloon.target_bytes,
            actual_bytes: balloon.actual_bytes,
            reported_bytes: balloon.reported_bytes,
            guest: balloon.guest.map(|guest| guest_memory(&guest)),
        }),
        devices: Details {
            disks: told.disks.into_iter(),
            nets: told.nets.into_iter(),
            vsock: told.vsock,
            rng: told.rng,
            mem: told.mem,
        }
        .of(told.devices),
    }
}

fn vcpu(
    times: Option<VcpuTimes>,
    total: Option<u64>,
    reasons: Option<told::VcpuExits>,
) -> VcpuStats {
    let us = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let reasons = reasons.unwrap_or_default();
    VcpuStats {
        run_us: times.map(|times| us(times.ran)),
        steal_us: times.map(|times| us(times.waited)),
        exits: VcpuExits {
            total: total.unwrap_or_default(),
            port_reads: reasons.port_reads,
            port_writes: reasons.port_writes,
            mmio_reads: reasons.memory_reads,
            mmio_writes: reasons.memory_writes,
            interruptions: reasons.interruptions,
        },
    }
}

fn guest_memory(guest: &told::GuestMemory) -> GuestMemoryStats {
    GuestMemoryStats {
        age_ms: guest.age_ms,
        total_bytes: guest.total_bytes,
        free_bytes: guest.free_bytes,
        available_bytes: guest.available_bytes,
        caches_bytes: guest.caches_bytes,
        swapped_in_bytes: guest.swapped_in_bytes,
        swapped_out_bytes: guest.swapped_out_bytes,
        major_faults: guest.major_faults,
        minor_faults: guest.minor_faults,
        oom_kills: guest.oom_kills,
    }
}

/// What there is to tell of devices beside what all of them have: those of a type in their order.
struct Details<D, N> {
    disks: D,
    nets: N,
    vsock: Option<told::VsockStats>,
    rng: Option<told::RngStats>,
    mem: Option<told::MemStats>,
}

impl<D, N> Details<D, N>
where
    D: Iterator<Item = told::DiskStats>,
    N: Iterator<Item = told::NetStats>,
{
    /// The devices by their names. Names that no machine of ours has are left out.
    fn of(mut self, devices: Vec<told::DeviceStats>) -> BTreeMap<String, DeviceStats> {
        let devices = devices.into_iter().take(DEVICES_MAX);
        let named = devices.filter_map(|device| {
            let kind = kind_of(&device.name)?;
            let stats = DeviceStats {
                kicks: device.kicks,
                interrupts: device.interrupts,
                failures: device.failures,
                ..self.detail(kind)
            };
            Some((device.name, stats))
        });
        named.collect()
    }

    fn detail(&mut self, kind: &str) -> DeviceStats {
        let mut stats = DeviceStats::default();
        match kind {
            "disk" => stats.disk = self.disks.next().map(disk),
            "net" => stats.net = self.nets.next().map(net),
            "vsock" => stats.vsock = self.vsock.map(vsock),
            "rng" => {
                stats.rng = self.rng.map(|rng| RngStats {
                    requests: rng.requests,
                    bytes: rng.bytes,
                });
            }
            "mem" => {
                stats.mem = self.mem.map(|mem| MemStats {
                    size_bytes: mem.size_bytes,
                    requested_bytes: mem.requested_bytes,
                    plugged_bytes: mem.plugged_bytes,
                });
            }
            _ => {}
        }
        stats
    }
}

/// The name of a device without its number; `None` if it is none.
fn kind_of(name: &str) -> Option<&str> {
    let kind = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let letters = !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_lowercase());
    (letters && name.len() <= DEVICE_NAME_BYTES_MAX).then_some(kind)
}

fn disk(told: told::DiskStats) -> DiskStats {
    DiskStats {
        read_ops: told.reads,
        read_bytes: told.read_bytes,
        write_ops: told.writes,
        write_bytes: told.written_bytes,
        flush_ops: told.flushes,
        discard_ops: told.zeroes,
        failed_ops: told.failures,
        throttled_ops: told.throttled,
    }
}

fn net(told: told::NetStats) -> NetStats {
    NetStats {
        ingress_packets: told.received_frames,
        ingress_bytes: told.received_bytes,
        ingress_dropped: told.received_dropped,
        egress_packets: told.sent_frames,
        egress_bytes: told.sent_bytes,
        egress_dropped: told.sent_dropped,
    }
}

fn vsock(told: told::VsockStats) -> VsockStats {
    VsockStats {
        connections: told.connections,
        open: told.open,
        refused: told.refused,
        ingress_packets: told.received_packets,
        ingress_bytes: told.received_bytes,
        egress_packets: told.sent_packets,
        egress_bytes: told.sent_bytes,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;

    fn device(name: &str, kicks: u64) -> told::DeviceStats {
        told::DeviceStats {
            name: name.to_owned(),
            kicks,
            ..told::DeviceStats::default()
        }
    }

    #[test]
    fn what_a_machine_tells_is_by_processor_and_device() {
        let read = |reads| told::DiskStats {
            reads,
            ..told::DiskStats::default()
        };
        let exits = told::VcpuExits {
            memory_writes: 5,
            ..told::VcpuExits::default()
        };
        let mem = told::MemStats {
            plugged_bytes: 2 << 20,
            ..told::MemStats::default()
        };
        let told = told::Stats {
            vcpu_exits: vec![7, 9],
            vcpu_exit_reasons: vec![exits],
            devices: vec![device("disk0", 1), device("disk1", 2), device("mem", 3)],
            disks: vec![read(10), read(20)],
            mem: Some(mem),
            ..told::Stats::default()
        };
        let times = VcpuTimes {
            ran: Duration::from_micros(30),
            waited: Duration::from_nanos(4999),
        };
        let stats = vm_stats(told, &[Some(times), None]);
        let [one, other] = [stats.vcpus[0], stats.vcpus[1]];
        assert_eq!((one.run_us, one.steal_us), (Some(30), Some(4)));
        assert_eq!((one.exits.total, one.exits.mmio_writes), (7, 5));
        assert_eq!((other.run_us, other.exits.total), (None, 9));
        let reads = |name: &str| stats.devices[name].disk.map(|disk| disk.read_ops);
        assert_eq!((reads("disk0"), reads("disk1")), (Some(10), Some(20)));
        assert_eq!((reads("mem"), stats.devices["disk1"].kicks), (None, 2));
        let mem = stats.devices["mem"].mem.map(|mem| mem.plugged_bytes);
        assert_eq!(mem, Some(2 << 20));
    }

    #[test]
    fn a_machine_that_lies_has_no_more_than_it_was_given() {
        let lies = told::Stats {
            vcpu_exits: vec![u64::MAX; 5000],
            devices: (0..5000)
                .map(|number| device(&format!("disk{number}"), u64::MAX))
                .collect(),
            disks: vec![told::DiskStats::default()],
            ..told::Stats::default()
        };
        let stats = vm_stats(lies, &[None]);
        assert_eq!(stats.vcpus.len(), 1);
        assert_eq!(stats.devices.len(), DEVICES_MAX);
        assert_eq!(stats.devices["disk1"].disk, None);
    }

    #[test]
    fn only_names_of_devices_are_names_of_devices() {
        let long = "d".repeat(DEVICE_NAME_BYTES_MAX + 1);
        for (name, kind) in [
            ("disk0", Some("disk")),
            ("net31", Some("net")),
            ("balloon", Some("balloon")),
            ("", None),
            ("7", None),
            ("disk0\"} 1\nother", None),
            ("d\u{1b}[2J", None),
            ("Disk0", None),
            (long.as_str(), None),
        ] {
            assert_eq!(kind_of(name), kind, "{name}");
        }
    }

    #[test]
    fn times_are_those_of_the_threads_that_are_processors() {
        let proc = TempDir::new().unwrap();
        for (thread, name, schedstat) in [
            (10, "hostd-vmm\n", "1000 1000 1\n"),
            (11, "vcpu0\n", "5000000 2000 7\n"),
            (12, "vcpu1\n", "0 0 0\n"),
            (13, "vcpu7\n", "9000 9000 9\n"),
        ] {
            let task = proc.path().join(format!("10/task/{thread}"));
            fs::create_dir_all(&task).unwrap();
            fs::write(task.join("comm"), name).unwrap();
            fs::write(task.join("schedstat"), schedstat).unwrap();
        }
        let pids = [Pid::from_raw(10), Pid::from_raw(99)];
        let first = VcpuTimes {
            ran: Duration::from_millis(5),
            waited: Duration::from_micros(2),
        };
        // A kernel that does not count says so by zeroes.
        let times = vcpu_times(proc.path(), &pids, 3);
        assert_eq!(times, [Some(first), None, None]);
    }
}
