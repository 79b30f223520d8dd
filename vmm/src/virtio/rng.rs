//! virtio-rng (virtio 1.2, section 5.4): one queue of device-writable buffers to fill from the
//! kernel's random number generator.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::rand::GetRandomFlags;
use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, answer_all};
use super::counters::{count, count_by};
use super::state::{DeviceState, StateError, read_nothing};
use super::{DeviceError, DeviceInfo, Signal, VirtioDevice};
use crate::control::RngStats;

/// Device type, virtio 1.2 section 5.
const ID: u32 = 4;

const QUEUE_SIZE: u16 = 64;

/// The most that one request costs the host, however large the guest's buffers are. Drivers ask for
/// tens of bytes; the used length tells them how much they got.
const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// The random bytes that are made at a time: memory of ours, so that no reference to the guest's
/// is needed.
const BLOCK_BYTES: usize = 4096;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    counters: Arc<RngCounters>,
}

/// What the device has done, for whoever asks while it is at work. They wrap at 2^64.
#[derive(Debug, Default)]
pub struct RngCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl RngCounters {
    /// As they are now.
    pub fn stats(&self) -> RngStats {
        RngStats {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

impl Rng {
    /// A device that draws on `getrandom(2)`: it needs no file.
    pub fn new() -> Rng {
        Rng::default()
    }

    /// To be read from then on.
    pub fn counters(&self) -> Arc<RngCounters> {
        self.counters.clone()
    }
}

impl VirtioDevice for Rng {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: ID,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
        }
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
            let filled = fill(chain).map_err(|source| DeviceError::Host {
                action: "get random bytes",
                source,
            })?;
            count(&self.counters.requests);
            count_by(&self.counters.bytes, filled as u64);
            Ok(filled)
        })
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::empty())
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        read_nothing(own)
    }
}

/// Fills the chain's device-writable part, up to [`REQUEST_BYTES_MAX`].
fn fill(chain: &Chain) -> io::Result<usize> {
    let want = chain.writable_bytes().min(REQUEST_BYTES_MAX);
    let mut bytes = [0; BLOCK_BYTES];
    let mut filled = 0;
    while filled < want {
        let part = &mut bytes[..BLOCK_BYTES.min(want - filled)];
        // The call itself: the getrandom crate falls back to a file, which the system call filter
        // forbids. It gives less than it is asked for when a signal comes in between.
        let count = rustix::rand::getrandom(&mut *part, GetRandomFlags::empty())?;
        filled += chain.write(filled, &part[..count]);
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use proptest::proptest;

    use super::*;
    use crate::virtio::testing::{
        Driver, any_noise, assert_noise_is_survived, assert_tricks_are_the_guests_error,
        noise_config,
    };

    #[test]
    fn all_writable_buffers_are_filled_with_what_was_not_there_before() {
        let (mut rng, lens) = (Rng::new(), [1, 100, 5000]);
        let mut driver = Driver::start(&mut rng);
        let buffers = lens.map(|len| driver.writable(len));
        let head = driver.offer(0, &buffers);
        assert_eq!(driver.kick(&mut rng, 0).unwrap(), Signal::queue(0));
        assert_eq!(driver.used(0), [(head, lens.iter().sum())]);
        let end = driver.read(buffers[2].address + 4968, 32);
        assert_ne!(end, [0; 32]);
        assert_ne!(end, driver.read(buffers[1].address, 32));
    }

    #[test]
    fn a_huge_request_costs_the_host_a_bounded_amount() {
        let mut rng = Rng::new();
        let mut driver = Driver::start(&mut rng);
        let buffer = driver.writable(8 << 20);
        let head = driver.offer(0, &[buffer]);
        let _ = driver.kick(&mut rng, 0).unwrap();
        assert_eq!(driver.used(0), [(head, 64 * 1024)]);
        let stats = rng.counters().stats();
        assert_eq!((stats.requests, stats.bytes), (1, 64 * 1024));
    }

    #[test]
    fn a_request_without_a_writable_buffer_is_given_back_as_it_is() {
        let mut rng = Rng::new();
        let mut driver = Driver::start(&mut rng);
        let buffer = driver.readable(b"no");
        let head = driver.offer(0, &[buffer]);
        let _ = driver.kick(&mut rng, 0).unwrap();
        assert_eq!(driver.used(0), [(head, 0)]);
        assert_eq!(driver.kick(&mut rng, 0).unwrap(), Signal::NONE);
        let stats = rng.counters().stats();
        assert_eq!((stats.requests, stats.bytes), (1, 0));
    }

    #[test]
    fn tricks_are_the_guests_error() {
        assert_tricks_are_the_guests_error(&mut Rng::new());
    }

    proptest! {
        #![proptest_config(noise_config())]

        #[test]
        fn noise_is_survived(noise in any_noise(1)) {
            assert_noise_is_survived(&mut Rng::new(), &noise);
        }
    }
}
