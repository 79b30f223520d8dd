//! A container's directory (`ROOT/ID`): what is recorded of it, who may change it, and what its status
//! is now.
//!
//! Nothing here is a memory of the status. `process` says which process was made; whether that process
//! lives, waits for `start` or is frozen is looked up each time it is asked.
//!
//! | file | meaning |
//! |---|---|
//! | `config.json` | the configuration, byte for byte; there is no record before it is complete |
//! | `state.json` | the record |
//! | `process` | a symbolic link to `PID:START TIME`, once there is a process |
//! | `init.sock` | the process is being set up, or its creator is about to start it |
//! | `start.sock` | the process is set up and waits on this socket for `start` |
//! | `notify/` | what the container sees, to say that it is ready; with the socket of who started it |
//!
//! The directory's lock (`flock`) is held while the container is made or deleted; the kernel drops it
//! when the holder dies, so a half-made container can be told from one that is being made. The
//! directory lies on a tmpfs like /run and means nothing after a reboot: what others may read appears
//! atomically, and need not reach a disk. Where it does lie on a disk, nothing is written twice: replacing
//! a file there starts the writing, for which its removal would then have to wait.

mod id;
mod record;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::cgroup::Cgroup;
use crate::handshake;
use crate::process::Process;

use self::id::check_id;
pub use self::id::{ID_BYTES_MAX, ids};
pub use self::record::{Record, Status};

/// The socket of a process that is being set up, and of one that waits for `start`.
pub(crate) const INIT_SOCKET: &str = "init.sock";
pub(crate) const START_SOCKET: &str = "start.sock";

/// A link, since that is made with its text in one step.
const PROCESS: &str = "process";
/// What the container sees of the directory, if it may say that it is ready.
pub(crate) const NOTIFY_DIRECTORY: &str = "notify";

const RECORD: &str = "state.json";
/// The record until it is complete.
const RECORD_NEW: &str = ".state.json.new";
const CONFIG: &str = "config.json";

