//! SIGTERM and SIGINT end the machine, by way of the event loop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::control::{ExitReason, ExitStatus};
use crate::events::{EventLoop, Readiness, Source};
use crate::exit::ExitSwitch;

/// Signals cannot be taken.
#[derive(Debug, thiserror::Error)]
#[error("cannot wait for signals")]
pub struct SignalError(#[source] io::Error);

struct Signals {
    fd: SignalFd,
    exit: ExitSwitch,
}

fn signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

fn failed(errno: Errno) -> SignalError {
    SignalError(errno.into())
}

/// The signals of this process wait from now on. To be called before other threads are started,
/// which inherit that.
pub fn hold_back() -> Result<(), SignalError> {
    signals().thread_block().map_err(failed)
}

/// From now on the signals that were [held back](hold_back) end the machine.
pub fn end_machine(events: &mut EventLoop, exit: &ExitSwitch) -> Result<(), SignalError> {
    let set = signals();
    let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(failed)?;
    let source = events.reserve();
    events
        .poller()
        .add(source, 0, fd.as_raw_fd(), Readiness::READABLE)
        .map_err(SignalError)?;
    let exit = exit.clone();
    events.attach(source, Arc::new(Signals { fd, exit }));
    Ok(())
}

impl Source for Signals {
    fn on_ready(&self, _token: u32, _readiness: Readiness) {
        if matches!(self.fd.read_signal(), Ok(Some(_))) {
            self.exit.end(ExitStatus::new(ExitReason::Killed));
        }
    }
}
