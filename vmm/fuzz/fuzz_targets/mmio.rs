//! The registers of a virtio device, its rings, and what the event loop does, in any order.
#![no_main]


use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::bus::BusDevice;
use vmm::events::{Readiness, Source};
use vmm::fair_mutex::FairMutex;
use vmm::virtio::block::{Block, BlockOptions};
use vmm::virtio::transport::{KICK_TOKEN, Transport};
use vmm_fuzz::World;

const MEMORY_BYTES: usize = 0x1_0000;

/// What an honest driver of a disk writes, by register (virtio 1.2, section 4.2.2).
const HONEST: [(u64, u32); 12] = [
    (0x70, 1),
    (0x70, 3),
    (0x24, 1),
    (0x20, 1), // VERSION_1.
    (0x70, 11),
    (0x30, 0),
    (0x38, 16),
    (0x80, 0x1000),
    (0x90, 0x2000),
    (0xa0, 0x3000),
    (0x44, 1),
    (0x70, 15),
];

/// One thing that a guest can do.
#[derive(Arbitrary, Debug)]
enum Act {
    Write { register: u8, value: u32 },
    Small { register: u8, value: u8 },
    Read { register: u8 },
    Access { offset: u16, bytes: Vec<u8> },
    Remember { address: u16, bytes: Vec<u8> },
    Ring { address: u8, value: u16 },
    Kick { queue: u8 },
    Turn { token: u8 },
    Honest { steps: u8 },
}

fn transport(memory: &GuestMemoryMmap) -> FairMutex<Transport> {
    let file = tempfile::tempfile().expect("a file can be made");
    file.set_len(1 << 20).expect("a file can be made larger");
    let block = Block::new(file, BlockOptions::default()).expect("a file can be a disk");
    let (device, world) = (Box::new(block), Box::new(World::default()));
    let transport = Transport::new("disk0".to_owned(), device, memory.clone(), world);
    FairMutex::new(transport.expect("its queues are possible"))
}

fn act(transport: &FairMutex<Transport>, memory: &GuestMemoryMmap, act: Act) {
    let bus = |access: &dyn Fn(&mut Transport)| {
        access(&mut transport.lock());
    };
    let word = |register: u64, value: u32| {
        bus(&|transport| transport.write(register, &value.to_le_bytes()));
    };
    match act {
        Act::Write { register, value } => word(u64::from(register) << 2, value),
        Act::Small { register, value } => word(u64::from(register) << 2, value.into()),
        Act::Read { register } => bus(&|transport| transport.read(register.into(), &mut [0; 4])),
        Act::Access { offset, bytes } => bus(&|transport| {
            transport.write(offset.into(), &bytes);
            transport.read(offset.into(), &mut bytes.clone());
        }),
        Act::Remember { address, bytes } => {
            let _ = memory.write(&bytes, GuestAddress(address.into()));
        }
        Act::Ring { address, value } => {
            let _ = memory.write_obj(value, GuestAddress(0x2000 + u64::from(address)));
        }
        Act::Kick { queue } => {
            transport.on_ready(KICK_TOKEN + u32::from(queue), Readiness::READABLE)
        }
        Act::Turn { token } => transport.on_ready(token.into(), Readiness::READABLE),
        Act::Honest { steps } => {
            for (register, value) in HONEST.into_iter().take(steps.into()) {
                word(register, value);
            }
        }
    }
}

fuzz_target!(|acts: Vec<Act>| {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .expect("a little memory can be had");
    let transport = transport(&memory);
    for one in acts.into_iter().take(256) {
        act(&transport, &memory, one);
    }
});
