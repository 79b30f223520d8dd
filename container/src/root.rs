//! A directory that paths cannot leave: every look-up below it treats it as `/`.
//!
//! The kernel does the walking (`openat2` with RESOLVE_IN_ROOT), so that symbolic links, `..` and
//! renames during the walk all stay inside. A path is resolved once, to a descriptor, and from then on
//! only the descriptor is used: nothing can be swapped between the check and the use.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How often a look-up is tried again after a rename or mount raced with it (EAGAIN).
const RESOLVE_TRIES_MAX: usize = 128;
/// How many symbolic links that point to nothing are followed while directories are made.
const DANGLING_LINKS_MAX: usize = 40;

/// A directory that stands for `/`.
#[derive(Debug)]
pub(crate) struct Root {
    directory: OwnedFd,
}

impl Root {
    pub(crate) fn new(directory: OwnedFd) -> Self {
        Self { directory }
    }

    /// The root of this process, in which the kernel's magic links are then not followed either.
    pub(crate) fn current() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self::new(fs::open("/", flags, Mode::empty())?))
    }

    /// Opens a directory of the host as a root.
    pub(crate) fn open_host(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self::new(fs::openat(fs::CWD, path, flags, Mode::empty())?))
    }

    /// Opens `path` inside the root. Links are followed unless the flags say NOFOLLOW; the kernel's
    /// magic links (as in /proc/PID/fd) are refused, since they lead anywhere.
    pub(crate) fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        resolve(self.directory.as_fd(), path, flags, ResolveFlags::IN_ROOT)
    }

    /// A handle on `path`, good for use as a mount point, for `fstat` and for `/proc/self/fd`.
    pub(crate) fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH)
    }

    /// The directory `path`, made with its missing parents (mode 0755) where needed.
    pub(crate) fn make_directory(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let mut at = self.open(Path::new("/"), OFlags::PATH | OFlags::DIRECTORY)?;
        let mut reached = PathBuf::from("/");
        let mut links = 0;
        // What is still to be walked, last first.
        let mut todo: Vec<PathBuf> = parts(path);
        while let Some(part) = todo.pop() {
            let next = reached.join(&part);
            match self.open(&next, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(directory) => {
                    at = directory;
                    reached = next;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if let Some(target) = dangling_link(at.as_fd(), part.as_os_str())? {
                        links += 1;
                        if links > DANGLING_LINKS_MAX {
                            return Err(Errno::LOOP.into());
                        }
                        if target.is_absolute() {
                            reached = PathBuf::from("/");
                            at = self.open(&reached, OFlags::PATH | OFlags::DIRECTORY)?;
                        }
                        todo.extend(parts(&target));
                        continue;
                    }
                    match fs::mkdirat(&at, &part, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                    at = beneath(at.as_fd(), part.as_os_str())?;
                    reached = next;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(at)
    }

    /// A handle on the file `path`, made empty (mode 0644, parents 0755) if it is missing.
    pub(crate) fn make_file(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut path = path.to_path_buf();
        for _ in 0..DANGLING_LINKS_MAX {
            match self.find(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                found => return found,
            }
            let (parent, name) = self.make_parent(&path)?;
            if let Some(target) = dangling_link(parent.as_fd(), name.as_os_str())? {
                // An absolute target replaces the path; the kernel resolves the dots.
                path = path.parent().unwrap_or_else(|| Path::new("/")).join(target);
                continue;
            }
            let flags = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o644))?;
            let handle = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            return Ok(fs::openat(&parent, &name, handle, Mode::empty())?);
        }
        Err(Errno::LOOP.into())
    }

    /// The directory that `path` is in, made if missing, and the last part of the path.
    pub(crate) fn make_parent(&self, path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().unwrap_or_else(|| Path::new("/"));
        Ok((self.make_directory(parent)?, PathBuf::from(name)))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The ordinary parts of a path, last first. `..` is kept: the kernel resolves it, at the root to the
/// root itself.
fn parts(path: &Path) -> Vec<PathBuf> {
    path.components()
        .rev()
        .filter_map(|component| match component {
            Component::Normal(part) => Some(PathBuf::from(part)),
            Component::ParentDir => Some(PathBuf::from("..")),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// The target, if `name` is a symbolic link (that was found to lead nowhere).
fn dangling_link(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<PathBuf>> {
    use std::os::unix::ffi::OsStringExt;
    match fs::readlinkat(directory, name, Vec::new()) {
        Ok(target) => Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(
            target.into_bytes(),
        )))),
        Err(Errno::NOENT | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn beneath(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    resolve(directory, Path::new(name), flags, ResolveFlags::BENEATH)
}

fn resolve(
    directory: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    for _ in 0..RESOLVE_TRIES_MAX {
        let how = resolve | ResolveFlags::NO_MAGICLINKS;
        match fs::openat2(directory, path, flags, Mode::empty(), how) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
    Err(Errno::AGAIN.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("root");
        std::fs::create_dir(&inside).unwrap();
        let root = Root::open_host(&inside).unwrap();
        (directory, root)
    }

    #[test]
    fn dots_and_links_stay_inside() {
        let (directory, root) = root();
        let inside = directory.path().join("root");
        std::os::unix::fs::symlink("/../..", inside.join("up")).unwrap();
        std::os::unix::fs::symlink("/gone/away", inside.join("dangling")).unwrap();
        for (path, made) in [
            ("../../a", "a"),
            ("/up/b", "b"),
            ("/c/../../d", "d"),
            ("/dangling/e", "gone/away/e"),
        ] {
            root.make_directory(Path::new(path)).unwrap();
            assert!(inside.join(made).is_dir(), "{path} should be {made}");
        }
        root.make_file(Path::new("../../up/f")).unwrap();
        assert!(inside.join("f").is_file());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_that_leads_to_itself_is_an_error() {
        let (directory, root) = root();
        let inside = directory.path().join("root");
        std::os::unix::fs::symlink("loop", inside.join("loop")).unwrap();
        root.make_directory(Path::new("/loop/a")).unwrap_err();
    }
}
