//! A driver's side of virtqueues, for the tests of devices and transport; what hostile drivers do
//! is in [`hostile`].
//!
//! virtio-queue's own mock lets rings overlap and does not wrap around; this driver does as Linux
//! does, for as long as a test likes.
//!
//! UNSAFETY: a device names what it waits for by descriptor number; to poll that, the number is
//! borrowed for the length of one call.

mod hostile;

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

pub(crate) use self::hostile::{
    TRICKS, any_noise, assert_held_chains_are_bounded, assert_noise_is_survived,
    assert_tricks_are_the_guests_error, noise_config,
};
use super::{DeviceError, Signal, VirtioDevice};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Two regions that touch, so that a buffer can lie in both; then a hole as that of the devices; then
/// one more region, and nothing after it.
const REGION_BYTES: usize = 16 << 20;
pub(crate) const REGION_BORDER: u64 = REGION_BYTES as u64;
pub(crate) const HOLE: u64 = 2 * REGION_BYTES as u64;
pub(crate) const HOLE_END: u64 = HOLE + 0x1_0000;
const LAST_REGION_BYTES: usize = 1 << 20;
pub(crate) const MEMORY_END: u64 = HOLE_END + LAST_REGION_BYTES as u64;

/// Each queue's rings have this much room.
const QUEUE_STRIDE: u64 = 0x1_0000;
/// Buffers are handed out from here on.
const BUFFERS: u64 = 0x10_0000;

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A buffer as a driver describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// The driver's side of all queues of a device.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) queues: Vec<Queue>,
    rings: Vec<Rings>,
    next_buffer: u64,
}

struct Rings {
    size: u16,
    base: u64,
    available: u16,
    used: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl Rings {
    fn descriptor(&self, index: u16) -> u64 {
        self.base + 16 * u64::from(index)
    }
    fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }
    fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }
}

impl Driver {
    /// Fresh memory and queues for `device`, and the device activated with all its features.
    pub(crate) fn start(device: &mut dyn VirtioDevice) -> Driver {
        let features = device.info().features;
        Driver::start_with(device, features)
    }

    /// As [`start`](Self::start), but with these features accepted.
    pub(crate) fn start_with(device: &mut dyn VirtioDevice, features: u64) -> Driver {
        let driver = Driver::new(&device.info().queue_sizes);
        device.activate(features).unwrap();
        driver
    }

