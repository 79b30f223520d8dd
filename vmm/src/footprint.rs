//! Memory that the process needed to start and does not need to run.
//!
//! UNSAFETY: the kernel is told to forget about mappings of this program's own file. They are read
//! only, so it finds the same in the file when they are used again.
#![expect(
    unsafe_code,
    reason = "the linker's symbols say where the program lies, and the kernel is told about it"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::events::{EventLoop, Readiness, Source};
use crate::layout;

/// When a machine's start is over. Not at once: the processors' threads use the same code, and would
/// have to fetch it again at the worst time.
const START: Duration = Duration::from_secs(1);

unsafe extern "C" {
    /// Where the program's file is mapped from.
    static __executable_start: u8;
    /// The end of its code.
    static etext: u8;
}

/// Forgets the program's code and constants once the start is over.
///
/// Most of a VMM's code is for its start, and the kernel maps whole neighbourhoods of what is used:
/// all of it in the end. An idle machine gets by with a fifth.
pub fn forget_start(events: &mut EventLoop) -> io::Result<()> {
    let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
    let after = Expiration::OneShot(TimeSpec::from_duration(START));
    timer.set(after, TimerSetTimeFlags::empty())?;
    let source = events.reserve();
    let fd = timer.as_fd().as_raw_fd();
    events.poller().add(source, 0, fd, Readiness::READABLE)?;
    events.attach(source, Arc::new(StartIsOver(timer)));
    Ok(())
}

/// The end of the start, which comes once.
#[derive(Debug)]
struct StartIsOver(TimerFd);

impl Source for StartIsOver {
    fn on_ready(&self, _token: u32, _readiness: Readiness) {
        // It does not become readable again, and setting a timer cannot fail.
        let _ = self.0.unset();
        unmap();
    }
}

/// Unmaps the program's file, page by page, until it is used again.
fn unmap() {
    let start = &raw const __executable_start;
    let end = &raw const etext;
    let page = usize::try_from(layout::PAGE_BYTES).expect("usize is 64 bits");
    let bytes = end.addr().saturating_sub(start.addr()) / page * page;
    let start = ptr::without_provenance_mut(start.addr());
    // SAFETY: from the first byte of the file's mapping to the end of its code, less a part of a
    // page, there are only mappings of the file that nobody can write to. If the kernel refuses,
    // nothing has changed.
    let _ = unsafe { libc::madvise(start, bytes, libc::MADV_DONTNEED) };
}
