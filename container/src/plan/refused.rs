//! What is refused because it could only be ignored: parts of the specification for other systems, and
//! for hardware that is not supported.

use oci_spec::runtime::{Linux, LinuxSeccomp, Spec};

use super::PlanError;

pub(super) fn refuse_unsupported(spec: &Spec) -> Result<(), PlanError> {
    for (field, given, reason) in [
        (
            "vm",
            spec.vm().is_some(),
            "this runtime makes no virtual machines",
        ),
        ("windows", spec.windows().is_some(), "this is Linux"),
        ("solaris", spec.solaris().is_some(), "this is Linux"),
        ("zos", spec.zos().is_some(), "this is Linux"),
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
    match parse_version(version) {
        // What comes before 1.0.0 are its drafts.
        Some((1, minor, patch, is_draft)) if (minor, patch) != (0, 0) || !is_draft => Ok(()),
        _ => Err(PlanError::value(
            "ociVersion",
            version,
            "it must be a version of 1.x, as `1.3.0`, which is what is supported",
        )),
    }
}

/// The numbers of a semantic version, and whether it has a pre-release after them.
fn parse_version(text: &str) -> Option<(u32, u32, u32, bool)> {
    let named = |text: &str| {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let mut parts = text.split('.');
        parts.all(|part| !part.is_empty() && part.bytes().all(letter))
    };
    let number = |text: &str| {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit());
        let canonical = text == "0" || !text.starts_with('0');
        text.parse().ok().filter(|_| plain && canonical)
    };
    let (text, build) = text
        .split_once('+')
        .map_or((text, None), |(text, build)| (text, Some(build)));
    let (text, draft) = text
        .split_once('-')
        .map_or((text, None), |(text, draft)| (text, Some(draft)));
    if !build.into_iter().chain(draft).all(named) {
        return None;
    }
    let mut numbers = text.split('.');
    let (major, minor, patch) = (numbers.next()?, numbers.next()?, numbers.next()?);
    if numbers.next().is_some() {
        return None;
    }
    Some((
        number(major)?,
        number(minor)?,
        number(patch)?,
        draft.is_some(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_from_1_0_0_to_2_0_0_is_taken_and_nothing_else() {
        for good in [
            "1.0.0",
            "1.0.2-dev",
            "1.2.1+build.5",
            "1.3.0",
            "1.30.12-rc.1+x",
            "1.1.0-rc-1",
        ] {
            assert!(check_version(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "1",
            "1.",
            "1.0",
            "1.0.0.0",
            "1.anything",
            "1.x.0",
            "01.0.0",
            "1.00.0",
            "+1.0.0",
            "1.+2.0",
            "1.-2.0",
            "1.0.0-",
            "1.0.0+",
            "1.0.0-a..b",
            "1.0.0-é",
            "1.0.0-rc5",
            "0.9.0",
            "2.0.0",
            "1.0.99999999999",
            " 1.0.0",
        ] {
            assert!(check_version(bad).is_err(), "{bad}");
        }
    }
}
