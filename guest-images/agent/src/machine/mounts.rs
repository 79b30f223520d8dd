//! Mounts the file systems of a machine and changes over from the initramfs to the image's root.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, chroot};

use super::SetUpError;

/// Where the parts of the root are put together in the initramfs.
const IMAGE: &str = "/hostd/image";
const WRITABLE: &str = "/hostd/writable";
const ROOT: &str = "/hostd/root";

/// Names in /dev that programs expect, and what they stand for.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Mounts what the set-up itself needs.
pub(super) fn mount_kernel_file_systems() -> Result<(), SetUpError> {
    mount_at("proc", "proc", "/proc", no_programs(), "")?;
    mount_at("sysfs", "sysfs", "/sys", no_programs(), "")?;
    mount_at("cgroup2", "cgroup2", "/sys/fs/cgroup", no_programs(), "")?;
    mount_at(
        "devtmpfs",
        "devtmpfs",
        "/dev",
        MsFlags::MS_NOSUID,
        "mode=755",
    )
}

/// Lays the writable disk over the image's and opens the former's root directory. Nothing can be
/// reached through the two disks' own mounts afterwards.
pub(super) fn join_disks(
    image: &str,
    image_file_system: &str,
    writable: &str,
) -> Result<File, SetUpError> {
    mount_at(image, image_file_system, IMAGE, MsFlags::MS_RDONLY, "")?;
    mount_at(writable, "ext4", WRITABLE, MsFlags::empty(), "")?;
    let upper = format!("{WRITABLE}/upper");
    let work = format!("{WRITABLE}/work");
    make_directory(&upper)?;
    make_directory(&work)?;
    let options = format!("lowerdir={IMAGE},upperdir={upper},workdir={work}");
    mount_at("overlay", "overlay", ROOT, MsFlags::empty(), &options)?;
    let writable = File::open(WRITABLE).map_err(|source| SetUpError::File {
        path: WRITABLE.into(),
        source,
    })?;
    for path in [IMAGE, WRITABLE] {
        umount2(path, MntFlags::MNT_DETACH).map_err(SetUpError::Root)?;
    }
    Ok(writable)
}

/// Moves the mounts that stay into the joined root and makes it the root of everything.
///
/// An initramfs cannot be unmounted, so the root is moved over it. /proc stays behind: the workload,
/// which has a pid namespace of its own, mounts another.
pub(super) fn enter_root() -> Result<(), SetUpError> {
    for path in ["/dev", "/sys"] {
        let target = format!("{ROOT}{path}");
        make_directory(&target)?;
        move_mount(path, &target)?;
    }
    make_directory(&format!("{ROOT}/proc"))?;
    chdir(ROOT).map_err(SetUpError::Root)?;
    move_mount(".", "/")?;
    chroot(".").map_err(SetUpError::Root)?;
    chdir("/").map_err(SetUpError::Root)
}

/// What programs find in /dev beside the kernel's own devices.
pub(super) fn mount_device_file_systems() -> Result<(), SetUpError> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let terminals = "gid=5,mode=620,ptmxmode=666";
    mount_at("devpts", "devpts", "/dev/pts", quiet, terminals)?;
    mount_at("shm", "tmpfs", "/dev/shm", no_programs(), "mode=1777")?;
    mount_at("mqueue", "mqueue", "/dev/mqueue", no_programs(), "")?;
    for (link, target) in DEVICE_LINKS {
        symlink(target, link).map_err(|source| SetUpError::File {
            path: link.into(),
            source,
        })?;
    }
    Ok(())
}

fn no_programs() -> MsFlags {
    MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
}

/// Mounts, on a directory that is made if it is missing.
fn mount_at(
    what: &str,
    file_system: &str,
    target: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), SetUpError> {
    make_directory(target)?;
    mount(Some(what), target, Some(file_system), flags, Some(options)).map_err(|source| {
        SetUpError::Mount {
            what: format!("{what} ({file_system})"),
            target: target.into(),
            source,
        }
    })
}

fn move_mount(from: &str, to: &str) -> Result<(), SetUpError> {
    let nothing = None::<&str>;
    mount(Some(from), to, nothing, MsFlags::MS_MOVE, nothing).map_err(|source| SetUpError::Mount {
        what: from.into(),
        target: to.into(),
        source,
    })
}

fn make_directory(path: &str) -> Result<(), SetUpError> {
    match fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(SetUpError::File {
            path: path.into(),
            source,
        }),
    }
}
