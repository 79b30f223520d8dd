//! What is refused because it could only be ignored: parts of the specification for other systems, and
//! for hardware that is not supported.

use oci_spec::runtime::{Linux, LinuxSeccomp, Spec};

use super::PlanError;

pub(super) fn refuse_unsupported(spec: &Spec, linux: &Linux) -> Result<(), PlanError> {
    for (field, given, reason) in [
        (
            "vm",
            spec.vm().is_some(),
            "this runtime makes no virtual machines",
        ),
        ("windows", spec.windows().is_some(), "this is Linux"),
        ("solaris", spec.solaris().is_some(), "this is Linux"),
        ("zos", spec.zos().is_some(), "this is Linux"),
        (
            "linux.intelRdt",
            linux.intel_rdt().is_some(),
            "Intel RDT (resctrl) is not supported",
        ),
    ] {
        if given {
            return Err(PlanError::invalid(field, reason));
        }
    }
    if let Some(version) = spec
        .annotations()
        .iter()
        .flatten()
        .find(|(key, _)| key.is_empty())
    {
        let reason = format!("the key of `{}` must not be empty", version.1);
        return Err(PlanError::invalid("annotations", reason));
    }
    Ok(())
}

pub(super) fn check_version(version: &str) -> Result<(), PlanError> {
    if version.starts_with("1.") {
        return Ok(());
    }
    Err(PlanError::invalid(
        "ociVersion",
        format!("`{version}` is not a version of 1.x, which is what is supported"),
    ))
}

/// A filter that asks needs somebody to answer.
pub(super) fn check_listener(seccomp: &LinuxSeccomp, notifies: bool) -> Result<(), PlanError> {
    let metadata = seccomp.listener_metadata().as_deref();
    let path = seccomp
        .listener_path()
        .as_ref()
        .is_some_and(|path| !path.as_os_str().is_empty());
    if notifies && !path {
        let reason = "SCMP_ACT_NOTIFY needs the socket of an agent";
        return Err(PlanError::invalid("linux.seccomp.listenerPath", reason));
    }
    if let Some(metadata) = metadata.filter(|metadata| !metadata.is_empty() && !path) {
        return Err(PlanError::value(
            "linux.seccomp.listenerMetadata",
            metadata,
            "it must not be set without listenerPath",
        ));
    }
    Ok(())
}

/// SELinux's label of the container's mounts; refused where the host could not enforce it.
pub(super) fn mount_label(linux: &Linux) -> Result<Option<&str>, PlanError> {
    let label = linux
        .mount_label()
        .as_deref()
        .filter(|label| !label.is_empty());
    match label {
        Some(label) if !super::process::selinux_is_enabled() => Err(PlanError::value(
            "linux.mountLabel",
            label,
            "SELinux is not enabled on this host",
        )),
        label => Ok(label),
    }
}
