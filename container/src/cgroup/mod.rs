//! The control group of a container: making it, limiting it, looking into it, stopping and removing
//! it, on cgroup v1, v2 and hybrids of both.
//!
//! Why this is more than a use of libcgroups, whose readers serve below: its manager looks for the
//! mounts anew for each of twelve controllers, which takes longer than everything here together;
//! it moves processes in the way that waits for grace periods of RCU (see [`Entry`]); and it
//! ignores what it cannot do: device rules on v2, unified files on v1, groups below the group that
//! is removed, frozen processes that do not die.

mod bpf;
mod build;
mod cpu;
mod device_program;
mod devices;
mod entry;
mod freezer;
mod hierarchy;
mod io;
mod memory;
mod owner;
mod properties;
mod removal;
mod resources;
mod setting;
mod shortage;
mod stats;
mod usage;

use std::{borrow::Cow, fmt::Display, path::PathBuf};

use libcgroups::common::WrappedIoError;
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;

pub(crate) use self::resources::first_limit;
pub use self::{
    entry::Entry,
    shortage::MemoryWatch,
    stats::{CpuStats, IoStats, MemoryStats, PidsStats, Stats},
};
use self::{
    hierarchy::{CgroupPath, Hierarchy, Version, hierarchies},
    setting::Setting,
};
use crate::rights::is_host_root;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("linux.cgroupsPath {path:?} cannot be used: {reason}")]
    Path { path: String, reason: &'static str },
    #[error("bad sub cgroup path: {path} is not a sub cgroup path")]
    Below { path: String },
    #[error("unknown controller {name:?}")]
    Controller { name: String },
    #[error("cannot join the container's groups: adding pid to {}", path.display())]
    Join {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("no cgroup hierarchy is mounted")]
    NoHierarchy,
    #[error("linux.resources.{field} cannot be honoured: {reason}")]
    Unsupported { field: String, reason: String },
    #[error("linux.resources.{field} is {value}, but {reason}")]
    Invalid {
        field: String,
        value: String,
        reason: String,
    },
    #[error("linux.resources.{field}: the kernel refuses {value:?} for {file:?}")]
    Set {
        field: String,
        value: String,
        file: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot {action} {path:?}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot read the state of the cgroup")]
    Library(#[source] WrappedIoError),
    #[error("cannot attach the device program to {path:?}")]
    Devices {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("container's cgroup is not empty: {path:?} has processes of others")]
    Occupied { path: PathBuf },
    #[error("container's cgroup unexpectedly frozen: {path:?}")]
    Frozen { path: PathBuf },
    #[error("{path:?} still has processes after {seconds} s")]
    Busy { path: PathBuf, seconds: u64 },
    #[error("{path:?} did not freeze within {seconds} s")]
    Freeze { path: PathBuf, seconds: u64 },
}

impl CgroupError {
    fn invalid(
        field: impl Into<Cow<'static, str>>,
        value: impl Display,
        reason: impl Into<String>,
    ) -> CgroupError {
        CgroupError::Invalid {
            field: field.into().into_owned(),
            value: value.to_string(),
            reason: reason.into(),
        }
    }

    fn unsupported(field: impl Into<Cow<'static, str>>, reason: impl Into<String>) -> CgroupError {
        CgroupError::Unsupported {
            field: field.into().into_owned(),
            reason: reason.into(),
        }
    }
}

/// The group's directory in one hierarchy.
#[derive(Clone, Debug)]
struct Directory {
    version: Version,
    controllers: Vec<String>,
    path: PathBuf,
    /// Where the hierarchy is mounted.
    root: PathBuf,
}

impl Directory {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|have| have == controller)
    }

    #[cfg(test)]
    fn for_test(version: Version, controller: &str, path: &std::path::Path) -> Directory {
        Directory {
            version,
            controllers: vec![controller.to_owned()],
            path: path.to_owned(),
            root: path.to_owned(),
        }
    }
}

/// A control group: one directory in each hierarchy of the host, all with the same path.
///
/// It is a name, not a handle: dropping it changes nothing, and any process can open it again.
#[derive(Clone, Debug)]
pub struct Cgroup {
    directories: Vec<Directory>,
}

