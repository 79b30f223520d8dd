//! The namespaces of a container: which are made, which are joined by path, and what is written into
//! them.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use libc::{
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWTIME,
    CLONE_NEWUSER, CLONE_NEWUTS,
};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};
use rustix::fs::{CWD, Mode, OFlags, fstat, openat};

use super::PlanError;
use crate::rights;
use crate::sys;

/// One kind of namespace, as a `CLONE_NEW*` flag.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Kind(pub(crate) u64);

impl Kind {
    pub(crate) const CGROUP: Kind = Kind(flag(CLONE_NEWCGROUP));
    pub(crate) const IPC: Kind = Kind(flag(CLONE_NEWIPC));
    pub(crate) const MOUNT: Kind = Kind(flag(CLONE_NEWNS));
    pub(crate) const NETWORK: Kind = Kind(flag(CLONE_NEWNET));
    pub(crate) const PID: Kind = Kind(flag(CLONE_NEWPID));
    pub(crate) const TIME: Kind = Kind(flag(CLONE_NEWTIME));
    pub(crate) const USER: Kind = Kind(flag(CLONE_NEWUSER));
    pub(crate) const UTS: Kind = Kind(flag(CLONE_NEWUTS));

    /// All kinds, in the order in which they are joined: the mount namespace takes the host's paths away.
    pub(crate) const ALL: [(Kind, &str); 8] = [
        (Kind::USER, "user"),
        (Kind::IPC, "ipc"),
        (Kind::UTS, "uts"),
        (Kind::NETWORK, "net"),
        (Kind::PID, "pid"),
        (Kind::CGROUP, "cgroup"),
        (Kind::TIME, "time"),
        (Kind::MOUNT, "mnt"),
    ];

    /// The name of the file in /proc/PID/ns.
    pub(crate) fn file_name(self) -> &'static str {
        Kind::ALL
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("unknown", |(_, name)| name)
    }
}

const fn flag(value: i32) -> u64 {
    value.unsigned_abs() as u64
}

const NANOSECONDS_PER_SECOND: u32 = 1_000_000_000;

/// The namespaces of a container.
#[derive(Debug, Default)]
pub(crate) struct NamespacePlan {
    /// `CLONE_NEW*` flags of those that are made.
    pub(crate) new: u64,
    /// Those that exist, in the order of [`Kind::ALL`].
    pub(crate) joined: Vec<(Kind, OwnedFd)>,
    /// The text of /proc/PID/uid_map and gid_map; empty without a new user namespace.
    pub(crate) uid_map: String,
    pub(crate) gid_map: String,
    /// The text of /proc/PID/timens_offsets; may be empty.
    pub(crate) time_offsets: String,
    /// The caller's additional groups stay in a user namespace.
    pub(crate) keep_groups: bool,
    /// The process must be inside before others in its pid namespace see it.
    pub(crate) unseen: bool,
}

impl NamespacePlan {
    /// # Errors
    /// The field that is wrong, and why.
    pub(crate) fn new(linux: &Linux) -> Result<Self, PlanError> {
        let mut plan = Self::default();
        let mut seen = 0;
        for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
            let field = format!("linux.namespaces[{index}]");
            let kind = kind(namespace.typ());
            if seen & kind.0 != 0 {
                let allowed = "it is given twice, and may be given once";
                return Err(PlanError::value(
                    format!("{field}.type"),
                    namespace.typ(),
                    allowed,
                ));
            }
            seen |= kind.0;
            match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => {
                    if let Some(file) = open(&field, path, kind)? {
                        plan.joined.push((kind, file));
                    }
                }
                _ => plan.new |= kind.0,
            }
        }
        let position = |kind: Kind| Kind::ALL.iter().position(|(known, _)| *known == kind);
        plan.joined.sort_by_key(|(kind, _)| position(*kind));
        plan.set_maps(linux)?;
        plan.set_time_offsets(linux)?;
        if plan.shares_mounts() && plan.has(Kind::USER) {
            let given = linux.namespaces().iter().flatten();
            let given: Vec<_> = given.map(|namespace| namespace.typ().to_string()).collect();
            return Err(PlanError::value(
                "linux.namespaces",
                given.join(", "),
                "a user namespace needs a mount namespace beside it, to make the root in",
            ));
        }
        Ok(plan)
    }

    /// Whether the container has one of this kind that is not the caller's.
    pub(crate) fn has(&self, kind: Kind) -> bool {
        self.makes(kind) || self.joined(kind).is_some()
    }

    /// Whether the container has no mount namespace but the caller's.
    pub(crate) fn shares_mounts(&self) -> bool {
        !self.has(Kind::MOUNT)
    }

    pub(crate) fn makes(&self, kind: Kind) -> bool {
        self.new & kind.0 != 0
    }

    pub(crate) fn joined(&self, kind: Kind) -> Option<&OwnedFd> {
        self.joined
            .iter()
            .find(|(joined, _)| *joined == kind)
            .map(|(_, file)| file)
    }

    /// Who a user of the container is outside; nothing for who is not mapped, or if the mapping is that of
    /// a namespace that is joined.
    pub(crate) fn host_user(&self, uid: u32) -> Option<u32> {
        if !self.has(Kind::USER) {
            return Some(uid);
        }
        rights::outside(&self.uid_map, uid)
    }

    fn set_maps(&mut self, linux: &Linux) -> Result<(), PlanError> {
        for (field, mappings, text) in [
            ("linux.uidMappings", linux.uid_mappings(), &mut self.uid_map),
            ("linux.gidMappings", linux.gid_mappings(), &mut self.gid_map),
        ] {
            let mappings = mappings.as_deref().unwrap_or_default();
            if let Some(index) = mappings.iter().position(|map| map.size() == 0) {
                let field = format!("{field}[{index}].size");
                return Err(PlanError::value(field, 0, "it must be more than 0"));
            }
            *text = map_text(mappings);
            let new = self.new & Kind::USER.0 != 0;
            if new && text.is_empty() {
                return Err(PlanError::invalid(
                    field,
                    "a new user namespace needs a mapping",
                ));
            }
            if !new && !text.is_empty() && self.joined.iter().all(|(kind, _)| *kind != Kind::USER) {
                return Err(PlanError::value(
                    field,
                    text.trim_end(),
                    "there is no user namespace to map",
                ));
            }
            if !new {
                // The namespace that is joined has its mapping.
                text.clear();
            }
        }
        Ok(())
    }

    fn set_time_offsets(&mut self, linux: &Linux) -> Result<(), PlanError> {
        for (clock, offset) in linux.time_offsets().iter().flatten() {
            if !matches!(clock.as_str(), "monotonic" | "boottime") {
                return Err(PlanError::invalid(
                    format!("linux.timeOffsets.{clock}"),
                    "only `monotonic` and `boottime` have offsets",
                ));
            }
            if !self.makes(Kind::TIME) {
                return Err(PlanError::invalid(
                    format!("linux.timeOffsets.{clock}"),
                    "it needs a new time namespace",
                ));
            }
            let (seconds, nanoseconds) =
                (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
            if nanoseconds >= NANOSECONDS_PER_SECOND {
                return Err(PlanError::value(
                    format!("linux.timeOffsets.{clock}.nanosecs"),
                    nanoseconds,
                    "it must be less than 1000000000, a second",
                ));
            }
            self.time_offsets += &format!("{clock} {seconds} {nanoseconds}\n");
        }
        Ok(())
    }
}

