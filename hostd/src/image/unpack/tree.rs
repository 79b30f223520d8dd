//! The directory that a layer is unpacked into, which no name in the layer can lead out of.
//!
//! Every path is resolved here, below one descriptor, with symbolic links followed as if that
//! directory were `/`. The kernel is asked for paths without links only (`RESOLVE_BENEATH` and
//! `RESOLVE_NO_SYMLINKS`), so a mistake in this file is an error and not an escape.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, XattrFlags};
use rustix::io::Errno;

use super::Failure;
use super::archive::Time;
use super::attributes;

/// Directories may be nested so deep. Removing a tree takes a descriptor for each level.
pub(super) const DEPTH_MAX: usize = 128;

/// As the kernel bounds the symbolic links in one path.
const LINKS_MAX: usize = 40;

/// Steps that one layer's paths may take through symbolic links and missing directories: some tens
/// of seconds, so that a maze of links cannot keep a thread for ever.
const STEPS_MAX: u64 = 10_000_000;

/// Paths of directories that are remembered until the layer's end, for their times.
const REMEMBERED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The mode of a directory that a layer does not mention, unless a lower layer has it.
const IMPLICIT_MODE: Mode = Mode::from_raw_mode(0o755);

const OPAQUE_ATTRIBUTE: &str = "trusted.overlay.opaque";

/// An open directory of the tree and its path from the root, free of symbolic links.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    pub(super) fd: Rc<OwnedFd>,
    path: PathBuf,
}

/// The tree that is being filled.
pub(super) struct Tree {
    root: OwnedFd,
    /// The last directory that was asked for: most entries follow one from the same directory.
    last: Option<(PathBuf, Directory)>,
    /// Directories that entries are in but no entry is about.
    implicit: BTreeSet<PathBuf>,
    times: Vec<(PathBuf, Time)>,
    remembered: usize,
    steps: u64,
}