    /// Fresh memory and queues.
    pub(crate) fn new(sizes: &[u16]) -> Driver {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), REGION_BYTES),
            (GuestAddress(REGION_BORDER), REGION_BYTES),
            (GuestAddress(HOLE_END), LAST_REGION_BYTES),
        ])
        .unwrap();
        let rings: Vec<Rings> = (1..)
            .zip(sizes)
            .map(|(number, size)| Rings {
                size: *size,
                base: number * QUEUE_STRIDE,
                available: 0,
                used: 0,
                free: (0..*size).rev().collect(),
                chains: HashMap::new(),
            })
            .collect();
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        let queues = rings
            .iter()
            .map(|rings| {
                let mut queue = Queue::new(rings.size).unwrap();
                queue.set_desc_table_address(low(rings.base), Some(0));
                queue.set_avail_ring_address(low(rings.available()), Some(0));
                queue.set_used_ring_address(low(rings.used()), Some(0));
                queue.set_ready(true);
                assert!(queue.is_valid(&memory));
                queue
            })
            .collect();
        Driver {
            memory,
            queues,
            rings,
            next_buffer: BUFFERS,
        }
    }

    /// Memory for a buffer, never handed out before.
    pub(crate) fn allocate(&mut self, len: u32, writable: bool) -> Buffer {
        let address = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(64);
        assert!(self.next_buffer <= HOLE, "the test has used up its memory");
        Buffer {
            address,
            len,
            writable,
        }
    }

    /// A device-readable buffer with this content.
    pub(crate) fn readable(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.allocate(u32::try_from(bytes.len()).unwrap(), false);
        self.write(buffer.address, bytes);
        buffer
    }

    /// A device-writable buffer.
    pub(crate) fn writable(&mut self, len: u32) -> Buffer {
        self.allocate(len, true)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Makes a chain of these buffers available; its head.
    pub(crate) fn offer(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let rings = &mut self.rings[queue];
        let indices: Vec<u16> = buffers
            .iter()
            .map(|_| {
                rings
                    .free
                    .pop()
                    .expect("the test has used up its descriptors")
            })
            .collect();
        rings.chains.insert(indices[0], indices.clone());
        for (at, (buffer, index)) in buffers.iter().zip(&indices).enumerate() {
            let next = indices.get(at + 1);
            let flags = if next.is_some() { NEXT } else { 0 };
            let write = if buffer.writable { WRITE } else { 0 };
            let next = next.copied().unwrap_or_default();
            self.describe(
                queue,
                *index,
                (buffer.address, buffer.len),
                flags | write,
                next,
            );
        }
        self.make_available(queue, indices[0]);
        indices[0]
    }

    /// Writes a descriptor, whatever it says.
    pub(crate) fn describe(
        &self,
        queue: usize,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let at = self.rings[queue].descriptor(index);
        self.write(at, &descriptor(address, len, flags, next));
    }

    /// Makes a head available, whatever it is.
    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let rings = &mut self.rings[queue];
        let slot = u64::from(rings.available % rings.size);
        rings.available = rings.available.wrapping_add(1);
        let (ring, index) = (rings.available(), rings.available);
        self.write(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.write(ring + 2, &index.to_le_bytes());
    }

    /// Sets the available index, whatever has been made available.
    pub(crate) fn jump(&mut self, queue: usize, by: u16) {
        let rings = &mut self.rings[queue];
        rings.available = rings.available.wrapping_add(by);
        let (ring, index) = (rings.available(), rings.available);
        self.write(ring + 2, &index.to_le_bytes());
    }

    /// Asks to be told when the used index passes this one (EVENT_IDX).
    pub(crate) fn set_used_event(&self, queue: usize, index: u16) {
        let rings = &self.rings[queue];
        let at = rings.available() + 4 + 2 * u64::from(rings.size);
        self.write(at, &index.to_le_bytes());
    }

    /// The chains that have been given back since, and how much of each was written.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let (ring, size) = (self.rings[queue].used(), self.rings[queue].size);
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut used = Vec::new();
        while self.rings[queue].used != index {
            let slot = u64::from(self.rings[queue].used % size);
            let [id, len]: [u32; 2] = self
                .memory
                .read_obj(GuestAddress(ring + 4 + 8 * slot))
                .unwrap();
            let head = u16::try_from(id).unwrap();
            let rings = &mut self.rings[queue];
            let indices = rings
                .chains
                .remove(&head)
                .expect("a chain is given back once");
            rings.free.extend(indices);
            rings.used = rings.used.wrapping_add(1);
            used.push((head, len));
        }
        used
    }

    /// Kicks a queue.
    pub(crate) fn kick(
        &mut self,
        device: &mut dyn VirtioDevice,
        queue: usize,
    ) -> Result<Signal, DeviceError> {
        device.process(queue, &mut self.queues, &self.memory)
    }

    /// Waits until one of the device's descriptors is ready, or `patience` has passed, and has the
    /// device see to it; whether one was.
    pub(crate) fn turn(&mut self, device: &mut dyn VirtioDevice, patience: Duration) -> bool {
        self.try_turn(device, patience).unwrap()
    }

    /// The same; or what the device found wrong.
    pub(crate) fn try_turn(
        &mut self,
        device: &mut dyn VirtioDevice,
        patience: Duration,
    ) -> Result<bool, DeviceError> {
        let interests = device.interests();
        let mut fds: Vec<PollFd<'_>> = interests
            .iter()
            .map(|interest| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, interest.readable);
                flags.set(PollFlags::POLLOUT, interest.writable);
                PollFd::new(borrow(interest.fd), flags)
            })
            .collect();
        let timeout = PollTimeout::try_from(patience).unwrap();
        poll(&mut fds, timeout).unwrap();
        let ready: Vec<u32> = interests
            .iter()
            .zip(&fds)
            .filter(|(_, fd)| fd.any().unwrap_or_default())
            .map(|(interest, _)| interest.token)
            .collect();
        for token in &ready {
            let _ = device.on_ready(*token, &mut self.queues, &self.memory)?;
        }
        Ok(!ready.is_empty())
    }

    /// Lets the device have turns until `count` chains of the queue have been given back.
    pub(crate) fn wait_used(
        &mut self,
        device: &mut dyn VirtioDevice,
        queue: usize,
        count: usize,
    ) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + PATIENCE;
        let mut used = self.used(queue);
        while used.len() < count {
            assert!(
                Instant::now() < deadline,
                "{} of {count} chains were used",
                used.len()
            );
            self.turn(device, Duration::from_millis(100));
            used.extend(self.used(queue));
        }
        used
    }
}

/// How many bytes of this guest memory, given in whole pages, the host has pages for.
#[expect(unsafe_code, reason = "the kernel is asked about memory by address")]
pub(crate) fn resident(memory: &GuestMemoryMmap, address: u64, bytes: usize) -> usize {
    let mut resident = 0;
    for slice in memory.get_slices(GuestAddress(address), bytes) {
        let slice = slice.unwrap();
        let mut pages = vec![0_u8; slice.len() / 4096];
        let start = slice.ptr_guard_mut().as_ptr();
        // SAFETY: it is memory of the guest, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(start.cast(), slice.len(), pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        resident += 4096 * pages.iter().filter(|page| **page & 1 != 0).count();
    }
    resident
}

/// A descriptor as it stands in memory.
pub(crate) fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [
        &address.to_le_bytes()[..],
        &len.to_le_bytes(),
        &flags.to_le_bytes(),
        &next.to_le_bytes(),
    ]
    .concat()
}

#[expect(unsafe_code, reason = "interests name descriptors by number")]
fn borrow<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: it is the descriptor of a device that outlives the call it is borrowed for.
    unsafe { BorrowedFd::borrow_raw(fd) }
}
