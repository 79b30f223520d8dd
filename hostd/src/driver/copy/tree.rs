//! A whole tree, as overlayfs keeps it: owners, modes, times, links, devices (which hide files of the
//! layers below), and every extended attribute (which overlayfs keeps its own notes in).
//!
//! The tree was written by a container. Nothing in it is followed: every name is used in an open
//! directory, and never a path.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::{Copier, CopyError, DEPTH_MAX};

/// The kernel's bound on a list of attributes and on a value.
const XATTR_BYTES_MAX: usize = 64 * 1024;

/// A copy of one tree.
struct Tree<'a> {
    copier: &'a mut Copier,
    target: OwnedFd,
    /// Files with several names: the path of the copy's first one, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

/// A directory and its copy, both open.
struct Pair<'a> {
    from: BorrowedFd<'a>,
    to: BorrowedFd<'a>,
    /// From the root of the copy.
    path: &'a Path,
}

impl Copier {
    /// Makes the directory `target` with all that `source` holds.
    pub(in crate::driver) fn tree(
        &mut self,
        source: &Path,
        target: &Path,
    ) -> Result<(), CopyError> {
        let from = rustix::fs::openat(CWD, source, directory_flags(), Mode::empty())
            .map_err(CopyError::io("open", &source.display()))?;
        rustix::fs::mkdirat(CWD, target, Mode::RWXU)
            .map_err(CopyError::io("make", &target.display()))?;
        let to = rustix::fs::openat(CWD, target, directory_flags(), Mode::empty())
            .map_err(CopyError::io("open", &target.display()))?;
        let mut tree = Tree {
            copier: self,
            target: to
                .try_clone()
                .map_err(CopyError::io("open", &target.display()))?,
            links: HashMap::new(),
        };
        let root = Pair {
            from: from.as_fd(),
            to: to.as_fd(),
            path: Path::new(""),
        };
        tree.directory(&root, 0)
    }
}

impl Tree<'_> {
    fn directory(&mut self, pair: &Pair<'_>, depth: usize) -> Result<(), CopyError> {
        let shown = pair.path.display();
        if depth > DEPTH_MAX {
            let name = shown.to_string();
            return Err(CopyError::Deep { name });
        }
        for name in names(pair.from).map_err(CopyError::io("read", &shown))? {
            self.copier.count()?;
            self.entry(pair, &name, depth)?;
        }
        let found = rustix::fs::fstat(pair.from).map_err(CopyError::io("read", &shown))?;
        let set = set_open(pair.from, pair.to, &found);
        set.map_err(CopyError::io("set the attributes of", &shown))
    }

    fn entry(&mut self, parent: &Pair<'_>, name: &OsStr, depth: usize) -> Result<(), CopyError> {
        let path = parent.path.join(name);
        let shown = path.display();
        let found = rustix::fs::statat(parent.from, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(CopyError::io("read", &shown))?;
        let kind = FileType::from_raw_mode(found.st_mode);
        if kind == FileType::Directory {
            let made = rustix::fs::mkdirat(parent.to, name, Mode::RWXU);
            made.map_err(CopyError::io("make", &shown))?;
            let open = |parent: BorrowedFd<'_>| {
                rustix::fs::openat(parent, name, directory_flags(), Mode::empty())
            };
            let from = open(parent.from).map_err(CopyError::io("open", &shown))?;
            let to = open(parent.to).map_err(CopyError::io("open", &shown))?;
            let pair = Pair {
                from: from.as_fd(),
                to: to.as_fd(),
                path: &path,
            };
            return self.directory(&pair, depth + 1);
        }
        let key = (found.st_dev, found.st_ino);
        if let Some(first) = self.links.get(&key) {
            return rustix::fs::linkat(&self.target, first, parent.to, name, AtFlags::empty())
                .map_err(CopyError::io("link", &shown));
        }
        if kind == FileType::RegularFile {
            self.regular(parent, name, &found, &shown.to_string())?;
        } else {
            special(parent, name, &found, kind).map_err(CopyError::io("make", &shown))?;
        }
        if found.st_nlink > 1 {
            self.links.insert(key, path);
        }
        Ok(())
    }

    fn regular(
        &mut self,
        parent: &Pair<'_>,
        name: &OsStr,
        found: &Stat,
        shown: &str,
    ) -> Result<(), CopyError> {
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = rustix::fs::openat(parent.from, name, flags | OFlags::RDONLY, Mode::empty())
            .map_err(CopyError::io("open", &shown))?;
        let create = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let to = rustix::fs::openat(parent.to, name, create, Mode::RUSR | Mode::WUSR)
            .map_err(CopyError::io("make", &shown))?;
        let (mut from, to) = (File::from(from), File::from(to));
        self.copier.file(&mut from, &to, shown)?;
        set_open(from.as_fd(), to.as_fd(), found)
            .map_err(CopyError::io("set the attributes of", &shown))
    }
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// What a directory holds. It is read to the end first, so that each level takes no more descriptors
/// than it must.
fn names(directory: BorrowedFd<'_>) -> rustix::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    Ok(names)
}

