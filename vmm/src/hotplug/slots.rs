//! Which devices of the PCI bus come and go: three words with a bit for each slot, as registers that
//! methods of the ACPI tables read and write (`arch::x86_64::acpi::hotplug`).
//!
//! A read of the first two takes what it gives: which devices have come, which are asked to leave. A
//! write to the third lets devices leave; those that were not asked stay.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Offsets of registers, 4 bytes each.
pub const COME: u64 = 0;
pub const ASKED: u64 = 4;
pub const LEAVE: u64 = 8;
/// The bytes of all of them.
pub const REGISTER_BYTES: u64 = 12;

/// The words, and the line by which the guest hears that it is to look.
#[derive(Debug)]
pub struct Slots {
    state: Mutex<SlotsState>,
    line: EventFd,
}

/// The words in a snapshot; bit N is slot N.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SlotsState {
    /// Devices that have come, of which the guest has not heard.
    pub come: u32,
    /// Devices that are asked to leave, of which the guest has not heard.
    pub asked: u32,
    /// Devices that may leave, and places of devices that were taken away until the guest knows.
    pub leaving: u32,
}

impl Slots {
    /// Nobody comes or goes.
    pub fn new(line: EventFd) -> Slots {
        Slots {
            state: Mutex::default(),
            line,
        }
    }

    /// There is a device in `slot` now.
    pub fn come(&self, slot: u32) {
        let mut state = self.lock();
        state.come |= bit(slot);
        // Whoever was there before it was asked, perhaps in the very moment of leaving.
        state.asked &= !bit(slot);
        state.leaving &= !bit(slot);
        drop(state);
        self.tell();
    }

    /// The device in `slot` is asked to leave, once more if it was before.
    pub fn ask(&self, slot: u32) {
        let mut state = self.lock();
        state.asked |= bit(slot);
        state.leaving |= bit(slot);
        drop(state);
        self.tell();
    }

    /// Places that are not free although no device may be there: a guest that has not yet let go of the
    /// one that was taken away would take the next one in that place for it.
    pub fn reserved(&self) -> u32 {
        self.lock().leaving
    }

    /// What [`restore`](Self::restore) takes.
    pub fn save(&self) -> SlotsState {
        *self.lock()
    }

    /// The words become those that were saved. A guest that has not looked yet is told again.
    pub fn restore(&self, state: SlotsState) {
        *self.lock() = state;
        if state.come | state.asked != 0 {
            self.tell();
        }
    }

    /// Which of these devices may leave; they do, and are forgotten.
    fn let_go(&self, wanted: u32) -> u32 {
        let mut state = self.lock();
        let gone = wanted & state.leaving;
        state.come &= !gone;
        state.asked &= !gone;
        state.leaving &= !gone;
        gone
    }

    fn tell(&self) {
        // A full counter is an interrupt that is pending.
        let _ = self.line.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, SlotsState> {
        self.state.lock().expect("nothing panics in here")
    }
}

fn bit(slot: u32) -> u32 {
    1_u32.checked_shl(slot).unwrap_or(0)
}

/// The registers.
pub struct SlotRegisters {
    slots: Arc<Slots>,
    /// Is told of each slot whose device leaves.
    leave: Box<dyn Fn(u32) + Send>,
}

opaque_debug!(SlotRegisters);

impl SlotRegisters {
    /// Registers of `slots`.
    pub fn new(slots: Arc<Slots>, leave: Box<dyn Fn(u32) + Send>) -> SlotRegisters {
        SlotRegisters { slots, leave }
    }
}

impl BusDevice for SlotRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Ok(place) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let mut state = self.slots.lock();
        let taken = match offset {
            COME => std::mem::take(&mut state.come),
            ASKED => std::mem::take(&mut state.asked),
            _ => 0,
        };
        *place = taken.to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (LEAVE, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) else {
            return;
        };
        let gone = self.slots.let_go(u32::from_le_bytes(word));
        for slot in (0..u32::BITS).filter(|slot| gone & bit(*slot) != 0) {
            (self.leave)(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::event;

    fn registers() -> (Arc<Slots>, EventFd, SlotRegisters, Arc<Mutex<Vec<u32>>>) {
        let line = event().unwrap();
        let slots = Arc::new(Slots::new(line.try_clone().unwrap()));
        let gone: Arc<Mutex<Vec<u32>>> = Arc::default();
        let seen = gone.clone();
        let leave = Box::new(move |slot| seen.lock().unwrap().push(slot));
        let registers = SlotRegisters::new(slots.clone(), leave);
        (slots, line, registers, gone)
    }

    fn read(registers: &mut SlotRegisters, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_hears_of_each_change_once() {
        let (slots, line, mut registers, gone) = registers();
        slots.come(3);
        slots.come(5);
        slots.ask(1);
        assert_eq!(line.read().unwrap(), 3);
        assert_eq!(read(&mut registers, COME), 1 << 3 | 1 << 5);
        assert_eq!(read(&mut registers, COME), 0);
        assert_eq!(read(&mut registers, ASKED), 1 << 1);
        assert_eq!(read(&mut registers, ASKED), 0);
        registers.write(LEAVE, &2_u32.to_le_bytes());
        assert_eq!(*gone.lock().unwrap(), [1]);
    }

    #[test]
    fn devices_that_were_not_asked_stay_and_none_leaves_twice() {
        let (slots, _line, mut registers, gone) = registers();
        slots.ask(2);
        for (offset, data) in [
            (COME, &[0xff; 4][..]),
            (LEAVE, &[0xff; 2]),
            (LEAVE, &[0xff; 8]),
            (LEAVE + 1, &[0xff; 4]),
            (LEAVE, &[0xfb, 0xff, 0xff, 0xff]),
        ] {
            registers.write(offset, data);
            assert!(gone.lock().unwrap().is_empty(), "{offset} {data:?}");
        }
        registers.write(LEAVE, &[0xff; 4]);
        registers.write(LEAVE, &[0xff; 4]);
        assert_eq!(*gone.lock().unwrap(), [2]);
        assert_eq!(slots.save(), SlotsState::default());
    }

    #[test]
    fn a_device_is_not_asked_to_leave_in_place_of_the_one_before() {
        let (slots, _line, mut registers, gone) = registers();
        slots.ask(2);
        slots.come(2);
        assert_eq!(read(&mut registers, ASKED), 0);
        registers.write(LEAVE, &[0xff; 4]);
        assert!(gone.lock().unwrap().is_empty());
    }

    #[test]
    fn a_place_is_reserved_until_the_guest_has_let_go() {
        let (slots, _line, mut registers, gone) = registers();
        slots.ask(7);
        assert_eq!(slots.reserved(), 1 << 7);
        assert_eq!(read(&mut registers, ASKED), 1 << 7);
        assert_eq!(slots.reserved(), 1 << 7);
        registers.write(LEAVE, &[0xff; 4]);
        assert_eq!((slots.reserved(), &*gone.lock().unwrap()), (0, &vec![7]));
    }

    #[test]
    fn what_a_guest_has_not_heard_it_is_told_after_a_restore() {
        let (slots, _line, _, _) = registers();
        slots.come(4);
        slots.ask(6);
        let (other, line, mut registers, _) = registers();
        other.restore(slots.save());
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&mut registers, COME), 1 << 4);
        other.restore(SlotsState::default());
        assert!(line.read().is_err(), "there is nothing to tell");
    }
}
