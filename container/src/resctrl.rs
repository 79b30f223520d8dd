//! A container's share of the caches and of the memory bandwidth (Intel RDT and what is like it), by the
//! kernel's file system for it (Documentation/arch/x86/resctrl.rst).
//!
//! A class of service is a directory there, with the processes that are in it (`tasks`) and what they may
//! have (`schemata`). A container has one of its own, or one that was set up for several. Below it can be
//! a directory that only measures.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::mountinfo::Line;

/// Why a container did not get its share.
#[derive(Debug, thiserror::Error)]
pub enum ResctrlError {
    #[error("linux.intelRdt.closID: there is no class `{class}` in {}, and no schemata to make one with", root.display())]
    NoClass { class: String, root: PathBuf },
    #[error(
        "linux.intelRdt: the class `{class}` exists with other schemata: it has no `{line}`; give it \
         another closID"
    )]
    Differs { class: String, line: String },
    #[error("linux.intelRdt: cannot {act} {}{explanation}", path.display())]
    Io {
        act: &'static str,
        path: PathBuf,
        /// What the kernel says beside the error's number.
        explanation: String,
        source: io::Error,
    },
}

/// What a container is to have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ResctrlPlan {
    /// Where the file system is mounted.
    pub(crate) root: PathBuf,
    pub(crate) class: Class,
    /// Lines, as `L3:0=7f0;1=1f`. None for a class that is taken as it is.
    pub(crate) schemata: Vec<String>,
    /// The name of a group that measures, if there is to be one.
    pub(crate) monitor: Option<String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Class {
    /// That of all processes that have no other.
    Default,
    /// One that may exist, and stays.
    Named(String),
    /// One for the container alone.
    Own(String),
}

/// The directories that a container is in.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResctrlGroups {
    /// Where the file system is mounted.
    root: PathBuf,
    class: PathBuf,
    /// The class goes with the container.
    is_own: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    monitor: Option<PathBuf>,
}

impl ResctrlPlan {
    /// The directories that the container will be in.
    pub(crate) fn groups(&self) -> ResctrlGroups {
        let (class, is_own) = match &self.class {
            Class::Default => (self.root.clone(), false),
            Class::Named(name) => (self.root.join(name), false),
            Class::Own(name) => (self.root.join(name), true),
        };
        let monitor = self.monitor.as_ref();
        ResctrlGroups {
            root: self.root.clone(),
            monitor: monitor.map(|name| class.join("mon_groups").join(name)),
            class,
            is_own,
        }
    }

    /// Makes of them what is not there.
    ///
    /// # Errors
    /// When the class is another one than was asked for, or the processor or the kernel refuses; nothing
    /// that was made is left then.
    pub(crate) fn make(&self, groups: &ResctrlGroups) -> Result<(), ResctrlError> {
        if groups.class.is_dir() {
            self.compare(groups)?;
            return groups.make_monitor();
        }
        if matches!(self.class, Class::Named(_)) && self.schemata.is_empty() {
            return Err(ResctrlError::NoClass {
                class: self.class.name().to_owned(),
                root: self.root.clone(),
            });
        }
        groups.make_directory(&groups.class)?;
        let filled = if self.schemata.is_empty() {
            Ok(())
        } else {
            groups.update(&self.schemata)
        };
        filled
            .and_then(|()| groups.make_monitor())
            .inspect_err(|_| {
                let _ = std::fs::remove_dir(&groups.class);
            })
    }

    /// Whether a class that exists is what was asked for.
    fn compare(&self, groups: &ResctrlGroups) -> Result<(), ResctrlError> {
        if self.schemata.is_empty() {
            return Ok(());
        }
        let text = groups.read_schemata()?;
        let has: BTreeMap<_, _> = text.lines().filter_map(parse).collect();
        let differs = |line: &&String| {
            let asked = parse(line);
            !asked.is_some_and(|(resource, parts)| {
                let has = has.get(resource);
                has.is_some_and(|has| {
                    parts
                        .iter()
                        .all(|(domain, value)| has.get(domain) == Some(value))
                })
            })
        };
        match self.schemata.iter().find(differs) {
            None => Ok(()),
            Some(line) => Err(ResctrlError::Differs {
                class: self.class.name().to_owned(),
                line: line.clone(),
            }),
        }
    }
}

