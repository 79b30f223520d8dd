//! What a virtio device is, apart from the transport that carries it (virtio 1.2).
//!
//! The transport owns negotiation, status, queue addresses, notification suppression and
//! interrupts, and lends the queues for the length of one call. A device is a state machine that is
//! poked: by a kick of the driver ([`VirtioDevice::process`]) or by one of its own descriptors
//! ([`VirtioDevice::on_ready`]). It never blocks.

pub mod balloon;
pub mod block;
mod chain;
pub mod counters;
mod discard;
mod io_ring;
pub mod mem;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod registers;
pub mod rng;
pub mod state;
pub mod tap;
#[cfg(test)]
pub(crate) mod testing;
pub mod transport;
pub mod vsock;

use std::io;
use std::os::fd::RawFd;

use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::state::{DeviceState, StateError};

/// Facts about a device that hold before any driver has spoken to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DeviceInfo {
    /// Device type, virtio 1.2 section 5.
    pub id: u32,
    /// Offered feature bits of the device itself. The transport adds VERSION_1, EVENT_IDX and
    /// INDIRECT_DESC.
    pub features: u64,
    /// The largest size of each queue, powers of two.
    pub queue_sizes: Vec<u16>,
}

/// What the driver is to be told after a call.
#[must_use = "a driver that is not told of used buffers waits for ever"]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Signal {
    /// Bit N: buffers were added to queue N's used ring.
    pub queues: u32,
    /// The configuration space changed.
    pub config: bool,
}

impl Signal {
    /// Nothing to tell.
    pub const NONE: Signal = Signal {
        queues: 0,
        config: false,
    };

    /// The configuration space changed.
    pub const CONFIG: Signal = Signal {
        queues: 0,
        config: true,
    };

    /// Queue `index` has used buffers.
    pub const fn queue(index: usize) -> Signal {
        Signal {
            queues: 1 << index,
            config: false,
        }
    }

    /// Queue `index` has used buffers, or there is nothing to tell.
    pub const fn queue_if(index: usize, used: bool) -> Signal {
        if used { Self::queue(index) } else { Self::NONE }
    }

    /// Both.
    pub const fn and(self, other: Signal) -> Signal {
        Signal {
            queues: self.queues | other.queues,
            config: self.config | other.config,
        }
    }
}

/// By whose fault a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The transport sets DEVICE_NEEDS_RESET; the VM lives on.
    #[error("The guest's queue {index} is malformed")]
    Guest {
        /// The queue.
        index: usize,
        source: virtio_queue::Error,
    },
    /// The VM stops and its exit record says why.
    #[error("The device's backend failed: {action}")]
    Host {
        /// What was attempted, e.g. "read the tap".
        action: &'static str,
        source: io::Error,
    },
}

/// A device behind a virtio transport.
pub trait VirtioDevice: Send {
    /// What the device is.
    fn info(&self) -> DeviceInfo;

    /// The device's configuration space, read by the transport byte for byte; reads past its end
    /// give zeroes.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes to the configuration space. What it may not write is left as it is, and
    /// most devices have nothing else.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set DRIVER_OK with these accepted features. Queues may hold buffers already;
    /// the transport calls [`process`](Self::process) for each of them next.
    fn activate(&mut self, features: u64) -> Result<(), DeviceError>;

    /// The driver kicked queue `index`. At most one queue's worth of buffers is taken per call.
    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError>;

    /// The events by which somebody else, who serves the queues, hears of kicks, one for each queue.
    /// The transport has the kernel make them, and leaves the rings alone. It calls
    /// [`process`](Self::process) when a queue is to be served from then on, and for kicks of which
    /// the kernel does not know.
    fn kicks(&self) -> Option<Vec<&EventFd>> {
        None
    }

    /// Whether drivers give the device so much to do that it is worth looking for it before the next
    /// kick.
    fn is_fast(&self) -> bool {
        false
    }

    /// Descriptors to poll while the device is active, each with a token of the device's own and
    /// the readiness waited for. Asked again after every call into the device.
    fn interests(&self) -> Vec<Interest> {
        Vec::new()
    }

    /// The descriptor of `token` is ready.
    fn on_ready(
        &mut self,
        _token: u32,
        _queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        Ok(Signal::NONE)
    }

    /// Descriptors to poll once a driver that was there has gone, or has broken the rules, until the
    /// next one is there: for whoever would wait for the guest in vain.
    fn interests_without_driver(&self) -> Vec<Interest> {
        Vec::new()
    }

    /// One of [`interests_without_driver`](Self::interests_without_driver) is ready. No guest memory
    /// is touched.
    fn on_ready_without_driver(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Back to the state before `activate`. In-flight work is finished or dropped first: no guest
    /// memory is touched after this returns.
    fn reset(&mut self);

    /// Finishes what the host does for the guest, before [`save`](Self::save). No processor runs,
    /// and the device is active. See [`state`] for how a device takes part in snapshots.
    fn quiesce(
        &mut self,
        _queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        Ok(Signal::NONE)
    }

    /// What [`restore`](Self::restore) needs. Changes nothing.
    fn save(&self) -> Result<DeviceState, StateError>;

    /// A device that was just made becomes the one that was saved; `own` is its
    /// [`DeviceState::own`], or what somebody has made of it.
    fn restore(&mut self, own: &Value) -> Result<(), StateError>;
}

/// A descriptor that a device waits for (level-triggered).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Interest {
    pub token: u32,
    pub fd: RawFd,
    pub readable: bool,
    pub writable: bool,
}

impl Interest {
    /// Until there is something to read.
    pub const fn readable(token: u32, fd: RawFd) -> Interest {
        Interest {
            token,
            fd,
            readable: true,
            writable: false,
        }
    }
}
