//! Mounts of hostd's own: overlays for the roots of containers, and their removal.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tempfile::TempDir;

/// The kernel takes options of at most a page, the final zero included.
const OPTIONS_BYTES_MAX: usize = 4095;

/// A file system of layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Overlay<'a> {
    /// Read-only, the lowest first.
    pub(super) layers: &'a [PathBuf],
    /// The writable one.
    pub(super) upper: &'a Path,
    /// Beside it, for the kernel's own use.
    pub(super) work: &'a Path,
    /// A directory with a short path; links in it stand for the layers while the mount is made, so that
    /// over a hundred layers fit into the options.
    pub(super) short: &'a Path,
}

/// Mounts an overlay at `target`.
///
/// # Errors
/// The kernel refuses, or there are too many layers.
pub(super) fn mount_overlay(overlay: &Overlay<'_>, target: &Path) -> io::Result<()> {
    with_options(overlay, |options| mount_with(options, target))
}

/// Does `work` with the kernel's options for an overlay.
fn with_options(
    overlay: &Overlay<'_>,
    work: impl FnOnce(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let links = TempDir::with_prefix_in("l", overlay.short)?;
    let mut options = b"lowerdir=".to_vec();
    // The kernel wants the topmost first.
    for (index, layer) in overlay.layers.iter().rev().enumerate() {
        let link = links.path().join(index.to_string());
        symlink(layer, &link)?;
        if index > 0 {
            options.push(b':');
        }
        options.extend(link.as_os_str().as_bytes());
    }
    for (name, directory) in [("upper", overlay.upper), ("work", overlay.work)] {
        let link = links.path().join(name);
        symlink(directory, &link)?;
        options.extend(format!(",{name}dir=").as_bytes());
        options.extend(link.as_os_str().as_bytes());
    }
    if options.len() > OPTIONS_BYTES_MAX {
        let count = overlay.layers.len();
        let message = format!("{count} layers do not fit into one mount");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    work(&options)
}

fn mount_with(options: &[u8], target: &Path) -> io::Result<()> {
    let kind = Some("overlay");
    Ok(mount(kind, target, kind, MsFlags::empty(), Some(options))?)
}

/// Mounts an overlay whose files have other owners than on the disk. `map` makes a mapped copy of a mount,
/// and `user` is who root is then. The copies are attached in `place` meanwhile, since older kernels
/// do not look for layers anywhere else.
///
/// # Errors
/// The kernel refuses: before 5.19 any such layer, and file systems whose mounts cannot be mapped.
pub(super) fn mount_mapped_overlay(
    overlay: &Overlay<'_>,
    target: &Path,
    place: &Path,
    user: u32,
    map: impl Fn(&Path) -> io::Result<OwnedFd>,
) -> io::Result<()> {
    let attach = |directory: Option<&Path>, name: &str| -> io::Result<PathBuf> {
        let tree = map(directory.ok_or(io::ErrorKind::InvalidInput)?)?;
        let at = place.join(name);
        fs::create_dir_all(&at)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tree, "", CWD, &at, flags)?;
        Ok(at)
    };
    let inside = |place: &Path, path: &Path| -> io::Result<PathBuf> {
        Ok(place.join(path.file_name().ok_or(io::ErrorKind::InvalidInput)?))
    };
    // Upper and work must be on one mount; the layers are side by side.
    let lowest = overlay.layers.first();
    let layers = attach(lowest.and_then(|layer| layer.parent()), "layers")?;
    let state = attach(overlay.upper.parent(), "state")?;
    let lower = overlay.layers.iter().map(|path| inside(&layers, path));
    let lower: Vec<PathBuf> = lower.collect::<io::Result<_>>()?;
    let (upper, work) = (
        inside(&state, overlay.upper)?,
        inside(&state, overlay.work)?,
    );
    let overlay = Overlay {
        layers: &lower,
        upper: &upper,
        work: &work,
        ..*overlay
    };
    let mounted = with_options(&overlay, |options| {
        as_user(user, || mount_with(options, target))
    });
    // The overlay has copies of its own.
    let detach = |at: &PathBuf| umount2(at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    let detached = [state, layers].iter().try_for_each(detach);
    mounted?;
    Ok(detached?)
}

/// Does `work` as a user, with the caller's rights but one. Overlayfs makes files as who has mounted it, and
/// a mapped mount takes none from users that it does not map. It writes with his rights as well, and what a
/// file system keeps in reserve for the host is not for containers (CAP_SYS_RESOURCE).
fn as_user<T: Send>(user: u32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let work = || {
        let mut rights = capabilities(None)?;
        rights.effective.remove(CapabilitySet::SYS_RESOURCE);
        setfsgid(Gid::from_raw(user));
        setfsuid(Uid::from_raw(user));
        // Who is not root loses those over files.
        set_capabilities(None, rights)?;
        work()
    };
    // All of this is a thread's own.
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

/// Unmounts everything at and below `directory`.
///
/// # Errors
/// Something is still mounted.
pub(super) fn unmount_below(directory: &Path) -> io::Result<()> {
    // The later ones may lie on the earlier ones.
    for target in mounts_below(directory)?.iter().rev() {
        umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    if mounts_below(directory)?.is_empty() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::ResourceBusy,
        format!("something is still mounted below {}", directory.display()),
    ))
}

fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|target| PathBuf::from(OsString::from_vec(unescape(target))))
        .filter(|target| target.starts_with(directory))
        .collect())
}

