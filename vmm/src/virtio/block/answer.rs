//! The end of a request.

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::request::Status;
use crate::virtio::DeviceError;
use crate::virtio::chain::Chain;

/// A chain on its way back to the driver.
pub(super) struct Answer {
    chain: Chain,
    status: Status,
    written: usize,
}

impl Answer {
    pub(super) fn new(chain: Chain, status: Status, written: usize) -> Answer {
        Answer {
            chain,
            status,
            written,
        }
    }

    pub(super) fn give(self, queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<(), DeviceError> {
        // A chain without a byte for the status gets none.
        let written = match self.chain.writable_bytes().checked_sub(1) {
            Some(last) => {
                self.chain.write(last, &[self.status.code()]);
                self.written
            }
            None => 0,
        };
        self.chain.give_back(0, queue, mem, written)
    }
}
