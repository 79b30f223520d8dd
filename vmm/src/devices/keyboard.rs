//! What is left of the keyboard controller: the command that pulses the processor's reset line.
//! Kernels that know no better way to reboot use it.

use crate::bus::BusDevice;
use crate::control::{ExitReason, ExitStatus};
use crate::exit::ExitSwitch;

/// Pulse output line 0, which is wired to reset.
const RESET: u8 = 0xfe;

/// The command port. Its status reads as zeroes: no key waits, and commands are taken at once.
#[derive(Debug)]
pub struct KeyboardController {
    exit: ExitSwitch,
}

impl KeyboardController {
    /// A controller whose reset line is `exit`.
    pub fn new(exit: ExitSwitch) -> Self {
        Self { exit }
    }
}

impl BusDevice for KeyboardController {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.contains(&RESET) {
            self.exit.end(ExitStatus::new(ExitReason::Reset));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_ends_the_machine() {
        let exit = ExitSwitch::new().unwrap();
        let mut controller = KeyboardController::new(exit.clone());
        for command in 0..RESET {
            controller.write(0, &[command]);
        }
        assert_eq!(exit.status(), None);
        controller.write(0, &[RESET]);
        assert_eq!(exit.status(), Some(ExitStatus::new(ExitReason::Reset)));
    }
}
