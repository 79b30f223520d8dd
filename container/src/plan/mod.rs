//! From what was asked to what will be done: every value checked, every file opened, before anything is
//! made. Making a [`Plan`] changes nothing on the host.

use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use libc::MS_UNBINDABLE;
use oci_spec::runtime::{Hooks, Linux, LinuxPersonalityDomain, LinuxResources, LinuxSeccomp, Spec};
use rustix::thread::CapabilitySet;

use crate::create::Grouping;
use crate::resctrl::ResctrlPlan;
use crate::seccomp::{self, Filter};
use crate::spec::Config;
use crate::systemd::ScopePlan;

pub(crate) mod capability;
pub(crate) mod devices;
mod group;
#[cfg(test)]
mod hostile;
pub(crate) mod memory;
pub(crate) mod mounts;
pub(crate) mod namespaces;
pub(crate) mod network;
pub(crate) mod options;
pub(crate) mod process;
pub(crate) mod rdt;
mod refused;
mod sysctl;

use devices::DevicePlan;
use group::GroupPlan;
use memory::MemoryPolicy;
use mounts::{MountPlan, Surroundings, Tree};
use namespaces::{Kind, NamespacePlan};
use network::NetworkDevicePlan;
use process::ProcessPlan;
use refused::{check_listener, check_version, mount_label, refuse_unsupported};

pub(crate) const KEEP_GROUPS: &str = "run.oci.keep_original_groups";

/// What will be done.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Absolute path of the root file system on the host, for the record.
    pub(crate) rootfs_path: PathBuf,
    pub(crate) rootfs: Tree,
    pub(crate) readonly_root: bool,
    /// `MS_` bit, and whether it holds for all mounts below.
    pub(crate) root_propagation: Option<(u64, bool)>,
    pub(crate) namespaces: NamespacePlan,
    pub(crate) mounts: Vec<MountPlan>,
    pub(crate) devices: Vec<DevicePlan>,
    /// Whether /dev gets the links that every container has (fd, stdin, ptmx, …).
    pub(crate) device_links: bool,
    pub(crate) masked_paths: Vec<PathBuf>,
    pub(crate) readonly_paths: Vec<PathBuf>,
    /// Path below /proc/sys, and value.
    pub(crate) sysctl: Vec<(PathBuf, String)>,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    pub(crate) process: ProcessPlan,
    pub(crate) personality: Option<LinuxPersonalityDomain>,
    pub(crate) memory_policy: Option<MemoryPolicy>,
    pub(crate) network_devices: Vec<NetworkDevicePlan>,
    pub(crate) filter: Option<Filter>,
    pub(crate) hooks: Hooks,
    /// The same in every hierarchy; absolute. Empty for a user who may not make groups, and where systemd
    /// says which it is.
    pub(crate) cgroup: String,
    /// The unit of systemd whose group it is.
    pub(crate) scope: Option<ScopePlan>,
    pub(crate) resources: Option<LinuxResources>,
    pub(crate) resctrl: Option<ResctrlPlan>,
}

/// What a plan is made for, beside the configuration.
#[derive(Debug)]
pub(crate) struct Setting<'a> {
    pub(crate) id: &'a str,
    /// Absolute.
    pub(crate) bundle: &'a Path,
    /// The program comes as a descriptor: the root may be empty, and gets no device that was not
    /// asked for.
    pub(crate) bare: bool,
    pub(crate) grouping: Grouping,
    /// Nothing will be carried out: what is to be mounted is found, but not copied, which waits for a grace
    /// period of the kernel when the copy is closed unused.
    pub(crate) check: bool,
}

/// Why a configuration cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("config.json: {field}: {reason}")]
    Invalid { field: String, reason: String },
    #[error("config.json: {field}: cannot open {}", path.display())]
    Open {
        field: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("config.json: linux.seccomp")]
    Seccomp(#[from] seccomp::SeccompError),
}

