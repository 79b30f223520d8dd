//! What is asked of /dev/vhost-net, by the crate `vhost` and two `ioctl`s of our own: one that it has for
//! descriptors of its own alone, and one that has to be stricter with guests.
//!
//! UNSAFETY: these `ioctl`s.
#![expect(
    unsafe_code,
    reason = "queues are placed, and joined to taps, by ioctls"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST_NET_SET_BACKEND, VHOST_SET_VRING_ADDR, vhost_vring_addr, vhost_vring_file,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
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
    /// The driver's fault.
    #[error("a queue is not in one piece of guest memory")]
    Ring,
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
        let [kick, call, malformed] = events;
        let sized = kernel
            .set_vring_num(index, queue.size())
            .and_then(|()| kernel.set_vring_base(index, queue.next_avail()));
        to("take the size of a queue", sized)?;
        self.place(index, queue, memory)?;
        let joined = kernel
            .set_vring_call(index, call)
            .and_then(|()| kernel.set_vring_err(index, malformed))
            .and_then(|()| kernel.set_vring_kick(index, kick));
        to("take a queue", joined)?;
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

    /// Tells the kernel where a queue is. It asks nobody whether all of it is the guest's: it goes on from
    /// these addresses, in this process, as far as the queue is long.
    ///
    /// Not by the crate, which looks for no more than that a queue begins in guest memory and that there
    /// is more behind its end.
    fn place(
        &self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), VhostError> {
        let [descriptors, available, used] = ring_addresses(queue, memory)?;
        let ring = vhost_vring_addr {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            desc_user_addr: descriptors,
            avail_user_addr: available,
            used_user_addr: used,
            ..vhost_vring_addr::default()
        };
        // SAFETY: VHOST_SET_VRING_ADDR reads a vhost_vring_addr, whose addresses are those of guest memory,
        // which the kernel does not access before it was given the tap, and no longer than the device is
        // open. The device goes before the memory.
        let result = unsafe { ioctl_with_ref(&self.device, VHOST_SET_VRING_ADDR(), &ring) };
        checked("place a queue", result)
    }

    fn join(&self, index: usize, tap: RawFd) -> Result<(), VhostError> {
        let file = vhost_vring_file {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            fd: tap,
        };
        // SAFETY: VHOST_NET_SET_BACKEND reads a vhost_vring_file.
        let result = unsafe { ioctl_with_ref(&self.device, VHOST_NET_SET_BACKEND(), &file) };
        checked("join a queue to the tap", result)
    }
}

fn checked(action: &'static str, result: libc::c_int) -> Result<(), VhostError> {
    if result < 0 {
        let source = io::Error::last_os_error();
        return Err(VhostError::Kernel { action, source });
    }
    Ok(())
}

/// Where a queue's descriptor table, available ring and used ring are in this process (virtio 1.2,
/// section 2.7, with the fields for EVENT_IDX).
///
/// Each must be in one region of guest memory: those that are neighbours for the guest are not so here.
fn ring_addresses(queue: &Queue, memory: &GuestMemoryMmap) -> Result<[u64; 3], VhostError> {
    let size = u64::from(queue.size());
    let [descriptors, available, used] = [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ]
    .map(|(start, bytes)| {
        let bytes = usize::try_from(bytes).map_err(|_| VhostError::Ring)?;
        let slice = memory.get_slice(GuestAddress(start), bytes);
        let slice = slice.map_err(|_| VhostError::Ring)?;
        Ok(slice.ptr_guard().as_ptr() as u64)
    });
    Ok([descriptors?, available?, used?])
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: usize = 0x1_0000;

    /// A queue of 8, whose parts are at these addresses.
    fn addresses([descriptors, available, used]: [u64; 3]) -> Result<[u64; 3], VhostError> {
        let start = |index| GuestAddress(index * REGION as u64);
        // Neighbours, as RAM and the memory of images are.
        let regions = [(start(0), REGION), (start(1), REGION)];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let mut queue = Queue::new(8).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(available))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        let base = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        ring_addresses(&queue, &memory).map(|found| found.map(|address| address - base))
    }

    #[test]
    fn a_queue_may_end_where_a_region_does_and_nowhere_else() {
        const END: u64 = REGION as u64;
        assert_eq!(addresses([0, 0x100, 0x200]).unwrap(), [0, 0x100, 0x200]);
        // The table has 128 bytes, the available ring 22 and the used ring 70.
        let last = [END - 0x80, END - 22, END - 72];
        assert_eq!(addresses(last).unwrap(), last);
        for (part, address) in [(0, END - 0x70), (1, END - 20), (2, END - 68)] {
            let mut over = [0, 0x100, 0x200];
            over[part] = address;
            assert!(matches!(addresses(over), Err(VhostError::Ring)), "{part}");
            // The last one has no neighbour.
            over[part] += END;
            assert!(matches!(addresses(over), Err(VhostError::Ring)), "{part}");
        }
    }
}