impl Cgroup {
    /// Names the group `path` below the root of every hierarchy, as `/hostd/web`; it need not
    /// exist. The empty path names no group: that of a container of a user who may not make any.
    /// Nobody is in it, and it can do nothing.
    ///
    /// # Errors
    ///
    /// If the path is the root or could leave it, or no hierarchy is mounted.
    pub fn open(path: &str) -> Result<Cgroup, CgroupError> {
        if path.is_empty() {
            return Ok(Cgroup {
                directories: Vec::new(),
            });
        }
        Ok(Cgroup::at(&CgroupPath::parse(path)?, hierarchies()?).within_rights())
    }

    /// A user without rights has groups only in the hierarchies that were given to the user.
    fn within_rights(mut self) -> Cgroup {
        if !is_host_root() {
            self.directories
                .retain(|it| it.version == Version::V2 || it.path.is_dir());
        }
        self
    }

    fn at(path: &CgroupPath, hierarchies: &[Hierarchy]) -> Cgroup {
        let directory = |hierarchy: &Hierarchy| Directory {
            version: hierarchy.version,
            controllers: hierarchy.controllers.clone(),
            path: hierarchy.root.join(path.relative()),
            root: hierarchy.root.clone(),
        };
        Cgroup {
            directories: hierarchies.iter().map(directory).collect(),
        }
    }

    /// Makes the group and limits it. Devices are denied but for the default ones even if
    /// `resources` says nothing. An existing group is taken over if nobody is in it.
    ///
    /// # Errors
    ///
    /// If a process is in the group, or the host cannot honour a resource, which the error then
    /// names; directories that were made are gone again, but for the parents of the group.
    pub fn create(path: &str, resources: Option<&LinuxResources>) -> Result<Cgroup, CgroupError> {
        Self::create_around(path, resources, None)
    }

    /// As [`Cgroup::create`], where the process `occupant` may be in the group already.
    pub(crate) fn create_around(
        path: &str,
        resources: Option<&LinuxResources>,
        occupant: Option<i32>,
    ) -> Result<Cgroup, CgroupError> {
        let resources = resources.cloned().unwrap_or_default();
        let path = CgroupPath::parse(path)?;
        let hierarchies = hierarchies()?;
        let mut made = build::Made::default();
        let result =
            build::build(hierarchies, &path, &resources, occupant, &mut made).and_then(|()| {
                let cgroup = Cgroup::at(&path, hierarchies).within_rights();
                let fresh = made.is_everything_of(&cgroup.directories);
                if !fresh && cgroup.is_frozen()? {
                    let path = cgroup.freezer_path();
                    return Err(CgroupError::Frozen { path });
                }
                setting::apply(&resources::plan(&cgroup.directories, &resources)?)?;
                let rules = resources.devices().as_deref().unwrap_or_default();
                cgroup.apply_devices(&devices::Rules::new(rules)?, fresh)?;
                Ok(cgroup)
            });
        if result.is_err() {
            made.undo();
        }
        result
    }

    /// Whether this user may make the group `path`, as far as permissions tell: in the v2 hierarchy, or
    /// where there is none in all of v1. Beside v2, those of v1 are mostly root's.
    #[must_use]
    pub fn may_make(path: &str) -> bool {
        let (Ok(path), Ok(hierarchies)) = (CgroupPath::parse(path), hierarchies()) else {
            return false;
        };
        let may = |hierarchy: &Hierarchy| build::may_make(&hierarchy.root.join(path.relative()));
        match hierarchies.iter().find(|it| it.version == Version::V2) {
            Some(unified) => may(unified),
            None => hierarchies.iter().all(may),
        }
    }

    /// Whether v2 has all controllers of this host.
    #[must_use]
    pub fn is_unified() -> bool {
        hierarchies().is_ok_and(|found| found.iter().all(|it| it.version == Version::V2))
    }

    /// The path of a group `name` beside that of this process in the v2 hierarchy, if there is one: where
    /// this user may make groups if anywhere, since a group with processes in it can give its children no
    /// controllers.
    #[must_use]
    pub fn beside_own(name: &str) -> Option<String> {
        let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let above = own.rsplit_once('/').map_or("", |(above, _)| above);
        Some(format!("/{above}/{name}").replace("//", "/"))
    }

