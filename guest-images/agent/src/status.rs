//! Tells the host how the workload fares, through the status register of hostd-vmm.
//!
//! The register is described in `vmm::guest_status`, and the numbers here are those of that file:
//! one 32-bit write to an I/O port for each report.

use crate::sys::Ports;

/// The register's I/O port.
const PORT: u16 = 0x610;

/// What reading it gives, where there is one.
const MAGIC: u32 = u32::from_le_bytes(*b"hstd");

const READY: u32 = 1 << 24;
const EXIT: u32 = 2 << 24;
const EXIT_OOM: u32 = 1 << 8;

/// How the workload ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct End {
    /// The exit code, or 128 and the number of the signal that killed it.
    pub code: u8,
    /// It was killed for want of memory.
    pub oom: bool,
}

/// Says that the workload runs and that the agent can be reached. Says nothing without a register.
pub fn report_ready() {
    if let Some(register) = register() {
        register.write(READY);
    }
}

/// Says how the workload ended, which ends the machine. Returns if there is no register.
pub fn report_end(end: End) {
    if let Some(register) = register() {
        let oom = if end.oom { EXIT_OOM } else { 0 };
        register.write(EXIT | u32::from(end.code) | oom);
    }
}

fn register() -> Option<Ports> {
    let ports = Ports::open(PORT).ok()?;
    (ports.read() == MAGIC).then_some(ports)
}
