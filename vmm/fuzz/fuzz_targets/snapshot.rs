//! State files of snapshots: cut, damaged, or made up with a checksum that fits; and what devices make
//! of what is in them.
#![no_main]

use std::fs::File;
use std::os::unix::net::UnixListener;

use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::bus::BusDevice;
use vmm::devices::ioapic::{IoApic, Message, Routes};
use vmm::devices::serial::{Output, SerialPort};
use vmm::events::{Readiness, Source, event};
use vmm::fair_mutex::FairMutex;
use vmm::hotplug::slots::Slots;
use vmm::memory::{MemoryPlan, RegionOrigin};
use vmm::plan::Places;
use vmm::snapshot::file;
use vmm::snapshot::layers;
use vmm::snapshot::memory::{self, Run};
use vmm::snapshot::restore::Restore;
use vmm::snapshot::state::{State, VirtioState};
use vmm::spec;
use vmm::virtio::VirtioDevice;
use vmm::virtio::balloon::Balloon;
use vmm::virtio::block::{Block, BlockOptions};
use vmm::virtio::mem::{BLOCK_BYTES, Mem};
use vmm::virtio::rng::Rng;
use vmm::virtio::transport::{KICK_TOKEN, Transport};
use vmm::virtio::vsock::{Vsock, VsockHost};
use vmm_fuzz::World;

const MEMORY_BYTES: usize = 0x2_0000;
const DISK_BYTES: u64 = 1 << 20;
const SPARE_BYTES: usize = 1 << 20;

/// The most devices of a state that are tried.
const DEVICES_MAX: usize = 8;

struct Nowhere;

impl Routes for Nowhere {
    fn set(&mut self, _pin: u32, _message: Option<Message>) {}
}

fn disk() -> File {
    let file = tempfile::tempfile().expect("a file can be made");
    file.set_len(DISK_BYTES).expect("a file can be made larger");
    file
}

/// A device of that type (virtio 1.2, section 5), if it needs no more of the host than a file.
fn device(id: u32) -> Option<Box<dyn VirtioDevice>> {
    let plan = MemoryPlan {
        boot_bytes: DISK_BYTES,
        hotplug_bytes: 0,
        huge_pages: spec::HugePages::Transparent,
    };
    Some(match id {
        2 => Box::new(Block::new(disk(), BlockOptions::default()).expect("a file can be a disk")),
        4 => Box::new(Rng::new()),
        5 => Box::new(Balloon::new(spec::Balloon::default(), &plan).expect("an event can be made")),
        19 => {
            let directory = tempfile::tempdir().expect("a directory can be made");
            let listener = UnixListener::bind(directory.path().join("v")).expect("it is new");
            let host = VsockHost::inherited(listener).expect("it listens");
            Box::new(Vsock::new(3, host, Vec::new()).expect("it is complete"))
        }
        24 => Box::new(Mem::new(0..8 * BLOCK_BYTES).expect("an event can be made")),
        _ => return None,
    })
}

fn restore_device(state: &VirtioState, memory: &GuestMemoryMmap) {
    let Some(device) = device(state.transport.device_id) else {
        return;
    };
    let queues = device.info().queue_sizes.len();
    let transport = Transport::new(
        "it".into(),
        device,
        memory.clone(),
        Box::new(World::default()),
    );
    let mut transport = transport.expect("its queues are possible");
    if transport.restore(&state.transport).is_err() {
        return;
    }
    transport
        .save()
        .expect("what was restored can be saved again");
    let transport = FairMutex::new(transport);
    for queue in (0..queues).filter_map(|queue| u32::try_from(queue).ok()) {
        transport.on_ready(KICK_TOKEN + queue, Readiness::READABLE);
    }
    let mut transport = transport.lock();
    transport.hold();
    transport.release();
    transport.write(0x70, &0_u32.to_le_bytes());
}

fn restore(state: &State, memory: &GuestMemoryMmap) {
    // Both outcomes are fine, of everything that is tried here.
    if let Ok(places) = Places::saved(state) {
        let _ = Restore::default().apply(state.machine.clone(), &places);
    }
    if let Some(slots) = state.devices.slots {
        let line = event().expect("an event can be made");
        Slots::new(line).restore(slots);
    }
    let _ = IoApic::new(Nowhere).restore(&state.devices.io_apic);
    let line = event().expect("an event can be made");
    let _ = SerialPort::restored(line, Output::Discard, &state.devices.serial);
    for device in state.devices.virtio.iter().take(DEVICES_MAX) {
        restore_device(device, memory);
    }
    if let Some(written) = &state.memory.written {
        put_over(written);
    }
}

/// Pages of a memory file of [`DISK_BYTES`], over memory of its own: some of it is the file's from then on.
fn put_over(written: &[Run]) {
    let file = disk();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SPARE_BYTES)]);
    let memory = memory.expect("it can be mapped");
    let mut origins = [RegionOrigin::Nothing];
    let least = layers::mapped_from(written.iter());
    let _ = layers::put_over(&memory, &mut origins, &file, written, least);
}

fuzz_target!(|text: &[u8]| {
    // As it is, it is refused nearly always.
    let _ = file::parse(text);
    let signed = [text, file::checksum(text).as_bytes()].concat();
    let Ok((header, state)) = file::parse(&signed) else {
        return;
    };
    memory::check(&disk(), &header.id, &state.memory.regions).expect_err("it is nobody's");
    let regions = [(GuestAddress(0), MEMORY_BYTES)];
    let memory = GuestMemoryMmap::from_ranges(&regions).expect("a little memory can be had");
    restore(&state, &memory);
});
