//! Makes a group's directories in every hierarchy, ready to be joined.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;
use rustix::fs::{Access, access};

use super::{
    CgroupError, Directory,
    hierarchy::{CgroupPath, Hierarchy, Version},
    resources::{Need, controllers_needed},
    setting,
};
use crate::rights::is_host_root;

/// The directories of the group that did not exist before; parents are not listed, since other
/// groups may live in them.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    /// Whether none of the group's `directories` existed before.
    pub(super) fn is_everything_of(&self, directories: &[Directory]) -> bool {
        self.0.len() == directories.len()
    }

    /// Removes the directories. Nobody has joined them, so nothing keeps them.
    pub(super) fn undo(&self) {
        for path in &self.0 {
            fs::remove_dir(path).ok();
        }
    }
}

pub(super) fn build(
    hierarchies: &[Hierarchy],
    path: &CgroupPath,
    resources: &LinuxResources,
    occupant: Option<i32>,
    made: &mut Made,
) -> Result<(), CgroupError> {
    let hybrid = hierarchies
        .iter()
        .any(|hierarchy| hierarchy.version == Version::V1);
    let needed = controllers_needed(resources);
    for hierarchy in hierarchies {
        let leaf = hierarchy.root.join(path.relative());
        if hierarchy.version == Version::V2 {
            // Beside v1 the group only gets what v1 does not have, if it asks for it.
            let wanted = hierarchy.controllers.iter().filter(|name| {
                !hybrid || needed.iter().any(|need| need.controller == name.as_str())
            });
            let wanted: Vec<&str> = wanted.map(String::as_str).collect();
            let parent = leaf.parent().unwrap_or(&hierarchy.root);
            enable(hierarchy, parent, &wanted, &needed)?;
        }
        match make_in(hierarchy, &leaf, occupant, made) {
            Err(CgroupError::Io { source, .. })
                if hybrid && !is_host_root() && is_denied(&source) =>
            {
                // A limit that would be there is missed when it is set.
            }
            result => result?,
        }
    }
    Ok(())
}

/// What a user gets who has no rights in a hierarchy.
fn is_denied(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem)
}

/// Makes the directory of one hierarchy.
fn make_in(
    hierarchy: &Hierarchy,
    leaf: &Path,
    occupant: Option<i32>,
    made: &mut Made,
) -> Result<(), CgroupError> {
    let parent = leaf.parent().unwrap_or(&hierarchy.root);
    let cpuset = hierarchy.version == Version::V1 && hierarchy.has("cpuset");
    if cpuset {
        make_parents(&hierarchy.root, parent, |it| inherit_cpuset(it, true))?;
    }
    let mut existed = false;
    match fs::create_dir(leaf) {
        Ok(()) => made.0.push(leaf.to_owned()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            refuse_occupied(leaf, occupant)?;
            existed = true;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_parents(&hierarchy.root, parent, |_| Ok(()))?;
            fs::create_dir(leaf).map_err(|source| cannot("make", leaf, source))?;
            made.0.push(leaf.to_owned());
        }
        Err(source) => return Err(cannot("make", leaf, source)),
    }
    if cpuset {
        inherit_cpuset(leaf, existed)?;
    }
    Ok(())
}

/// Whether this user may make the directory `leaf`, with those above it that are missing.
pub(super) fn may_make(leaf: &Path) -> bool {
    let above = leaf.ancestors().skip(1).find(|above| above.is_dir());
    above.is_some_and(|above| access(above, Access::WRITE_OK | Access::EXEC_OK).is_ok())
}

fn cannot(action: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Makes every directory between `root` and `last`, with `last`, and calls `each` on them in order.
fn make_parents(
    root: &Path,
    last: &Path,
    each: impl Fn(&Path) -> Result<(), CgroupError>,
) -> Result<(), CgroupError> {
    for directory in below(root, last) {
        match fs::create_dir(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(cannot("make", directory, source)),
        }
        each(directory)?;
    }
    Ok(())
}

/// The directories below `root` on the way to `last`, from the top.
fn below<'a>(root: &Path, last: &'a Path) -> Vec<&'a Path> {
    let mut directories: Vec<&Path> = last
        .ancestors()
        .take_while(|directory| *directory != root)
        .collect();
    directories.reverse();
    directories
}

/// Processes other than the occupant would share the limits, and die with the container.
fn refuse_occupied(leaf: &Path, occupant: Option<i32>) -> Result<(), CgroupError> {
    let procs = leaf.join("cgroup.procs");
    match fs::read_to_string(&procs) {
        Ok(text) if text.lines().all(|pid| is_occupant(pid, occupant)) => Ok(()),
        Ok(_) => Err(CgroupError::Occupied {
            path: leaf.to_owned(),
        }),
        Err(source) => Err(cannot("read", &procs, source)),
    }
}

