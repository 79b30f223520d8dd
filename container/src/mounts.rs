//! Makes the mounts of a container, in the order of the configuration.
//!
//! Each is made detached and complete, with all its attributes, and only then attached to a descriptor
//! of its destination that was found under the container's root: it is never there in a weaker form,
//! and never outside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::slice;

use libc::{MOUNT_ATTR_RDONLY, MS_SHARED, MS_SLAVE};
use rustix::fs::{
    CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, fstat, fstatfs, mkdirat, symlinkat,
};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick,
};

use crate::copy::copy_contents;
use crate::plan::mounts::{MountKind, MountPlan, Tree, clone_tree};
use crate::plan::options::Options;
use crate::root::Root;
use crate::rootfs::{attach_at, set_propagation};
use crate::sys::{MountAttributes, mount_setattr};

/// Files of /proc that may be replaced: they tell about the machine and decide nothing
/// (the list that runc and lxcfs agree on).
const PROC_FILES: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
    "/proc/uptime",
];

/// Why a mount could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{field}: cannot mount {what} on `{destination}`{hint}")]
pub(crate) struct MountError {
    field: String,
    what: String,
    destination: String,
    /// What the kernel's log of the mount says, if anything.
    hint: String,
    source: io::Error,
}

/// The control groups that a `cgroup` mount shows: directories of the host, detached, by the name they
/// get. One without a name is a cgroup v2 hierarchy, alone.
pub(crate) type CgroupTrees = Vec<(String, OwnedFd)>;

/// Makes them; `cgroups` are those of each `cgroup` mount. With `spread` a mount that is to be shared is
/// shared with the host; without it, only with what the container makes of it, as with the other runtimes.
pub(crate) fn make(
    mounts: &[MountPlan],
    root: &Root,
    cgroups: &[CgroupTrees],
    spread: bool,
) -> Result<(), MountError> {
    let mut cgroups = cgroups.iter();
    for mount in mounts {
        let mut hint = String::new();
        make_one(mount, root, &mut cgroups, spread, &mut hint).map_err(|source| MountError {
            field: mount.field.clone(),
            what: match &mount.what {
                MountKind::Bind { .. } => "the source".to_owned(),
                MountKind::FileSystem { name, .. } => name.clone(),
                MountKind::Cgroup => "cgroup".to_owned(),
                MountKind::Remount => "again".to_owned(),
            },
            destination: mount.destination.display().to_string(),
            hint,
            source,
        })?;
    }
    Ok(())
}

/// Makes read-only what could not be before all was in it.
pub(crate) fn finish(mounts: &[MountPlan], root: &Root) -> Result<(), MountError> {
    let make = |mount: &MountPlan| {
        let target = root.find(&mount.destination)?;
        set_attributes(target.as_fd(), MOUNT_ATTR_RDONLY)
    };
    for mount in mounts.iter().filter(|mount| mount.read_only_last) {
        make(mount).map_err(|source| MountError {
            field: mount.field.clone(),
            what: "read-only".to_owned(),
            destination: mount.destination.display().to_string(),
            hint: String::new(),
            source,
        })?;
    }
    Ok(())
}

