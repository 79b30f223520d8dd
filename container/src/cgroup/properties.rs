//! Limits as systemd knows them: the properties of a unit that say the same as files of its group.

use std::fs;
use std::path::Path;

use super::{Cgroup, CgroupError, devices, resources, setting::Setting};
use crate::rights::is_host_root;
use crate::systemd::{Property, Value};
use oci_spec::runtime::LinuxResources;

const MICROSECONDS_PER_SECOND: u64 = 1_000_000;

/// The period of the CPU quota where a group has none yet.
const PERIOD_DEFAULT: u64 = 100_000;

/// The highest number of a processor or memory node that is told.
const MEMBERS_MAX: usize = 8192;

/// Files with one number in them, where `max` and less than 0 are no limit, and their properties.
const LIMITS: &[(&str, &str)] = &[
    ("memory.max", "MemoryMax"),
    ("memory.high", "MemoryHigh"),
    ("memory.low", "MemoryLow"),
    ("memory.min", "MemoryMin"),
    ("memory.swap.max", "MemorySwapMax"),
    ("memory.zswap.max", "MemoryZSwapMax"),
    ("memory.limit_in_bytes", "MemoryLimit"),
    ("pids.max", "TasksMax"),
    ("cpu.weight", "CPUWeight"),
    ("cpu.shares", "CPUShares"),
    ("io.weight", "IOWeight"),
    ("blkio.weight", "BlockIOWeight"),
];

impl Cgroup {
    /// What of `resources` systemd must know, so that it does not put its own in their place; the rules
    /// for devices, which are there without being asked for, only `with_devices`. What systemd has no
    /// property for it leaves alone.
    ///
    /// # Errors
    /// If the host cannot honour a resource.
    pub(crate) fn properties(
        &self,
        resources: &LinuxResources,
        with_devices: bool,
    ) -> Result<Vec<Property>, CgroupError> {
        let mut properties = of_settings(&resources::plan(&self.directories, resources)?);
        // On v2 the rules are a program that is the runtime's own.
        let v1 = self.directory_of("devices").is_some();
        if v1 && with_devices && is_host_root() {
            let rules = resources.devices().as_deref().unwrap_or_default();
            properties.extend(devices::Rules::new(rules)?.properties()?);
        }
        Ok(properties)
    }
}

fn of_settings(settings: &[Setting]) -> Vec<Property> {
    let mut properties = Vec::new();
    let mut quota = None;
    for setting in settings {
        let name = setting.file.file_name().unwrap_or_default();
        let name = name.to_str().unwrap_or_default();
        let value = setting.value.as_str();
        if let Some((_, property)) = LIMITS.iter().find(|(file, _)| *file == name) {
            properties.extend(limit(value).map(|value| (*property, Value::Large(value))));
        }
        match name {
            "cpuset.cpus" => properties.extend(members("AllowedCPUs", value)),
            "cpuset.mems" => properties.extend(members("AllowedMemoryNodes", value)),
            // As `CPUWeight=idle`.
            "cpu.idle" if value == "1" => properties.push(("CPUWeight", Value::Large(0))),
            "cpu.max" => {
                let parts = value.split_once(' ');
                quota = parts.map(|(quota, period)| (quota, period.to_owned()));
            }
            "cpu.cfs_quota_us" => quota = Some((value, period_v1(settings, &setting.file))),
            _ => {}
        }
    }
    if let Some((quota, period)) = quota {
        properties.extend(quota_properties(quota, &period));
    }
    properties
}

/// Nothing for what is no number, as the line of one device.
fn limit(value: &str) -> Option<u64> {
    if value == "max" {
        return Some(u64::MAX);
    }
    let number: i64 = value
        .strip_prefix("default ")
        .unwrap_or(value)
        .parse()
        .ok()?;
    Some(u64::try_from(number).unwrap_or(u64::MAX))
}

/// The period that holds beside a quota of v1: the one that is set too, or that is there.
fn period_v1(settings: &[Setting], quota: &Path) -> String {
    let file = quota.with_file_name("cpu.cfs_period_us");
    let beside = settings.iter().find(|setting| setting.file == file);
    match beside {
        Some(setting) => setting.value.clone(),
        None => fs::read_to_string(file)
            .unwrap_or_default()
            .trim()
            .to_owned(),
    }
}

fn quota_properties(quota: &str, period: &str) -> [Property; 2] {
    let period = period.parse::<u64>().ok().filter(|period| *period > 0);
    let period = period.unwrap_or(PERIOD_DEFAULT);
    let in_a_second = match quota.parse::<u64>() {
        // Rounded up: what systemd makes of it by the period is then the quota again.
        Ok(quota) => quota
            .saturating_mul(MICROSECONDS_PER_SECOND)
            .div_ceil(period),
        Err(_) => u64::MAX,
    };
    [
        ("CPUQuotaPeriodUSec", Value::Large(period)),
        ("CPUQuotaPerSecUSec", Value::Large(in_a_second)),
    ]
}

