//! CPU limits: `linux.resources.cpu` as values of the cpu and cpuset controllers.

use std::{fs, path::Path};

use oci_spec::runtime::LinuxCpu;

use super::{CgroupError, Directory, hierarchy::Version, setting::Setting};

/// The range of shares that the kernel keeps; outside it would clamp without a word.
const SHARES_MIN: u64 = 2;
const SHARES_MAX: u64 = 262_144;

/// The range of weights (Documentation/admin-guide/cgroup-v2.rst, CPU Interface Files).
const WEIGHT_MIN: u64 = 1;
const WEIGHT_MAX: u64 = 10_000;

pub(super) fn plan(directory: &Directory, cpu: &LinuxCpu) -> Result<Vec<Setting>, CgroupError> {
    let shares = cpu.shares().filter(|shares| *shares != 0);
    if let Some(shares) = shares.filter(|shares| !(SHARES_MIN..=SHARES_MAX).contains(shares)) {
        let reason = "it is between 2 and 262144";
        return Err(CgroupError::invalid("cpu.shares", shares, reason));
    }
    if let Some(idle) = cpu.idle().filter(|idle| !(0..=1).contains(idle)) {
        return Err(CgroupError::invalid("cpu.idle", idle, "it is 0 or 1"));
    }
    match directory.version {
        Version::V1 => Ok(plan_v1(&directory.path, cpu, shares)),
        Version::V2 => plan_v2(&directory.path, cpu, shares),
    }
}

fn plan_v1(directory: &Path, cpu: &LinuxCpu, shares: Option<u64>) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |field, file, value: Option<String>| {
        settings.extend(value.map(|value| Setting::new(field, directory, file, value)));
    };
    let text = |value: u64| {
        Some(value)
            .filter(|value| *value != 0)
            .map(|value| value.to_string())
    };
    let signed = |value: i64| {
        Some(value)
            .filter(|value| *value != 0)
            .map(|value| value.to_string())
    };
    let file = "cpu.rt_period_us";
    set(
        "cpu.realtimePeriod",
        file,
        cpu.realtime_period().and_then(text),
    );
    let file = "cpu.rt_runtime_us";
    set(
        "cpu.realtimeRuntime",
        file,
        cpu.realtime_runtime().and_then(signed),
    );
    let idle = cpu.idle().map(|idle| idle.to_string());
    let (wakes, sleeps) = split_idle(idle);
    set("cpu.idle", "cpu.idle", wakes);
    set("cpu.shares", "cpu.shares", shares.and_then(text));
    set("cpu.idle", "cpu.idle", sleeps);
    set(
        "cpu.period",
        "cpu.cfs_period_us",
        cpu.period().and_then(text),
    );
    set(
        "cpu.quota",
        "cpu.cfs_quota_us",
        cpu.quota().and_then(signed),
    );
    set(
        "cpu.burst",
        "cpu.cfs_burst_us",
        cpu.burst().map(|burst| burst.to_string()),
    );
    settings
}

fn plan_v2(
    directory: &Path,
    cpu: &LinuxCpu,
    shares: Option<u64>,
) -> Result<Vec<Setting>, CgroupError> {
    let period = cpu.realtime_period().map(|value| value.to_string());
    let runtime = cpu.realtime_runtime().map(|value| value.to_string());
    for (field, asked) in [
        ("cpu.realtimePeriod", period),
        ("cpu.realtimeRuntime", runtime),
    ] {
        if let Some(value) = asked.filter(|value| value != "0") {
            let reason = "cgroup v2 has no such setting";
            return Err(CgroupError::invalid(field, value, reason));
        }
    }
    let mut settings = Vec::new();
    let mut set = |field, file, value| settings.push(Setting::new(field, directory, file, value));
    let (wakes, sleeps) = split_idle(cpu.idle().map(|idle| idle.to_string()));
    let weight = shares.map(|shares| weight_of_shares(shares).to_string());
    for (field, file, value) in [
        ("cpu.idle", "cpu.idle", wakes),
        ("cpu.shares", "cpu.weight", weight),
        ("cpu.idle", "cpu.idle", sleeps),
    ] {
        if let Some(value) = value {
            set(field, file, value);
        }
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let field = if quota.is_some() {
            "cpu.quota"
        } else {
            "cpu.period"
        };
        let present = fs::read_to_string(directory.join("cpu.max")).unwrap_or_default();
        set(field, "cpu.max", cpu_max(&present, quota, period));
    }
    if let Some(burst) = cpu.burst() {
        set("cpu.burst", "cpu.max.burst", burst.to_string());
    }
    Ok(settings)
}

/// What is to be written to cpu.idle before the weight, and what after it: the kernel refuses a weight
/// while the group is idle.
fn split_idle(idle: Option<String>) -> (Option<String>, Option<String>) {
    if idle.as_deref() == Some("0") {
        (idle, None)
    } else {
        (None, idle)
    }
}