impl Tree {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let root: OwnedFd = File::open(root)?.into();
        rustix::fs::fchmod(&root, IMPLICIT_MODE)?;
        let implicit = BTreeSet::from([PathBuf::new()]);
        let times = vec![(PathBuf::new(), Time::default())];
        Ok(Self {
            root,
            last: None,
            implicit,
            times,
            remembered: 0,
            steps: 0,
        })
    }

    /// The directory `components`, made if it is missing.
    pub(super) fn directory(&mut self, components: &[&OsStr]) -> Result<Directory, Failure> {
        let asked: PathBuf = components.iter().collect();
        if let Some((path, directory)) = &self.last
            && *path == asked
        {
            return Ok(directory.clone());
        }
        let directory = match self.open_exactly(&asked) {
            Ok(fd) => Directory {
                fd: Rc::new(fd),
                path: asked.clone(),
            },
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => {
                let path = self
                    .resolve(components, true)?
                    .ok_or_else(|| too_tangled(&asked))?;
                let fd = self.open_exactly(&path).map_err(Failure::host("open"))?;
                Directory {
                    fd: Rc::new(fd),
                    path,
                }
            }
            Err(error) => return Err(Failure::host("open")(error)),
        };
        self.last = Some((asked, directory.clone()));
        Ok(directory)
    }

    /// The directory `components` if it is there.
    pub(super) fn existing(&mut self, components: &[&OsStr]) -> Result<Option<Directory>, Failure> {
        let Some(path) = self.resolve(components, false)? else {
            return Ok(None);
        };
        let fd = self.open_exactly(&path).map_err(Failure::host("open"))?;
        Ok(Some(Directory {
            fd: Rc::new(fd),
            path,
        }))
    }

    /// Makes the directory `name`, or takes the one that is there, and opens it for its attributes.
    pub(super) fn make_directory(
        &mut self,
        parent: &Directory,
        name: &OsStr,
    ) -> Result<File, Failure> {
        if parent.path.iter().count() >= DEPTH_MAX {
            return Err(too_deep());
        }
        let path = parent.path.join(name);
        let opaque = match lookup(parent, name)? {
            Some(found) if is_directory(&found) => false,
            Some(found) => {
                self.remove(parent, name, &found)?;
                make(parent, name)?;
                is_whiteout(&found)
            }
            None => {
                make(parent, name)?;
                false
            }
        };
        if opaque {
            self.set_opaque(parent, name)?;
        }
        self.implicit.remove(&path);
        open_in(parent, name).map(File::from)
    }

    /// The root itself, for its attributes.
    pub(super) fn root(&mut self) -> Result<File, Failure> {
        self.implicit.remove(Path::new(""));
        let root = self
            .root
            .try_clone()
            .map_err(|error| Failure::Host("open", error))?;
        Ok(File::from(root))
    }

    /// Remembers a directory's time of change, which later entries in it would overwrite.
    pub(super) fn set_time_at_end(
        &mut self,
        parent: Option<(&Directory, &OsStr)>,
        time: Time,
    ) -> Result<(), Failure> {
        let path = parent
            .map(|(parent, name)| parent.path.join(name))
            .unwrap_or_default();
        self.remember(&path)?;
        self.times.push((path, time));
        Ok(())
    }

    /// Runs `create`, and if something of that name is in the way, once more without it.
    pub(super) fn create<T>(
        &mut self,
        parent: &Directory,
        name: &OsStr,
        create: impl Fn() -> rustix::io::Result<T>,
    ) -> Result<T, Failure> {
        match create() {
            Err(Errno::EXIST) => {
                if let Some(found) = lookup(parent, name)? {
                    self.remove(parent, name, &found)?;
                }
                create().map_err(Failure::host("create"))
            }
            result => result.map_err(Failure::host("create")),
        }
    }

    /// Hides `name` of the layers below, unless this layer has it.
    pub(super) fn whiteout(&mut self, parent: &Directory, name: &OsStr) -> Result<(), Failure> {
        match lookup(parent, name)? {
            Some(found) if is_directory(&found) => self.set_opaque(parent, name),
            // What is in the layer itself hides what is below, and is not hidden.
            Some(_) => Ok(()),
            None => {
                let device = rustix::fs::makedev(0, 0);
                let mode = Mode::empty();
                rustix::fs::mknodat(&parent.fd, name, FileType::CharacterDevice, mode, device)
                    .map_err(Failure::host("create"))
            }
        }
    }

    /// Hides everything that the layers below have in this directory (overlayfs.rst, "whiteouts
    /// and opaque directories").
    pub(super) fn hide_below(&self, directory: &Directory) -> Result<(), Failure> {
        // The descriptor of a `Directory` is for paths only.
        let opened = open_in(directory, OsStr::new("."))?;
        mark_opaque(&opened)
    }

    /// Sets the times that were left for the end; returns the directories that no entry described,
    /// parents first.
    pub(super) fn finish(self) -> Result<Vec<PathBuf>, Failure> {
        for (path, time) in &self.times {
            match open_beneath(&self.root, path, OFlags::RDONLY) {
                Ok(directory) => attributes::set_time(&File::from(directory), *time)?,
                // A later entry has replaced it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(Failure::host("open")(error)),
            }
        }
        Ok(self.implicit.into_iter().collect())
    }

    fn set_opaque(&self, parent: &Directory, name: &OsStr) -> Result<(), Failure> {
        mark_opaque(&open_in(parent, name)?)
    }

    /// Follows symbolic links inside of the tree. `None` if something is missing and not to be made.
    fn resolve(&mut self, components: &[&OsStr], make: bool) -> Result<Option<PathBuf>, Failure> {
        let mut ahead: VecDeque<OsString> =
            components.iter().map(|name| (*name).to_owned()).collect();
        let mut resolved = PathBuf::new();
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            self.steps += 1;
            match name.as_bytes() {
                _ if self.steps > STEPS_MAX => return Err(too_tangled(&resolved)),
                b"" | b"." => continue,
                // At the root it stays there, as `/..` is `/`.
                b".." => {
                    resolved.pop();
                    continue;
                }
                _ if resolved.iter().count() >= DEPTH_MAX => return Err(too_deep()),
                _ => {}
            }
            let fd = self
                .open_exactly(&resolved)
                .map_err(Failure::host("open"))?;
            let parent = Directory {
                fd: Rc::new(fd),
                path: resolved.clone(),
            };
            match lookup(&parent, &name)? {
                Some(found) if is_directory(&found) => resolved.push(name),
                Some(found) if is_symlink(&found) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(too_tangled(&resolved.join(name)));
                    }
                    let target = rustix::fs::readlinkat(&parent.fd, &name, Vec::new())
                        .map_err(Failure::host("read"))?;
                    let target = target.as_bytes();
                    if target.starts_with(b"/") {
                        resolved.clear();
                    }
                    for part in target.rsplit(|&byte| byte == b'/') {
                        ahead.push_front(OsStr::from_bytes(part).to_owned());
                    }
                }
                found if found.as_ref().is_none_or(is_whiteout) => {
                    if !make {
                        return Ok(None);
                    }
                    self.make_implicit(&parent, &name)?;
                    resolved.push(name);
                }
                _ => {
                    let path = resolved.join(name);
                    let path = path.display();
                    return Err(Failure::Refused(format!(
                        "its parent `{path}` is not a directory"
                    )));
                }
            }
        }
        Ok(Some(resolved))
    }

    fn make_implicit(&mut self, parent: &Directory, name: &OsStr) -> Result<(), Failure> {
        let path = parent.path.join(name);
        self.remember(&path)?;
        let directory = self.make_directory(parent, name)?;
        rustix::fs::fchmod(&directory, IMPLICIT_MODE).map_err(Failure::host("set the mode of"))?;
        self.times.push((path.clone(), Time::default()));
        self.implicit.insert(path);
        Ok(())
    }

    fn remember(&mut self, path: &Path) -> Result<(), Failure> {
        self.remembered += 2 * (path.as_os_str().len() + size_of::<(PathBuf, Time)>());
        if self.remembered > REMEMBERED_BYTES_MAX {
            return Err(Failure::Refused(
                "the layer has too many directories".to_owned(),
            ));
        }
        Ok(())
    }

    fn remove(&mut self, parent: &Directory, name: &OsStr, found: &Stat) -> Result<(), Failure> {
        // It may be what the last path led through.
        self.last = None;
        if is_directory(found) {
            let path = Path::new("/proc/self/fd").join(parent.fd.as_raw_fd().to_string());
            fs::remove_dir_all(path.join(name)).map_err(|error| Failure::Host("remove", error))
        } else {
            rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty())
                .map_err(Failure::host("remove"))
        }
    }

    /// Opens a directory by a path in which nothing is a symbolic link.
    fn open_exactly(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        open_beneath(&self.root, path, OFlags::PATH)
    }
}