/// A bit for each member of a list as `0-3,7`; nothing for what is none, which the kernel refuses.
fn members(property: &'static str, list: &str) -> Option<Property> {
    let members = crate::plan::process::members(list, MEMBERS_MAX)?;
    let mut bytes = vec![0u8; members.iter().max().map_or(0, |last| last / 8 + 1)];
    for member in members {
        bytes[member / 8] |= 1 << (member % 8);
    }
    Some((property, Value::Bytes(bytes)))
}

impl devices::Rules {
    /// The rules in the words of systemd, for v1: there it writes what it knows each time that it reads
    /// its configuration.
    fn properties(&self) -> Result<Vec<Property>, CgroupError> {
        if self.otherwise {
            let none = ("DeviceAllow", Value::Pairs(Vec::new()));
            return Ok(vec![("DevicePolicy", Value::Text("auto".to_owned())), none]);
        }
        let drivers = fs::read_to_string("/proc/devices").unwrap_or_default();
        let exceptions = self.exceptions()?;
        let pairs = exceptions
            .iter()
            .filter_map(|devices| devices.node(&drivers));
        Ok(vec![
            ("DevicePolicy", Value::Text("strict".to_owned())),
            ("DeviceAllow", Value::Pairs(pairs.collect())),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_the_properties_that_say_the_same() {
        let directory = Path::new("/nonexistent");
        let set = |file: &str, value: &str| Setting::new("x", directory, file, value);
        let large = Value::Large;
        for (settings, expected) in [
            (
                vec![set("memory.max", "64")],
                vec![("MemoryMax", large(64))],
            ),
            (
                vec![set("memory.limit_in_bytes", "-1")],
                vec![("MemoryLimit", large(u64::MAX))],
            ),
            (
                vec![set("pids.max", "max")],
                vec![("TasksMax", large(u64::MAX))],
            ),
            (
                vec![set("cpuset.cpus", "0-1,9")],
                vec![("AllowedCPUs", Value::Bytes(vec![3, 2]))],
            ),
            (
                vec![set("cpu.max", "20000 50000")],
                vec![
                    ("CPUQuotaPeriodUSec", large(50_000)),
                    ("CPUQuotaPerSecUSec", large(400_000)),
                ],
            ),
            (
                vec![set("cpu.max", "max 30000")],
                vec![
                    ("CPUQuotaPeriodUSec", large(30_000)),
                    ("CPUQuotaPerSecUSec", large(u64::MAX)),
                ],
            ),
            (
                vec![
                    set("cpu.cfs_period_us", "30000"),
                    set("cpu.cfs_quota_us", "10000"),
                ],
                vec![
                    ("CPUQuotaPeriodUSec", large(30_000)),
                    ("CPUQuotaPerSecUSec", large(333_334)),
                ],
            ),
            (vec![set("io.max", "8:0 rbps=5")], vec![]),
            (vec![set("io.weight", "8:0 5")], vec![]),
        ] {
            assert_eq!(of_settings(&settings), expected);
        }
    }

    #[test]
    fn systemd_gets_the_quota_back_by_the_period() {
        for (quota, period) in [(1_000_u64, 3_000_u64), (33_333, 100_000), (7_777, 999_983)] {
            let [_, (_, in_a_second)] = quota_properties(&quota.to_string(), &period.to_string());
            let Value::Large(in_a_second) = in_a_second else {
                panic!("{in_a_second:?}");
            };
            assert_eq!(in_a_second * period / MICROSECONDS_PER_SECOND, quota);
        }
    }

    #[test]
    fn devices_have_the_names_that_systemd_reads() {
        let json = r#"[{"allow":true,"type":"b","major":8,"access":"rw"},
            {"allow":true,"type":"c","major":10,"minor":229,"access":"r"}]"#;
        let rules = devices::tests::rules(json).unwrap();
        let drivers = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n";
        let nodes: Vec<_> = rules.exceptions().unwrap();
        let nodes: Vec<_> = nodes.iter().filter_map(|it| it.node(drivers)).collect();
        let has = |node: &str, access: &str| {
            let found = nodes.iter().find(|(name, _)| name == node);
            assert_eq!(
                found.map(|(_, access)| access.as_str()),
                Some(access),
                "{node}"
            );
        };
        has("char-*", "m");
        has("/dev/char/1:3", "rwm");
        has("char-pts", "rwm");
        has("block-sd", "rw");
        has("/dev/char/10:229", "r");
    }
}
