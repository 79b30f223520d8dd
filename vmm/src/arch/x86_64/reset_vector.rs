//! Where a processor goes when it is reset: sixteen bytes below 1 MiB, in real mode.
//!
//! Kernels on hardware-reduced ACPI machines expect EFI, and, where there is none, reboot by jumping
//! here, as to a BIOS. What they find is four instructions that throw the reset switch.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::devices::power;
use crate::layout;

/// Writes the instructions to their place.
pub(super) fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let port = layout::POWER_PORT + u64::from(power::RESET);
    let [low, high, ..] = port.to_le_bytes();
    let code = [
        [0xba, low, high].as_slice(), // mov dx, port
        &[0xb0, power::RESET_VALUE],  // mov al, value
        &[0xee],                      // out dx, al
        &[0xf4],                      // hlt
    ]
    .concat();
    memory.write_slice(&code, GuestAddress(layout::RESET_VECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instructions_reset_the_machine() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&memory).unwrap();
        let mut code = [0; 7];
        memory
            .read_slice(&mut code, GuestAddress(0xf_fff0))
            .unwrap();
        assert_eq!(code, [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4]);
    }
}
