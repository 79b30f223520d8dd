//! virtio-pmem (virtio 1.2, section 5.19): a file as memory, which a guest reads without a copy of its
//! own: all machines with the same file share the host's page cache.
//!
//! The file is mapped privately. A guest that writes to it gets pages of its own, as it would of any
//! memory, and the file stays as it is: there is nothing to flush.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::chain::answer_all;
use super::state::{self, DeviceState, StateError};
use super::{DeviceError, DeviceInfo, Signal, VirtioDevice};

/// Device type, virtio 1.2 section 5.
const ID: u32 = 27;

/// Linux has a request for each thread that flushes.
const QUEUE_SIZE: u16 = 64;

/// The only request (section 5.19.6).
const FLUSH: u32 = 0;

/// What comes of a request (section 5.19.6.1).
const DONE: u32 = 0;
const FAILED: u32 = 1;

/// The device: it says where the memory is.
#[derive(Debug)]
pub struct Pmem {
    range: Range<u64>,
}

/// What a snapshot keeps of it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct PmemState {
    start: u64,
    bytes: u64,
}

impl Pmem {
    /// Of memory at `range` of guest addresses.
    pub fn new(range: Range<u64>) -> Pmem {
        Pmem { range }
    }

    fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

impl VirtioDevice for Pmem {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: ID,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
        }
    }

    /// `struct virtio_pmem_config`.
    fn config(&self) -> Vec<u8> {
        [self.range.start, self.bytes()]
            .map(u64::to_le_bytes)
            .concat()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        answer_all(index, queues, mem, |chain| {
            let mut kind = [0; 4];
            let whole = chain.read(0, &mut kind) == kind.len();
            let result = if whole && u32::from_le_bytes(kind) == FLUSH {
                DONE
            } else {
                FAILED
            };
            Ok(chain.write(0, &result.to_le_bytes()))
        })
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&PmemState {
            start: self.range.start,
            bytes: self.bytes(),
        })
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        let saved: PmemState = state::read(own)?;
        state::expect("address", &saved.start, &self.range.start)?;
        state::expect("size", &saved.bytes, &self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::proptest;

    use super::*;
    use crate::virtio::testing::{
        Driver, any_noise, assert_noise_is_survived, assert_tricks_are_the_guests_error,
        noise_config,
    };

    fn pmem() -> Pmem {
        Pmem::new(0x1_4000_0000..0x1_4020_0000)
    }

    #[test]
    fn the_configuration_says_where_the_memory_is() {
        let config = pmem().config();
        assert_eq!(config[..8], 0x1_4000_0000_u64.to_le_bytes());
        assert_eq!(config[8..], 0x20_0000_u64.to_le_bytes());
    }

    #[test]
    fn a_flush_is_done_and_nothing_else_is() {
        let mut pmem = pmem();
        let mut driver = Driver::start(&mut pmem);
        for (request, room, want) in [
            (&[0_u8; 4][..], 4, &DONE.to_le_bytes()[..]),
            (&[0; 100], 8, &DONE.to_le_bytes()),
            (&[1, 0, 0, 0], 4, &FAILED.to_le_bytes()),
            (&[0; 3], 4, &FAILED.to_le_bytes()),
            (&[0; 4], 2, &[0; 2]),
        ] {
            let buffers = [driver.readable(request), driver.writable(room)];
            driver.write(buffers[1].address, &[9; 2]);
            let head = driver.offer(0, &buffers);
            assert_eq!(driver.kick(&mut pmem, 0).unwrap(), Signal::queue(0));
            let written = u32::try_from(want.len()).unwrap();
            assert_eq!(driver.used(0), [(head, written)]);
            assert_eq!(driver.read(buffers[1].address, want.len()), want);
        }
        let only = driver.readable(&[0; 4]);
        let head = driver.offer(0, &[only]);
        let _ = driver.kick(&mut pmem, 0).unwrap();
        assert_eq!(driver.used(0), [(head, 0)]);
    }

    #[test]
    fn a_restored_device_is_where_the_saved_one_was() {
        let own = pmem().save().unwrap().own;
        pmem().restore(&own).unwrap();
        let mut elsewhere = Pmem::new(0..0x20_0000);
        elsewhere.restore(&own).unwrap_err();
    }

    #[test]
    fn tricks_are_the_guests_error() {
        assert_tricks_are_the_guests_error(&mut pmem());
    }

    proptest! {
        #![proptest_config(noise_config())]

        #[test]
        fn noise_is_survived(noise in any_noise(1)) {
            assert_noise_is_survived(&mut pmem(), &noise);
        }
    }
}