    /// Whether the group exists, in any hierarchy.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.directories
            .iter()
            .any(|directory| directory.path.is_dir())
    }

    /// Changes the limits that `resources` names, on a group that may have processes.
    ///
    /// # Errors
    ///
    /// If the host cannot honour a resource, or the kernel refuses a value, as a memory limit that
    /// it cannot reclaim down to. The limits are then as they were.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let settings: Vec<Setting> = resources::plan(&self.directories, resources)?;
        let rules = resources
            .devices()
            .as_deref()
            .map(devices::Rules::new)
            .transpose()?;
        setting::apply_all_or_nothing(&settings)?;
        rules.map_or(Ok(()), |rules| self.apply_devices(&rules, false))
    }

    /// Whether this host could honour `resources`, as far as that is known without writing anything.
    pub(crate) fn check(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        resources::plan(&self.directories, resources)?;
        let rules = resources.devices().as_deref().unwrap_or_default();
        device_program::program(&devices::Rules::new(rules)?);
        Ok(())
    }

    /// Moves a process with all its threads into the group. Waits for a grace period of RCU, about
    /// ten milliseconds: a process that has not started yet enters by [`Cgroup::entry`].
    ///
    /// # Errors
    ///
    /// If the group or the process does not exist, or the group has groups below it on v2.
    pub fn add(&self, pid: Pid) -> Result<(), CgroupError> {
        for directory in &self.directories {
            let path = directory.path.join("cgroup.procs");
            setting::write(&path, &pid.to_string()).map_err(|source| CgroupError::Io {
                action: "add a process to",
                path,
                source,
            })?;
        }
        Ok(())
    }

    /// The group's directories with the names that their hierarchies have, for showing them to a
    /// container as the host shows them: as `cpu,cpuacct`. Where v2 is alone it has no name.
    #[must_use]
    pub fn views(&self) -> Vec<(String, PathBuf)> {
        let alone = self.legacy().next().is_none();
        let view = |directory: &Directory| {
            let name = if alone {
                None
            } else {
                directory.root.file_name()
            };
            let name = name.unwrap_or_default().to_string_lossy().into_owned();
            (name, directory.path.clone())
        };
        self.directories.iter().map(view).collect()
    }

    /// How a new process gets into the group at once; see [`Entry`].
    ///
    /// # Errors
    ///
    /// If the group does not exist.
    pub fn entry(&self) -> Result<Entry, CgroupError> {
        Entry::open(&self.directories)
    }

    /// As [`Cgroup::entry`], with the v2 group of the process `pid` to go to where the kernel lets nobody
    /// into the group itself, or it is gone: a container that manages groups of its own need have nobody
    /// in it any more. One that is elsewhere leads there only if the group is gone.
    ///
    /// # Errors
    ///
    /// If neither group exists, or the process does not.
    pub fn entry_beside(&self, pid: i32) -> Result<Entry, CgroupError> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = std::fs::read_to_string(&path).map_err(|source| CgroupError::Io {
            action: "read",
            path,
            source,
        })?;
        let inside = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let beside = inside.zip(self.unified()).and_then(|(inside, unified)| {
            let beside = unified.root.join(inside);
            let own = &unified.path;
            (beside.starts_with(own) || !own.exists()).then_some(beside)
        });
        Entry::open_or(&self.directories, beside.as_deref())
    }

    /// A `fresh` group was made just now, and nobody has changed it.
    fn apply_devices(&self, rules: &devices::Rules, fresh: bool) -> Result<(), CgroupError> {
        // Only the host's root may set them. Without its rights no device can be made that the rules would
        // have to deny.
        if self.directories.is_empty() || !is_host_root() {
            return Ok(());
        }
        if let Some(directory) = self.directory_of("devices") {
            return devices::apply_v1(&directory.path, rules, fresh);
        }
        let Some(directory) = self.unified() else {
            let reason = "no hierarchy of this host controls devices";
            return Err(CgroupError::unsupported("devices", reason));
        };
        let attach = || {
            let handle = std::fs::File::open(&directory.path)?;
            bpf::attach(
                std::os::fd::AsFd::as_fd(&handle),
                &device_program::program(rules),
            )
        };
        attach().map_err(|source| CgroupError::Devices {
            path: directory.path.clone(),
            source,
        })
    }

    /// The directory whose hierarchy has `controller`.
    fn directory_of(&self, controller: &str) -> Option<&Directory> {
        self.directories
            .iter()
            .find(|directory| directory.has(controller))
    }

    /// The directory in the v2 hierarchy.
    fn unified(&self) -> Option<&Directory> {
        self.directories
            .iter()
            .find(|directory| directory.version == Version::V2)
    }

    /// The directories of v1.
    fn legacy(&self) -> impl Iterator<Item = &Directory> {
        self.directories
            .iter()
            .filter(|directory| directory.version == Version::V1)
    }
}
