//! The parts of a machine that requests move.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::console::Console;
use super::memory::MemoryControls;
use super::{
    BalloonStats, DiskStats, ExitReason, ExitStatus, MachineState, MemStats, NetStats, Request,
    Response, Stats, VcpuExits, VcpuTimes,
};
use crate::devices::guest_status::Readiness;
use crate::exit::ExitSwitch;
use crate::hotplug::Hotplug;
use crate::inventory::{Handle, Made, SharedInventory, lock};
use crate::snapshot::file::Kind;
use crate::snapshot::thread::{Busy, Order, SnapshotThread};
use crate::spec::{DiskLimits, NetLimits};
use crate::vcpu::{self, Vcpus};
use crate::virtio::block::BlockHandle;
use crate::virtio::net::NetHandle;

/// The parts.
pub struct Controls {
    pub vcpus: Arc<Vcpus>,
    pub exit: ExitSwitch,
    pub readiness: Readiness,
    /// Its interrupt line.
    pub power_button: EventFd,
    pub inventory: SharedInventory,
    /// Absent without PCI.
    pub hotplug: Option<Hotplug>,
    pub memory: MemoryControls,
    /// Absent where there is nothing behind the controls.
    pub snapshots: Option<SnapshotThread>,
    /// Absent likewise.
    pub console: Option<Console>,
}

opaque_debug!(Controls);

/// What becomes of a request.
#[derive(Debug)]
pub enum Answer {
    Now(Box<Response>),
    /// [`Response::Done`], once the guest has said that it is ready.
    WhenReady,
    /// What [`SnapshotThread::take_result`] gives, once it does.
    WhenTaken,
    /// What becomes of the device that is being made.
    WhenAttached,
    /// [`Response::Done`], once the device with this ticket is no more.
    WhenDetached(u64),
    /// The connection becomes the console, with input or without.
    Console {
        input: bool,
    },
}

impl Answer {
    pub(super) fn now(response: Response) -> Answer {
        Answer::Now(Box::new(response))
    }
}

impl Controls {
    /// Does what `request` asks, with the `descriptors` that came with it or before.
    pub fn answer(&self, request: &Request, descriptors: &mut Vec<OwnedFd>) -> Answer {
        let done = Response::Done {};
        Answer::now(match request {
            Request::WaitReady {} if !self.readiness.get() => return Answer::WhenReady,
            Request::WaitReady {} => done,
            Request::State {} => self.state(),
            Request::PowerButton {} => {
                // A counter that is full has presses in it that the guest has not seen.
                let _ = self.power_button.write(1);
                done
            }
            Request::Pause {} => {
                self.vcpus.pause();
                done
            }
            Request::Resume {} if self.busy() => busy(),
            Request::Resume {} => {
                self.vcpus.resume();
                done
            }
            Request::Stats {} => Response::Stats {
                stats: Box::new(self.stats()),
            },
            Request::SetDiskLimits { disk, limits } => self.set_disk_limits(*disk, *limits),
            Request::SetNetLimits { net, limits } => self.set_net_limits(*net, *limits),
            Request::Memory { size_mib } => self.memory.resize(*size_mib),
            Request::Balloon { target_mib } => self.memory.inflate(*target_mib),
            Request::Snapshot { kind } => return self.snapshot(*kind, descriptors),
            Request::AttachDisk { disk } => {
                return self.attach(Made::Disk(disk.clone()), descriptors);
            }
            Request::AttachNet { net } => {
                return self.attach(Made::Net(net.clone()), descriptors);
            }
            Request::Detach { name, force } => return self.detach(name, *force),
            Request::Console { input } => return Answer::Console { input: *input },
            Request::Kill {} => {
                self.exit.end(ExitStatus::new(ExitReason::Killed));
                done
            }
        })
    }

    fn state(&self) -> Response {
        let state = if self.vcpus.paused() {
            MachineState::Paused
        } else {
            MachineState::Running
        };
        Response::State {
            state,
            ready: self.readiness.get(),
        }
    }

    /// Whether a snapshot is being written.
    fn busy(&self) -> bool {
        self.snapshots.as_ref().is_some_and(SnapshotThread::busy)
    }

    /// Descriptors are the request's, whatever becomes of it.
    fn attach(&self, made: Made, descriptors: &mut Vec<OwnedFd>) -> Answer {
        let descriptors = std::mem::take(descriptors);
        if self.busy() {
            return Answer::now(busy());
        }
        let Some(hotplug) = &self.hotplug else {
            return Answer::now(no_slots());
        };
        match hotplug.attach(made, descriptors) {
            Ok(()) => Answer::WhenAttached,
            Err(refused) => Answer::now(refusal(refused.to_string())),
        }
    }

