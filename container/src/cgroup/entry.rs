//! How a new process gets into a group without waiting.
//!
//! Writing a pid to `cgroup.procs` makes the kernel take a lock against all forks and exits, and
//! getting it waits for a grace period of RCU: some ten milliseconds, more than everything else
//! that starting a container takes. Two ways need no lock: being born in a v2 group, by clone3(2)
//! with `CLONE_INTO_CGROUP`, and moving only oneself, by writing "0" to the file `tasks` of v1.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use nix::{errno::Errno, unistd::write};

use super::{Cgroup, CgroupError, Directory, hierarchy::Version};

/// Open files of a group, for a process that is about to be made.
///
/// The parent opens it, passes [`Entry::clone_into`] to clone3(2), and the child calls
/// [`Entry::join`] while it has one thread, before anything that should count against the limits.
/// The descriptors are close-on-exec.
#[derive(Debug)]
pub struct Entry {
    clone_into: Option<File>,
    /// Where to go if `clone_into` lets nobody in.
    otherwise: Option<File>,
    tasks: Vec<File>,
}

impl Entry {
    pub(super) fn open(directories: &[Directory]) -> Result<Entry, CgroupError> {
        Entry::open_or(directories, None)
    }

    /// As [`Entry::open`], with another v2 group to go to.
    pub(super) fn open_or(
        directories: &[Directory],
        beside: Option<&Path>,
    ) -> Result<Entry, CgroupError> {
        let mut entry = Entry {
            clone_into: None,
            otherwise: beside.and_then(|path| File::open(path).ok()),
            tasks: Vec::new(),
        };
        let error = |path: &Path, source: io::Error| CgroupError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        };
        for directory in directories {
            match directory.version {
                Version::V1 => {
                    let path = directory.path.join("tasks");
                    let file = OpenOptions::new().write(true).open(&path);
                    entry
                        .tasks
                        .push(file.map_err(|source| error(&path, source))?);
                }
                Version::V2 => {
                    let file = match File::open(&directory.path) {
                        Err(gone) if gone.kind() == io::ErrorKind::NotFound => {
                            entry.otherwise.take().ok_or(gone)
                        }
                        opened => opened,
                    };
                    entry.clone_into = Some(file.map_err(|source| error(&directory.path, source))?);
                }
            }
        }
        Ok(entry)
    }

    /// The directory for clone3(2); `None` where there is no v2 hierarchy.
    ///
    /// On a hybrid host the process may be made without it: it is then in all groups that limit,
    /// and [`kill_all`](super::Cgroup::kill_all) works without the help of `cgroup.kill`.
    #[must_use]
    pub fn clone_into(&self) -> Option<BorrowedFd<'_>> {
        self.clone_into.as_ref().map(AsFd::as_fd)
    }

    /// The directory to try if clone3(2) says that [`Entry::clone_into`] lets nobody in (EBUSY): it has
    /// groups below it that have controllers (Documentation/admin-guide/cgroup-v2.rst, No Internal
    /// Process Constraint).
    #[must_use]
    pub fn otherwise(&self) -> Option<BorrowedFd<'_>> {
        self.otherwise.as_ref().map(AsFd::as_fd)
    }

    /// Moves the calling thread, which must be its process's only one, into the v1 groups. Does
    /// nothing but write(2), so it may be called between clone and exec. The caller is
    /// to drop the entry then: the container has no use for directories of the host's.
    ///
    /// # Errors
    ///
    /// What write(2) says: ENODEV if the group was removed meanwhile.
    pub fn join(&self) -> Result<(), Errno> {
        for file in &self.tasks {
            write(file, b"0")?;
        }
        Ok(())
    }
}

impl Cgroup {
    /// As [`Cgroup::entry`], but into groups below, which exist: each `PATH`, or `CONTROLLER,…:PATH` for
    /// the hierarchies of these controllers of v1.
    ///
    /// # Errors
    ///
    /// If a path could lead out of the group, or there is no such group or controller.
    pub fn entry_below(&self, paths: &[String]) -> Result<Entry, CgroupError> {
        let mut directories = self.directories.clone();
        for given in paths {
            let (controllers, path) = match given.split_once(':') {
                Some((names, path)) => (Some(names.split(',').collect::<Vec<_>>()), path),
                None => (None, given.as_str()),
            };
            let path = path.trim_start_matches('/');
            if path.split('/').any(|part| part == "..") {
                let path = given.clone();
                return Err(CgroupError::Below { path });
            }
            let unknown = |name: &&&str| !directories.iter().any(|directory| directory.has(name));
            if let Some(name) = controllers.iter().flatten().find(unknown) {
                let name = (*name).to_owned();
                return Err(CgroupError::Controller { name });
            }
            let is_chosen = |directory: &&mut Directory| {
                let names = controllers.as_ref();
                names.is_none_or(|names| names.iter().any(|name| directory.has(name)))
            };
            for directory in directories.iter_mut().filter(is_chosen) {
                directory.path.push(path);
                let path = directory.path.join("cgroup.procs");
                let found = std::fs::metadata(&path);
                found.map_err(|source| CgroupError::Join { path, source })?;
            }
        }
        Entry::open(&directories)
    }
}