impl Class {
    /// As `closID` has it.
    fn name(&self) -> &str {
        match self {
            Class::Default => "/",
            Class::Named(name) | Class::Own(name) => name,
        }
    }
}

impl ResctrlGroups {
    /// Adds a process, and with it those that it will make.
    ///
    /// # Errors
    /// When there is no such process, or the directories are gone.
    pub(crate) fn add(&self, pid: i32) -> Result<(), ResctrlError> {
        // In this order: what measures takes only processes of its class.
        for group in [Some(&self.class), self.monitor.as_ref()]
            .into_iter()
            .flatten()
        {
            self.write(&group.join("tasks"), &pid.to_string())?;
        }
        Ok(())
    }

    /// What the class may have, in lines.
    ///
    /// # Errors
    /// The system call's.
    pub(crate) fn schemata(&self) -> Result<Vec<String>, ResctrlError> {
        let text = self.read_schemata()?;
        Ok(text.lines().map(|line| line.trim().to_owned()).collect())
    }

    fn read_schemata(&self) -> Result<String, ResctrlError> {
        let path = self.class.join("schemata");
        std::fs::read_to_string(&path).map_err(|source| self.failed("read", &path, source))
    }

    /// Changes what the class may have.
    ///
    /// # Errors
    /// When the processor or the kernel refuses.
    pub(crate) fn update(&self, schemata: &[String]) -> Result<(), ResctrlError> {
        // In one write, so that the kernel takes all of it or nothing of a line.
        self.write(&self.class.join("schemata"), &(schemata.join("\n") + "\n"))
    }

