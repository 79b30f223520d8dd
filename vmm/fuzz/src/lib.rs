//! A guest that does whatever the fuzzer says to a device's queues, and a machine around a device.
//!
//! `cargo xtask fuzz` builds the targets with the instrumentation that libFuzzer learns from, and runs
//! them.
//!
//! UNSAFETY: a device names the descriptors that it waits for by number; they are polled as such.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::virtio::pci::interrupts::Interrupts;
use vmm::virtio::transport::{Kick, Platform};
use vmm::virtio::{DeviceError, Interest, Signal, VirtioDevice};

/// The guest's memory: small, so that its edges are met, with a hole as that of the devices.
const MEMORY_BYTES: usize = 0x4_0000;
const HOLE_END: u64 = 0x5_0000;
const MEMORY_AFTER_HOLE_BYTES: usize = 0x1_0000;

/// Each queue's rings have this much room; buffers lie behind all of them.
const QUEUE_STRIDE: u64 = 0x4000;
const BUFFERS: u64 = 0x2_0000;

/// The most steps of one run.
const STEPS_MAX: usize = 64;

const WRITE: u16 = 2;

/// One thing that a driver can do.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Writes a descriptor; its buffer is where the buffers are.
    Describe {
        index: u8,
        buffer: u8,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// Writes a descriptor as it likes.
    Misdescribe {
        index: u8,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    /// Offers a chain of one or two buffers with this content and room, as honest drivers do.
    Offer {
        content: Vec<u8>,
        room: u16,
    },
    /// Writes anywhere, the rings included.
    Write {
        address: u32,
        bytes: Vec<u8>,
    },
    /// Makes a head available.
    Available {
        head: u16,
    },
    /// Moves the available index.
    Jump {
        by: u16,
    },
    Kick,
    /// The device's own descriptors are seen to.
    Turn,
    /// The driver starts anew.
    Reset,
}

/// What a driver does, and to which queue.
#[derive(Arbitrary, Debug)]
pub struct Script {
    features: u64,
    steps: Vec<(u8, Step)>,
}

/// Does it. Any way to return is fine; a panic, a fault or a hang is not.
pub fn run(device: &mut dyn VirtioDevice, script: Script) {
    let info = device.info();
    let mut guest = Guest::new(&info.queue_sizes);
    let features = script.features & info.features;
    if device.activate(features).is_err() {
        return;
    }
    for (queue, step) in script.steps.into_iter().take(STEPS_MAX) {
        let queue = usize::from(queue) % guest.queues.len();
        if let Step::Reset = step {
            device.reset();
            guest = Guest::new(&info.queue_sizes);
            if device.activate(features).is_err() {
                return;
            }
            continue;
        }
        match guest.step(device, queue, step) {
            Ok(()) => {}
            Err(DeviceError::Guest { .. }) => break,
            Err(error) => panic!("the host is blamed: {error:?}"),
        }
    }
    device.reset();
}

struct Guest {
    memory: GuestMemoryMmap,
    queues: Vec<Queue>,
    available: Vec<u16>,
    next_descriptor: u16,
}

impl Guest {
    fn new(sizes: &[u16]) -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), MEMORY_BYTES),
            (GuestAddress(HOLE_END), MEMORY_AFTER_HOLE_BYTES),
        ])
        .expect("a little memory can be had");
        let queues = (0..).zip(sizes).map(|(number, size)| {
            let [descriptors, available, used] = rings(number, *size).map(|at| at as u32);
            let mut queue = Queue::new(*size).expect("devices have possible queues");
            queue.set_desc_table_address(Some(descriptors), Some(0));
            queue.set_avail_ring_address(Some(available), Some(0));
            queue.set_used_ring_address(Some(used), Some(0));
            queue.set_ready(true);
            queue
        });
        Guest {
            memory,
            queues: queues.collect(),
            available: vec![0; sizes.len()],
            next_descriptor: 0,
        }
    }

    fn step(
        &mut self,
        device: &mut dyn VirtioDevice,
        queue: usize,
        step: Step,
    ) -> Result<(), DeviceError> {
        match step {
            Step::Describe {
                index,
                buffer,
                len,
                flags,
                next,
            } => {
                let address = BUFFERS + 256 * u64::from(buffer);
                self.describe(
                    queue,
                    index.into(),
                    (address, len.into()),
                    flags.into(),
                    next.into(),
                );
            }
            Step::Misdescribe {
                index,
                address,
                len,
                flags,
                next,
            } => self.describe(queue, index.into(), (address, len), flags, next),
            Step::Offer { content, room } => self.offer(queue, &content, room),
            Step::Write { address, bytes } => self.write(address.into(), &bytes),
            Step::Available { head } => self.make_available(queue, head),
            Step::Jump { by } => self.jump(queue, by),
            Step::Kick => {
                let _ = device.process(queue, &mut self.queues, &self.memory)?;
            }
            Step::Turn => self.turn(device)?,
            Step::Reset => {}
        }
        Ok(())
    }

    fn size(&self, queue: usize) -> u16 {
        self.queues[queue].size()
    }

    /// Writes what there is memory for.
    fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    fn describe(
        &self,
        queue: usize,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let [table, ..] = rings(queue, self.size(queue));
        let bytes = [
            &address.to_le_bytes()[..],
            &len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ]
        .concat();
        self.write(table + 16 * u64::from(index % self.size(queue)), &bytes);
    }

    fn offer(&mut self, queue: usize, content: &[u8], room: u16) {
        let first = self.next_descriptor % self.size(queue);
        let second = (first + 1) % self.size(queue);
        self.next_descriptor = self.next_descriptor.wrapping_add(2);
        let at = BUFFERS + 512 * u64::from(first);
        self.write(at, content);
        let len = u32::try_from(content.len()).unwrap_or(0);
        match (content.is_empty(), room) {
            (true, _) => self.describe(queue, first, (at, room.into()), WRITE, 0),
            (false, 0) => self.describe(queue, first, (at, len), 0, 0),
            (false, _) => {
                self.describe(queue, first, (at, len), 1, second);
                self.describe(queue, second, (at + 256, room.into()), WRITE, 0);
            }
        }
        self.make_available(queue, first);
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let [_, ring, _] = rings(queue, self.size(queue));
        let slot = self.available[queue] % self.size(queue);
        self.write(ring + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.jump(queue, 1);
    }

    fn jump(&mut self, queue: usize, by: u16) {
        let [_, ring, _] = rings(queue, self.size(queue));
        self.available[queue] = self.available[queue].wrapping_add(by);
        self.write(ring + 2, &self.available[queue].to_le_bytes());
    }

    fn turn(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DeviceError> {
        for interest in device.interests() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, interest.readable);
            flags.set(PollFlags::POLLOUT, interest.writable);
            let mut fds = [PollFd::new(borrow(interest.fd), flags)];
            if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
                let _ = device.on_ready(interest.token, &mut self.queues, &self.memory)?;
            }
        }
        Ok(())
    }
}

