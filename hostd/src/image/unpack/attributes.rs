//! Owner, mode, times and extended attributes of what is unpacked.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::Failure;
use super::archive::{Entry, Time};
use super::tree::Directory;

/// Extended attributes that images may bring. Others would change how the host treats a file:
/// `trusted.overlay.*` redirects to other files, `security.selinux` is the host's to say.
const XATTR_CAPABILITY: &[u8] = b"security.capability";
const XATTR_USER_PREFIX: &[u8] = b"user.";
/// Overlayfs reads these where it is mounted without privilege.
const XATTR_USER_OVERLAY_PREFIX: &[u8] = b"user.overlay.";

/// Who owns an entry, checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    user: Uid,
    group: Gid,
}

impl Owner {
    pub(super) fn of(entry: &Entry) -> Result<Self, Failure> {
        let id = |id: u64, what: &str| match u32::try_from(id) {
            // The greatest means "do not change" to the kernel.
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(Failure::Refused(format!("its {what} {id} is out of range"))),
        };
        let (user, group) = (id(entry.uid, "user id")?, id(entry.gid, "group id")?);
        Ok(Self {
            user: Uid::from_raw(user),
            group: Gid::from_raw(group),
        })
    }
}

/// Sets everything but the time of an open file or directory.
pub(super) fn set(file: &File, entry: &Entry, owner: Owner) -> Result<(), Failure> {
    // A change of owner takes away setuid bits and capabilities, so it comes first.
    rustix::fs::fchown(file, Some(owner.user), Some(owner.group))
        .map_err(Failure::host("set the owner of"))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode))
        .map_err(Failure::host("set the mode of"))?;
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_wanted(name)) {
        let name = OsStr::from_bytes(name);
        match rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::RANGE | Errno::TOOBIG) => {
                let name = name.display();
                return Err(Failure::Refused(format!(
                    "its attribute `{name}` is not valid"
                )));
            }
            // The store's file system has no such attributes; other engines do without them too.
            Err(Errno::NOTSUP) => tracing::debug!(name = %name.display(), "left out an attribute"),
            Err(error) => return Err(Failure::host("set an attribute of")(error)),
        }
    }
    Ok(())
}

/// Sets owner and time of what cannot be opened: symbolic links and pipes.
pub(super) fn set_by_name(
    parent: &Directory,
    name: &OsStr,
    entry: &Entry,
    owner: Owner,
) -> Result<(), Failure> {
    let (user, group) = (Some(owner.user), Some(owner.group));
    rustix::fs::chownat(&parent.fd, name, user, group, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(Failure::host("set the owner of"))?;
    let times = timestamps(entry.modified);
    rustix::fs::utimensat(&parent.fd, name, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(Failure::host("set the time of"))
}

/// Sets the time of an open file, once its data is written.
pub(super) fn set_time(file: &File, time: Time) -> Result<(), Failure> {
    rustix::fs::futimens(file, &timestamps(time)).map_err(Failure::host("set the time of"))
}

pub(super) fn timestamps(time: Time) -> Timestamps {
    let time = Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn is_wanted(name: &[u8]) -> bool {
    name == XATTR_CAPABILITY
        || (name.starts_with(XATTR_USER_PREFIX) && !name.starts_with(XATTR_USER_OVERLAY_PREFIX))
}
