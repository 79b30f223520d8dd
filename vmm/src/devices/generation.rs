//! The machine's generation: 128 bits that are others after a restore, so that a guest knows that it
//! may be one of several (Microsoft, "Virtual Machine Generation ID"). Linux mixes them into its
//! random numbers.

use std::io;

use rustix::rand::GetRandomFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;

/// A new generation cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("the host gives no random bytes")]
    Random(#[source] io::Error),
    #[error("the guest's memory has no place for the machine's generation")]
    Memory(#[source] GuestMemoryError),
    #[error("the guest cannot be told of its new generation")]
    Interrupt(#[source] io::Error),
}

/// Gives the machine with this memory a number that no machine has had.
pub fn renew(memory: &GuestMemoryMmap) -> Result<(), GenerationError> {
    let mut number = [0; 16];
    // So few bytes come whole.
    rustix::rand::getrandom(&mut number, GetRandomFlags::empty())
        .map_err(|error| GenerationError::Random(error.into()))?;
    memory
        .write_slice(&number, GuestAddress(layout::GENERATION))
        .map_err(GenerationError::Memory)
}

/// Tells the guest to look at the number. To be called when interrupts can reach it.
pub fn announce(line: &EventFd) -> Result<(), GenerationError> {
    line.write(1).map_err(GenerationError::Interrupt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_generations_have_one_number() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut numbers = [[0; 16]; 3];
        for number in &mut numbers[1..] {
            renew(&memory).unwrap();
            let place = GuestAddress(layout::GENERATION);
            memory.read_slice(number, place).unwrap();
        }
        let [none, one, other] = numbers;
        assert!(none != one && one != other);
    }
}