/// A machine around a device that takes everything.
#[derive(Default)]
pub struct World {
    /// What a PCI function interrupts by.
    pub interrupts: Option<Arc<Mutex<Interrupts>>>,
}

impl Platform for World {
    fn interrupt(&self, told: Signal) -> io::Result<()> {
        if let Some(interrupts) = &self.interrupts {
            interrupts.lock().expect("nothing panics").raise(told);
        }
        Ok(())
    }
    fn watch_kicks(&mut self, _queues: usize) -> io::Result<()> {
        Ok(())
    }
    fn unwatch_kicks(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn kick(&self, _queue: usize, _kick: Kick) -> io::Result<()> {
        Ok(())
    }
    fn watch(&mut self, _old: &[Interest], _new: &[Interest]) -> io::Result<()> {
        Ok(())
    }
    fn fail(&self, error: DeviceError) {
        panic!("the host is blamed: {error:?}");
    }
}

/// Where a queue's descriptors, available ring and used ring are.
fn rings(queue: usize, size: u16) -> [u64; 3] {
    let base = QUEUE_STRIDE * queue as u64;
    let available = base + 16 * u64::from(size);
    [base, available, available + 2 * u64::from(size) + 8]
}

#[expect(unsafe_code, reason = "interests name descriptors by number")]
fn borrow<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: it is the descriptor of a device that outlives the call it is borrowed for.
    unsafe { BorrowedFd::borrow_raw(fd) }
}
