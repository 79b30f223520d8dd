//! The I/O APIC (Intel 82093AA): which processor hears of a device's interrupt, and as what.
//!
//! It is emulated here since KVM's own costs every machine milliseconds at its start and end. It is
//! never in the path of an interrupt: what the guest programs is handed on as a message that the
//! kernel sends by itself whenever the device signals.
//!
//! Every line of this machine is edge-triggered, and so is every message, whatever the guest asks:
//! there is no level to end, and no end of interrupt to wait for.

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::layout::PINS;
use crate::virtio::state::{StateError, expect};

/// What a pin sends: an MSI's address and data (Intel SDM volume 3, section 11.11).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    pub address: u32,
    pub data: u32,
}

/// Where pins lead to.
pub trait Routes: Send {
    /// From now on `pin` sends `message`, or nothing if there is none. An interrupt that comes
    /// while there is none is kept, and sent when there is a message again.
    fn set(&mut self, pin: u32, message: Option<Message>);
}

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_REDIRECTION: u8 = 0x10;

/// Version 0x11, and the number of the last pin.
const VERSION: u32 = 0x11 | (PINS - 1) << 16;

/// The bits of the chip's number in its register.
const ID: u32 = 0x0f00_0000;

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0x700;
const DESTINATION_MODE: u64 = 1 << 11;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR, which the guest cannot write.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// The chip in a snapshot.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    pub id: u32,
    pub select: u8,
    /// One for each pin.
    pub redirections: Vec<u64>,
}

/// The chip. All pins are masked at first.
pub struct IoApic<R> {
    routes: R,
    id: u32,
    select: u8,
    redirections: [u64; PINS as usize],
}

opaque_debug!(IoApic<R>);

impl<R: Routes> IoApic<R> {
    /// A chip whose pins lead to `routes`.
    pub fn new(routes: R) -> Self {
        Self {
            routes,
            id: 0,
            select: 0,
            redirections: [MASKED; PINS as usize],
        }
    }

    /// What [`restore`](Self::restore) takes.
    pub fn save(&self) -> IoApicState {
        IoApicState {
            id: self.id,
            select: self.select,
            redirections: self.redirections.to_vec(),
        }
    }

    /// A new chip becomes the one that was saved. From here on interrupts reach processors, whose
    /// local APICs must be what they will be.
    pub fn restore(&mut self, state: &IoApicState) -> Result<(), StateError> {
        let pins = state.redirections.len();
        expect("number of pins", &pins, &self.redirections.len())?;
        self.id = state.id & ID;
        self.select = state.select;
        for ((pin, new), redirection) in (0..).zip(&state.redirections).zip(&mut self.redirections)
        {
            *redirection = new & !READ_ONLY;
            if message(*new).is_some() {
                self.routes.set(pin, message(*new));
            }
        }
        Ok(())
    }

    fn register(&self) -> u32 {
        match self.select {
            REGISTER_ID => self.id,
            REGISTER_VERSION => VERSION,
            _ => match self.selected_redirection() {
                Some((pin, shift)) => low_half(self.redirections[pin] >> shift),
                None => 0,
            },
        }
    }

    fn set_register(&mut self, value: u32) {
        if self.select == REGISTER_ID {
            self.id = value & ID;
        } else if let Some((pin, shift)) = self.selected_redirection() {
            let old = self.redirections[pin];
            let new = old & !(0xffff_ffff << shift) | u64::from(value) << shift;
            self.redirections[pin] = new & !READ_ONLY;
            if message(old) != message(new) {
                let number = u32::try_from(pin).expect("less than PINS");
                self.routes.set(number, message(new));
            }
        }
    }

    /// The pin of the selected register, and where in its redirection entry the register lies.
    fn selected_redirection(&self) -> Option<(usize, u32)> {
        let index = usize::from(self.select.checked_sub(REGISTER_REDIRECTION)?);
        let half = if index % 2 == 0 { 0 } else { 32 };
        (index / 2 < self.redirections.len()).then_some((index / 2, half))
    }
}

