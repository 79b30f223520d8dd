//! Directories that a layer has entries in but does not describe: they look as in the layer below.
//!
//! Without this, a layer that adds `tmp/x` and no entry for `tmp` would take the sticky bit away.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::tree::{is_opaque, open_beneath};

/// What a layer says about a directory.
enum Found {
    Here(OwnedFd),
    /// It says nothing; the layers below may.
    Absent,
    /// It hides what the layers below say.
    Hidden,
}

/// Gives each of the `implicit` directories of `upper` the owner, mode and time that it has in the
/// first of `below` that has it, as overlayfs sees it. `below` is ordered from the top.
pub(in crate::image) fn settle<'a>(
    upper: &Path,
    implicit: &[PathBuf],
    below: impl Iterator<Item = &'a Path>,
) -> io::Result<()> {
    if implicit.is_empty() {
        return Ok(());
    }
    let upper: OwnedFd = File::open(upper)?.into();
    let below: Vec<OwnedFd> = below
        .map(|path| File::open(path).map(OwnedFd::from))
        .collect::<Result<_, _>>()?;
    for path in implicit {
        let Found::Here(directory) = find(&upper, path, true)? else {
            continue;
        };
        for layer in &below {
            match find(layer, path, false)? {
                Found::Here(model) => {
                    copy_attributes(&model, &directory)?;
                    break;
                }
                Found::Absent => {}
                Found::Hidden => break,
            }
        }
    }
    Ok(())
}

/// Walks down to `path`. With `stop_if_opaque` the directory itself must not be opaque either.
fn find(root: &OwnedFd, path: &Path, stop_if_opaque: bool) -> io::Result<Found> {
    let mut current = open_beneath(root, Path::new(""), OFlags::RDONLY)?;
    let mut opaque = is_opaque(&current);
    for name in path.iter() {
        match open_beneath(&current, Path::new(name), OFlags::RDONLY) {
            Ok(next) => current = next,
            Err(Errno::NOENT) if opaque => return Ok(Found::Hidden),
            Err(Errno::NOENT) => return Ok(Found::Absent),
            // A whiteout, a file or a link: the directory is not that of the layers below.
            Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Found::Hidden),
            Err(error) => return Err(error.into()),
        }
        opaque |= is_opaque(&current);
    }
    Ok(if opaque && stop_if_opaque {
        Found::Hidden
    } else {
        Found::Here(current)
    })
}

fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let model = rustix::fs::fstat(from)?;
    let (user, group) = (Uid::from_raw(model.st_uid), Gid::from_raw(model.st_gid));
    rustix::fs::fchown(to, Some(user), Some(group))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(model.st_mode & 0o7777))?;
    let nanoseconds = i64::try_from(model.st_mtime_nsec).unwrap_or(0);
    let time = Timespec {
        tv_sec: model.st_mtime,
        tv_nsec: nanoseconds,
    };
    rustix::fs::futimens(
        to,
        &Timestamps {
            last_access: time,
            last_modification: time,
        },
    )?;
    Ok(())
}
