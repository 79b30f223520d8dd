//! The user's terminal, while it is the guest's: keys go to the guest as they are pressed.

use std::fs::File;
use std::io;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A terminal without line editing and signals of its own. Dropping it restores the terminal.
#[derive(Debug)]
pub struct RawTerminal {
    terminal: File,
    before: Termios,
}

impl RawTerminal {
    /// Takes `file` over, if it is a terminal.
    pub fn new(file: &File) -> io::Result<Option<Self>> {
        let Ok(before) = tcgetattr(file) else {
            return Ok(None); // Not a terminal.
        };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(file, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self {
            terminal: file.try_clone()?,
            before,
        }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, &self.before);
    }
}
