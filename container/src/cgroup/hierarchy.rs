//! Where the hierarchies of control groups are mounted on this host, and which controller each of
//! them has.
//!
//! A host has one cgroup v2 hierarchy, several of v1, or both ("hybrid"); a controller is in at
//! most one of them. So the question is never "which version has this host" but "which version has
//! this controller", and hybrid needs no code of its own.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use super::CgroupError;
use crate::mountinfo::Line;

/// Where hierarchies are mounted by convention. A mount elsewhere is used only where this has none,
/// since it may be a bind mount into some container's root.
const ROOT_USUAL: &str = "/sys/fs/cgroup";

/// What is read of the table of mounts at once: mostly all of it.
const MOUNT_TABLE_BYTES: usize = 8 * 1024;

/// The v1 controllers, which tell themselves in the mount options from the other options.
const V1_CONTROLLERS: &[&str] = &[
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Version {
    V1,
    V2,
}

/// One mounted hierarchy.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Hierarchy {
    pub(super) version: Version,
    /// Empty for a named v1 hierarchy, and for the v2 one of most hybrid hosts.
    pub(super) controllers: Vec<String>,
    pub(super) root: PathBuf,
}

impl Hierarchy {
    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|have| have == controller)
    }
}

/// The hierarchies of this host, v2 first: joining it is then the first thing that happens to a
/// process, and `cgroup.kill` reaches it from there on.
///
/// They are looked for once: what a host mounts there it mounts when it boots, and the table of mounts is
/// long where many containers run.
pub(super) fn hierarchies() -> Result<&'static [Hierarchy], CgroupError> {
    static FOUND: OnceLock<Vec<Hierarchy>> = OnceLock::new();
    match FOUND.get() {
        Some(found) => Ok(found),
        None => look().map(|found| FOUND.get_or_init(|| found).as_slice()),
    }
}

fn look() -> Result<Vec<Hierarchy>, CgroupError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CgroupError::Io {
            action: "read",
            path,
            source,
        }
    };
    let path = Path::new("/proc/self/mountinfo");
    let mut text = String::with_capacity(MOUNT_TABLE_BYTES);
    fs::File::open(path)
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(failed(path))?;
    let mut found = parse(&text);
    for hierarchy in &mut found {
        if hierarchy.version == Version::V2 {
            let path = hierarchy.root.join("cgroup.controllers");
            let text = fs::read_to_string(&path).map_err(failed(&path))?;
            hierarchy.controllers = text.split_whitespace().map(str::to_owned).collect();
        }
    }
    if found.is_empty() {
        return Err(CgroupError::NoHierarchy);
    }
    Ok(found)
}

/// Finds the hierarchies in the text of mountinfo (proc_pid_mountinfo(5)). Controllers of v2 are
/// not told there.
fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut seen: Vec<(&str, Hierarchy)> = Vec::new();
    for line in mountinfo.lines() {
        let Some((device, hierarchy)) = parse_line(line) else {
            continue;
        };
        match seen.iter_mut().find(|(have, _)| *have == device) {
            None => seen.push((device, hierarchy)),
            Some((_, have)) => {
                if !have.root.starts_with(ROOT_USUAL) && hierarchy.root.starts_with(ROOT_USUAL) {
                    *have = hierarchy;
                }
            }
        }
    }
    let mut found: Vec<Hierarchy> = seen.into_iter().map(|(_, hierarchy)| hierarchy).collect();
    found.sort_by_key(|hierarchy| hierarchy.version == Version::V1);
    found
}

/// The mount's device number, which names the hierarchy, and the hierarchy.
fn parse_line(line: &str) -> Option<(&str, Hierarchy)> {
    let line = Line::parse(line)?;
    let version = match line.kind {
        "cgroup" => Version::V1,
        "cgroup2" => Version::V2,
        _ => return None,
    };
    let controllers = line
        .options
        .split(',')
        .filter(|option| V1_CONTROLLERS.contains(option))
        .map(str::to_owned)
        .collect();
    let hierarchy = Hierarchy {
        version,
        controllers,
        root: line.point(),
    };
    Some((line.device, hierarchy))
}

/// A checked path of a control group below the root of every hierarchy; never empty, since the
/// empty path is the root of the host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct CgroupPath(PathBuf);

impl CgroupPath {
    /// # Errors
    ///
    /// If the path names the root or could leave it.
    pub(super) fn parse(path: &str) -> Result<CgroupPath, CgroupError> {
        let refuse = |reason| CgroupError::Path {
            path: path.to_owned(),
            reason,
        };
        let mut checked = PathBuf::new();
        for component in path.split('/').filter(|component| !component.is_empty()) {
            match component {
                "." | ".." => return Err(refuse("it has a `.` or `..` component")),
                _ if component.len() > NAME_BYTES_MAX => {
                    return Err(refuse("a component is longer than 255 bytes"));
                }
                _ if component.contains(['\0', '\n']) => {
                    return Err(refuse("it has a NUL or a newline"));
                }
                _ => checked.push(component),
            }
        }
        if checked.as_os_str().is_empty() {
            return Err(refuse("it names the root of the hierarchy"));
        }
        Ok(CgroupPath(checked))
    }

    /// Relative to a hierarchy's root.
    pub(super) fn relative(&self) -> &Path {
        &self.0
    }
}

/// What the kernel allows a directory's name (NAME_MAX).
const NAME_BYTES_MAX: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(mountinfo: &str) -> Vec<(Version, String, String)> {
        parse(mountinfo)
            .into_iter()
            .map(|hierarchy| {
                let root = hierarchy.root.display().to_string();
                (hierarchy.version, hierarchy.controllers.join("+"), root)
            })
            .collect()
    }

    #[test]
    fn every_layout_is_recognised() {
        let hybrid = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";
        assert_eq!(
            summary(hybrid),
            [
                (Version::V2, String::new(), "/sys/fs/cgroup/unified".into()),
                (
                    Version::V1,
                    "cpu+cpuacct".into(),
                    "/sys/fs/cgroup/cpu,cpuacct".into()
                ),
                (Version::V1, String::new(), "/sys/fs/cgroup/systemd".into()),
            ]
        );
        let unified = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            summary(unified),
            [(Version::V2, String::new(), "/sys/fs/cgroup".into())]
        );
        assert_eq!(
            summary("22 1 8:1 / / rw - ext4 /dev/sda1 rw\nnonsense\n"),
            []
        );
    }

    #[test]
    fn a_hierarchy_mounted_twice_counts_once_and_the_usual_place_wins() {
        let text = "\
50 23 0:26 / /srv/a\\040root/cgroup rw - cgroup2 cgroup2 rw
30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
60 23 0:26 / /srv/other rw - cgroup2 cgroup2 rw
";
        assert_eq!(
            summary(text),
            [(Version::V2, String::new(), "/sys/fs/cgroup".into())]
        );
    }

    #[test]
    fn a_path_that_is_the_root_or_leaves_it_is_refused() {
        for bad in ["", "/", "//", "/a/../b", "..", "./a", "/a\nb", "/a\0b"] {
            CgroupPath::parse(bad).unwrap_err();
        }
        CgroupPath::parse(&format!("/{}", "x".repeat(256))).unwrap_err();
        for (good, relative) in [("/hostd/a", "hostd/a"), ("a//b/", "a/b"), ("/..a", "..a")] {
            assert_eq!(
                CgroupPath::parse(good).unwrap().relative(),
                Path::new(relative)
            );
        }
    }
}