fn make_one(
    mount: &MountPlan,
    root: &Root,
    cgroups: &mut slice::Iter<'_, CgroupTrees>,
    spread: bool,
    hint: &mut String,
) -> io::Result<()> {
    match &mount.what {
        MountKind::Bind {
            source,
            recursive,
            directory,
        } => {
            let destination = if *directory {
                root.make_directory(&mount.destination)?
            } else {
                root.make_file(&mount.destination)?
            };
            let opened;
            let tree = match source {
                Tree::Detached(tree) => tree.as_fd(),
                Tree::Path(path) => {
                    opened = clone_tree(CWD, path, *recursive)?;
                    opened.as_fd()
                }
            };
            check_destination(mount, &destination)?;
            if let (Some((MS_SHARED, _)), false) = (mount.options.propagation, spread) {
                set_propagation(tree, MS_SLAVE, true)?;
            }
            change(tree, &mount.options, *recursive)?;
            attach_at(tree, destination, Path::new(""))
        }
        MountKind::FileSystem { name, source } => {
            let existing = root.find(&mount.destination).ok();
            refuse_link(name, &mount.destination, root)?;
            let destination = root.make_directory(&mount.destination)?;
            let tree = new_file_system(name, source, &mount.options, existing.as_ref(), hint)?;
            if name == "tmpfs" && mount.options.copy_up {
                copy_contents(destination.as_fd(), tree.as_fd())?;
                set_all(tree.as_fd(), mount.options.attributes, &mount.options)?;
            }
            check_destination(mount, &destination)?;
            if let Some((propagation, recursive)) = mount.options.propagation {
                set_propagation(tree.as_fd(), propagation, recursive)?;
            }
            attach_at(tree.as_fd(), destination, Path::new(""))
        }
        MountKind::Cgroup => {
            let trees = cgroups.next().map_or(&[][..], Vec::as_slice);
            make_cgroup(mount, root, trees)
        }
        MountKind::Remount => {
            let target = root.find(&mount.destination)?;
            if !mount.options.data.is_empty() {
                reconfigure(&target, &mount.options, hint)?;
            }
            if let Some((propagation, recursive)) = mount.options.propagation {
                set_propagation(target.as_fd(), propagation, recursive)?;
            }
            set_all(target.as_fd(), mount.options.attributes, &mount.options)
        }
    }
}

/// Gives a copied tree its attributes, in as few calls as can be. `below` says whether it may have
/// mounts below its root.
fn change(tree: BorrowedFd<'_>, options: &Options, below: bool) -> io::Result<()> {
    let mut own = options.attributes;
    // Unless it is asked for, nothing that is mounted here spreads to the host.
    let (propagation, recursive) = options.propagation.unwrap_or((MS_SLAVE, true));
    if recursive && below {
        set_propagation(tree, propagation, true)?;
    } else {
        own.propagation = propagation;
    }
    set_all(tree, own, options)
}

fn set_all(tree: BorrowedFd<'_>, own: MountAttributes, options: &Options) -> io::Result<()> {
    if !own.is_empty() {
        mount_setattr(tree, own, false, None)?;
    }
    if !options.recursive.is_empty() {
        mount_setattr(tree, options.recursive, true, None)?;
    }
    Ok(())
}

/// An image whose /proc is a link would have everything that trusts /proc look elsewhere (CVE-2019-19921,
/// CVE-2023-27561).
fn refuse_link(name: &str, destination: &Path, root: &Root) -> io::Result<()> {
    if !matches!(name, "proc" | "sysfs") {
        return Ok(());
    }
    let last = root.open(destination, OFlags::PATH | OFlags::NOFOLLOW);
    let is_link = |file| fstat(file).map(|stat| FileType::from_raw_mode(stat.st_mode).is_symlink());
    match last.map(is_link) {
        Ok(Ok(false)) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(Ok(true)) => Err(io::Error::other(format!(
            "{name} must be mounted on ordinary directory"
        ))),
    }
}

/// A mount over a file of /proc could fool the programs, and this one, that trust what /proc says
/// (CVE-2019-16884, CVE-2025-52881).
fn check_destination(mount: &MountPlan, destination: &OwnedFd) -> io::Result<()> {
    let on_proc = fstatfs(destination)?.f_type == PROC_SUPER_MAGIC;
    let allowed = PROC_FILES
        .iter()
        .any(|file| mount.destination == Path::new(file));
    if on_proc && !allowed && mount.destination != Path::new("/proc") {
        return Err(io::Error::other(
            "only some files of /proc may be mounted over",
        ));
    }
    Ok(())
}

