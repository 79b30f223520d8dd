//! Stops all processes of a group where they are, and lets them go on.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Cgroup, CgroupError, setting};

/// A process in uninterruptible sleep delays the freezing for as long as it sleeps.
const FREEZE_WAIT: Duration = Duration::from_secs(10);

/// Pause between two looks at the v1 freezer, which has no event to wait for.
const V1_PAUSE: Duration = Duration::from_millis(1);

/// Every so many looks the v1 freezer is let go and started again: it can be stuck halfway with one
/// process waiting in the kernel for another that is frozen already.
const V1_LOOKS_PER_TRY: u32 = 50;

/// How long to wait for an event before looking whether it is still to be waited for.
const V2_LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Cgroup {
    /// Freezes the group; returns when every process stands still, or somebody else has thawed it.
    ///
    /// # Errors
    ///
    /// If it takes longer than ten seconds; the group is then thawed.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        let frozen = match (self.directory_of("freezer"), self.unified()) {
            (Some(directory), _) => freeze_v1(&directory.path),
            (None, Some(directory)) => freeze_v2(&directory.path),
            (None, None) => {
                let reason = "no hierarchy of this host can freeze";
                return Err(CgroupError::unsupported("freezer", reason));
            }
        };
        match frozen {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.thaw()?;
                Err(self.freezer_error())
            }
            Err(source) => {
                self.thaw().ok();
                Err(self.freezer_io(source))
            }
        }
    }

    /// Lets a frozen group go on; does nothing to one that is not frozen, or does not exist.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        let Some((path, thawed)) = self.freezer() else {
            return Ok(());
        };
        let result = match fs::read_to_string(&path) {
            Ok(state) if state.trim() == thawed => Ok(()),
            Ok(_) => setting::write(&path, thawed),
            // No such group, or a kernel before 5.2, whose v2 cannot freeze.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        result.map_err(|source| CgroupError::Io {
            action: "thaw",
            path,
            source,
        })
    }

    /// Whether the group is frozen, or on its way there.
    ///
    /// # Errors
    ///
    /// If the state cannot be read; a group that does not exist is not frozen.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let Some((path, thawed)) = self.freezer() else {
            return Ok(false);
        };
        match fs::read_to_string(&path) {
            Ok(state) => Ok(state.trim() != thawed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(CgroupError::Io {
                action: "read",
                path,
                source,
            }),
        }
    }

    /// The file that tells and sets the state, and what it says when nothing is frozen.
    fn freezer(&self) -> Option<(PathBuf, &'static str)> {
        if let Some(directory) = self.directory_of("freezer") {
            return Some((directory.path.join("freezer.state"), "THAWED"));
        }
        let directory = self.unified()?;
        Some((directory.path.join("cgroup.freeze"), "0"))
    }

    fn freezer_error(&self) -> CgroupError {
        CgroupError::Freeze {
            path: self.freezer_path(),
            seconds: FREEZE_WAIT.as_secs(),
        }
    }

    fn freezer_io(&self, source: io::Error) -> CgroupError {
        CgroupError::Io {
            action: "freeze",
            path: self.freezer_path(),
            source,
        }
    }

    /// The directory of the group in the hierarchy that freezes; empty if there is none.
    pub(crate) fn freezer_path(&self) -> PathBuf {
        let directory = self.directory_of("freezer").or_else(|| self.unified());
        directory
            .map(|directory| directory.path.clone())
            .unwrap_or_default()
    }
}

fn freeze_v1(directory: &Path) -> io::Result<bool> {
    let file = directory.join("freezer.state");
    let deadline = Instant::now() + FREEZE_WAIT;
    let mut looks = 0;
    setting::write(&file, "FROZEN")?;
    // Reading makes the kernel look again at who stands still.
    while fs::read_to_string(&file)?.trim() != "FROZEN" {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        looks += 1;
        if looks % V1_LOOKS_PER_TRY == 0 {
            setting::write(&file, "THAWED")?;
            setting::write(&file, "FROZEN")?;
        }
        thread::sleep(V1_PAUSE);
    }
    Ok(true)
}

fn freeze_v2(directory: &Path) -> io::Result<bool> {
    let deadline = Instant::now() + FREEZE_WAIT;
    let events = directory.join("cgroup.events");
    let wish = directory.join("cgroup.freeze");
    setting::write(&wish, "1")?;
    loop {
        // Opened before it is read: a change after the reading wakes the poll.
        let file = fs::File::open(&events)?;
        if io::read_to_string(&file)?
            .lines()
            .any(|line| line == "frozen 1")
        {
            return Ok(true);
        }
        // Somebody let the group go on again before all of it stood still, which is no event.
        if fs::read_to_string(&wish)?.trim() == "0" {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = PollTimeout::try_from(left.min(V2_LOOK_AGAIN)).unwrap_or(PollTimeout::MAX);
        poll(
            &mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)],
            timeout,
        )?;
    }
}
