//! The mounts of a container and its root: sources opened, options understood.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use libc::MOUNT_ATTR_RDONLY;
use oci_spec::runtime::{Linux, Mount};
use rustix::fs::{CWD, FileType, OFlags, fstat};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::PlanError;
use super::namespaces::{Kind, NamespacePlan, map_text};
use super::options::{Bind, Options};

/// One mount to make.
#[derive(Debug)]
pub(crate) struct MountPlan {
    /// `mounts[N]`, for errors.
    pub(crate) field: String,
    /// In the container's root.
    pub(crate) destination: PathBuf,
    pub(crate) what: MountKind,
    pub(crate) options: Options,
    pub(crate) id_map: Option<IdMap>,
    /// It becomes read-only only when all that is in it has been made.
    pub(crate) read_only_last: bool,
}

/// How the owners of a mount's files are mapped.
#[derive(Debug)]
pub(crate) struct IdMap {
    pub(crate) owners: Owners,
    /// For the mounts below, too.
    pub(crate) recursive: bool,
}

/// Who are the owners of a file through a mount.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Owners {
    /// By texts of uid_map and gid_map.
    Mapped { uid_map: String, gid_map: String },
    /// Those that the user namespace which the container joins has for them.
    OfJoined,
}

#[derive(Debug)]
pub(crate) enum MountKind {
    /// A tree of the host, bound to the destination.
    Bind {
        source: Tree,
        recursive: bool,
        directory: bool,
    },
    /// A file system of its own.
    FileSystem { name: String, source: String },
    /// The control groups, as the host has them: one tree of v2, or one of v1 per controller.
    Cgroup,
    /// Change what is mounted there.
    Remount,
}

/// A part of the host's file tree.
#[derive(Debug)]
pub(crate) enum Tree {
    /// Copied from the caller's mounts, and attached nowhere yet. The container's user may be one who
    /// cannot reach the path.
    Detached(OwnedFd),
    /// To be opened by the container's first process, since the caller may not copy mounts.
    Path(PathBuf),
}

impl Tree {
    /// Takes hold of what is at `path` now.
    pub(crate) fn new(path: &Path, recursive: bool, copy: bool) -> io::Result<Self> {
        if copy {
            return clone_tree(CWD, path, recursive).map(Tree::Detached);
        }
        std::fs::metadata(path)?;
        Ok(Tree::Path(path.to_path_buf()))
    }
}

/// A detached copy of the mounts at `path`.
pub(crate) fn clone_tree(
    directory: impl AsFd,
    path: &Path,
    recursive: bool,
) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    Ok(open_tree(directory, path, flags)?)
}

/// What a mount is planned in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings<'a> {
    pub(crate) linux: &'a Linux,
    pub(crate) namespaces: &'a NamespacePlan,
    /// SELinux's label of the mounts.
    pub(crate) label: Option<&'a str>,
    pub(crate) bundle: &'a Path,
    /// The caller may mount.
    pub(crate) privileged: bool,
    /// Sources are copied at once.
    pub(crate) copy: bool,
}

/// File systems that have labels of the kernel's own making.
const UNLABELED: [&str; 3] = ["proc", "sysfs", "mqueue"];

impl MountPlan {
    /// # Errors
    /// The field that is wrong, and why.
    pub(crate) fn new(
        index: usize,
        mount: &Mount,
        surroundings: &Surroundings<'_>,
    ) -> Result<Self, PlanError> {
        let Surroundings {
            label,
            bundle,
            privileged,
            copy,
            ..
        } = *surroundings;
        let field = format!("mounts[{index}]");
        let options = mount.options().iter().flatten().map(String::as_str);
        let mut options = Options::parse(options);
        if mount.destination().as_os_str().is_empty() {
            return Err(PlanError::value(
                format!("{field}.destination"),
                "",
                "it must be a path in the container",
            ));
        }
        let name = mount.typ().as_deref().unwrap_or("none");
        let what = match (options.bind, name) {
            _ if options.remount => MountKind::Remount,
            (Some(bind), _) => bind_plan(&field, mount, bundle, bind, copy)?,
            (None, "bind") => bind_plan(&field, mount, bundle, Bind::Single, copy)?,
            (None, "none" | "") => {
                return Err(PlanError::value(
                    format!("{field}.type"),
                    name,
                    "it must name a file system, unless the options have `bind` or `rbind`",
                ));
            }
            (None, "cgroup" | "cgroup2") => MountKind::Cgroup,
            (None, name) => MountKind::FileSystem {
                name: name.to_owned(),
                source: mount
                    .source()
                    .as_ref()
                    .map_or_else(|| name.to_owned(), |source| source.display().to_string()),
            },
        };
        refuse_in_vain(&field, &what, &options)?;
        options.data.extend(label_option(&what, label));
        let id_map = id_map(&field, mount, &options, surroundings)?;
        if id_map.is_some() && !(privileged && matches!(what, MountKind::Bind { .. })) {
            return Err(PlanError::value(
                format!("{field}.type"),
                name,
                "its owners cannot be mapped: only those of a bind mount can, by a caller who may mount",
            ));
        }
        // Devices, and most other file systems, are in /dev.
        let read_only_last = matches!(what, MountKind::FileSystem { .. })
            && mount
                .destination()
                .components()
                .eq(Path::new("/dev").components())
            && options.attributes.set & MOUNT_ATTR_RDONLY != 0;
        if read_only_last {
            options.attributes.set &= !MOUNT_ATTR_RDONLY;
        }
        Ok(Self {
            field,
            id_map,
            destination: mount.destination().clone(),
            what,
            options,
            read_only_last,
        })
    }
}

