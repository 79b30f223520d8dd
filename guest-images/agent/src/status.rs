//! Tells the host how the workload fares, in the ways that `vmm::guest_status` describes; the numbers
//! here are those of that file.
//!
//! vsock comes first: a kernel that is locked down lets no process use I/O ports, and some processors
//! do not either once the machine went on from a snapshot. The register is for machines without vsock.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use crate::sys;
use crate::transport;

/// The register's I/O port, and the host's vsock port.
const PORT: u16 = 0x610;

/// How long the host may take to say that it has a report.
const ANSWER_MAX: Duration = Duration::from_secs(10);

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

/// Says that the workload runs and that the agent can be reached. Says nothing if nobody listens.
pub fn report_ready() {
    report(READY);
}

/// Says how the workload ended, which ends the machine. Returns if nobody listens.
pub fn report_end(end: End) {
    let oom = if end.oom { EXIT_OOM } else { 0 };
    report(EXIT | u32::from(end.code) | oom);
}

fn report(value: u32) {
    if send(value).is_err() {
        // Without a register either there is nobody to tell.
        let _ = sys::write_port(PORT, MAGIC, value);
    }
}

/// Returns once the host has the report.
fn send(value: u32) -> io::Result<()> {
    let mut stream = transport::connect_privileged(PORT.into())?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.write_all(&value.to_le_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0]) {
        // The host hangs up when it has it.
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error),
    }
}
