//! Makes the monitor a process that no accident ends.
//!
//! UNSAFETY: a signal handler may run at any point of the program. The one here does nothing.
#![expect(
    unsafe_code,
    reason = "a signal handler can break any invariant of the program"
)]

use nix::{
    libc::c_int,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::setsid,
};

use super::{MonitorError, step};

/// What a service manager, a terminal or a shell sends to everything that it started.
const ACCIDENTS: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

extern "C" fn nothing(_signal: c_int) {}

/// Leaves the session of the starter, and takes no notice of [`ACCIDENTS`].
///
/// A handler that does nothing, and not `SIG_IGN`: exec puts handlers back to the default, so hooks
/// and the workload do not inherit it.
pub(super) fn detach() -> Result<(), MonitorError> {
    // It fails for the leader of a session, who needs no other.
    setsid().ok();
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in ACCIDENTS {
        // SAFETY: the handler touches nothing, so it may interrupt anything.
        let set = unsafe { sigaction(signal, &action) };
        step("handle a signal", set)?;
    }
    Ok(())
}