    /// Removes what is the container's own. Processes that are still there fall back to the default.
    ///
    /// # Errors
    /// The system call's.
    pub(crate) fn remove(&self) -> Result<(), ResctrlError> {
        let own = Some(&self.class).filter(|_| self.is_own);
        for path in [self.monitor.as_ref(), own].into_iter().flatten() {
            match std::fs::remove_dir(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(self.failed("remove", path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn make_monitor(&self) -> Result<(), ResctrlError> {
        let path = self.monitor.as_ref();
        path.map_or(Ok(()), |path| self.make_directory(path))
    }

    fn make_directory(&self, path: &Path) -> Result<(), ResctrlError> {
        match std::fs::create_dir(path) {
            // Of a creator that died.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(|source| self.failed("make", path, source)),
        }
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), ResctrlError> {
        std::fs::write(path, text).map_err(|source| self.failed("write to", path, source))
    }

    /// The kernel explains the last failure in a file.
    fn failed(&self, act: &'static str, path: &Path, source: io::Error) -> ResctrlError {
        let status = std::fs::read_to_string(self.root.join("info/last_cmd_status"));
        let status = status.unwrap_or_default();
        let explanation = match status.trim() {
            "" | "ok" => String::new(),
            status => format!(" ({status})"),
        };
        ResctrlError::Io {
            act,
            path: path.to_owned(),
            explanation,
            source,
        }
    }
}

/// A line of schemata, `RESOURCE:DOMAIN=VALUE;…`: the kernel aligns them, and writes numbers as it likes.
fn parse(line: &str) -> Option<(&str, BTreeMap<&str, &str>)> {
    let (resource, rest) = line.split_once(':')?;
    let parts = rest.split(';').map(|part| {
        let (domain, value) = part.split_once('=')?;
        let digits = value.trim().trim_start_matches('0');
        Some((domain.trim(), digits))
    });
    Some((resource.trim(), parts.collect::<Option<_>>()?))
}

/// Where the file system is mounted, by the text of /proc/self/mountinfo.
pub(crate) fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    let mut mounts = mountinfo.lines().filter_map(Line::parse);
    mounts
        .find(|line| line.kind == "resctrl")
        .map(|line| line.point())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A directory that looks like the file system, but does nothing by itself.
    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("info")).unwrap();
        fs::create_dir_all(root.path().join("mon_groups")).unwrap();
        fs::write(root.path().join("info/last_cmd_status"), "ok\n").unwrap();
        fs::write(
            root.path().join("schemata"),
            "    L3:0=7ff;1=7ff\n    MB:0=100;1=100\n",
        )
        .unwrap();
        root
    }

    fn plan(root: &Path, class: Class, schemata: &[&str]) -> ResctrlPlan {
        ResctrlPlan {
            root: root.to_owned(),
            class,
            schemata: schemata.iter().map(|&line| line.to_owned()).collect(),
            monitor: None,
        }
    }

    fn make(plan: &ResctrlPlan) -> Result<ResctrlGroups, ResctrlError> {
        let groups = plan.groups();
        plan.make(&groups).map(|()| groups)
    }

    #[test]
    fn a_class_of_the_containers_own_is_made_and_goes_with_it() {
        let root = tree();
        let schemata = ["L3:0=7f0;1=1f", "MB:0=20;1=70"];
        let groups = make(&plan(root.path(), Class::Own("a".into()), &schemata)).unwrap();
        let class = root.path().join("a");
        let written = fs::read_to_string(class.join("schemata")).unwrap();
        assert_eq!(written, "L3:0=7f0;1=1f\nMB:0=20;1=70\n");
        groups.add(77).unwrap();
        assert_eq!(fs::read_to_string(class.join("tasks")).unwrap(), "77");
        groups.update(&["MB:0=10".to_owned()]).unwrap();
        assert_eq!(groups.schemata().unwrap(), ["MB:0=10"]);
        // The kernel's directories go with what it has put there.
        for file in ["schemata", "tasks"] {
            fs::remove_file(class.join(file)).unwrap();
        }
        groups.remove().unwrap();
        assert!(!class.exists());
        groups.remove().unwrap();
    }

    #[test]
    fn a_class_that_exists_must_be_as_it_is_asked_for_and_stays() {
        let root = tree();
        let class = root.path().join("shared");
        fs::create_dir(&class).unwrap();
        fs::write(
            class.join("schemata"),
            "    L3:0=00ff;1=7ff\n    MB:0= 20;1=100\n",
        )
        .unwrap();
        let shared = || Class::Named("shared".into());
        for good in [&["L3:0=ff"][..], &["MB:1=100;0=20", "L3:1=07ff"], &[]] {
            let groups = make(&plan(root.path(), shared(), good)).unwrap();
            groups.remove().unwrap();
            assert!(class.exists());
        }
        for bad in ["L3:0=fe", "L3:2=ff", "L2:0=ff", "L3"] {
            let error = make(&plan(root.path(), shared(), &[bad])).unwrap_err();
            assert!(
                error.to_string().contains(&format!("no `{bad}`")),
                "{error}"
            );
        }
        let default = plan(root.path(), Class::Default, &["MB:0=100"]);
        assert_eq!(make(&default).unwrap().class, root.path());
        make(&plan(root.path(), Class::Default, &["MB:0=10"])).unwrap_err();
        let none = make(&plan(root.path(), Class::Named("none".into()), &[]));
        assert!(matches!(none, Err(ResctrlError::NoClass { .. })));
        assert!(!root.path().join("none").exists());
    }

    #[test]
    fn what_measures_lies_in_the_class_and_a_failure_leaves_nothing() {
        let root = tree();
        let mut plan = plan(root.path(), Class::Default, &[]);
        plan.monitor = Some("a".into());
        let groups = make(&plan).unwrap();
        groups.add(77).unwrap();
        let group = root.path().join("mon_groups/a");
        for tasks in [root.path().join("tasks"), group.join("tasks")] {
            assert_eq!(fs::read_to_string(tasks).unwrap(), "77");
        }
        fs::remove_file(group.join("tasks")).unwrap();
        groups.remove().unwrap();
        assert!(!group.exists() && root.path().exists());
        // A class without a directory for it, as where nothing is measured.
        plan.class = Class::Own("b".into());
        fs::write(root.path().join("info/last_cmd_status"), "Out of RMIDs\n").unwrap();
        let error = make(&plan).unwrap_err();
        assert!(error.to_string().contains("(Out of RMIDs)"), "{error}");
        assert!(!root.path().join("b").exists());
    }

    #[test]
    fn the_file_system_is_found_by_its_type() {
        let text = "\
30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
31 23 0:27 / /sys/fs/resctrl rw,relatime - resctrl resctrl rw
";
        assert_eq!(mount_point(text), Some("/sys/fs/resctrl".into()));
        assert_eq!(mount_point("22 1 8:1 / / rw - ext4 resctrl rw\n"), None);
    }
}
