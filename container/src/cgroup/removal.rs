//! Who is in a group, killing all of them, and removing the group with every group below it.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::Pid,
};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Cgroup, CgroupError, Directory, setting};

/// How long a removal waits for processes that were killed to be gone.
const REMOVE_WAIT: Duration = Duration::from_secs(10);

/// The longest wait before looking again: a process may have come that is not waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The wait where nobody is left to wait for, but the kernel is not done with the last one.
const KERNEL_PAUSE: Duration = Duration::from_millis(1);

/// Rounds of killing on v1. From the second on the group is frozen meanwhile, so that nobody forks
/// away; more than a few are needed only if freezing fails.
const KILL_ROUNDS_MAX: u32 = 100;

/// Processes to wait for at once, to bound the descriptors.
const WAIT_FOR_MAX: usize = 64;

impl Cgroup {
    /// The processes in the group and in all groups below it; none if it does not exist.
    ///
    /// # Errors
    ///
    /// If a group cannot be read.
    pub fn pids(&self) -> Result<Vec<Pid>, CgroupError> {
        let mut pids = BTreeSet::new();
        if let Some(directory) = self.census() {
            collect(&directory.path, &mut pids)?;
        }
        Ok(pids.into_iter().map(Pid::from_raw).collect())
    }

    /// Sends SIGKILL to every process of the group and of the groups below it, and thaws them so
    /// that they die. On return all have been signalled; [`Cgroup::remove`] waits until they are
    /// gone.
    ///
    /// # Errors
    ///
    /// If the group cannot be read, or its processes fork faster than they can be killed.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        let atomically = match self.unified() {
            None => false,
            Some(directory) => kill_v2(&directory.path)?,
        };
        if atomically && self.legacy().next().is_none() {
            return Ok(());
        }
        // On a hybrid host a process need not be in the v2 group.
        let killed = self.kill_each();
        self.thaw()?;
        killed
    }

    fn kill_each(&self) -> Result<(), CgroupError> {
        let mut signalled = BTreeSet::new();
        for round in 0..KILL_ROUNDS_MAX {
            if round == 1 {
                // Best effort: where it does not work, the rounds go on without.
                self.freeze().ok();
            }
            let pids: BTreeSet<i32> = self.pids()?.into_iter().map(Pid::as_raw).collect();
            if pids.is_subset(&signalled) {
                return Ok(());
            }
            let processes: Vec<(i32, OwnedFd)> = pids
                .iter()
                .filter_map(|&pid| Some((pid, open_process(pid)?)))
                .collect();
            // Between the list and the opening a pid may have become somebody else's. Who is still
            // listed now was opened as what it is.
            let still: BTreeSet<i32> = self.pids()?.into_iter().map(Pid::as_raw).collect();
            for (pid, process) in processes.iter().filter(|(pid, _)| still.contains(pid)) {
                pidfd_send_signal(process, Signal::KILL).ok();
                signalled.insert(*pid);
            }
        }
        Err(self.busy())
    }

    /// Removes the group and all groups below it, waiting for processes that are dying. Removing
    /// twice is removing once.
    ///
    /// # Errors
    ///
    /// If processes remain for longer than ten seconds, or the kernel refuses; all that could be
    /// removed is.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + REMOVE_WAIT;
        while !self.try_remove()? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.busy());
            }
            self.wait_for_an_exit(left.min(LOOK_AGAIN))?;
        }
        Ok(())
    }

    /// Removes the group and all groups below it if nobody is in them; else says false, and has
    /// removed at most groups that nobody was in.
    ///
    /// # Errors
    ///
    /// If the kernel refuses for another reason.
    pub fn remove_if_empty(&self) -> Result<bool, CgroupError> {
        // Where it is asked who is in the group: as long as somebody is, the others stay as well.
        let Some(census) = self.census() else {
            return Ok(true);
        };
        match remove_tree(&census.path) {
            Ok(()) => self.try_remove(),
            Err(Errno::EBUSY) => Ok(false),
            Err(errno) => Err(cannot_remove(census, errno)),
        }
    }

    /// Removes what can be removed; false if something is left that somebody is in.
    fn try_remove(&self) -> Result<bool, CgroupError> {
        let mut busy = false;
        let mut failed = None;
        for directory in &self.directories {
            match remove_tree(&directory.path) {
                Ok(()) => {}
                Err(Errno::EBUSY) => busy = true,
                Err(errno) => {
                    failed.get_or_insert_with(|| cannot_remove(directory, errno));
                }
            }
        }
        failed.map_or(Ok(!busy), Err)
    }

    /// Waits until one of the processes has ended, or for `limit`.
    fn wait_for_an_exit(&self, limit: Duration) -> Result<(), CgroupError> {
        let pids = self.pids()?;
        let processes: Vec<OwnedFd> = pids
            .iter()
            .take(WAIT_FOR_MAX)
            .filter_map(|pid| open_process(pid.as_raw()))
            .collect();
        let limit = if processes.is_empty() {
            KERNEL_PAUSE
        } else {
            limit
        };
        let mut polled: Vec<PollFd<'_>> = processes
            .iter()
            .map(|process| PollFd::new(process.as_fd(), PollFlags::POLLIN))
            .collect();
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(CgroupError::Io {
                action: "wait for the processes of",
                path: self.census_path(),
                source: errno.into(),
            }),
        }
    }

    /// The directory that is asked who is in the group. Processes are in all hierarchies alike; of
    /// v2 beside v1 only those are that were born in it.
    fn census(&self) -> Option<&Directory> {
        ["pids", "freezer", "devices", "memory"]
            .iter()
            .find_map(|controller| self.directory_of(controller))
            .or_else(|| self.legacy().next())
            .or_else(|| self.unified())
    }

    fn census_path(&self) -> std::path::PathBuf {
        self.census()
            .map(|directory| directory.path.clone())
            .unwrap_or_default()
    }

    fn busy(&self) -> CgroupError {
        CgroupError::Busy {
            path: self.census_path(),
            seconds: REMOVE_WAIT.as_secs(),
        }
    }
}

