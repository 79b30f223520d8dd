//! Makes the device nodes and the links in /dev.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Uid, chmodat, chownat, major, makedev, minor, mknodat,
    statat, symlinkat,
};
use rustix::io::Errno;

use crate::plan::devices::DevicePlan;
use crate::plan::mounts::clone_tree;
use crate::root::Root;
use crate::rootfs::attach_at;

/// The links that every container has.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the device `{path}`")]
pub(crate) struct DeviceError {
    path: String,
    source: io::Error,
}

/// Makes the nodes, and with `links` the links. In a user namespace, where nodes cannot be made, the
/// host's are bound instead.
pub(crate) fn make(
    devices: &[DevicePlan],
    links: bool,
    in_user_namespace: bool,
    root: &Root,
) -> Result<(), DeviceError> {
    let named = |path: &Path| {
        let path = path.display().to_string();
        move |source| DeviceError { path, source }
    };
    // A node would be that of another instance of the file system: the link is to the right one.
    let is_linked = |device: &&DevicePlan| {
        links && device.path == Path::new("/dev/ptmx") && device.number == makedev(5, 2)
    };
    for device in devices.iter().filter(|device| !is_linked(device)) {
        let made = if in_user_namespace {
            bind(device, root)
        } else {
            make_one(device, root)
        };
        made.map_err(named(&device.path))?;
    }
    if links {
        for (target, path) in LINKS {
            link(target, Path::new(path), root).map_err(named(Path::new(path)))?;
        }
    }
    Ok(())
}

fn make_one(device: &DevicePlan, root: &Root) -> io::Result<()> {
    let (parent, name) = root.make_parent(&device.path)?;
    let mode = Mode::from_raw_mode(device.mode);
    match mknodat(&parent, &name, device.kind, mode, device.number) {
        Ok(()) => {}
        Err(Errno::EXIST) => return check_existing(device, &parent, &name),
        Err(Errno::PERM) => return bind(device, root),
        Err(error) => return Err(error.into()),
    }
    // The umask had a say in the mode; and the name is ours: nobody else is in the container yet.
    chmodat(&parent, &name, mode, AtFlags::empty())?;
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    chownat(
        &parent,
        &name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    Ok(())
}

/// What the image has there is good if it is the same device.
fn check_existing(device: &DevicePlan, parent: impl AsFd, name: &Path) -> io::Result<()> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let same = FileType::from_raw_mode(stat.st_mode) == device.kind
        && (device.kind == FileType::Fifo || stat.st_rdev == device.number);
    if same {
        return Ok(());
    }
    Err(io::Error::other("something else is there already"))
}

/// Binds the host's node of the same path. The host's tree is still that of this mount namespace.
fn bind(device: &DevicePlan, root: &Root) -> io::Result<()> {
    let host = statat(CWD, &device.path, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(host.st_mode) != device.kind || host.st_rdev != device.number {
        return Err(io::Error::other(format!(
            "it cannot be made here, and the host's is not device {}:{}",
            major(device.number),
            minor(device.number)
        )));
    }
    let tree = clone_tree(CWD, &device.path, false)?;
    let target = root.make_file(&device.path)?;
    attach_at(tree.as_fd(), target, Path::new(""))
}

fn link(target: &str, path: &Path, root: &Root) -> io::Result<()> {
    let (parent, name): (_, PathBuf) = root.make_parent(path)?;
    match symlinkat(target, parent, name) {
        // What the image has there is its own choice.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
