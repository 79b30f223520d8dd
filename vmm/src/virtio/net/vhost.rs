//! virtio-net whose queues the host's kernel serves (vhost-net, linux/vhost.h): frames move between the
//! tap and guest memory without this process, which only sets that up and interrupts the driver.
//!
//! The guest then speaks to code of the kernel that reads its rings, where otherwise it speaks to a
//! process that may do little. That is for whoever trusts the guest more than that.

mod backend;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use serde_json::Value;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::backend::Backend;
pub use self::backend::VhostError;
use super::offer::{config_space, features, offloads, set_offloads};
use super::state::NetState;
use super::{ID, QUEUE_SIZE};
use crate::events::event;
use crate::spec::NetLimits;
use crate::virtio::state::{DeviceState, StateError, expect};
use crate::virtio::tap::Tap;
use crate::virtio::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};

/// Receive and transmit (virtio 1.2, section 5.1.2).
const QUEUES: usize = 2;

/// What of the accepted features the kernel is told. The others are the tap's, or nobody's.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Tokens of [`Interest`]: a queue's number, and from here up that of a queue that is malformed.
const MALFORMED: u32 = 1 << 8;

/// The network device.
#[derive(Debug)]
pub struct VhostNet {
    tap: Tap,
    backend: Backend,
    mac: [u8; 6],
    mtu: Option<u16>,
    /// The driver has read another address, and is still to be told to look again.
    moved: bool,
    /// Those that the driver has accepted.
    features: u64,
    queues: [Served; QUEUES],
}

/// A queue as the kernel has it.
#[derive(Debug)]
struct Served {
    /// Made by the driver's kicks.
    kick: EventFd,
    /// Made by the kernel when the driver is to be interrupted.
    call: EventFd,
    /// Made by the kernel when it gives the queue up.
    malformed: EventFd,
    running: bool,
}

impl Served {
    fn new() -> io::Result<Served> {
        Ok(Served {
            kick: event()?,
            call: event()?,
            malformed: event()?,
            running: false,
        })
    }
}

impl VhostNet {
    /// A network device whose cable is `tap`, served by what `device`, /dev/vhost-net, stands for.
    ///
    /// # Errors
    ///
    /// If it stands for something else, or lacks what drivers are always offered.
    pub fn new(device: File, tap: Tap, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, VhostError> {
        let event = |source| VhostError::Kernel {
            action: "make an event",
            source,
        };
        Ok(VhostNet {
            tap,
            backend: Backend::new(device, RING_FEATURES)?,
            mac,
            mtu,
            moved: false,
            features: 0,
            queues: [Served::new().map_err(event)?, Served::new().map_err(event)?],
        })
    }

    fn start(
        &mut self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), VhostError> {
        if !self.queues.iter().any(|queue| queue.running) {
            let features = self.features & RING_FEATURES;
            self.backend.prepare(features, memory)?;
        }
        let served = &mut self.queues[index];
        let events = [&served.kick, &served.call, &served.malformed];
        self.backend
            .start(index, queue, memory, events, &self.tap)?;
        served.running = true;
        Ok(())
    }

    /// The kernel touches the queues no more. Returns, for each that it had, where it has come to.
    fn stop(&mut self) -> Result<[Option<u16>; QUEUES], VhostError> {
        let mut bases = [None; QUEUES];
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if queue.running {
                queue.running = false;
                bases[index] = Some(self.backend.stop(index)?);
            }
        }
        Ok(bases)
    }
}

impl VirtioDevice for VhostNet {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: ID,
            features: features(self.mtu),
            queue_sizes: vec![QUEUE_SIZE; QUEUES],
        }
    }

    fn config(&self) -> Vec<u8> {
        config_space(self.mac, self.mtu)
    }

    fn kicks(&self) -> Option<Vec<&EventFd>> {
        Some(self.queues.iter().map(|queue| &queue.kick).collect())
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.features = features;
        set_offloads(&self.tap, offloads(features))
    }

    /// Has the kernel serve the queue, and look at it.
    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let (Some(queue), Some(served)) = (queues.get(index), self.queues.get(index)) else {
            return Ok(Signal::NONE);
        };
        if !served.running {
            self.start(index, queue, mem).map_err(|error| {
                if matches!(error, VhostError::Ring) {
                    let source = Error::FindMemoryRegion;
                    return DeviceError::Guest { index, source };
                }
                error.into()
            })?;
        }
        match self.queues[index].kick.write(1) {
            // The counter is full: the kernel has not looked yet.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            made => made.map_err(|source| DeviceError::Host {
                action: "make a kick",
                source,
            })?,
        }
        Ok(if std::mem::take(&mut self.moved) {
            Signal::CONFIG
        } else {
            Signal::NONE
        })
    }

    fn interests(&self) -> Vec<Interest> {
        let queues = (0..).zip(&self.queues);
        queues
            .flat_map(|(index, queue)| {
                [
                    Interest::readable(index, queue.call.as_raw_fd()),
                    Interest::readable(MALFORMED + index, queue.malformed.as_raw_fd()),
                ]
            })
            .collect()
    }

    fn on_ready(
        &mut self,
        token: u32,
        _queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let index = usize::try_from(token % MALFORMED).unwrap_or(QUEUES);
        let Some(queue) = self.queues.get(index) else {
            return Ok(Signal::NONE);
        };
        if token >= MALFORMED {
            let _ = queue.malformed.read();
            let source = Error::InvalidChain;
            return Err(DeviceError::Guest { index, source });
        }
        // Somebody else may have taken it.
        Ok(Signal::queue_if(index, queue.call.read().is_ok()))
    }

    fn reset(&mut self) {
        // The kernel refuses it only for queues that there are not.
        let _ = self.stop();
        for queue in &self.queues {
            // What the kernel has found since is not the next driver's.
            let _ = queue.call.read();
            let _ = queue.malformed.read();
        }
        self.features = 0;
        self.moved = false;
    }

    fn quiesce(
        &mut self,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let bases = self.stop()?;
        let mut told = Signal::NONE;
        for (index, (queue, base)) in queues.iter_mut().zip(bases).enumerate() {
            let Some(base) = base else { continue };
            queue.set_next_avail(base);
            let used = queue.used_idx(mem, Ordering::Acquire);
            let used = used.map_err(|source| DeviceError::Guest { index, source })?;
            queue.set_next_used(used.0);
            told = told.and(Signal::queue_if(
                index,
                self.queues[index].call.read().is_ok(),
            ));
        }
        Ok(told)
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&NetState {
            mac: self.mac,
            mtu: self.mtu,
            limits: NetLimits::default(),
        })
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        let saved = NetState::read(own, self.mtu)?;
        let limited = saved.limits != NetLimits::default();
        expect(
            "having limits, which the kernel does not keep,",
            &limited,
            &false,
        )?;
        self.moved = saved.mac != self.mac;
        Ok(())
    }
}

impl From<VhostError> for DeviceError {
    fn from(error: VhostError) -> DeviceError {
        DeviceError::Host {
            action: "have the kernel serve a network device",
            source: io::Error::other(error),
        }
    }
}
