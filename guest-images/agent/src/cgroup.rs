//! Control groups (version 2) of what runs beside the agent.
//!
//! - `PARENT/workload` has the limits: for the workload and what exec started, together.
//! - `PARENT/workload/main` is for the workload.
//! - `PARENT/workload/exec-N` is for one process of exec and its children.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::streams::wait;

/// Delegated to the groups as far as the kernel has them.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// How long processes may take to stop; one that waits for a device does not before it is served.
const FREEZE_MAX: Duration = Duration::from_secs(10);

/// What `memory.stat` counts pages in.
const PAGE_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
#[error("Failed to use the control group file {}", path.display())]
pub(crate) struct CgroupError {
    path: PathBuf,
    source: io::Error,
}

/// The workload's group and those below it.
#[derive(Debug)]
pub(crate) struct Cgroups {
    workload: PathBuf,
    /// The number of the next exec.
    next: AtomicU64,
    /// The workload's limit of memory in bytes, which holds except while the kernel is made to kill.
    memory_max: Mutex<Option<u64>>,
}

/// How often a group has come to its limit of memory: its file `memory.events`.
#[derive(Debug)]
pub(crate) struct LimitHits {
    path: PathBuf,
    events: File,
    /// Those that have been told of.
    count: u64,
}

/// What a group has of the memory that it may have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Usage {
    pub(crate) limit_bytes: u64,
    /// What cannot be had again once it is dropped.
    pub(crate) kept_bytes: u64,
    /// What could be read again.
    pub(crate) droppable_bytes: u64,
    /// What was read again after it had been dropped, since the group was made.
    pub(crate) refaulted_bytes: u64,
}