/// The text for cpu.max: what is not asked for stays as it is in `present`.
fn cpu_max(present: &str, quota: Option<i64>, period: Option<u64>) -> String {
    let mut present = present.split_whitespace();
    let present_quota = present.next().unwrap_or("max");
    let present_period = present.next().unwrap_or("100000");
    let quota = match quota {
        None => present_quota.to_owned(),
        Some(quota) if quota < 0 => "max".to_owned(),
        Some(quota) => quota.to_string(),
    };
    let period = period.map_or_else(|| present_period.to_owned(), |period| period.to_string());
    format!("{quota} {period}")
}

/// Turns shares into a weight, so that 2, 1024 and 262144 become 1, 100 and 10000.
///
/// This is the curve that runc and crun use; the straight line that they used before gave the
/// default of 1024 shares a weight of 39 in place of 100.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "shares are at most 262144, and the curve stays between 1 and 10000"
)]
fn weight_of_shares(shares: u64) -> u64 {
    let log = (shares.clamp(SHARES_MIN, SHARES_MAX) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    // Rounding up must not be moved by the last bit of the power at the exact points.
    let weight = (10f64.powf(exponent) - 1e-9).ceil() as u64;
    weight.clamp(WEIGHT_MIN, WEIGHT_MAX)
}

pub(super) fn plan_sets(directory: &Directory, cpu: &LinuxCpu) -> Vec<Setting> {
    let sets = [
        ("cpu.cpus", "cpuset.cpus", cpu.cpus()),
        ("cpu.mems", "cpuset.mems", cpu.mems()),
    ];
    sets.into_iter()
        .filter_map(|(field, file, value)| {
            let value = value.as_deref().filter(|value| !value.is_empty())?;
            Some(Setting::new(field, &directory.path, file, value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxCpuBuilder;

    use super::*;

    fn text(version: Version, cpu: &LinuxCpu) -> String {
        let directory = Directory::for_test(version, "cpu", Path::new("/x"));
        let settings = match plan(&directory, cpu) {
            Err(error) => return format!("error: {error}"),
            Ok(settings) => settings,
        };
        let lines = settings.iter().map(|setting| {
            format!(
                "{}={}",
                setting.file.file_name().unwrap().to_str().unwrap(),
                setting.value
            )
        });
        lines.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn shares_become_weights_on_the_common_curve() {
        for (shares, weight) in [
            (2, 1),
            (3, 2),
            (1024, 100),
            (512, 59),
            (2048, 174),
            (22_000, 1204),
            (262_144, 10_000),
        ] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
        let mut last = 0;
        for shares in SHARES_MIN..=SHARES_MAX {
            let weight = weight_of_shares(shares);
            assert!(weight >= last, "{shares}");
            last = weight;
        }
    }

    #[test]
    fn half_a_quota_keeps_the_other_half() {
        assert_eq!(cpu_max("max 100000", Some(50_000), None), "50000 100000");
        assert_eq!(cpu_max("20000 50000", None, Some(40_000)), "20000 40000");
        assert_eq!(cpu_max("20000 50000", Some(-1), None), "max 50000");
        assert_eq!(cpu_max("", Some(5_000), Some(10_000)), "5000 10000");
    }

    #[test]
    fn zero_is_unset_and_the_rest_is_written_in_an_order_the_kernel_takes() {
        let cpu = LinuxCpuBuilder::default()
            .shares(1024u64)
            .quota(50_000)
            .period(100_000u64)
            .burst(1_000u64)
            .idle(0)
            .realtime_runtime(0)
            .build()
            .unwrap();
        assert_eq!(
            text(Version::V1, &cpu),
            "cpu.idle=0 cpu.shares=1024 cpu.cfs_period_us=100000 cpu.cfs_quota_us=50000 \
             cpu.cfs_burst_us=1000"
        );
        assert_eq!(
            text(Version::V2, &cpu),
            "cpu.idle=0 cpu.weight=100 cpu.max=50000 100000 cpu.max.burst=1000"
        );
        let zero = LinuxCpuBuilder::default()
            .shares(0u64)
            .quota(0)
            .build()
            .unwrap();
        assert_eq!(text(Version::V1, &zero), "");
    }

    #[test]
    fn what_the_kernel_would_clamp_or_lacks_is_refused() {
        let new = LinuxCpuBuilder::default;
        for (cpu, start) in [
            (new().shares(1u64), "error: linux.resources.cpu.shares"),
            (
                new().shares(262_145u64),
                "error: linux.resources.cpu.shares",
            ),
            (new().idle(2), "error: linux.resources.cpu.idle"),
            (
                new().realtime_period(5u64),
                "error: linux.resources.cpu.realtimePeriod",
            ),
        ] {
            let text = text(Version::V2, &cpu.build().unwrap());
            assert!(text.starts_with(start), "{text}");
        }
    }
}