/// Spaces and the like are written as `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let escaped = match rest {
            [b'\\', a, b, c, ..] => std::str::from_utf8(&[*a, *b, *c])
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 8).ok()),
            _ => None,
        };
        match escaped {
            Some(byte) => {
                text.push(byte);
                rest = &rest[4..];
            }
            None => {
                text.push(*first);
                rest = tail;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn escapes_are_undone() {
        for (field, text) in [
            ("/a", "/a"),
            ("/a\\040b", "/a b"),
            ("/a\\", "/a\\"),
            ("\\09", "\\09"),
        ] {
            assert_eq!(unescape(field.as_bytes()), text.as_bytes());
        }
    }

    #[test]
    fn work_as_a_user_leaves_the_caller_as_he_was_and_has_his_rights() {
        let dir = TempDir::new().unwrap();
        let [theirs, ours] = ["theirs", "ours"].map(|name| dir.path().join(name));
        let foreign = dir.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o700)).unwrap();
        as_user(3_000_000_000, || {
            fs::write(&theirs, "")?;
            fs::read_dir(&foreign).map(drop)
        })
        .unwrap();
        fs::write(&ours, "").unwrap();
        let owner = |path| {
            let found = fs::metadata(path).unwrap();
            (found.uid(), found.gid())
        };
        assert_eq!(owner(theirs), (3_000_000_000, 3_000_000_000));
        assert_eq!(owner(ours), (0, 0));
        let failed = as_user(5, || -> io::Result<()> {
            Err(io::ErrorKind::NotFound.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    /// As many layers as images have at most; each holds one file.
    #[test]
    fn many_layers_become_one_root_and_go_away_again() {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        let layers: Vec<PathBuf> = (0..127)
            .map(|number| {
                let layer = path(&format!("sha256-{}-{number}", "0".repeat(64)));
                fs::create_dir(&layer).unwrap();
                fs::write(layer.join(format!("file{number}")), "").unwrap();
                fs::write(layer.join("last"), number.to_string()).unwrap();
                layer
            })
            .collect();
        // An overlay cannot lie on an overlay on every host, so the writable part is a tmpfs.
        let writable = path("writable");
        fs::create_dir(&writable).unwrap();
        mount(
            Some("tmpfs"),
            &writable,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        for name in ["writable/upper", "writable/work", "run"] {
            fs::create_dir(path(name)).unwrap();
        }
        let root = path("run");
        let overlay = Overlay {
            layers: &layers,
            upper: &path("writable/upper"),
            work: &path("writable/work"),
            short: Path::new("/run"),
        };
        let mounted = mount_overlay(&overlay, &root);
        let files = fs::read_dir(&root).unwrap().count();
        let last = fs::read_to_string(root.join("last")).unwrap_or_default();
        unmount_below(dir.path()).unwrap();
        mounted.unwrap();
        assert_eq!((files, last.as_str()), (128, "126"));
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }
}
