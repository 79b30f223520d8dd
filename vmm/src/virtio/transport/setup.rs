//! What a driver says about a queue before it is used.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// What a driver writes before it says that a queue is ready.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueSetup {
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// Gives a queue the addresses its driver wrote. Returns whether they are usable.
pub(super) fn configure(queue: &mut Queue, setup: QueueSetup, memory: &GuestMemoryMmap) -> bool {
    let size = u16::try_from(setup.size).unwrap_or(0);
    let set = queue
        .try_set_size(size)
        .and_then(|()| queue.try_set_desc_table_address(GuestAddress(setup.descriptors)))
        .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(setup.available)))
        .and_then(|()| queue.try_set_used_ring_address(GuestAddress(setup.used)));
    queue.set_ready(true);
    let usable = set.is_ok() && queue.is_valid(memory);
    queue.set_ready(usable);
    usable
}
