//! Hides paths and makes paths read-only.
//!
//! What hides a file is the host's /dev/null, opened in the host's tree before the container's root
//! becomes `/`: the container's own /dev/null may be anything (CVE-2025-31133). Each path is found
//! under the root, and the mount is put on what was found.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use libc::MOUNT_ATTR_RDONLY;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, makedev, openat};

use crate::mounts::{new_tmpfs, set_attributes};
use crate::plan::mounts::clone_tree;
use crate::root::Root;
use crate::rootfs::attach_at;

/// Why a path could not be protected.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act} `{path}`")]
pub(crate) struct MaskError {
    act: &'static str,
    path: String,
    source: io::Error,
}

/// Hides every path that exists: files behind /dev/null, directories behind an empty read-only tmpfs.
pub(crate) fn hide(paths: &[impl AsRef<Path>], root: &Root) -> Result<(), MaskError> {
    let mut hiders = Hiders::default();
    for path in paths.iter().map(AsRef::as_ref) {
        hiders.hide(path, root).map_err(|source| MaskError {
            act: "hide",
            path: path.display().to_string(),
            source,
        })?;
    }
    Ok(())
}

/// Makes every path that exists read-only, with the mounts below as they are.
pub(crate) fn make_readonly(paths: &[impl AsRef<Path>], root: &Root) -> Result<(), MaskError> {
    let make = |path: &Path| -> io::Result<()> {
        let Some(target) = find(path, root)? else {
            return Ok(());
        };
        let tree = clone_tree(&target, Path::new(""), true)?;
        set_attributes(tree.as_fd(), MOUNT_ATTR_RDONLY)?;
        attach_at(tree.as_fd(), target, Path::new(""))
    };
    for path in paths.iter().map(AsRef::as_ref) {
        make(path).map_err(|source| MaskError {
            act: "make read-only",
            path: path.display().to_string(),
            source,
        })?;
    }
    Ok(())
}

/// What paths are hidden behind, made when first needed.
#[derive(Default)]
struct Hiders {
    null: Option<OwnedFd>,
    /// The first directory's tmpfs, from which the others are cloned.
    empty: Option<OwnedFd>,
}

impl Hiders {
    fn hide(&mut self, path: &Path, root: &Root) -> io::Result<()> {
        let Some(target) = find(path, root)? else {
            return Ok(());
        };
        if !FileType::from_raw_mode(fstat(&target)?.st_mode).is_dir() {
            let null = match &self.null {
                Some(null) => null,
                None => self.null.insert(open_null()?),
            };
            let tree = clone_tree(null, Path::new(""), false)?;
            return attach_at(tree.as_fd(), target, Path::new(""));
        }
        let tree = match &self.empty {
            Some(empty) => clone_tree(empty, Path::new(""), false)?,
            None => {
                let tree = new_tmpfs(&[("nr_inodes", "1"), ("mode", "755")])?;
                set_attributes(tree.as_fd(), MOUNT_ATTR_RDONLY)?;
                tree
            }
        };
        attach_at(tree.as_fd(), target, Path::new(""))?;
        self.empty.get_or_insert(tree);
        Ok(())
    }
}

/// The host's /dev/null, and nothing else.
fn open_null() -> io::Result<OwnedFd> {
    let null = openat(
        CWD,
        "/dev/null",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let stat = fstat(&null)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    if !is_device || stat.st_rdev != makedev(1, 3) {
        return Err(io::Error::other(
            "the host's /dev/null is not the null device",
        ));
    }
    Ok(null)
}

/// A path of the container, if there is one.
pub(crate) fn find(path: &Path, root: &Root) -> io::Result<Option<OwnedFd>> {
    match root.find(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(None),
        Err(error) => Err(error),
    }
}