/// Why a container could not be found, recorded or claimed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(
        "invalid container id `{id}`: use 1 to {ID_BYTES_MAX} letters, digits, `_`, `+`, `-` and `.`"
    )]
    Id { id: String },
    #[error("container `{id}` already exists")]
    Exists { id: String },
    /// The text is the one that engines look for.
    #[error("container `{id}` does not exist")]
    NotFound { id: String },
    #[error("container `{id}` is being created, checkpointed or deleted by another process")]
    Busy { id: String },
    #[error("container `{id}` is being started by another process")]
    Starting { id: String },
    #[error("cannot {act} {}", path.display())]
    Io {
        act: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is malformed", path.display())]
    Malformed {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// An open `ROOT/ID`.
#[derive(Debug)]
pub struct Home {
    id: String,
    path: PathBuf,
    directory: OwnedFd,
}

impl Home {
    /// Makes the directory, and holds its lock until the value is dropped. What a creator that died
    /// left under this id is removed first.
    ///
    /// # Errors
    /// [`StateError::Exists`] if there is such a container.
    pub(crate) fn claim(root: &Path, id: &str) -> Result<Self, StateError> {
        check_id(id)?;
        let path = root.join(id);
        let failed = |error: Errno| match error {
            Errno::EXIST => StateError::Exists { id: id.to_owned() },
            error => StateError::Io {
                act: "make",
                path: path.clone(),
                source: error.into(),
            },
        };
        let make = || fs::mkdirat(CWD, &path, Mode::from_raw_mode(0o700));
        match make() {
            Ok(()) => {}
            Err(Errno::NOENT) => {
                std::fs::create_dir_all(root).map_err(|source| StateError::Io {
                    act: "make",
                    path: root.to_path_buf(),
                    source,
                })?;
                make().map_err(failed)?;
            }
            Err(Errno::EXIST) if remove_abandoned(root, id)? => make().map_err(failed)?,
            Err(error) => return Err(failed(error)),
        }
        let home = Self::open(root, id)?;
        match home.lock() {
            Ok(()) => Ok(home),
            // Between the two calls another claimant took it for abandoned.
            Err(StateError::NotFound { .. } | StateError::Busy { .. }) => {
                Err(StateError::Exists { id: id.to_owned() })
            }
            Err(error) => Err(error),
        }
    }

    /// Opens the directory of a container that exists, without its lock.
    ///
    /// # Errors
    /// [`StateError::NotFound`] if there is none.
    pub fn open(root: &Path, id: &str) -> Result<Self, StateError> {
        check_id(id)?;
        let path = root.join(id);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match fs::openat(CWD, &path, flags, Mode::empty()) {
            Ok(directory) => Ok(Self {
                id: id.to_owned(),
                path,
                directory,
            }),
            Err(Errno::NOENT) => Err(StateError::NotFound { id: id.to_owned() }),
            Err(error) => Err(StateError::Io {
                act: "open",
                path,
                source: error.into(),
            }),
        }
    }

    /// Closes the directory, and frees no memory.
    pub(crate) fn close(self) {
        let Self {
            id,
            path,
            directory,
        } = self;
        drop(directory);
        std::mem::forget((id, path));
    }

    /// Takes the lock, or says that another process has it.
    pub(crate) fn lock(&self) -> Result<(), StateError> {
        match fs::flock(&self.directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(StateError::Busy {
                    id: self.id.clone(),
                });
            }
            Err(error) => return Err(self.failed("lock", error.into())),
        }
        // The directory may have been removed while the lock was free.
        let here = fs::fstat(&self.directory).map_err(|error| self.failed("read", error.into()))?;
        match fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) => Ok(()),
            Ok(_) | Err(Errno::NOENT) => Err(StateError::NotFound {
                id: self.id.clone(),
            }),
            Err(error) => Err(self.failed("read", error.into())),
        }
    }

    /// Takes the lock of a starter that stays to listen, or says that another one has it. `delete` does not
    /// wait for it.
    pub(crate) fn lock_start(&self) -> Result<OwnedFd, StateError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let record = fs::openat(&self.directory, RECORD, flags, Mode::empty())
            .map_err(|error| self.failed("open", error.into()))?;
        match fs::flock(&record, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(record),
            Err(Errno::WOULDBLOCK) => Err(StateError::Starting {
                id: self.id.clone(),
            }),
            Err(error) => Err(self.failed("lock", error.into())),
        }
    }

    /// Whether no other process holds the lock.
    fn is_unlocked(&self) -> Result<bool, StateError> {
        match fs::flock(&self.directory, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {
                fs::flock(&self.directory, FlockOperation::Unlock)
                    .map_err(|error| self.failed("unlock", error.into()))?;
                Ok(true)
            }
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(self.failed("lock", error.into())),
        }
    }

    /// Before [`write_record`](Self::write_record): who finds the record finds the configuration.
    pub(crate) fn write_config(&self, text: &[u8]) -> Result<(), StateError> {
        self.write(CONFIG, text)
    }

    /// Writes what is known before there is a process, and is known for good.
    pub(crate) fn write_record(&self, record: &Record) -> Result<(), StateError> {
        let text = serde_json::to_vec(record).map_err(|source| StateError::Malformed {
            path: self.path.join(RECORD),
            source,
        })?;
        self.write(RECORD_NEW, &text)?;
        fs::renameat(&self.directory, RECORD_NEW, &self.directory, RECORD)
            .map_err(|error| self.failed("write to", error.into()))
    }

    /// Adds the process, which is made once.
    pub(crate) fn write_process(&self, process: &Process) -> Result<(), StateError> {
        let text = format!("{}:{}", process.pid(), process.start_time());
        fs::symlinkat(text, &self.directory, PROCESS)
            .map_err(|error| self.failed("write to", error.into()))
    }

    /// The record.
    ///
    /// # Errors
    /// [`StateError::NotFound`] when there is none: the container is not made yet, or gone again.
    pub fn record(&self) -> Result<Record, StateError> {
        let path = self.path.join(RECORD);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = match fs::openat(&self.directory, RECORD, flags, Mode::empty()) {
            Ok(file) => std::fs::File::from(file),
            Err(Errno::NOENT) => {
                return Err(StateError::NotFound {
                    id: self.id.clone(),
                });
            }
            Err(error) => return Err(self.failed("open", error.into())),
        };
        let text = io::read_to_string(file).map_err(|source| self.failed("read", source))?;
        let mut record: Record =
            serde_json::from_str(&text).map_err(|source| StateError::Malformed { path, source })?;
        if let Some((pid, start_time)) = self.process()? {
            record.pid = pid;
            record.start_time = start_time;
        }
        Ok(record)
    }

    /// The pid and the start time of the process, if there is one.
    fn process(&self) -> Result<Option<(i32, u64)>, StateError> {
        let text = match fs::readlinkat(&self.directory, PROCESS, Vec::new()) {
            Ok(text) => text,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.failed("read", error.into())),
        };
        let parse = |text: &str| {
            let (pid, start_time) = text.split_once(':')?;
            Some((pid.parse().ok()?, start_time.parse().ok()?))
        };
        let parsed = text.to_str().ok().and_then(parse);
        let malformed = || self.failed("read", io::ErrorKind::InvalidData.into());
        parsed.map(Some).ok_or_else(malformed)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the configuration was copied to.
    pub(crate) fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// A path to `name` in this directory that is short enough for a socket's address.
    pub(crate) fn socket_path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!(
            "/proc/self/fd/{}/{name}",
            self.directory.as_raw_fd()
        ))
    }

    /// Says that the process is set up: its socket gets the name that `start` looks for.
    pub(crate) fn publish_start_socket(&self) -> Result<(), StateError> {
        fs::renameat(&self.directory, INIT_SOCKET, &self.directory, START_SOCKET)
            .map_err(|error| self.failed("rename the socket of", error.into()))
    }

    /// Leaves the mark of a process that is being set up, where it has no socket: its creator will start
    /// it.
    pub(crate) fn mark_unstarted(&self) -> Result<(), StateError> {
        let kind = FileType::RegularFile;
        fs::mknodat(&self.directory, INIT_SOCKET, kind, Mode::RUSR, 0)
            .map_err(|error| self.failed("write to", error.into()))
    }

    /// Takes the marks away: the program runs.
    pub(crate) fn mark_started(&self) -> Result<(), StateError> {
        for name in [INIT_SOCKET, START_SOCKET] {
            match fs::unlinkat(&self.directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(self.failed("remove a mark of", error.into())),
            }
        }
        Ok(())
    }

    /// Removes the directory. Removing it twice is removing it once.
    pub(crate) fn remove(&self) -> Result<(), StateError> {
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("remove", error))
            }
            _ => Ok(()),
        }
    }

    /// The process and the status of the container, as they are now.
    ///
    /// # Errors
    /// When either cannot be found out; that is never taken for "stopped".
    pub fn observe(&self, record: &Record) -> Result<(Status, Option<Process>), StateError> {
        if record.pid == 0 {
            let status = if self.is_unlocked()? {
                Status::Stopped
            } else {
                Status::Creating
            };
            return Ok((status, None));
        }
        let process = Process::find(record.pid, record.start_time)
            .map_err(|source| self.failed("find the process of", source))?;
        let Some(process) = process else {
            return Ok((Status::Stopped, None));
        };
        let status = if self.has(INIT_SOCKET)? {
            Status::Creating
        } else if self.has(START_SOCKET)? && self.is_awaited()? {
            Status::Created
        } else if is_frozen(record) {
            Status::Paused
        } else {
            Status::Running
        };
        Ok((status, Some(process)))
    }

    /// Whether the first process waits for `start`. If nobody listens any more, the program runs, and
    /// who started it died before it could take the mark away.
    fn is_awaited(&self) -> Result<bool, StateError> {
        match handshake::connect(&self.socket_path(START_SOCKET)) {
            // It takes this for a starter that died.
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.failed("reach the first process of", error)),
        }
    }

    /// Whether what is recorded was never created, by a creator that is dead. The process, had there been
    /// one, ended when its end of the creator's socket closed.
    fn was_abandoned(&self, record: &Record) -> Result<bool, StateError> {
        if record.pid == 0 {
            return Ok(true);
        }
        if !self.has(INIT_SOCKET)? {
            return Ok(false);
        }
        let process = Process::find(record.pid, record.start_time)
            .map_err(|source| self.failed("find the process of", source))?;
        Ok(process.is_none())
    }

    pub(crate) fn has(&self, name: &str) -> Result<bool, StateError> {
        match fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.failed("read", error.into())),
        }
    }

    /// Writes a file that nobody reads yet.
    fn write(&self, name: &str, text: &[u8]) -> Result<(), StateError> {
        let write = || -> io::Result<()> {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(0o600);
            let file = fs::openat(&self.directory, name, flags, mode)?;
            io::Write::write_all(&mut std::fs::File::from(file), text)
        };
        write().map_err(|source| self.failed("write to", source))
    }

    fn failed(&self, act: &'static str, source: io::Error) -> StateError {
        StateError::Io {
            act,
            path: self.path.clone(),
            source,
        }
    }
}

