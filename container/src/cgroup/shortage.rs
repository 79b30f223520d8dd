//! Tells when a group is short of memory, by a descriptor that becomes readable.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::fs::inotify;

use super::{Cgroup, CgroupError, hierarchy::Version, stats::flat};

/// Becomes readable when the group may be short of memory, or is gone.
#[derive(Debug)]
pub struct MemoryWatch {
    descriptor: OwnedFd,
    /// The file that tells whether it was the shortage.
    file: PathBuf,
    version: Version,
    kills: Cell<u64>,
}

impl Cgroup {
    /// Watches the memory of the group; nothing if no hierarchy of the host limits memory.
    ///
    /// # Errors
    /// If the group does not exist.
    pub fn watch_memory(&self) -> Result<Option<MemoryWatch>, CgroupError> {
        let Some(directory) = self.directory_of("memory") else {
            return Ok(None);
        };
        let file = directory.path.join(match directory.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        });
        let watch = || match directory.version {
            Version::V1 => {
                let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
                let control = File::open(&file)?;
                let (event_number, number) = (event.as_fd().as_raw_fd(), control.as_raw_fd());
                let text = format!("{event_number} {number}");
                fs::write(directory.path.join("cgroup.event_control"), text)?;
                Ok(event.into())
            }
            Version::V2 => {
                let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
                let descriptor = inotify::init(flags)?;
                inotify::add_watch(&descriptor, &file, inotify::WatchFlags::MODIFY)?;
                Ok(descriptor)
            }
        };
        let descriptor = watch().map_err(|source: io::Error| CgroupError::Io {
            action: "watch",
            path: file.clone(),
            source,
        })?;
        let kills = Cell::new(self.oom_kills()?);
        Ok(Some(MemoryWatch {
            descriptor,
            file,
            version: directory.version,
            kills,
        }))
    }
}

impl MemoryWatch {
    /// After the descriptor was readable: takes the event, and says whether it was a shortage.
    ///
    /// # Errors
    /// If the event cannot be read.
    pub fn short_of_memory(&self) -> io::Result<bool> {
        /// One event of a file that is watched by its own name.
        const EVENT_BYTES_MAX: usize = 256;
        match rustix::io::read(&self.descriptor, &mut [0; EVENT_BYTES_MAX]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        // The end of the group is an event, too.
        let Ok(text) = fs::read_to_string(&self.file) else {
            return Ok(false);
        };
        Ok(match self.version {
            // It comes before the kill.
            Version::V1 => true,
            Version::V2 => {
                let kills = flat(&text, "oom_kill");
                kills > self.kills.replace(kills)
            }
        })
    }
}

impl AsFd for MemoryWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