/// Opens the directory `path` below `root`, through no symbolic link.
pub(super) fn open_beneath(
    root: &OwnedFd,
    path: &Path,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    loop {
        // EAGAIN means that something was renamed meanwhile, anywhere on the host.
        match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Whether overlayfs hides what is below a directory.
pub(super) fn is_opaque(directory: &OwnedFd) -> bool {
    let mut value = [0; 1];
    let length = rustix::fs::fgetxattr(directory, OPAQUE_ATTRIBUTE, &mut value[..]);
    length == Ok(1) && value == *b"y"
}

/// What is called `name`, links not followed.
pub(super) fn lookup(parent: &Directory, name: &OsStr) -> Result<Option<Stat>, Failure> {
    match rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(Failure::host("look up")(error)),
    }
}

pub(super) fn is_directory(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Directory
}

fn is_symlink(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Symlink
}

fn is_whiteout(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0
}

fn make(parent: &Directory, name: &OsStr) -> Result<(), Failure> {
    rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU).map_err(Failure::host("create"))
}

fn open_in(parent: &Directory, name: &OsStr) -> Result<OwnedFd, Failure> {
    open_beneath(&parent.fd, Path::new(name), OFlags::RDONLY).map_err(Failure::host("open"))
}

fn mark_opaque(directory: &OwnedFd) -> Result<(), Failure> {
    rustix::fs::fsetxattr(directory, OPAQUE_ATTRIBUTE, b"y", XattrFlags::empty())
        .map_err(Failure::host("set an attribute of"))
}

fn too_deep() -> Failure {
    Failure::Refused(format!("it is more than {DEPTH_MAX} directories deep"))
}

fn too_tangled(path: &Path) -> Failure {
    Failure::Refused(format!(
        "too many symbolic links lead to `{}`",
        path.display()
    ))
}
