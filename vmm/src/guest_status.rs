//! How a guest says how its workload fares: a 32-bit report, in one of two ways.
//!
//! - Over vsock, if the machine has it: connect to [`VSOCK_PORT`] of the host from a port below
//!   [`VSOCK_GUEST_PORTS_END`], send the report as 4 bytes in little-endian order, all at once, and
//!   shut down; the machine's end of the connection is closed when the report was taken. The machine
//!   itself listens there: no socket of the host is asked.
//! - By a write to the I/O port [`PORT`]. In a Linux guest it takes two lines of the first process:
//!   `ioperm(PORT, 4, 1)` and `outl(exit(code, oom), PORT)`, which a kernel that is locked down
//!   refuses. Reads give [`MAGIC`], so a guest can tell whether the register is there.
//!
//! Reports of another width, or of an unknown kind, do nothing.

/// The I/O port, 4 bytes wide.
pub const PORT: u16 = 0x610;

/// The host's vsock port (of CID 2) for reports.
pub const VSOCK_PORT: u32 = PORT as u32;

/// Guests' ports from here on are anybody's, in Linux; those below are for privileged processes, who
/// alone are to speak for the guest.
pub const VSOCK_GUEST_PORTS_END: u32 = 1024;

/// What a 32-bit read of [`PORT`] gives: `hstd` in ASCII, first letter in the lowest byte.
pub const MAGIC: u32 = u32::from_le_bytes(*b"hstd");

/// Bits 31 to 24 hold the kind of a report.
const KIND_SHIFT: u32 = 24;
const KIND_READY: u32 = 1;
const KIND_EXIT: u32 = 2;

/// Bits 7 to 0 of an exit hold the code, bit 8 that it was for want of memory.
const CODE_MASK: u32 = 0xff;
const OOM: u32 = 1 << 8;

/// Written when the guest is ready for work: the value of a ready report.
pub const READY: u32 = KIND_READY << KIND_SHIFT;

/// The value of an exit report. Its write is the last thing the guest does: the machine ends at
/// once, so disks are to be synchronised and streams closed before.
pub const fn exit(code: u8, oom: bool) -> u32 {
    (KIND_EXIT << KIND_SHIFT) | code as u32 | if oom { OOM } else { 0 }
}

/// What a guest has said.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Report {
    /// It is ready for work.
    Ready,
    /// Its workload has ended.
    Exit {
        /// The workload's exit code.
        code: u8,
        /// The workload was killed for want of memory.
        oom: bool,
    },
}

impl Report {
    /// The meaning of a written value, if it has one.
    pub fn parse(value: u32) -> Option<Report> {
        match value >> KIND_SHIFT {
            KIND_READY if value == READY => Some(Report::Ready),
            KIND_EXIT if value & !(CODE_MASK | OOM) == KIND_EXIT << KIND_SHIFT => {
                Some(Report::Exit {
                    code: value.to_le_bytes()[0],
                    oom: value & OOM != 0,
                })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_comes_out_as_it_went_in() {
        let table = [
            (READY, Some(Report::Ready)),
            (
                exit(0, false),
                Some(Report::Exit {
                    code: 0,
                    oom: false,
                }),
            ),
            (
                exit(137, true),
                Some(Report::Exit {
                    code: 137,
                    oom: true,
                }),
            ),
            (
                0x0200_00ff,
                Some(Report::Exit {
                    code: 255,
                    oom: false,
                }),
            ),
            (READY | 1, None),
            (exit(1, false) | 1 << 9, None),
            (0, None),
            (u32::MAX, None),
        ];
        for (value, want) in table {
            assert_eq!(Report::parse(value), want, "{value:#x}");
        }
    }
}