fn cannot_remove(directory: &Directory, errno: Errno) -> CgroupError {
    CgroupError::Io {
        action: "remove",
        path: directory.path.clone(),
        source: errno.into(),
    }
}

/// Kills all of a v2 group at once. False if the kernel cannot (before Linux 5.14), or there is no
/// such group.
fn kill_v2(directory: &Path) -> Result<bool, CgroupError> {
    let path = directory.join("cgroup.kill");
    match setting::write(&path, "1") {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(source) => Err(CgroupError::Io {
            action: "kill the processes of",
            path,
            source,
        }),
    }
}

fn open_process(pid: i32) -> Option<OwnedFd> {
    pidfd_open(rustix::process::Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}

/// A file of a group that does not exist, or that was removed while it was open.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

fn collect(directory: &Path, pids: &mut BTreeSet<i32>) -> Result<(), CgroupError> {
    let path = directory.join("cgroup.procs");
    match fs::read_to_string(&path) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        // A threaded group: its processes are listed above it.
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
        Err(error) if is_gone(&error) => return Ok(()),
        Err(source) => {
            return Err(CgroupError::Io {
                action: "read",
                path,
                source,
            });
        }
    }
    for child in children(directory) {
        collect(&child, pids)?;
    }
    Ok(())
}

/// The groups directly below; none if the group is gone.
fn children(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(directory: &Path) -> Result<(), Errno> {
    match remove_directory(directory) {
        // Busy with processes, or with groups below.
        Err(Errno::EBUSY) => {}
        result => return result,
    }
    for child in children(directory) {
        remove_tree(&child)?;
    }
    remove_directory(directory)
}

fn remove_directory(directory: &Path) -> Result<(), Errno> {
    match fs::remove_dir(directory) {
        Ok(()) => Ok(()),
        Err(error) if is_gone(&error) => Ok(()),
        Err(error) => Err(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
    }
}
