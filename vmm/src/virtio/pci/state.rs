//! A function in a snapshot. The transport behind it is saved by itself.

use serde::{Deserialize, Serialize};

use super::interrupts::InterruptsState;
use super::{VirtioFunction, access};
use crate::pci::bus::Function;
use crate::pci::config::{COMMAND, WINDOW};
use crate::virtio::state::StateError;

/// What a guest has written to a function.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    pub command: u16,
    /// Where the window is.
    pub window: u32,
    /// Of the access through the configuration space: window, offset, length.
    pub access: (u8, u32, u32),
    pub interrupts: InterruptsState,
}

impl VirtioFunction {
    /// What [`restore`](Self::restore) takes.
    pub fn save(&self) -> FunctionState {
        let config = &self.config;
        let mut window = [0];
        config.read(self.access + access::WINDOW, &mut window);
        FunctionState {
            command: config.word(COMMAND),
            window: config.long(WINDOW),
            access: (
                window[0],
                config.long(self.access + access::OFFSET),
                config.long(self.access + access::LENGTH),
            ),
            interrupts: self.interrupts().save(),
        }
    }

    /// A new function becomes the one that was saved, before its transport does. What the guest may
    /// not write is left as it is.
    ///
    /// # Errors
    ///
    /// If the state is that of another function.
    pub fn restore(&mut self, state: &FunctionState) -> Result<(), StateError> {
        let control = state.interrupts.control;
        self.interrupts().restore(&state.interrupts)?;
        let (window, offset, length) = state.access;
        self.config.write(self.access + access::WINDOW, &[window]);
        for (field, value) in [
            (self.access + access::OFFSET, offset),
            (self.access + access::LENGTH, length),
            (WINDOW, state.window),
        ] {
            self.config.write(field, &value.to_le_bytes());
        }
        self.config.write(self.messages + 2, &control.to_le_bytes());
        self.write_config(COMMAND, &state.command.to_le_bytes());
        Ok(())
    }
}
