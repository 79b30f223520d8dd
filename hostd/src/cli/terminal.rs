//! The terminal that `hostctl` runs in.

use std::io::{self, IsTerminal};

use console::Term;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::error::CliError;

/// Ctrl-P, Ctrl-Q: leaves a session without ending what runs in it.
const DETACH: [u8; 2] = [0x10, 0x11];

/// Whether standard input is a terminal.
pub(super) fn is_input() -> bool {
    io::stdin().is_terminal()
}

/// Rows and columns of the terminal, if there is one.
pub(super) fn size() -> Option<(u16, u16)> {
    Term::stdout()
        .size_checked()
        .or_else(|| Term::stderr().size_checked())
}

/// Every key goes through unread, until this is dropped, also when a panic drops it.
#[derive(Debug)]
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    pub(super) fn enter() -> Result<RawMode, CliError> {
        let terminal = |errno: nix::Error| CliError::Terminal {
            action: "set up the terminal",
            source: errno.into(),
        };
        let before = tcgetattr(io::stdin()).map_err(terminal)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw).map_err(terminal)?;
        Ok(RawMode { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may have gone; then there is nothing to restore.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}

/// Looks for the detach keys in what is typed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DetachKeys {
    /// The first of them was typed, and is held back until it is known what it was meant as.
    half: bool,
}

/// What to do with what was typed.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Typed {
    Pass(Vec<u8>),
    Detach,
}

impl DetachKeys {
    pub(super) fn filter(&mut self, bytes: &[u8]) -> Typed {
        let mut passed = Vec::with_capacity(bytes.len() + 1);
        for byte in bytes {
            if self.half && *byte == DETACH[1] {
                return Typed::Detach;
            }
            if self.half {
                passed.push(DETACH[0]);
            }
            self.half = *byte == DETACH[0];
            if !self.half {
                passed.push(*byte);
            }
        }
        Typed::Pass(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detach_keys_are_found_also_across_reads_and_nothing_else_is_lost() {
        type Case<'a> = (&'a [&'a [u8]], &'a [u8], bool);
        let table: [Case<'_>; 7] = [
            (&[b"ls\n"], b"ls\n", false),
            (&[b"\x10\x11"], b"", true),
            (&[b"\x10", b"\x11"], b"", true),
            (&[b"a\x10", b"b"], b"a\x10b", false),
            (&[b"\x10\x10", b"\x11"], b"\x10", true),
            (&[b"\x11\x10a"], b"\x11\x10a", false),
            (&[b"a\x10\x11b"], b"", true),
        ];
        for (reads, expected, detaches) in table {
            let mut keys = DetachKeys::default();
            let (mut passed, mut detached) = (Vec::new(), false);
            for read in reads {
                match keys.filter(read) {
                    Typed::Pass(bytes) => passed.extend(bytes),
                    Typed::Detach => detached = true,
                }
            }
            assert_eq!(
                (passed.as_slice(), detached),
                (expected, detaches),
                "{reads:?}"
            );
        }
    }
}
