//! User namespaces that no process is in, for containers to be started in and for mounts to be mapped by.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use libc::MOUNT_ATTR_IDMAP;
use rustix::event::pause;
use rustix::fs::CWD;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, getpid, getppid, pidfd_send_signal,
    set_parent_process_death_signal, waitid,
};

use crate::namespaces::write_id_maps;
use crate::plan::mounts::clone_tree;
use crate::plan::namespaces::Kind;
use crate::sys::{self, Cloned, MountAttributes, mount_setattr};

/// Users and groups of the host that stand for those from 0 on in a user namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IdRange {
    /// The host's user and group that 0 stands for.
    pub first: u32,
    /// How many there are, at least 1.
    pub count: u32,
}

impl IdRange {
    /// As the kernel wants it in uid_map and gid_map.
    fn map(self) -> String {
        format!("0 {} {}\n", self.first, self.count)
    }
}

/// A user namespace, which exists for as long as this value, a process in it or a mount that it maps.
#[derive(Debug)]
pub struct UserNamespace {
    file: OwnedFd,
}

impl UserNamespace {
    /// Makes one.
    ///
    /// # Errors
    /// The kernel's: EPERM or EINVAL without the right to map `range`, ENOSPC where
    /// `user.max_user_namespaces` has been reached.
    pub fn new(range: IdRange) -> io::Result<Self> {
        let map = range.map();
        let file = with_maps(&map, &map)?;
        Ok(Self { file })
    }

    /// Makes one, and a network namespace that belongs to it: who is root in the one has rights over the
    /// other.
    ///
    /// # Errors
    /// Those of [`UserNamespace::new`]; ENOSPC also for `user.max_net_namespaces`.
    pub fn with_network(range: IdRange) -> io::Result<(Self, OwnedFd)> {
        let map = range.map();
        make(&map, &map, Kind::USER.0 | Kind::NETWORK.0, |pid| {
            let file = open(pid, Kind::USER)?;
            Ok((Self { file }, open(pid, Kind::NETWORK)?))
        })
    }

    /// A copy of the mount at `path`, with `recursive` of those below as well, attached nowhere. Through it
    /// a file of the user 0 is one of the first of the range, and so on; files of other users are nobody's.
    ///
    /// # Errors
    /// The kernel's: EINVAL for a file system whose mounts cannot be mapped.
    pub fn mapped_tree(&self, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
        let tree = clone_tree(CWD, path, recursive)?;
        map_owners(&tree, recursive, self.as_fd())?;
        Ok(tree)
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Maps the owners of the files in a tree that is attached nowhere yet.
pub(crate) fn map_owners(
    tree: &OwnedFd,
    recursive: bool,
    user_namespace: BorrowedFd<'_>,
) -> io::Result<()> {
    let attributes = MountAttributes {
        set: MOUNT_ATTR_IDMAP,
        ..MountAttributes::default()
    };
    mount_setattr(tree.as_fd(), attributes, recursive, Some(user_namespace))
}

/// Makes the new namespaces of `flags`, one of them a user namespace with a mapping, and has `open` open those
/// of a process. The kernel makes them for a process only, so there is one, which does nothing else and has
/// ended afterwards.
fn make<T>(
    uid_map: &str,
    gid_map: &str,
    flags: u64,
    open: impl FnOnce(i32) -> io::Result<T>,
) -> io::Result<T> {
    let parent = getpid();
    match sys::clone3(flags, None)? {
        Cloned::Child => hold_out(parent),
        Cloned::Parent { pid, pidfd } => {
            let opened = write_id_maps(pid, uid_map, gid_map).and_then(|()| open(pid));
            let ended = pidfd_send_signal(&pidfd, Signal::KILL)
                .and_then(|()| waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED));
            let opened = opened?;
            ended?;
            Ok(opened)
        }
    }
}

/// Makes a user namespace with a mapping, held by nothing but the descriptor.
pub(crate) fn with_maps(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    make(uid_map, gid_map, Kind::USER.0, |pid| open(pid, Kind::USER))
}

fn open(pid: i32, kind: Kind) -> io::Result<OwnedFd> {
    let file = File::open(format!("/proc/{pid}/ns/{}", kind.file_name()))?;
    Ok(file.into())
}

/// The part of the process: it is there until it is killed, if need be by the end of its parent. That may
/// have several threads, so nothing is done here but system calls.
fn hold_out(parent: Pid) -> ! {
    let dies_with_it = set_parent_process_death_signal(Some(Signal::KILL));
    if dies_with_it.is_err() || getppid() != Some(parent) {
        sys::exit_now(1);
    }
    loop {
        pause();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const RANGE: IdRange = IdRange {
        first: 3_000_000_000,
        count: 65536,
    };

    /// As root. The parent has several threads, and makes some at once.
    #[test]
    fn namespaces_are_made_beside_other_threads_and_map_the_owners_of_files() {
        // On a disk: the owners of a tmpfs's files cannot be mapped before Linux 6.3.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::chown(&file, Some(5), Some(6)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let (users, network) = UserNamespace::with_network(RANGE).unwrap();
                    assert_eq!(
                        sys::namespace_type(network.as_fd()).unwrap(),
                        Kind::NETWORK.0
                    );
                    let tree = users.mapped_tree(dir.path(), false).unwrap();
                    let found = rustix::fs::statat(&tree, "file", rustix::fs::AtFlags::empty());
                    let found = found.unwrap();
                    assert_eq!((found.st_uid, found.st_gid), (3_000_000_005, 3_000_000_006));
                });
            }
        });
        assert_eq!(std::fs::metadata(&file).unwrap().uid(), 5);
    }

    #[test]
    fn what_cannot_be_mapped_is_told_and_no_process_is_left() {
        let range = IdRange {
            first: u32::MAX - 1,
            count: 65536,
        };
        UserNamespace::with_network(range).unwrap_err();
        let (users, _) = UserNamespace::with_network(RANGE).unwrap();
        let refused = users.mapped_tree(Path::new("/proc"), false).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }
}