/// A new file system, detached, with its attributes; nothing spreads from it or to it.
fn new_file_system(
    name: &str,
    source: &str,
    options: &Options,
    destination: Option<&OwnedFd>,
    hint: &mut String,
) -> io::Result<OwnedFd> {
    let context = fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let configure = || -> io::Result<OwnedFd> {
        fsconfig_set_string(&context, "source", source)?;
        set_data(&context, options)?;
        // A tmpfs takes on the mode of the directory that it hides, as with the other runtimes.
        if let Some(destination) = destination
            && name == "tmpfs"
            && !options.data.iter().any(|(key, _)| key == "mode")
        {
            let mode = fstat(destination)?.st_mode & 0o7777;
            fsconfig_set_string(&context, "mode", format!("{mode:o}"))?;
        }
        fsconfig_create(&context)?;
        let mut attributes = options.attributes.set | options.recursive.set;
        if options.copy_up {
            // What is to be read only is filled first.
            attributes &= !MOUNT_ATTR_RDONLY;
        }
        let attributes = u32::try_from(attributes).map_err(io::Error::other)?;
        let attributes = MountAttrFlags::from_bits_retain(attributes);
        Ok(fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            attributes,
        )?)
    };
    configure().inspect_err(|_| *hint = kernel_messages(&context))
}

/// Changes a file system that is mounted.
fn reconfigure(mount: &OwnedFd, options: &Options, hint: &mut String) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(mount, "", flags)?;
    let configure = || {
        set_data(&context, options)?;
        Ok(fsconfig_reconfigure(&context)?)
    };
    configure().inspect_err(|_| *hint = kernel_messages(&context))
}

fn set_data(context: &OwnedFd, options: &Options) -> io::Result<()> {
    for (key, value) in &options.data {
        match value {
            Some(value) => fsconfig_set_string(context, key, value)?,
            None => fsconfig_set_flag(context, key)?,
        }
    }
    Ok(())
}

/// What the kernel has to say about a mount that failed: lines that begin with their severity.
fn kernel_messages(context: &OwnedFd) -> String {
    const MESSAGE_BYTES_MAX: usize = 256;
    let mut text = [0; MESSAGE_BYTES_MAX];
    let length = rustix::io::read(context, &mut text).unwrap_or(0);
    let text = String::from_utf8_lossy(&text[..length]);
    let text = text.trim().trim_start_matches("e ");
    if text.is_empty() {
        String::new()
    } else {
        format!(" ({text})")
    }
}

/// Shows the container its control groups.
fn make_cgroup(mount: &MountPlan, root: &Root, cgroups: &[(String, OwnedFd)]) -> io::Result<()> {
    let destination = root.make_directory(&mount.destination)?;
    if let [(name, tree)] = cgroups
        && name.is_empty()
    {
        check_destination(mount, &destination)?;
        change(tree.as_fd(), &mount.options, false)?;
        return attach_at(tree.as_fd(), destination, Path::new(""));
    }
    // One tree per hierarchy, as Linux distributions lay them out.
    let tmpfs = Options {
        data: vec![("mode".into(), Some("755".into()))],
        ..Options::default()
    };
    let hierarchies = new_file_system("tmpfs", "tmpfs", &tmpfs, None, &mut String::new())?;
    check_destination(mount, &destination)?;
    attach_at(hierarchies.as_fd(), destination, Path::new(""))?;
    let inside = Root::new(hierarchies.try_clone()?);
    for (name, tree) in cgroups {
        mkdirat(&hierarchies, name, Mode::from_raw_mode(0o755))?;
        let directory = inside.find(Path::new(name))?;
        change(tree.as_fd(), &mount.options, false)?;
        attach_at(tree.as_fd(), directory, Path::new(""))?;
        for part in name.split(',').filter(|part| *part != name) {
            symlinkat(name, &hierarchies, part)?;
        }
    }
    set_all(
        hierarchies.as_fd(),
        mount.options.attributes,
        &mount.options,
    )
}

/// Sets attributes of one mount, for the modules that protect paths.
pub(crate) fn set_attributes(tree: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    mount_setattr(
        tree,
        MountAttributes {
            set,
            ..MountAttributes::default()
        },
        false,
        None,
    )
}

/// A new, empty tmpfs, detached.
pub(crate) fn new_tmpfs(data: &[(&str, &str)]) -> io::Result<OwnedFd> {
    let data = data
        .iter()
        .map(|(key, value)| ((*key).to_owned(), Some((*value).to_owned())));
    let options = Options {
        data: data.collect(),
        ..Options::default()
    };
    new_file_system("tmpfs", "tmpfs", &options, None, &mut String::new())
}