/// A group for one process and its children.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroups {
    /// Makes the workload's group below `parent`, which must have no processes of its own unless it
    /// is the root.
    pub(crate) fn create(parent: &Path) -> Result<Self, CgroupError> {
        let workload = parent.join("workload");
        delegate(parent)?;
        make(&workload)?;
        delegate(&workload)?;
        Ok(Self {
            workload,
            next: AtomicU64::new(0),
            memory_max: Mutex::default(),
        })
    }

    /// The group of the workload itself.
    pub(crate) fn main(&self) -> Result<Cgroup, CgroupError> {
        Cgroup::create(self.workload.join("main"))
    }

    /// A new group for an exec'd process. Takes away those whose processes have all ended.
    pub(crate) fn exec(&self) -> Result<Cgroup, CgroupError> {
        self.sweep();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Cgroup::create(self.workload.join(format!("exec-{number}")))
    }

    /// Limits the number of processes and threads; `None` takes the limit away.
    pub(crate) fn set_pids_max(&self, max: Option<u32>) -> Result<(), CgroupError> {
        let text = max.map_or_else(|| "max".to_owned(), |max| max.to_string());
        write(&self.workload.join("pids.max"), &text)
    }

    /// Limits memory, page cache included, in bytes. Does nothing where the kernel does not control
    /// memory.
    pub(crate) fn set_memory_max(&self, bytes: u64) -> Result<(), CgroupError> {
        let mut memory_max = self.memory_max();
        if self.memory_file().exists() {
            write(&self.memory_file(), &bytes.to_string())?;
            *memory_max = Some(bytes);
        }
        Ok(())
    }

    fn memory_max(&self) -> MutexGuard<'_, Option<u64>> {
        self.memory_max
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn memory_file(&self) -> PathBuf {
        self.workload.join("memory.max")
    }

    /// How often the workload comes to its limit of memory; `None` where the kernel does not control
    /// memory.
    pub(crate) fn limit_hits(&self) -> Result<Option<LimitHits>, CgroupError> {
        let path = self.workload.join("memory.events");
        match File::open(&path) {
            Ok(events) => Ok(Some(LimitHits {
                path,
                events,
                count: 0,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CgroupError { path, source }),
        }
    }

    /// What the workload's group uses of its memory; `None` if that is not limited.
    pub(crate) fn usage(&self) -> Result<Option<Usage>, CgroupError> {
        let Some(limit_bytes) = *self.memory_max() else {
            return Ok(None);
        };
        let stat = read(&self.workload.join("memory.stat"))?;
        Ok(Some(Usage::of(limit_bytes, &stat)))
    }

    /// Has the kernel kill a process for want of memory. Under a limit that leaves no room for what can
    /// be dropped, nothing can be read again, and the kernel runs out of pages to drop.
    pub(crate) fn kill_for_memory(&self, usage: Usage) -> Result<(), CgroupError> {
        let memory_max = self.memory_max();
        // A little less than is kept, so that dropping all the rest is not enough.
        let less = usage.kept_bytes - usage.kept_bytes / 64;
        let killed = write(&self.memory_file(), &less.to_string());
        if let Some(bytes) = *memory_max {
            write(&self.memory_file(), &bytes.to_string())?;
        }
        killed
    }

    /// Stops every process of the workload and of exec where it is, and waits until all have stopped.
    /// If one does not in time, all go on.
    pub(crate) fn freeze(&self) -> Result<(), CgroupError> {
        write(&self.workload.join("cgroup.freeze"), "1")?;
        let frozen = self.wait_until_frozen();
        if frozen.is_err() {
            self.thaw()?;
        }
        frozen
    }

    /// Lets them go on. Doing it twice is doing it once.
    pub(crate) fn thaw(&self) -> Result<(), CgroupError> {
        write(&self.workload.join("cgroup.freeze"), "0")
    }

    fn wait_until_frozen(&self) -> Result<(), CgroupError> {
        let path = self.workload.join("cgroup.events");
        let waited = File::open(&path).and_then(|mut events| {
            let deadline = Instant::now() + FREEZE_MAX;
            loop {
                if entry(&read_again(&mut events)?, "frozen") == 1 {
                    return Ok(());
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                // The kernel tells of a change of the file so (cgroup-v2.rst, "cgroup.events").
                wait([(events.as_fd(), libc::POLLPRI)], Some(left))?;
            }
        });
        waited.map_err(|source| CgroupError { path, source })
    }

    /// Processes and threads.
    pub(crate) fn pids(&self) -> Result<u64, CgroupError> {
        let path = self.workload.join("pids.current");
        let text = read(&path)?;
        let number = text.trim().parse().map_err(io::Error::other);
        number.map_err(|source| CgroupError { path, source })
    }

    /// What an exec'd process left running keeps its group until it ends.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.workload) else {
            return;
        };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with("exec-") {
                // A group with processes in it cannot be removed, which is what is wanted.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
}

impl LimitHits {
    /// Returns once the group has come to its limit since the last call: whether it had to wait for
    /// that.
    pub(crate) fn wait(&mut self) -> Result<bool, CgroupError> {
        self.try_wait().map_err(|source| CgroupError {
            path: self.path.clone(),
            source,
        })
    }

    fn try_wait(&mut self) -> io::Result<bool> {
        let mut waited = false;
        loop {
            let count = entry(&read_again(&mut self.events)?, "max");
            if count != self.count {
                self.count = count;
                return Ok(waited);
            }
            // The kernel tells of a change of the file so (cgroup-v2.rst, "memory.events").
            wait([(self.events.as_fd(), libc::POLLPRI)], None)?;
            waited = true;
        }
    }
}

impl Cgroup {
    fn create(path: PathBuf) -> Result<Self, CgroupError> {
        make(&path)?;
        Ok(Self { path })
    }

    /// The file that a process joins the group with.
    pub(crate) fn procs(&self) -> Result<OwnedFd, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let file = OpenOptions::new().write(true).open(&path);
        file.map(OwnedFd::from)
            .map_err(|source| CgroupError { path, source })
    }

    /// Kills every process of the group.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// Whether the kernel has killed a process of the group for want of memory.
    pub(crate) fn oom_killed(&self) -> bool {
        // Without the memory controller there is no such file, and no answer but no.
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        has_oom_kill(&events)
    }
}

/// The text that a file of the kernel's has now.
fn read_again(file: &mut File) -> io::Result<String> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn has_oom_kill(events: &str) -> bool {
    entry(events, "oom_kill") != 0
}

/// The number after `name` in a file of names and numbers.
fn entry(text: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let value = lines.find_map(|(key, value)| (key == name).then_some(value));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

impl Usage {
    fn of(limit_bytes: u64, stat: &str) -> Self {
        let shmem = entry(stat, "shmem");
        Self {
            limit_bytes,
            kept_bytes: entry(stat, "anon") + shmem + entry(stat, "kernel"),
            // Shared memory counts as file, and cannot be dropped.
            droppable_bytes: entry(stat, "file").saturating_sub(shmem),
            refaulted_bytes: entry(stat, "workingset_refault_file").saturating_mul(PAGE_BYTES),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Fails while there are processes left; `sweep` tries again.
        let _ = fs::remove_dir(&self.path);
    }
}

/// Lets the groups below `group` use the controllers that `group` has.
fn delegate(group: &Path) -> Result<(), CgroupError> {
    let available = read(&group.join("cgroup.controllers"))?;
    for controller in CONTROLLERS {
        if available.split_whitespace().any(|name| name == controller) {
            write(
                &group.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            )?;
        }
    }
    Ok(())
}

fn make(path: &Path) -> Result<(), CgroupError> {
    fs::create_dir(path).map_err(|source| CgroupError {
        path: path.into(),
        source,
    })
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError {
        path: path.into(),
        source,
    })
}

/// Writes to a file that exists: cgroupfs has no others.
fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    let mut options = File::options();
    let file = options.write(true).open(path);
    file.and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
        .map_err(|source| CgroupError {
            path: path.into(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_group_uses_is_told_apart() {
        let stat = "anon 9000\nfile 5000\nkernel 300\nshmem 700\nanon_thp 1\n\
                    workingset_refault_anon 8\nworkingset_refault_file 2\n";
        let usage = Usage {
            limit_bytes: 20_000,
            kept_bytes: 10_000,
            droppable_bytes: 4300,
            refaulted_bytes: 8192,
        };
        assert_eq!(Usage::of(20_000, stat), usage);
        assert_eq!(entry("file x\n", "file"), 0);
    }

    #[test]
    fn a_kill_for_want_of_memory_is_found_among_the_events() {
        let events = |kills: u32| {
            format!("low 0\nhigh 0\nmax 7\noom 3\noom_kill {kills}\noom_group_kill 0\n")
        };
        assert!(has_oom_kill(&events(2)));
        assert!(!has_oom_kill(&events(0)));
        assert!(!has_oom_kill(""));
    }
}
