//! A driver's side of virtqueues, for the tests of devices and transport: honest, and hostile.
//!
//! virtio-queue's own mock lets rings overlap and does not wrap around; this driver does as Linux
//! does, for as long as a test likes.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{DeviceError, Signal, VirtioDevice};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Two regions that touch, so that a buffer can lie in both, and nothing after them.
const REGION_BYTES: usize = 16 << 20;
pub(crate) const REGION_BORDER: u64 = REGION_BYTES as u64;
pub(crate) const MEMORY_END: u64 = 2 * REGION_BYTES as u64;

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
        assert!(
            self.next_buffer <= MEMORY_END,
            "the test has used up its memory"
        );
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
            let _ = device
                .on_ready(*token, &mut self.queues, &self.memory)
                .unwrap();
        }
        !ready.is_empty()
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

/// What a hostile driver does to a queue.
type Trick = fn(&mut Driver, usize);

/// Malformed rings and chains, none of which any device can do anything with.
pub(crate) const TRICKS: [(&str, Trick); 14] = [
    ("a head that is not in the table", |driver, queue| {
        let size = driver.rings[queue].size;
        driver.make_available(queue, size);
    }),
    ("the largest head", |driver, queue| {
        driver.make_available(queue, u16::MAX);
    }),
    ("a chain that leads out of the table", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 64), NEXT, u16::MAX);
        driver.make_available(queue, 0);
    }),
    ("a descriptor that is its own successor", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 64), NEXT, 0);
        driver.make_available(queue, 0);
    }),
    ("a loop of two", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 64), NEXT | WRITE, 1);
        driver.describe(queue, 1, (BUFFERS, 64), NEXT | WRITE, 0);
        driver.make_available(queue, 0);
    }),
    ("a readable buffer after a writable one", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 4096), NEXT | WRITE, 1);
        driver.describe(queue, 1, (BUFFERS, 4096), 0, 0);
        driver.make_available(queue, 0);
    }),
    ("a buffer outside memory", |driver, queue| {
        driver.describe(queue, 0, (MEMORY_END, 4096), WRITE, 0);
        driver.make_available(queue, 0);
    }),
    ("a buffer that ends outside memory", |driver, queue| {
        driver.describe(queue, 0, (MEMORY_END - 4095, 4096), 0, 0);
        driver.make_available(queue, 0);
    }),
    (
        "a buffer that wraps around the address space",
        |driver, queue| {
            driver.describe(queue, 0, (u64::MAX - 100, u32::MAX), WRITE, 0);
            driver.make_available(queue, 0);
        },
    ),
    ("a chain of more than 4 GiB", |driver, queue| {
        driver.describe(queue, 0, (0, u32::MAX), NEXT, 1);
        driver.describe(queue, 1, (0, u32::MAX), NEXT, 2);
        driver.describe(queue, 2, (0, 64), WRITE, 0);
        driver.make_available(queue, 0);
    }),
    (
        "an indirect table within an indirect table",
        |driver, queue| {
            driver.write(BUFFERS, &descriptor(BUFFERS, 16, INDIRECT, 0));
            driver.describe(queue, 0, (BUFFERS, 16), INDIRECT, 0);
            driver.make_available(queue, 0);
        },
    ),
    ("an indirect table of half a descriptor", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 24), INDIRECT, 0);
        driver.make_available(queue, 0);
    }),
    ("an indirect table outside memory", |driver, queue| {
        driver.describe(queue, 0, (MEMORY_END, 160), INDIRECT, 0);
        driver.make_available(queue, 0);
    }),
    ("an available index that jumps", |driver, queue| {
        let size = driver.rings[queue].size;
        driver.jump(queue, size + 1);
    }),
];

/// Each of [`TRICKS`], on each queue, must be the guest's error and nothing else, and a device that
/// is reset afterwards must serve the next driver.
pub(crate) fn assert_tricks_are_the_guests_error(device: &mut dyn VirtioDevice) {
    let queues = device.info().queue_sizes.len();
    for (name, trick) in TRICKS {
        for queue in 0..queues {
            let mut driver = Driver::start(device);
            trick(&mut driver, queue);
            let result = driver.kick(device, queue);
            assert!(
                matches!(result, Err(DeviceError::Guest { index, .. }) if index == queue),
                "{name}, queue {queue}: {result:?}"
            );
            device.reset();
        }
    }
}

/// A driver that offers the same chain again and again without getting it back must not make the
/// device hold more chains than the queue has.
pub(crate) fn assert_held_chains_are_bounded(
    device: &mut dyn VirtioDevice,
    queue: usize,
    buffer: Buffer,
) {
    let mut driver = Driver::start(device);
    let size = device.info().queue_sizes[queue];
    let write = if buffer.writable { WRITE } else { 0 };
    driver.describe(queue, 0, (buffer.address, buffer.len), write, 0);
    for _ in 0..size {
        driver.make_available(queue, 0);
    }
    let _ = driver.kick(device, queue).unwrap();
    driver.make_available(queue, 0);
    let result = driver.kick(device, queue);
    assert!(
        matches!(result, Err(DeviceError::Guest { .. })),
        "{result:?}"
    );
    device.reset();
}

/// One descriptor of a random table: mostly plausible, so that chains get somewhere.
fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        8 => BUFFERS..BUFFERS + 0x1000,
        1 => MEMORY_END - 0x100..MEMORY_END + 0x100,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => 0u32..0x200, 2 => 0u32..0x2_0000, 1 => any::<u32>()];
    let flags = prop_oneof![12 => 0u16..4, 1 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (address, len, flags, next)
}

/// A random driver: a table, what the buffers hold, and which heads it makes available on which
/// queue before each kick.
#[derive(Clone, Debug)]
pub(crate) struct Noise {
    table: Vec<(u64, u32, u16, u16)>,
    content: Vec<u8>,
    steps: Vec<(usize, Vec<u16>)>,
}

/// How many random drivers each device meets: each has memory and descriptors of its own.
pub(crate) fn noise_config() -> ProptestConfig {
    ProptestConfig {
        // A crash is told by what it prints; nothing is written into the source tree.
        failure_persistence: None,
        ..ProptestConfig::with_cases(64)
    }
}

pub(crate) fn any_noise(queues: usize) -> impl Strategy<Value = Noise> {
    let head = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (
        prop::collection::vec(any_descriptor(), 8),
        prop::collection::vec(prop_oneof![4 => 0u8..4, 1 => any::<u8>()], 0x400),
        prop::collection::vec((0..queues, prop::collection::vec(head, 0..6)), 1..12),
    )
        .prop_map(|(table, content, steps)| Noise {
            table,
            content,
            steps,
        })
}

/// Whatever a driver does, the device returns, and blames nobody but the guest.
pub(crate) fn assert_noise_is_survived(device: &mut dyn VirtioDevice, noise: &Noise) {
    let mut driver = Driver::start(device);
    for (index, (address, len, flags, next)) in (0..).zip(&noise.table) {
        for queue in 0..driver.queues.len() {
            driver.describe(queue, index, (*address, *len), *flags, *next);
        }
    }
    driver.write(BUFFERS, &noise.content);
    for (queue, heads) in &noise.steps {
        for head in heads {
            driver.make_available(*queue, *head);
        }
        match driver.kick(device, *queue) {
            Ok(_) => {}
            Err(DeviceError::Guest { .. }) => break,
            Err(error @ DeviceError::Host { .. }) => panic!("{error:?}"),
        }
        driver.turn(device, Duration::ZERO);
    }
    device.reset();
}