/// The text that the kernel wants in uid_map and gid_map.
pub(crate) fn map_text(mappings: &[LinuxIdMapping]) -> String {
    mappings
        .iter()
        .map(|map| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size()))
        .collect()
}

/// Opens a namespace; nothing if it is the one that the caller is in, which cannot be joined twice
/// where it is a user namespace, and need not be where it is another.
fn open(field: &str, path: &Path, kind: Kind) -> Result<Option<OwnedFd>, PlanError> {
    let failed = |source: rustix::io::Errno| PlanError::Open {
        field: format!("{field}.path"),
        path: path.to_path_buf(),
        source: source.into(),
    };
    // It may be anything, for instance a pipe that would be waited for.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = openat(CWD, path, flags, Mode::empty()).map_err(failed)?;
    if sys::namespace_type(file.as_fd()).ok() != Some(kind.0) {
        let reason = format!("{} is no {} namespace", path.display(), kind.file_name());
        return Err(PlanError::invalid(format!("{field}.path"), reason));
    }
    let own = format!("/proc/self/ns/{}", kind.file_name());
    let own = openat(CWD, own, flags, Mode::empty()).map_err(failed)?;
    let (mine, theirs) = (fstat(&own).map_err(failed)?, fstat(&file).map_err(failed)?);
    Ok((mine.st_ino != theirs.st_ino).then_some(file))
}

fn kind(name: LinuxNamespaceType) -> Kind {
    match name {
        LinuxNamespaceType::Mount => Kind::MOUNT,
        LinuxNamespaceType::Cgroup => Kind::CGROUP,
        LinuxNamespaceType::Uts => Kind::UTS,
        LinuxNamespaceType::Ipc => Kind::IPC,
        LinuxNamespaceType::User => Kind::USER,
        LinuxNamespaceType::Pid => Kind::PID,
        LinuxNamespaceType::Network => Kind::NETWORK,
        LinuxNamespaceType::Time => Kind::TIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<NamespacePlan, PlanError> {
        NamespacePlan::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (json, message) in [
            (
                r#"{"namespaces":[{"type":"user"}],"uidMappings":[{"hostID":1,"containerID":0,"size":1}],
                    "gidMappings":[{"hostID":1,"containerID":0,"size":1}]}"#,
                "needs a mount namespace",
            ),
            (
                r#"{"namespaces":[{"type":"uts"},{"type":"uts"}]}"#,
                "namespaces[1]",
            ),
            (
                r#"{"namespaces":[{"type":"mount"},{"type":"user"}]}"#,
                "uidMappings",
            ),
            (
                r#"{"namespaces":[{"type":"mount","path":"/dev/null"}]}"#,
                "is no mnt namespace",
            ),
            (
                r#"{"namespaces":[{"type":"net","path":"/nowhere"}]}"#,
                "namespaces[0].path",
            ),
            (
                r#"{"namespaces":[{"type":"mount"}],"uidMappings":[{"hostID":1,"containerID":0,"size":1}]}"#,
                "no user namespace",
            ),
            (
                r#"{"namespaces":[{"type":"mount"}],"timeOffsets":{"boottime":{"secs":1}}}"#,
                "needs a new time namespace",
            ),
        ] {
            let json = json.replace(r#""net""#, r#""network""#);
            let error = plan(&json).unwrap_err().to_string();
            assert!(error.contains(message), "{json}: {error}");
        }
    }

    #[test]
    fn the_callers_own_namespace_is_not_joined() {
        let json = r#"{"namespaces":[{"type":"mount"},{"type":"uts","path":"/proc/self/ns/uts"}]}"#;
        let plan = plan(json).unwrap();
        assert!(plan.joined.is_empty());
        assert_eq!(plan.new, Kind::MOUNT.0);
    }
}
