//! Programs that are measured.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Has the kernel read a program from the disk when it is executed next, as after the host's start. What
/// was written a moment ago lies in the page cache in other pieces: they may be larger, all of which counts
/// as a process's memory that uses a part of one, or smaller, and take longer to map. It may also count as
/// changed.
pub(super) fn forget_pages(program: &Path) -> io::Result<()> {
    let file = File::open(program)?;
    file.sync_all()?;
    let (start, to_the_end) = (0, 0);
    let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    Ok(posix_fadvise(&file, start, to_the_end, advice)?)
}
