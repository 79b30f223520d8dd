//! The container's root: attached, later made `/`, with the host's tree taken away.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use libc::{MOUNT_ATTR_RDONLY, MS_SLAVE};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, open, statfs};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, UnmountFlags, mount_change, move_mount, unmount,
};
use rustix::process::{chdir, chroot, fchdir, pivot_root};

use crate::plan::Plan;
use crate::plan::mounts::{Tree, clone_tree};
use crate::root::Root;
use crate::sys::{MountAttributes, mount_setattr};

/// `statfs` types of the file systems that a kernel's first root may be.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Attaches the root file system in this mount namespace. It lies where the host has it, at `path`: there
/// hooks that enter the namespace look for it. Where that cannot be, as the container's user may not be
/// allowed to walk there, it lies over the host's root, which no path is needed to reach.
pub(crate) fn attach(tree: &Tree, path: &Path) -> io::Result<Root> {
    // From here on nothing that is mounted spreads to the host.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?;
    leave_initramfs()?;
    let opened;
    let tree = match tree {
        Tree::Detached(tree) => tree.as_fd(),
        Tree::Path(path) => {
            opened = clone_tree(CWD, path, true)?;
            opened.as_fd()
        }
    };
    // pivot_root wants a root that is not shared.
    set_propagation(tree, MS_SLAVE, true)?;
    attach_at(tree, CWD, path).or_else(|_| attach_at(tree, CWD, Path::new("/")))?;
    Ok(Root::new(tree.try_clone_to_owned()?))
}

/// Attaches a detached tree at a path of this mount namespace, or with an empty path at the directory
/// itself.
pub(crate) fn attach_at(tree: BorrowedFd<'_>, directory: impl AsFd, path: &Path) -> io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if path.as_os_str().is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    Ok(move_mount(tree, "", directory, path, flags)?)
}

/// Sets how mounts spread from and to a tree.
pub(crate) fn set_propagation(
    tree: BorrowedFd<'_>,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    let attributes = MountAttributes {
        propagation,
        ..MountAttributes::default()
    };
    mount_setattr(tree, attributes, recursive, None)
}

/// Makes the root `/` and detaches the host's tree. No path leads out of the container afterwards.
pub(crate) fn pivot(root: &Root) -> io::Result<()> {
    fchdir(root)?;
    // With both paths the same the old root ends up on top of the new one, and needs no directory in
    // it (pivot_root(2)).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(())
}

/// A mount namespace that stands only while the root of a container is made that has none of its own.
///
/// In the caller's namespace the whole host would see what is mounted for the container, others could reach
/// into it meanwhile, and it would stay there if the runtime died. So the root is made where only this
/// process is, and a copy of it taken along, which is attached nowhere: who has it as its root sees it, and
/// it goes with the last of them. Nothing more can be mounted on it, and no path leads out of it, not
/// by chroot(2) either.
#[derive(Debug)]
pub(crate) struct Scaffold {
    /// The caller's.
    outside: OwnedFd,
}

impl Scaffold {
    pub(crate) fn enter() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let outside = open("/proc/self/ns/mnt", flags, Mode::empty())?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        Ok(Self { outside })
    }

    /// Goes back to the caller's namespace, with a copy of `root` as the root of this process.
    pub(crate) fn leave(self, root: &Root) -> io::Result<Root> {
        let copy = clone_tree(root, Path::new(""), true)?;
        setns(self.outside, CloneFlags::CLONE_NEWNS)?;
        change_root(&copy)?;
        Ok(Root::new(copy))
    }
}

/// Makes a directory `/` for this process alone.
pub(crate) fn change_root(directory: impl AsFd) -> io::Result<()> {
    fchdir(directory)?;
    Ok(chroot(".")?)
}

/// The root of an initramfs cannot be pivoted from, since nothing lies below it. All of it is copied,
/// put over it, and used in its place. The original stays below, where no path leads to.
fn leave_initramfs() -> io::Result<()> {
    if !is_lowest_mount()? {
        return Ok(());
    }
    let copy = clone_tree(CWD, Path::new("/"), true)?;
    set_propagation(copy.as_fd(), MS_SLAVE, true)?;
    attach_at(copy.as_fd(), CWD, Path::new("/"))?;
    change_root(&copy)
}

/// Whether `/` is the one mount of the namespace that lies on no other.
fn is_lowest_mount() -> io::Result<bool> {
    // The kernel's first root is a ramfs or a tmpfs; for any other the table need not be read.
    if !matches!(statfs("/")?.f_type, RAMFS_MAGIC | TMPFS_MAGIC) {
        return Ok(false);
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let lowest = |line: &str| {
        let mut fields = line.split(' ');
        let (id, parent) = (fields.next(), fields.next());
        id == parent && fields.nth(2) == Some("/")
    };
    Ok(table.lines().any(lowest))
}

/// The last changes of the root, after which nothing more is made in it.
pub(crate) fn finish(plan: &Plan, root: &Root) -> io::Result<()> {
    if let Some((propagation, recursive)) = plan.root_propagation {
        set_propagation(root.as_fd(), propagation, recursive)?;
    }
    if plan.readonly_root {
        let attributes = MountAttributes {
            set: MOUNT_ATTR_RDONLY,
            ..MountAttributes::default()
        };
        mount_setattr(root.as_fd(), attributes, false, None)?;
    }
    Ok(())
}