/// Sets owner, mode, attributes and times of a copy, by its descriptor.
fn set_open(from: BorrowedFd<'_>, to: BorrowedFd<'_>, found: &Stat) -> rustix::io::Result<()> {
    // A change of owner takes away setuid bits and capabilities, so it comes first.
    let (user, group) = owner(found);
    rustix::fs::fchown(to, user, group)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(found.st_mode))?;
    let mut list = vec![0; XATTR_BYTES_MAX];
    let count = present(rustix::fs::flistxattr(from, list.as_mut_slice()))?;
    let mut value = vec![0; XATTR_BYTES_MAX];
    for name in attributes(&list[..count]) {
        let count = rustix::fs::fgetxattr(from, name, value.as_mut_slice())?;
        rustix::fs::fsetxattr(to, name, &value[..count], XattrFlags::empty())?;
    }
    rustix::fs::futimens(to, &times(found))
}

/// Copies what has no data: links, pipes, sockets, devices.
fn special(
    parent: &Pair<'_>,
    name: &OsStr,
    found: &Stat,
    kind: FileType,
) -> rustix::io::Result<()> {
    if kind == FileType::Symlink {
        let target = rustix::fs::readlinkat(parent.from, name, Vec::new())?;
        rustix::fs::symlinkat(&target, parent.to, name)?;
    } else {
        let mode = Mode::from_raw_mode(found.st_mode);
        rustix::fs::mknodat(parent.to, name, kind, mode, found.st_rdev)?;
    }
    let (user, group) = owner(found);
    rustix::fs::chownat(parent.to, name, user, group, AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        // The mask for new files took some of it away. It is no link, and nobody else is here.
        let mode = Mode::from_raw_mode(found.st_mode);
        rustix::fs::chmodat(parent.to, name, mode, AtFlags::empty())?;
    }
    let (from, to) = (by_name(parent.from, name), by_name(parent.to, name));
    let mut list = vec![0; XATTR_BYTES_MAX];
    let count = present(rustix::fs::llistxattr(&from, list.as_mut_slice()))?;
    let mut value = vec![0; XATTR_BYTES_MAX];
    for name in attributes(&list[..count]) {
        let count = rustix::fs::lgetxattr(&from, name, value.as_mut_slice())?;
        rustix::fs::lsetxattr(&to, name, &value[..count], XattrFlags::empty())?;
    }
    rustix::fs::utimensat(parent.to, name, &times(found), AtFlags::SYMLINK_NOFOLLOW)
}

/// What cannot be opened has its attributes by a path, of which only the last part is a container's.
fn by_name(directory: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(directory.as_raw_fd().to_string())
        .join(name)
}

/// A file system without extended attributes has none.
fn present(listed: rustix::io::Result<usize>) -> rustix::io::Result<usize> {
    match listed {
        Err(Errno::NOTSUP) => Ok(0),
        other => other,
    }
}

fn attributes(list: &[u8]) -> impl Iterator<Item = &OsStr> {
    list.split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(OsStr::from_bytes)
}

fn owner(found: &Stat) -> (Option<Uid>, Option<Gid>) {
    let (user, group) = (Uid::from_raw(found.st_uid), Gid::from_raw(found.st_gid));
    (Some(user), Some(group))
}

