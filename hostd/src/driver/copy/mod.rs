//! Copies what instances have written: disks and whole trees, as they are, within bounds.
//!
//! Where the file system can, a copy shares its blocks with the original until one of them is
//! changed (`FICLONE`: Btrfs, XFS, bcachefs); elsewhere data is copied and holes stay holes. A copy that
//! takes too long, has too much to copy, or would fill the disk ends with an error, and so does one
//! that is under way when hostd is told to go.

mod file;
mod tree;

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{DriverError, chain};

/// The longest that one copy takes; the instance may have to stand still for as long.
const TIME_MAX: Duration = Duration::from_secs(600);

/// Files and directories in one copy.
const ENTRIES_MAX: u64 = 4_000_000;

/// Directories may be nested so deep: each level takes descriptors, here and when the copy is removed.
const DEPTH_MAX: usize = 128;

/// What a copy leaves of the disk for others, in bytes.
const SPARE_BYTES: u64 = 64 * 1024 * 1024;

/// What `st_blocks` counts in.
const STAT_BLOCK_BYTES: u64 = 512;

/// Why something was not copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    #[error("cannot {action} `{name}`")]
    Io {
        action: &'static str,
        name: String,
        source: io::Error,
    },
    #[error("it takes longer than {} s", TIME_MAX.as_secs())]
    Late,
    #[error("hostd is being stopped")]
    Stopped,
    #[error("there are more than {ENTRIES_MAX} files")]
    Many,
    #[error("directories are nested deeper than {DEPTH_MAX}, at `{name}`")]
    Deep { name: String },
    #[error(
        "{wanted} bytes are to be copied, and the disk has {free} left, less {SPARE_BYTES} to spare"
    )]
    Full { wanted: u64, free: u64 },
}

impl CopyError {
    /// For `map_err`: an error of the kernel while doing `action` to `name`.
    pub(super) fn io<'a, E: Into<io::Error> + 'a>(
        action: &'static str,
        name: &'a dyn ToString,
    ) -> impl FnOnce(E) -> CopyError + 'a {
        move |source| CopyError::Io {
            action,
            name: name.to_string(),
            source: source.into(),
        }
    }

    /// The driver's error for a copy that is a part of `action`.
    pub(super) fn during(&self, action: &str) -> DriverError {
        DriverError::Helper {
            action: action.to_owned(),
            message: chain(self),
        }
    }
}

/// One copy, and how far it has come.
#[derive(Debug)]
pub(super) struct Copier {
    stopping: CancellationToken,
    deadline: Instant,
    entries: u64,
    /// What the originals take of the disk.
    pub(super) bytes: u64,
}

impl Copier {
    /// A copy that begins now, and ends when `stopping` is cancelled.
    pub(super) fn begin(stopping: CancellationToken) -> Self {
        Self {
            stopping,
            deadline: Instant::now() + TIME_MAX,
            entries: 0,
            bytes: 0,
        }
    }

    /// Whether to go on; asked before every piece of work.
    fn check(&self) -> Result<(), CopyError> {
        if self.stopping.is_cancelled() {
            Err(CopyError::Stopped)
        } else if Instant::now() > self.deadline {
            Err(CopyError::Late)
        } else {
            Ok(())
        }
    }

    fn count(&mut self) -> Result<(), CopyError> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(CopyError::Many);
        }
        self.check()
    }
}

/// Checks that `wanted` bytes more leave the disk of `target` with something to spare.
pub(super) fn check_room(target: impl AsFd, wanted: u64) -> Result<(), CopyError> {
    let found = rustix::fs::fstatvfs(target).map_err(CopyError::io("look at the disk of", &""))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if wanted > free.saturating_sub(SPARE_BYTES) {
        return Err(CopyError::Full { wanted, free });
    }
    Ok(())
}
