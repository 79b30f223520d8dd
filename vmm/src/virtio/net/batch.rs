//! Several frames to the tap in one system call, through io_uring.
//!
//! UNSAFETY: the kernel reads guest memory from the submission of an operation until its completion.
//! [`Batch::write`] borrows the frames, and returns once all have completed; a tap that does not block
//! answers at once.
#![expect(
    unsafe_code,
    reason = "the kernel is handed raw pointers into guest memory"
)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::IoUring;
use io_uring::types::Fd;
use smallvec::{SmallVec, smallvec};

use crate::virtio::chain::{Chain, IoList};
use crate::virtio::io_ring;

/// The most frames at a time. Few enough for a driver to have half its queue back while the other
/// half is sent.
pub(super) const FRAMES_MAX: usize = RING_DEPTH as usize;

const RING_DEPTH: u16 = 32;

/// What became of each frame of a batch.
pub(super) type Outcomes = SmallVec<[io::Result<usize>; FRAMES_MAX]>;

/// A ring for frames to a tap. Nothing is in flight in it between calls.
pub(super) struct Batch {
    ring: IoUring,
    /// The ranges of frames in several pieces, while the kernel may look at them.
    iovecs: [Vec<libc::iovec>; FRAMES_MAX],
}

// SAFETY: the ranges are addresses in guest memory that only the kernel follows.
unsafe impl Send for Batch {}

impl fmt::Debug for Batch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Batch").finish_non_exhaustive()
    }
}

impl Batch {
    /// # Errors
    ///
    /// If the host gives no ring.
    pub(super) fn new() -> io::Result<Batch> {
        Ok(Batch {
            ring: io_ring::build(RING_DEPTH)?,
            iovecs: Default::default(),
        })
    }

    /// Writes frames to `tap`, in their order, and no more than [`FRAMES_MAX`]. None waits for room, whatever
    /// the tap's flags say: a ring would wait even where the file is marked as non-blocking.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] if no frame was sent, because the kernel cannot promise that (before
    /// Linux 6.4). Otherwise the ring cannot be used any more, and some frames may have been sent. In
    /// both cases it must be dropped.
    pub(super) fn write<'a>(
        &mut self,
        tap: BorrowedFd<'_>,
        frames: impl Iterator<Item = &'a Chain>,
    ) -> io::Result<Outcomes> {
        let tap = Fd(tap.as_raw_fd());
        let mut count = 0;
        for (frame, iovecs) in frames.zip(&mut self.iovecs) {
            let mut list = IoList::new();
            list.push_readable(frame, 0, usize::MAX);
            let entry = io_ring::write(tap, list.iovecs(), iovecs, 0, libc::RWF_NOWAIT)
                .user_data(count as u64);
            // SAFETY: `frames` are borrowed, and with them their memory, until this function returns;
            // the ranges are not touched until then. All has completed by then, unless the ring fails:
            // then the kernel has its own copy of the ranges, as `io_ring::build` made sure, and only
            // reads what they name.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            pushed.map_err(io::Error::other)?;
            count += 1;
        }
        let outcomes = self.wait(count)?;
        if outcomes.iter().any(is_unsupported) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(outcomes)
    }

    /// Submits what was pushed and takes `count` answers.
    fn wait(&mut self, count: usize) -> io::Result<Outcomes> {
        let mut results: SmallVec<[i32; FRAMES_MAX]> = smallvec![0; count];
        let mut missing = count;
        let mut refusals = 0;
        loop {
            for entry in self.ring.completion() {
                let index = usize::try_from(entry.user_data()).map_err(io::Error::other)?;
                if let Some(result) = results.get_mut(index) {
                    *result = entry.result();
                    missing -= 1;
                }
            }
            if missing == 0 {
                return Ok(results.into_iter().map(io_ring::outcome).collect());
            }
            io_ring::submit(&self.ring, missing, &mut refusals)?;
        }
    }
}

fn is_unsupported(outcome: &io::Result<usize>) -> bool {
    let unsupported = Some(libc::EOPNOTSUPP);
    outcome
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == unsupported)
}
