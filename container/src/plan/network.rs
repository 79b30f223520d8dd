//! The network devices that are moved into the container (`linux.netDevices`).

use std::collections::HashSet;

use oci_spec::runtime::Linux;

use super::PlanError;
use super::namespaces::{Kind, NamespacePlan};

/// `IFNAMSIZ` without the NUL byte.
const NAME_BYTES_MAX: usize = 15;

/// A device of the caller's network namespace, and its name in the container's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct NetworkDevicePlan {
    /// `linux.netDevices.NAME`, for errors.
    pub(crate) field: String,
    pub(crate) name: String,
    /// May be a template, as `eth%d`, for the kernel to number.
    pub(crate) name_inside: String,
}

/// The devices in the order of their names, so that equal requests act equally.
pub(crate) fn plan(
    linux: &Linux,
    namespaces: &NamespacePlan,
) -> Result<Vec<NetworkDevicePlan>, PlanError> {
    let mut devices: Vec<_> = linux.net_devices().iter().flatten().collect();
    devices.sort_by_key(|(name, _)| *name);
    let mut names_inside = HashSet::new();
    let mut plans = Vec::with_capacity(devices.len());
    for (name, device) in devices {
        let field = format!("linux.netDevices.{name}");
        if !namespaces.has(Kind::NETWORK) {
            let reason = "unable to move network devices without a NET namespace: \
                          it needs a network namespace of the container's own";
            return Err(PlanError::invalid(field, reason));
        }
        let given = device.name().as_deref().filter(|name| !name.is_empty());
        let name_inside = given.unwrap_or(name);
        check_name(&field, name, false)?;
        check_name(&format!("{field}.name"), name_inside, true)?;
        if !name_inside.contains('%') && !names_inside.insert(name_inside) {
            let reason = format!("`{name_inside}` is given to two devices");
            return Err(PlanError::invalid(format!("{field}.name"), reason));
        }
        plans.push(NetworkDevicePlan {
            field,
            name: name.clone(),
            name_inside: name_inside.to_owned(),
        });
    }
    Ok(plans)
}

/// What the kernel takes for a name (`dev_valid_name`); in a template, one `%d`.
fn check_name(field: &str, name: &str, template: bool) -> Result<(), PlanError> {
    let plain = if template {
        name.replacen("%d", "", 1)
    } else {
        name.to_owned()
    };
    let wrong = |letter: char| matches!(letter, '/' | ':' | '%' | '\0') || letter.is_whitespace();
    if name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || matches!(name, "." | "..")
        || plain.contains(wrong)
    {
        let reason = format!(
            "`{name}` is no name of a network device: 1 to {NAME_BYTES_MAX} bytes, without spaces, \
             `/`, `:` and `%`{}",
            if template { " but for one `%d`" } else { "" }
        );
        return Err(PlanError::invalid(field, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_plan(devices: &str) -> Result<Vec<NetworkDevicePlan>, PlanError> {
        let linux = serde_json::from_str(&format!(r#"{{"netDevices":{devices}}}"#)).unwrap();
        let namespaces = NamespacePlan {
            new: Kind::NETWORK.0,
            ..NamespacePlan::default()
        };
        plan(&linux, &namespaces)
    }

    #[test]
    fn a_device_keeps_its_name_or_gets_another() {
        let devices = try_plan(r#"{"b":{"name":"net%d"},"a":{},"c":{"name":""}}"#).unwrap();
        let names: Vec<_> = devices
            .iter()
            .map(|device| (device.name.as_str(), device.name_inside.as_str()))
            .collect();
        assert_eq!(names, [("a", "a"), ("b", "net%d"), ("c", "c")]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (devices, field) in [
            (r#"{"a/b":{}}"#, "linux.netDevices.a/b"),
            (r#"{"a%d":{}}"#, "linux.netDevices.a%d"),
            (
                r#"{"a":{"name":"sixteen-letters."}}"#,
                "linux.netDevices.a.name",
            ),
            (r#"{"a":{"name":"%d%d"}}"#, "linux.netDevices.a.name"),
            (r#"{"a":{"name":"b"},"b":{}}"#, "linux.netDevices.b.name"),
        ] {
            let error = try_plan(devices).unwrap_err().to_string();
            assert!(error.contains(&format!("{field}: ")), "{devices}: {error}");
        }
        let linux = serde_json::from_str(r#"{"netDevices":{"a":{}}}"#).unwrap();
        let error = plan(&linux, &NamespacePlan::default()).unwrap_err();
        assert!(error.to_string().contains("without a NET namespace"));
    }
}