/// SELinux's label of a new file system, which is an option.
fn label_option(what: &MountKind, label: Option<&str>) -> Option<(String, Option<String>)> {
    let MountKind::FileSystem { name, .. } = what else {
        return None;
    };
    let label = label.filter(|_| !UNLABELED.contains(&name.as_str()))?;
    Some(("context".to_owned(), Some(label.to_owned())))
}

/// Options that could only be ignored for this kind of mount.
fn refuse_in_vain(field: &str, what: &MountKind, options: &Options) -> Result<(), PlanError> {
    let is_tmpfs = matches!(what, MountKind::FileSystem { name, .. } if name == "tmpfs");
    let refused = |option: &str, allowed| {
        let field = format!("{field}.options");
        Err(PlanError::value(field, option, allowed))
    };
    if options.copy_up && !is_tmpfs {
        return refused("tmpcopyup", "it is for a new tmpfs");
    }
    let allowed = match what {
        MountKind::FileSystem { .. } => return Ok(()),
        MountKind::Remount if options.bind.is_none() => return Ok(()),
        MountKind::Remount | MountKind::Bind { .. } => {
            "a bind mount has attributes of its own, and no options of its file system"
        }
        MountKind::Cgroup => "the control groups are mounted, and are shown with attributes only",
    };
    match options.for_file_system() {
        Some(option) => refused(&option, allowed),
        None => Ok(()),
    }
}

/// The mapping of the mount; with the option alone it is that of the container's user namespace.
fn id_map(
    field: &str,
    mount: &Mount,
    options: &Options,
    surroundings: &Surroundings<'_>,
) -> Result<Option<IdMap>, PlanError> {
    let linux = surroundings.linux;
    let recursive = options.id_map.unwrap_or(false);
    let own = (mount.uid_mappings(), mount.gid_mappings());
    let (uids, gids) = match (own, options.id_map) {
        ((None, None), None) => return Ok(None),
        ((None, None), Some(_)) if surroundings.namespaces.joined(Kind::USER).is_some() => {
            return Ok(Some(IdMap {
                owners: Owners::OfJoined,
                recursive,
            }));
        }
        ((None, None), Some(_)) => (linux.uid_mappings(), linux.gid_mappings()),
        (own, _) => own,
    };
    let text = |mappings: &Option<Vec<_>>| map_text(mappings.as_deref().unwrap_or_default());
    let (uid_map, gid_map) = (text(uids), text(gids));
    for (name, map) in [("uidMappings", &uid_map), ("gidMappings", &gid_map)] {
        if map.is_empty() {
            let reason = "there is none, here or in linux; an id-mapped mount needs mappings of users \
                          and of groups";
            return Err(PlanError::invalid(format!("{field}.{name}"), reason));
        }
    }
    Ok(Some(IdMap {
        owners: Owners::Mapped { uid_map, gid_map },
        recursive,
    }))
}

fn bind_plan(
    field: &str,
    mount: &Mount,
    bundle: &Path,
    bind: Bind,
    copy: bool,
) -> Result<MountKind, PlanError> {
    let field = format!("{field}.source");
    let Some(source) = mount.source() else {
        return Err(PlanError::invalid(field, "a bind mount needs one"));
    };
    let path = bundle.join(source);
    let failed = |source| PlanError::Open {
        field,
        path: path.clone(),
        source,
    };
    let recursive = bind == Bind::Recursive;
    let open = || -> io::Result<MountKind> {
        let tree = Tree::new(&path, recursive, copy)?;
        let directory = match &tree {
            Tree::Detached(tree) => FileType::from_raw_mode(fstat(tree)?.st_mode).is_dir(),
            Tree::Path(path) => std::fs::metadata(path)?.is_dir(),
        };
        Ok(MountKind::Bind {
            source: tree,
            recursive,
            directory,
        })
    };
    open().map_err(failed)
}

/// The root file system: its path, made absolute, and its tree.
pub(crate) fn open_rootfs(
    root: &oci_spec::runtime::Root,
    bundle: &Path,
    copy: bool,
) -> Result<(PathBuf, Tree), PlanError> {
    let field = "root.path";
    let path = bundle.join(root.path());
    let open = || -> io::Result<(PathBuf, Tree)> {
        let path = path.canonicalize()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, &path, flags, rustix::fs::Mode::empty())?;
        let tree = Tree::new(&path, true, copy)?;
        Ok((path, tree))
    };
    open().map_err(|source| PlanError::Open {
        field: field.to_owned(),
        path,
        source,
    })
}
