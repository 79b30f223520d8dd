//! What a guest reaches by registers and is no virtio device: the serial port, the I/O APIC, which
//! devices come and go, the guest's reports, and the ways to end.
#![no_main]

use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm::bus::BusDevice;
use vmm::devices::guest_status::{GuestStatus, Readiness, Reports};
use vmm::devices::ioapic::{IoApic, Message, Routes};
use vmm::devices::keyboard::KeyboardController;
use vmm::devices::power::PowerRegisters;
use vmm::devices::serial::{Output, SerialPort};
use vmm::events::event;
use vmm::exit::ExitSwitch;
use vmm::hotplug::slots::{SlotRegisters, Slots};
use vmm::layout::PINS;

/// The most acts of one run.
const ACTS_MAX: usize = 256;

/// One thing that a guest can do, or a client of the machine.
#[derive(Arbitrary, Debug)]
enum Act {
    Write {
        device: Device,
        offset: u8,
        bytes: Vec<u8>,
    },
    /// As wide as drivers do.
    Word {
        device: Device,
        offset: u8,
        value: u32,
    },
    Read {
        device: Device,
        offset: u8,
        bytes: u8,
    },
    /// A device comes to this place.
    Come(u8),
    /// The device there is asked to leave.
    Ask(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Device {
    Serial,
    IoApic,
    Slots,
    Status,
    Keyboard,
    Power,
}

/// Lines that lead nowhere.
struct Nowhere;

impl Routes for Nowhere {
    fn set(&mut self, pin: u32, _message: Option<Message>) {
        assert!(pin < PINS, "there is no pin {pin}");
    }
}

struct Machine {
    serial: SerialPort,
    io_apic: IoApic<Nowhere>,
    slots: Arc<Slots>,
    /// Places that were asked to be left and have not been: a bit for each.
    asked: Arc<Mutex<u32>>,
    slot_registers: SlotRegisters,
    status: GuestStatus,
    keyboard: KeyboardController,
    power: PowerRegisters,
}

impl Machine {
    fn new() -> Machine {
        let line = || event().expect("an event can be made");
        let exit = ExitSwitch::new().expect("an event can be made");
        let readiness = Readiness::new().expect("an event can be made");
        let slots = Arc::new(Slots::new(line()));
        let asked: Arc<Mutex<u32>> = Arc::default();
        let known = asked.clone();
        let leave = Box::new(move |slot: u32| {
            let mut asked = known.lock().expect("nothing panics");
            assert!(*asked & 1 << slot != 0, "{slot} leaves unasked");
            *asked &= !(1 << slot);
        });
        Machine {
            serial: SerialPort::new(line(), Output::Discard),
            io_apic: IoApic::new(Nowhere),
            slot_registers: SlotRegisters::new(slots.clone(), leave),
            slots,
            asked,
            status: GuestStatus::new(Reports::new(exit.clone(), readiness)),
            keyboard: KeyboardController::new(exit.clone()),
            power: PowerRegisters::new(exit),
        }
    }

    fn device(&mut self, device: Device) -> &mut dyn BusDevice {
        match device {
            Device::Serial => &mut self.serial,
            Device::IoApic => &mut self.io_apic,
            Device::Slots => &mut self.slot_registers,
            Device::Status => &mut self.status,
            Device::Keyboard => &mut self.keyboard,
            Device::Power => &mut self.power,
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Write {
                device,
                offset,
                bytes,
            } => self.device(device).write(offset.into(), &bytes),
            Act::Word {
                device,
                offset,
                value,
            } => self
                .device(device)
                .write(offset.into(), &value.to_le_bytes()),
            Act::Read {
                device,
                offset,
                bytes,
            } => {
                let mut data = vec![0; bytes.into()];
                self.device(device).read(offset.into(), &mut data);
            }
            Act::Come(slot) => {
                *self.asked.lock().expect("nothing panics") &= !(1 << (slot % 32));
                self.slots.come(u32::from(slot % 32));
            }
            Act::Ask(slot) => {
                *self.asked.lock().expect("nothing panics") |= 1 << (slot % 32);
                self.slots.ask(u32::from(slot % 32));
            }
        }
    }

    /// Whatever the guest has made of them, they can be saved and restored.
    fn save(&self) {
        let saved = self.io_apic.save();
        let mut other = IoApic::new(Nowhere);
        other.restore(&saved).expect("it was one");
        assert_eq!(other.save(), saved);
        let line = event().expect("an event can be made");
        SerialPort::restored(line, Output::Discard, &self.serial.save()).expect("it was one");
    }
}

fuzz_target!(|acts: Vec<Act>| {
    let mut machine = Machine::new();
    for act in acts.into_iter().take(ACTS_MAX) {
        machine.act(act);
    }
    machine.save();
});
