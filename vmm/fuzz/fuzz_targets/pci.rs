//! The configuration space and the window of a PCI function, its rings, and what the event loop does,
//! in any order.
#![no_main]

use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::bus::BusDevice;
use vmm::devices::ioapic::Message;
use vmm::events::{Readiness, Source};
use vmm::fair_mutex::FairMutex;
use vmm::layout;
use vmm::pci::bus::PciBus;
use vmm::virtio::block::{Block, BlockOptions};
use vmm::virtio::pci::interrupts::{Interrupts, Messages};
use vmm::virtio::pci::{Place, VirtioFunction};
use vmm::virtio::transport::{KICK_TOKEN, Transport};
use vmm_fuzz::World;

const MEMORY_BYTES: usize = 0x1_0000;

/// Device 1's configuration space, and the first window, from the start of the bus's range.
const SPACE: u64 = 1 << 15;
const WINDOW: u64 = layout::PCI_CONFIG_BYTES;

/// What an honest driver of a disk writes: where, how wide, what (virtio 1.2, section 4.1.4.3).
const HONEST: [(u64, usize, u64); 16] = [
    (SPACE + 4, 2, 6),
    (SPACE + 0x42, 2, 0x8000),
    (WINDOW + 0x4000, 8, 0xfee0_0000),
    (WINDOW + 0x4008, 8, 50),
    (WINDOW + 0x14, 1, 1),
    (WINDOW + 0x14, 1, 3),
    (WINDOW + 0x08, 4, 1),
    (WINDOW + 0x0c, 4, 1), // VERSION_1.
    (WINDOW + 0x14, 1, 11),
    (WINDOW + 0x1a, 2, 0),
    (WINDOW + 0x18, 2, 16),
    (WINDOW + 0x20, 8, 0x1000),
    (WINDOW + 0x28, 8, 0x2000),
    (WINDOW + 0x30, 8, 0x3000),
    (WINDOW + 0x1c, 2, 1),
    (WINDOW + 0x14, 1, 15),
];

/// One thing that a guest can do.
#[derive(Arbitrary, Debug)]
enum Act {
    Configure { register: u8, wide: u8, value: u32 },
    Common { offset: u8, wide: u8, value: u64 },
    Table { offset: u8, wide: u8, value: u64 },
    Access { offset: u32, wide: u8, value: u64 },
    Remember { address: u16, bytes: Vec<u8> },
    Ring { address: u8, value: u16 },
    Kick { queue: u8 },
    Turn { token: u8 },
    Honest { steps: u8 },
    /// Lets go of it, or has it taken away.
    Leave { from_bus: bool },
}

struct Nobody;

impl Messages for Nobody {
    fn send(&self, _message: Message) {}
}

struct Guest {
    bus: PciBus,
    function: Arc<Mutex<VirtioFunction>>,
    transport: Arc<FairMutex<Transport>>,
    memory: GuestMemoryMmap,
}

impl Guest {
    fn new() -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
            .expect("a little memory can be had");
        let file = tempfile::tempfile().expect("a file can be made");
        file.set_len(1 << 20).expect("a file can be made larger");
        let block = Block::new(file, BlockOptions::default()).expect("a file can be a disk");
        let interrupts = Arc::new(Mutex::new(Interrupts::new(1, Box::new(Nobody))));
        let (device, world) = (
            Box::new(block),
            Box::new(World {
                interrupts: Some(interrupts.clone()),
            }),
        );
        let transport = Transport::new("disk0".to_owned(), device, memory.clone(), world);
        let transport = Arc::new(FairMutex::new(transport.expect("its queues are possible")));
        let place = Place::default();
        let at = layout::PCI_MEMORY;
        let function = VirtioFunction::new(at, transport.clone(), interrupts, place);
        let function = Arc::new(Mutex::new(function));
        let mut bus = PciBus::new();
        bus.insert(1, function.clone());
        Guest {
            bus,
            function,
            transport,
            memory,
        }
    }

    /// Writes and reads there.
    fn access(&mut self, offset: u64, wide: u8, value: u64) {
        let wide = 1 << (wide % 4);
        let mut data = value.to_le_bytes();
        self.bus.write(offset, &data[..wide]);
        self.bus.read(offset, &mut data[..wide]);
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Configure {
                register,
                wide,
                value,
            } => self.access(SPACE + u64::from(register), wide % 3, value.into()),
            Act::Common {
                offset,
                wide,
                value,
            } => self.access(WINDOW + u64::from(offset % 0x40), wide, value),
            Act::Table {
                offset,
                wide,
                value,
            } => self.access(WINDOW + 0x4000 + u64::from(offset), wide, value),
            Act::Access {
                offset,
                wide,
                value,
            } => {
                let range = PciBus::range();
                self.access(u64::from(offset) % (range.end - range.start), wide, value);
            }
            Act::Remember { address, bytes } => {
                let _ = self.memory.write(&bytes, GuestAddress(address.into()));
            }
            Act::Ring { address, value } => {
                let at = GuestAddress(0x2000 + u64::from(address));
                let _ = self.memory.write_obj(value, at);
            }
            Act::Kick { queue } => {
                let token = KICK_TOKEN + u32::from(queue);
                self.transport.on_ready(token, Readiness::READABLE);
            }
            Act::Turn { token } => self.transport.on_ready(token.into(), Readiness::READABLE),
            Act::Honest { steps } => {
                for (offset, wide, value) in HONEST.into_iter().take(steps.into()) {
                    self.bus.write(offset, &value.to_le_bytes()[..wide]);
                }
            }
            Act::Leave { from_bus } => {
                if from_bus {
                    self.bus.remove(1);
                }
                self.transport.lock().retire();
            }
        }
    }
}

fuzz_target!(|acts: Vec<Act>| {
    let mut guest = Guest::new();
    for act in acts.into_iter().take(256) {
        guest.act(act);
    }
    // What it has become can be saved, and another becomes it.
    let state = guest.function.lock().expect("nothing panics").save();
    let other = Guest::new();
    let mut function = other.function.lock().expect("nothing panics");
    function.restore(&state).expect("its own state");
    assert_eq!(function.save(), state);
});