impl AsFd for Home {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Whether a creator died before the container was created. If so, what it made is removed.
fn remove_abandoned(root: &Path, id: &str) -> Result<bool, StateError> {
    let home = match Home::open(root, id) {
        Ok(home) => home,
        Err(StateError::NotFound { .. }) => return Ok(true),
        Err(error) => return Err(error),
    };
    match home.lock() {
        Ok(()) => {}
        Err(StateError::NotFound { .. }) => return Ok(true),
        Err(StateError::Busy { .. }) => return Ok(false),
        Err(error) => return Err(error),
    }
    match home.record() {
        Ok(record) if home.was_abandoned(&record)? => {
            if let Ok(cgroup) = Cgroup::open(&record.cgroup) {
                // Nothing is lost if it stays: it is empty, and is found again under this name. A hook that
                // runs on may be in it.
                let _ = cgroup.kill_all();
                let _ = cgroup.remove();
            }
            if let Some(groups) = &record.resctrl {
                let _ = groups.remove();
            }
        }
        Ok(_) => return Ok(false),
        Err(StateError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    home.remove()?;
    Ok(true)
}

fn is_frozen(record: &Record) -> bool {
    Cgroup::open(&record.cgroup).is_ok_and(|cgroup| cgroup.is_frozen().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_claimed_once_and_again_after_its_claimant_died() {
        let root = tempfile::tempdir().unwrap();
        let first = Home::claim(root.path(), "a").unwrap();
        assert!(matches!(
            Home::claim(root.path(), "a"),
            Err(StateError::Exists { .. })
        ));
        // A process that dies loses its lock and leaves the directory, as here.
        drop(first);
        let second = Home::claim(root.path(), "a").unwrap();
        second.remove().unwrap();
        second.remove().unwrap();
        assert!(matches!(
            Home::open(root.path(), "a"),
            Err(StateError::NotFound { .. })
        ));
    }
}