fn is_occupant(pid: &str, occupant: Option<i32>) -> bool {
    occupant.is_some_and(|occupant| pid.parse() == Ok(occupant))
}

/// A cpuset of v1 starts empty, and nobody can join it before it has processors and memory nodes. One
/// that `existed` may have them.
fn inherit_cpuset(directory: &Path, existed: bool) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = directory.join(file);
        let read =
            |path: &Path| fs::read_to_string(path).map_err(|source| cannot("read", path, source));
        if !existed || read(&path)?.trim().is_empty() {
            let above = directory.parent().unwrap_or(directory).join(file);
            let value = read(&above)?;
            setting::write(&path, value.trim()).map_err(|source| cannot("write", &path, source))?;
        }
    }
    Ok(())
}

/// Makes the parents in the v2 hierarchy and gives their children the controllers in `wanted`. It
/// is an error only if one in `needed` cannot be given.
fn enable(
    hierarchy: &Hierarchy,
    parent: &Path,
    wanted: &[&str],
    needed: &[Need],
) -> Result<(), CgroupError> {
    give_to_children(&hierarchy.root, wanted, needed)?;
    make_parents(&hierarchy.root, parent, |directory| {
        give_to_children(directory, wanted, needed)
    })
}

fn give_to_children(directory: &Path, wanted: &[&str], needed: &[Need]) -> Result<(), CgroupError> {
    if wanted.is_empty() {
        return Ok(());
    }
    let file = directory.join("cgroup.subtree_control");
    let present = fs::read_to_string(&file).map_err(|source| cannot("read", &file, source))?;
    let missing = |name: &&str| !present.split_whitespace().any(|have| have == *name);
    let missing: Vec<&str> = wanted.iter().copied().filter(missing).collect();
    let inhabited = !missing.is_empty() && is_inhabited(directory)?;
    for name in missing {
        let given = if inhabited {
            Err(io::Error::from(Errno::EBUSY))
        } else {
            setting::write(&file, &format!("+{name}"))
        };
        let Err(source) = given else {
            continue;
        };
        let Some(need) = needed.iter().find(|need| need.controller == name) else {
            continue;
        };
        let internal = source.raw_os_error() == Some(Errno::EBUSY as i32);
        let reason = if internal {
            // Documentation/admin-guide/cgroup-v2.rst, No Internal Process Constraint.
            "processes live in it, so its children cannot have controllers; \
             move them to a group of their own"
        } else if is_denied(&source) && !is_host_root() {
            "it is not delegated to this user; systemd delegates what Delegate= of user@.service names"
        } else {
            "the kernel does not give it to the children"
        };
        let reason = format!(
            "it needs the {name} controller, and {}: {reason} ({source})",
            directory.display()
        );
        return Err(CgroupError::unsupported(need.field.clone(), reason));
    }
    Ok(())
}

/// Whether processes live in a v2 group that is not the root, where they may.
///
/// The kernel then refuses most controllers for the children, but not those that work on threads:
/// with these the group would become the domain of threads, and nobody could join its children.
fn is_inhabited(directory: &Path) -> Result<bool, CgroupError> {
    if !directory.join("cgroup.events").exists() {
        return Ok(false);
    }
    let procs = directory.join("cgroup.procs");
    let text = fs::read_to_string(&procs).map_err(|source| cannot("read", &procs, source))?;
    Ok(!text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_down_starts_below_the_root() {
        let way = below(Path::new("/cg"), Path::new("/cg/a/b"));
        assert_eq!(way, [Path::new("/cg/a"), Path::new("/cg/a/b")]);
        assert!(below(Path::new("/cg"), Path::new("/cg")).is_empty());
    }

    #[test]
    fn controllers_are_given_on_the_whole_way_and_only_a_needed_one_can_fail() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.subtree_control"), "cpu memory\n").unwrap();
        // All are there already: nothing is written.
        let need = |controller: &str| Need {
            controller: controller.to_owned(),
            field: "cpu.cpus".to_owned(),
        };
        give_to_children(root.path(), &["cpu", "memory"], &[need("cpu")]).unwrap();
        let text = fs::read_to_string(root.path().join("cgroup.subtree_control")).unwrap();
        assert_eq!(text, "cpu memory\n");
        give_to_children(root.path(), &["pids"], &[]).unwrap();
        let text = fs::read_to_string(root.path().join("cgroup.subtree_control")).unwrap();
        assert!(text.starts_with("+pids"));
        // Processes in the way: no controller goes past them, and a needed one is an error.
        fs::write(root.path().join("cgroup.events"), "populated 1\n").unwrap();
        fs::write(root.path().join("cgroup.procs"), "1\n").unwrap();
        give_to_children(root.path(), &["cpuset"], &[]).unwrap();
        let error = give_to_children(root.path(), &["cpuset"], &[need("cpuset")]).unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("linux.resources.cpu.cpus"), "{error}");
        assert!(error.contains("processes live in it"), "{error}");
    }
}