/// What an entry sends, if it is not masked.
fn message(entry: u64) -> Option<Message> {
    let destination = low_half(entry >> 56);
    let mode = low_half((entry & DESTINATION_MODE) >> 9);
    (entry & MASKED == 0).then_some(Message {
        address: crate::layout::LOCAL_APIC | destination << 12 | mode,
        data: low_half(entry & (VECTOR | DELIVERY_MODE)),
    })
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("masked")
}

impl<R: Routes> BusDevice for IoApic<R> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.register(),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        let length = data.len().min(bytes.len());
        data[..length].copy_from_slice(&bytes[..length]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            (SELECT, _) => self.select = data.first().copied().unwrap_or_default(),
            (WINDOW, Ok(value)) => self.set_register(u32::from_le_bytes(value)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Wires(Vec<(u32, Option<Message>)>);

    impl Routes for Wires {
        fn set(&mut self, pin: u32, message: Option<Message>) {
            self.0.push((pin, message));
        }
    }

    fn set(chip: &mut IoApic<Wires>, register: u8, value: u32) {
        chip.write(SELECT, &[register, 0, 0, 0]);
        chip.write(WINDOW, &value.to_le_bytes());
    }

    fn get(chip: &mut IoApic<Wires>, register: u8) -> u32 {
        chip.write(SELECT, &[register, 0, 0, 0]);
        let mut data = [0; 4];
        chip.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_pin_sends_what_its_entry_says_from_unmasking_to_masking() {
        let mut chip = IoApic::new(Wires::default());
        set(&mut chip, 0x1b, 0x0300_0000); // Pin 5 to processor 3,
        set(&mut chip, 0x1a, 0x0001_0931); // masked,
        set(&mut chip, 0x1a, 0x0000_0931); // unmasked: vector 0x31, lowest priority, logical.
        set(&mut chip, 0x1a, 0x0000_8931); // Level-triggered changes nothing here.
        set(&mut chip, 0x1b, 0x0100_0000);
        set(&mut chip, 0x1a, 0x0001_0931);
        let message = |address| {
            Some(Message {
                address,
                data: 0x131,
            })
        };
        assert_eq!(
            chip.routes.0,
            [
                (5, message(0xfee0_3004)),
                (5, message(0xfee0_1004)),
                (5, None)
            ]
        );
        assert_eq!(get(&mut chip, 0x1b), 0x0100_0000);
    }

    #[test]
    fn a_restored_chip_has_the_registers_and_the_messages_of_the_saved_one() {
        let mut chip = IoApic::new(Wires::default());
        set(&mut chip, 0, 0x0300_0000);
        set(&mut chip, 0x1b, 0x0100_0000);
        set(&mut chip, 0x1a, 0x0000_0931);
        set(&mut chip, 0x12, 0x0001_0932);
        let state = chip.save();

        let mut other = IoApic::new(Wires::default());
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        assert_eq!(other.routes.0, chip.routes.0[..1]);
        let mut short = state;
        short.redirections.pop();
        other.restore(&short).unwrap_err();
    }

    #[test]
    fn registers_read_as_the_chip_has_them() {
        let mut chip = IoApic::new(Wires::default());
        set(&mut chip, 0, u32::MAX);
        set(&mut chip, 1, u32::MAX);
        set(&mut chip, 0x10, u32::MAX);
        set(&mut chip, 0x40, u32::MAX);
        set(&mut chip, 0xff, u32::MAX);
        for (register, want) in [
            (0, 0x0f00_0000),
            (1, 0x0017_0011),
            (2, 0),
            (0x10, 0xffff_afff),
            (0x3e, 0x0001_0000),
            (0x40, 0),
            (0xff, 0),
        ] {
            assert_eq!(get(&mut chip, register), want, "{register:#x}");
        }
    }
}
