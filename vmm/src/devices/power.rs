//! The registers by which a guest with ACPI switches itself off or resets (ACPI 6.5, sections
//! 4.8.3.7 sleep control, 4.8.3.8 sleep status, 4.8.3.6 reset).

use crate::bus::BusDevice;
use crate::control::{ExitReason, ExitStatus};
use crate::exit::ExitSwitch;

/// What a guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of "soft off", as the `_S5` object tells the guest.
pub const SOFT_OFF: u8 = 5;

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// Sleep control, sleep status and reset, a byte each. All read as zeroes.
#[derive(Debug)]
pub struct PowerRegisters {
    exit: ExitSwitch,
}

impl PowerRegisters {
    /// Registers that throw `exit`.
    pub fn new(exit: ExitSwitch) -> Self {
        Self { exit }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        let reason = match (u16::try_from(offset), data) {
            (Ok(SLEEP_CONTROL), [value])
                if *value == SLEEP_ENABLE | SOFT_OFF << SLEEP_TYPE_SHIFT =>
            {
                ExitReason::PowerOff
            }
            (Ok(RESET), [RESET_VALUE]) => ExitReason::Reset,
            _ => return,
        };
        self.exit.end(ExitStatus::new(reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_soft_off_and_reset_end_the_machine() {
        for (offset, data, want) in [
            (0, &[0x34][..], Some(ExitReason::PowerOff)),
            (0, &[0x14], None),
            (0, &[0x24], None),
            (0, &[0x34, 0], None),
            (1, &[0x34], None),
            (2, &[1], Some(ExitReason::Reset)),
            (2, &[0], None),
        ] {
            let exit = ExitSwitch::new().unwrap();
            PowerRegisters::new(exit.clone()).write(offset, data);
            assert_eq!(
                exit.status(),
                want.map(ExitStatus::new),
                "{offset} {data:?}"
            );
        }
    }
}