impl PlanError {
    /// What was found, as far as it is short, and what is allowed.
    pub(crate) fn value(field: impl Into<String>, value: impl Display, allowed: &str) -> Self {
        const VALUE_LETTERS_MAX: usize = 100;
        let value: String = value.to_string().chars().take(VALUE_LETTERS_MAX).collect();
        Self::invalid(field, format!("`{}`: {allowed}", value.escape_debug()))
    }

    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

impl Plan {
    /// # Errors
    /// The field that is wrong, and why.
    pub(crate) fn new(config: &Config, setting: &Setting<'_>) -> Result<Self, PlanError> {
        let spec = &config.spec;
        check_version(spec.version())?;
        let empty = Linux::default_empty();
        let linux = spec.linux().as_ref().unwrap_or(&empty);
        refuse_unsupported(spec)?;

        let needed = |field: &str| PlanError::invalid(field, "it is needed");
        let root = spec.root().as_ref().ok_or_else(|| needed("root"))?;
        let process = spec.process().as_ref().ok_or_else(|| needed("process"))?;
        let mut namespaces = NamespacePlan::new(linux)?;
        namespaces.keep_groups = keeps_groups(spec);
        let available = capability::available_in(&namespaces);
        let privileged = capability::available().contains(CapabilitySet::SYS_ADMIN);
        let copy = privileged && !setting.check;
        let (rootfs_path, rootfs) = mounts::open_rootfs(root, setting.bundle, copy)?;
        let surroundings = Surroundings {
            linux,
            namespaces: &namespaces,
            label: mount_label(linux)?,
            bundle: setting.bundle,
            privileged,
            copy,
        };
        let mounts = spec.mounts().iter().flatten().enumerate();
        let mounts = mounts
            .map(|(index, mount)| MountPlan::new(index, mount, &surroundings))
            .collect::<Result<Vec<_>, _>>()?;
        if namespaces.shares_mounts() {
            refuse_unbindable(&mounts)?;
        }
        let mut process = ProcessPlan::new(process, available)?;
        process.user.keep_groups = namespaces.keep_groups;
        let device_defaults = has_device_defaults(&mounts, setting.bare);
        let group = GroupPlan::new(linux, spec.annotations().as_ref(), setting)?;
        Ok(Self {
            rootfs_path,
            rootfs,
            readonly_root: root.readonly().unwrap_or(false),
            root_propagation: root_propagation(linux)?,
            devices: devices::plan(
                linux.devices().as_deref().unwrap_or_default(),
                device_defaults,
            )?,
            device_links: device_defaults,
            masked_paths: paths("linux.maskedPaths", linux.masked_paths())?,
            readonly_paths: paths("linux.readonlyPaths", linux.readonly_paths())?,
            sysctl: sysctl::plan(
                linux.sysctl().as_ref(),
                &namespaces,
                spec.domainname().as_deref(),
            )?,
            hostname: host_name("hostname", spec.hostname(), &namespaces)?,
            domainname: host_name("domainname", spec.domainname(), &namespaces)?,
            process,
            personality: personality(linux)?,
            memory_policy: memory::plan(linux)?,
            network_devices: network::plan(linux, &namespaces)?,
            filter: linux.seccomp().as_ref().map(filter).transpose()?,
            hooks: hooks(spec)?,
            cgroup: group.path,
            scope: group.scope,
            resources: linux.resources().clone(),
            resctrl: rdt::plan(linux, &config.text, setting.id)?,
            namespaces,
            mounts,
        })
    }
}

/// Whether the caller's additional groups stay: with them a user without rights has what only they open. The
/// annotation is crun's, and what podman makes of `--group-add keep-groups`.
pub(crate) fn keeps_groups(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    let given = annotations.and_then(|annotations| annotations.get(KEEP_GROUPS));
    given.is_some_and(|value| value == "1")
}

/// A `Linux` section without any of the defaults that oci-spec's `Default` has.
trait DefaultEmpty {
    fn default_empty() -> Self;
}

impl DefaultEmpty for Linux {
    fn default_empty() -> Self {
        serde_json::from_str("{}").expect("every field is optional")
    }
}

fn filter(seccomp: &LinuxSeccomp) -> Result<Filter, PlanError> {
    let filter = seccomp::compile(seccomp)?;
    check_listener(seccomp, filter.notifies())?;
    Ok(filter)
}

/// A /dev that is bound from the host has its own nodes, and must not be changed.
fn has_device_defaults(mounts: &[MountPlan], bare: bool) -> bool {
    let at_dev = |mount: &&MountPlan| mount.destination == Path::new("/dev");
    match mounts.iter().rev().find(at_dev) {
        Some(mount) => !matches!(mount.what, mounts::MountKind::Bind { .. }),
        None => !bare,
    }
}

/// The root of a container that shares its caller's mount namespace is a copy.
fn refuse_unbindable(mounts: &[MountPlan]) -> Result<(), PlanError> {
    let unbindable = |mount: &MountPlan| {
        let propagation = mount.options.propagation;
        propagation.is_some_and(|(bit, _)| bit == MS_UNBINDABLE)
    };
    mounts.iter().position(unbindable).map_or(Ok(()), |index| {
        let field = format!("mounts[{index}].options");
        let allowed = "it needs a mount namespace of the container's own";
        Err(PlanError::value(field, "unbindable", allowed))
    })
}

fn root_propagation(linux: &Linux) -> Result<Option<(u64, bool)>, PlanError> {
    let Some(text) = linux
        .rootfs_propagation()
        .as_deref()
        .filter(|text| !text.is_empty())
    else {
        return Ok(None);
    };
    options::parse_propagation(text).map(Some).ok_or_else(|| {
        let reason = format!("`{text}` is none of (r)shared, (r)slave, (r)private, (r)unbindable");
        PlanError::invalid("linux.rootfsPropagation", reason)
    })
}

fn paths(field: &str, list: &Option<Vec<String>>) -> Result<Vec<PathBuf>, PlanError> {
    let check = |(index, path): (usize, &String)| {
        let path = PathBuf::from(path);
        if path.is_absolute() {
            return Ok(path);
        }
        Err(PlanError::value(
            format!("{field}[{index}]"),
            path.display(),
            "it must be an absolute path",
        ))
    };
    list.iter().flatten().enumerate().map(check).collect()
}

fn host_name(
    field: &str,
    name: &Option<String>,
    namespaces: &NamespacePlan,
) -> Result<Option<String>, PlanError> {
    /// `__NEW_UTS_LEN` of the kernel.
    const NAME_BYTES_MAX: usize = 64;
    let Some(name) = name.as_ref().filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    if name.len() > NAME_BYTES_MAX {
        let allowed = format!("it may have {NAME_BYTES_MAX} bytes");
        return Err(PlanError::value(field, name, &allowed));
    }
    if !namespaces.has(Kind::UTS) {
        return Err(PlanError::value(
            field,
            name,
            "it needs a uts namespace of the container's own",
        ));
    }
    Ok(Some(name.clone()))
}

fn personality(linux: &Linux) -> Result<Option<LinuxPersonalityDomain>, PlanError> {
    let Some(personality) = linux.personality() else {
        return Ok(None);
    };
    if let Some(flag) = personality.flags().iter().flatten().next() {
        return Err(PlanError::value(
            "linux.personality.flags[0]",
            flag,
            "the specification has no flags",
        ));
    }
    Ok(Some(personality.domain()))
}

fn hooks(spec: &Spec) -> Result<Hooks, PlanError> {
    let hooks = spec.hooks().clone().unwrap_or_default();
    for (list, name) in crate::hooks::lists(&hooks) {
        for (index, hook) in list.iter().enumerate() {
            let field = format!("hooks.{name}[{index}]");
            if !hook.path().is_absolute() {
                return Err(PlanError::value(
                    format!("{field}.path"),
                    hook.path().display(),
                    "it must be absolute",
                ));
            }
            if let Some(timeout) = hook.timeout().filter(|timeout| *timeout <= 0) {
                return Err(PlanError::value(
                    format!("{field}.timeout"),
                    timeout,
                    "it must be more than 0 seconds",
                ));
            }
        }
    }
    Ok(hooks)
}

/// What the process of a container needs open when it is executed, beside its standard streams.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    /// The program, in place of what `args[0]` names.
    pub(crate) executable: Option<OwnedFd>,
    /// They become 3, 4, ….
    pub(crate) descriptors: Vec<OwnedFd>,
}
