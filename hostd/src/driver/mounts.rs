//! Mounts of hostd's own: overlays for the roots of containers, and their removal.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// The kernel takes options of at most a page, the final zero included.
const OPTIONS_BYTES_MAX: usize = 4095;

/// Mounts an overlay of read-only `layers`, the lowest first, and a writable one at `target`.
///
/// `short` is a directory with a short path; links in it stand for the layers while the mount is
/// made, so that over a hundred layers fit into the options.
///
/// # Errors
/// The kernel refuses, or there are too many layers.
pub(super) fn mount_overlay(
    layers: &[PathBuf],
    upper: &Path,
    work: &Path,
    target: &Path,
    short: &Path,
) -> io::Result<()> {
    let links = TempDir::with_prefix_in("l", short)?;
    let mut options = b"lowerdir=".to_vec();
    // The kernel wants the topmost first.
    for (index, layer) in layers.iter().rev().enumerate() {
        let link = links.path().join(index.to_string());
        symlink(layer, &link)?;
        if index > 0 {
            options.push(b':');
        }
        options.extend(link.as_os_str().as_bytes());
    }
    for (name, directory) in [("upper", upper), ("work", work)] {
        let link = links.path().join(name);
        symlink(directory, &link)?;
        options.extend(format!(",{name}dir=").as_bytes());
        options.extend(link.as_os_str().as_bytes());
    }
    if options.len() > OPTIONS_BYTES_MAX {
        let message = format!("{} layers do not fit into one mount", layers.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let options = Some(options.as_slice());
    mount(
        Some("overlay"),
        target,
        Some("overlay"),
        MsFlags::empty(),
        options,
    )?;
    Ok(())
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
        let (upper, work) = (path("writable/upper"), path("writable/work"));
        let mounted = mount_overlay(&layers, &upper, &work, &root, Path::new("/run"));
        let files = fs::read_dir(&root).unwrap().count();
        let last = fs::read_to_string(root.join("last")).unwrap_or_default();
        unmount_below(dir.path()).unwrap();
        mounted.unwrap();
        assert_eq!((files, last.as_str()), (128, "126"));
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }
}