fn times(found: &Stat) -> Timestamps {
    let time = |tv_sec: i64, nanoseconds: u64| Timespec {
        tv_sec,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or_default(),
    };
    Timestamps {
        last_access: time(found.st_atime, found.st_atime_nsec),
        last_modification: time(found.st_mtime, found.st_mtime_nsec),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use tempfile::TempDir;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn copy(from: &Path, to: &Path) -> Result<u64, CopyError> {
        let mut copier = Copier::begin(CancellationToken::new());
        copier.tree(from, to).map(|()| copier.bytes)
    }

    /// What of a file is to be the same in its copy.
    fn facts(path: &Path) -> (u32, u32, u32, u64, i64, i64) {
        let found = fs::symlink_metadata(path).unwrap();
        let (mode, uid, gid) = (found.mode(), found.uid(), found.gid());
        (
            mode,
            uid,
            gid,
            found.rdev(),
            found.mtime(),
            found.mtime_nsec(),
        )
    }

    fn attribute(path: &Path, name: &str) -> Vec<u8> {
        let mut value = vec![0; 100];
        let count = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
        value[..count].to_vec()
    }

    /// As root: everything that overlayfs may have in a writable layer.
    #[test]
    fn a_writable_layer_is_copied_as_it_is() {
        let dir = TempDir::new().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("etc/deep")).unwrap();
        fs::write(from.join("etc/file"), "data").unwrap();
        fs::hard_link(from.join("etc/file"), from.join("second")).unwrap();
        fs::write(from.join("setuid"), "x").unwrap();
        rustix::fs::chown(from.join("setuid"), Some(Uid::from_raw(1000)), None).unwrap();
        let mode = fs::Permissions::from_mode(0o4711);
        fs::set_permissions(from.join("setuid"), mode).unwrap();
        symlink("/etc/shadow", from.join("link")).unwrap();
        symlink("/nowhere", from.join("dangling")).unwrap();
        rustix::fs::mkfifoat(CWD, from.join("pipe"), Mode::from_raw_mode(0o622)).unwrap();
        let whiteout = from.join("etc/hidden");
        rustix::fs::mknodat(CWD, &whiteout, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        for (path, name) in [("etc", "trusted.overlay.opaque"), ("link", "trusted.x")] {
            let path = from.join(path);
            rustix::fs::lsetxattr(&path, name, b"y", XattrFlags::empty()).unwrap();
        }
        copy(&from, &to).unwrap();

        let all = [
            "",
            "etc",
            "etc/deep",
            "etc/file",
            "etc/hidden",
            "second",
            "setuid",
            "link",
            "dangling",
            "pipe",
        ];
        for path in all {
            assert_eq!(facts(&from.join(path)), facts(&to.join(path)), "{path}");
        }
        assert_eq!(fs::read_to_string(to.join("second")).unwrap(), "data");
        let inode = |path: &str| fs::metadata(to.join(path)).unwrap().ino();
        assert_eq!(inode("second"), inode("etc/file"));
        assert_eq!(
            fs::read_link(to.join("link")).unwrap(),
            Path::new("/etc/shadow")
        );
        assert_eq!(attribute(&to.join("etc"), "trusted.overlay.opaque"), b"y");
        assert_eq!(attribute(&to.join("link"), "trusted.x"), b"y");
    }

    #[test]
    fn a_tree_that_is_too_deep_is_refused_and_a_link_at_its_root_is_not_followed() {
        let dir = TempDir::new().unwrap();
        let deep: PathBuf = std::iter::repeat_n("d", DEPTH_MAX + 1).collect();
        fs::create_dir_all(dir.path().join("from").join(deep)).unwrap();
        let deep = copy(&dir.path().join("from"), &dir.path().join("to"));
        assert!(matches!(deep, Err(CopyError::Deep { .. })), "{deep:?}");

        symlink("/etc", dir.path().join("link")).unwrap();
        let linked = copy(&dir.path().join("link"), &dir.path().join("other"));
        assert!(matches!(linked, Err(CopyError::Io { .. })), "{linked:?}");
    }
}
