//! What is asked of /dev/vhost-net, by the crate `vhost` and one `ioctl` that it has for descriptors of
//! its own alone.
//!
//! UNSAFETY: that `ioctl`.
#![expect(unsafe_code, reason = "taps are joined to queues by an ioctl")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::virtio::tap::Tap;

/// Why the kernel does not serve a network device.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    #[error("the kernel's vhost-net is not able to {action}")]
    Able { action: &'static str },
    #[error("the kernel's vhost-net refuses to {action}")]
    Vhost {
        action: &'static str,
        source: vhost::Error,
    },
    #[error("cannot {action}")]
    Kernel {
        action: &'static str,
        source: io::Error,
    },
}

/// The kernel's side of one network device.
#[derive(Debug)]
pub(super) struct Backend {
    device: File,
}

/// The same with the guest's memory, by which addresses are told.
struct InMemory<'a> {
    device: &'a File,
    memory: &'a GuestMemoryMmap,
}

impl AsRawFd for InMemory<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl<'a> VhostKernBackend for InMemory<'a> {
    type AS = &'a GuestMemoryMmap;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

fn to<T>(action: &'static str, result: vhost::Result<T>) -> Result<T, VhostError> {
    result.map_err(|source| VhostError::Vhost { action, source })
}

impl Backend {
    /// Takes `device` over for this process, if it is able to do what drivers are always offered.
    pub(super) fn new(device: File, needed: u64) -> Result<Backend, VhostError> {
        let backend = Backend { device };
        let none = GuestMemoryMmap::new();
        let kernel = backend.within(&none);
        to("belong to this machine", kernel.set_owner())?;
        let able = to("say what it can do", kernel.get_features())?;
        if able & needed != needed {
            let action = "do what drivers are always offered; update the host's kernel";
            return Err(VhostError::Able { action });
        }
        Ok(backend)
    }

    fn within<'a>(&'a self, memory: &'a GuestMemoryMmap) -> InMemory<'a> {
        InMemory {
            device: &self.device,
            memory,
        }
    }

    /// Tells the kernel what all queues have in common.
    pub(super) fn prepare(
        &self,
        features: u64,
        memory: &GuestMemoryMmap,
    ) -> Result<(), VhostError> {
        let kernel = self.within(memory);
        to("take the driver's features", kernel.set_features(features))?;
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        to("take the guest's memory", kernel.set_mem_table(&regions)).map(drop)
    }

    /// Has the kernel serve a queue, which goes on from where it is. The events are made by kicks, for
    /// interrupts, and when the kernel gives the queue up.
    pub(super) fn start(
        &self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemoryMmap,
        events: [&EventFd; 3],
        tap: &Tap,
    ) -> Result<(), VhostError> {
        let kernel = self.within(memory);
        let ring = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        let [kick, call, malformed] = events;
        kernel
            .set_vring_num(index, queue.size())
            .and_then(|()| kernel.set_vring_base(index, queue.next_avail()))
            .and_then(|()| kernel.set_vring_addr(index, &ring))
            .and_then(|()| kernel.set_vring_call(index, call))
            .and_then(|()| kernel.set_vring_err(index, malformed))
            .and_then(|()| kernel.set_vring_kick(index, kick))
            .map_err(|source| VhostError::Vhost {
                action: "take a queue",
                source,
            })?;
        self.join(index, tap.as_raw_fd())
    }

    /// Takes a queue from the kernel, which has done by then with what was under way. Returns where in
    /// the available ring it has come to.
    pub(super) fn stop(&self, index: usize) -> Result<u16, VhostError> {
        const NO_TAP: RawFd = -1;
        self.join(index, NO_TAP)?;
        let none = GuestMemoryMmap::new();
        let base = self.within(&none).get_vring_base(index);
        // The ring's index has 16 bits; above them, of a packed ring, there is nothing here.
        to("say how far it is", base).map(|base| (base & 0xffff) as u16)
    }

    fn join(&self, index: usize, tap: RawFd) -> Result<(), VhostError> {
        let action = "join a queue to the tap";
        let file = vhost_vring_file {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            fd: tap,
        };
        // SAFETY: VHOST_NET_SET_BACKEND reads a vhost_vring_file.
        let result = unsafe { ioctl_with_ref(&self.device, VHOST_NET_SET_BACKEND(), &file) };
        if result < 0 {
            let source = io::Error::last_os_error();
            return Err(VhostError::Kernel { action, source });
        }
        Ok(())
    }
}
