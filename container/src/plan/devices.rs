//! The device nodes of a container: those that every container has, and those asked for.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{FileType, makedev};

use super::PlanError;

/// One node to make.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct DevicePlan {
    /// In the container's root.
    pub(crate) path: PathBuf,
    pub(crate) kind: FileType,
    /// The device number; 0 for a FIFO.
    pub(crate) number: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Name and number of the devices that the specification says a container has.
const DEFAULTS: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The default devices, where the configuration has none of the same path, and the configured ones.
pub(crate) fn plan(devices: &[LinuxDevice], defaults: bool) -> Result<Vec<DevicePlan>, PlanError> {
    let mut plans = Vec::with_capacity(DEFAULTS.len() + devices.len());
    if defaults {
        plans.extend(DEFAULTS.iter().map(|(path, major, minor)| DevicePlan {
            path: PathBuf::from(path),
            kind: FileType::CharacterDevice,
            number: makedev(*major, *minor),
            mode: 0o666,
            uid: 0,
            gid: 0,
        }));
    }
    for (index, device) in devices.iter().enumerate() {
        let plan = one(index, device)?;
        plans.retain(|other| other.path != plan.path);
        plans.push(plan);
    }
    Ok(plans)
}

fn one(index: usize, device: &LinuxDevice) -> Result<DevicePlan, PlanError> {
    let field = format!("linux.devices[{index}]");
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => {
            return Err(PlanError::value(
                format!("{field}.type"),
                "a",
                "it must be b, c, u or p",
            ));
        }
    };
    if !device.path().is_absolute() {
        return Err(PlanError::value(
            format!("{field}.path"),
            device.path().display(),
            "it must be absolute",
        ));
    }
    let number = |name: &str, value: i64| {
        u32::try_from(value).map_err(|_| {
            PlanError::value(
                format!("{field}.{name}"),
                value,
                "it must be between 0 and 4294967295",
            )
        })
    };
    let number = if kind == FileType::Fifo {
        0
    } else {
        makedev(
            number("major", device.major())?,
            number("minor", device.minor())?,
        )
    };
    Ok(DevicePlan {
        path: device.path().clone(),
        kind,
        number,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configured_device_replaces_the_default_of_its_path() {
        let device: LinuxDevice = serde_json::from_str(
            r#"{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":384,"uid":7}"#,
        )
        .unwrap();
        let plans = plan(&[device], true).unwrap();
        assert_eq!(plans.len(), DEFAULTS.len());
        assert_eq!((plans[5].mode, plans[5].uid), (0o600, 7));
    }
}