    /// Not while a snapshot is being written, which has all devices that there were when it was begun.
    fn detach(&self, name: &str, force: bool) -> Answer {
        if self.busy() {
            return Answer::now(busy());
        }
        let Some(hotplug) = &self.hotplug else {
            return Answer::now(no_slots());
        };
        match hotplug.detach(name, force) {
            Ok(ticket) => Answer::WhenDetached(ticket),
            Err(refused) => Answer::now(refusal(refused.to_string())),
        }
    }

    fn snapshot(&self, kind: Kind, descriptors: &mut Vec<OwnedFd>) -> Answer {
        let mut files = descriptors.drain(..).map(File::from);
        let (Some(state), Some(memory)) = (files.next(), files.next()) else {
            return Answer::now(Response::Error {
                message: "send two descriptors with the request: the state file's and the memory \
                          file's; `hostd-vmm --snapshot` does"
                    .to_owned(),
            });
        };
        if self.hotplug.as_ref().is_some_and(Hotplug::busy) {
            return Answer::now(refusal("busy: a device is being attached".to_owned()));
        }
        let Some(thread) = &self.snapshots else {
            return Answer::now(Response::Error {
                message: "there is no machine".to_owned(),
            });
        };
        match thread.begin(Order {
            kind,
            state,
            memory,
        }) {
            Ok(()) => Answer::WhenTaken,
            Err(Busy) => Answer::now(busy()),
        }
    }

    fn set_disk_limits(&self, disk: usize, limits: DiskLimits) -> Response {
        if let Some(field) = limits.zero() {
            return refusal(format!(
                "`limits/{field}` is 0; it must be 1 or more, or absent"
            ));
        }
        let inventory = lock(&self.inventory);
        let entry = inventory.find(&format!("disk{disk}"));
        match entry.map(|entry| &entry.handle) {
            Some(Handle::Disk(handle)) => {
                handle.set_limits(limits);
                Response::Done {}
            }
            _ => refusal(format!(
                "there is no disk {disk}; there are {}",
                inventory.disks().count()
            )),
        }
    }

    fn set_net_limits(&self, net: usize, limits: NetLimits) -> Response {
        let inventory = lock(&self.inventory);
        let entry = inventory.find(&format!("net{net}"));
        match entry.map(|entry| &entry.handle) {
            Some(Handle::Net(handle)) => {
                handle.set_limits(limits);
                Response::Done {}
            }
            _ => refusal(format!(
                "there is no network interface {net} that the machine itself serves; there are {}",
                inventory.nets().count()
            )),
        }
    }

    fn stats(&self) -> Stats {
        let inventory = lock(&self.inventory);
        let entries = inventory.entries().iter();
        let exits = self.vcpus.exits();
        Stats {
            vcpu_exits: exits.iter().map(VcpuExits::sum).collect(),
            vcpu_exit_reasons: exits,
            vcpu_times: self.vcpus.times().map(vcpu_times),
            vsock: entries.clone().find_map(|entry| match &entry.handle {
                Handle::Vsock(counters) => Some(counters.stats()),
                Handle::Disk(_) | Handle::Net(_) | Handle::Rng(_) | Handle::Other => None,
            }),
            rng: entries.clone().find_map(|entry| match &entry.handle {
                Handle::Rng(counters) => Some(counters.stats()),
                Handle::Disk(_) | Handle::Net(_) | Handle::Vsock(_) | Handle::Other => None,
            }),
            devices: entries.map(|entry| entry.counters.stats()).collect(),
            disks: inventory.disks().map(disk_stats).collect(),
            nets: inventory.nets().map(net_stats).collect(),
            memory: self.memory.stats(),
            balloon: self.memory.balloon.as_ref().map(BalloonStats::of),
            mem: self.memory.mem.as_ref().map(MemStats::of),
        }
    }
}

fn busy() -> Response {
    refusal("busy: a snapshot is being written".to_owned())
}

fn no_slots() -> Response {
    refusal("devices come and go on PCI alone: set `transport` to \"pci\"".to_owned())
}

fn refusal(message: String) -> Response {
    Response::Error { message }
}

fn vcpu_times(times: Vec<vcpu::VcpuTimes>) -> Vec<VcpuTimes> {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let times = times.into_iter().map(|times| VcpuTimes {
        run_ns: nanoseconds(times.ran),
        wait_ns: nanoseconds(times.waited),
    });
    times.collect()
}

fn disk_stats(disk: &BlockHandle) -> DiskStats {
    let stats = disk.stats();
    DiskStats {
        reads: stats.reads,
        read_bytes: stats.read_bytes,
        writes: stats.writes,
        written_bytes: stats.written_bytes,
        flushes: stats.flushes,
        zeroes: stats.zeroes,
        failures: stats.failures,
        throttled: stats.throttled,
    }
}

fn net_stats(net: &NetHandle) -> NetStats {
    let stats = net.stats();
    NetStats {
        received_frames: stats.received_frames,
        received_bytes: stats.received_bytes,
        received_dropped: stats.received_dropped,
        sent_frames: stats.sent_frames,
        sent_bytes: stats.sent_bytes,
        sent_dropped: stats.sent_dropped,
    }
}
