//! What a limit may be, and what it comes to for the kernel.
//!
//! The numbers of [`Limits`] mean the same for both kinds; the few bounds that differ between the
//! kinds are data in [`Rules`].

use std::collections::{BTreeSet, HashMap};

use oci_spec::runtime::{
    LinuxBlockIo, LinuxBlockIoBuilder, LinuxCpu, LinuxCpuBuilder, LinuxMemoryBuilder,
    LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder, LinuxThrottleDevice,
    LinuxThrottleDeviceBuilder,
};

use oci_spec::OciSpecError;

use crate::api::types::{DiskLimits, Effect, Limits};
use crate::validate::FieldError;

/// The least part of a processor that a limit can be: the kernel's quantum is 1 ms in 100 ms.
pub const CPU_CORES_MIN: f64 = 0.01;
pub const CPU_WEIGHT_MAX: u32 = 10_000;
pub const CPU_WEIGHT_DEFAULT: u32 = 100;
/// The kernel's own bound on process ids (PID_MAX_LIMIT).
pub const PIDS_MAX: u32 = 4 * 1024 * 1024;
/// Below this a file system has no room for its own structures.
pub const DISK_SIZE_MIN_BYTES: u64 = 16 * MIB;
pub const DISK_SIZE_MAX_BYTES: u64 = 16 << 40;
pub const MIB: u64 = 1024 * 1024;
const CPU_SHARES_DEFAULT: u64 = 1024;
/// The kernel takes no less.
const CPU_SHARES_MIN: u64 = 2;
const CPU_PERIOD_US: u64 = 100_000;
/// As the runtime specification writes it.
const UNLIMITED: i64 = -1;

/// What the host has to give.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Capacity {
    /// The processors that are online.
    pub cpus: BTreeSet<u32>,
    pub memory_bytes: u64,
    /// Whether all controllers are those of cgroup v2.
    pub cgroup_v2: bool,
}

/// What an instance needs of the host's memory beside its `memory.max`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Overhead {
    pub fixed_bytes: u64,
    /// What each 256 bytes of its memory come with.
    pub per_256_bytes: u64,
}

impl Overhead {
    pub const NONE: Self = Self {
        fixed_bytes: 0,
        per_256_bytes: 0,
    };

    /// What an instance with so much memory takes of the host's.
    pub fn with(self, memory: u64) -> u64 {
        let tables = (memory / 256).saturating_mul(self.per_256_bytes);
        memory
            .saturating_add(tables)
            .saturating_add(self.fixed_bytes)
    }

    /// How much memory an instance can have that takes so much of the host's.
    pub fn most_within(self, total: u64) -> u64 {
        let left = total.saturating_sub(self.fixed_bytes);
        let parts = left.div_ceil(256 + self.per_256_bytes);
        left.saturating_sub(parts.saturating_mul(self.per_256_bytes))
    }
}

/// What differs between the kinds of isolation, as data.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub memory_min_bytes: u64,
    pub memory_overhead: Overhead,
    /// What an instance without `memory.max` takes of the host, if that is bounded.
    pub memory_default_bytes: Option<u64>,
    /// Whether directories of the host can be mounted into an instance.
    pub mounts: bool,
    /// Whether an instance has a user namespace or shares the host's users.
    pub user_namespace: bool,
    /// Whether the writable layer can be bounded.
    pub disk_size: bool,
    /// Whether a snapshot can hold the memory of an instance.
    pub memory_snapshots: bool,
    /// Why an instance has no console that clients can be at, if it has none.
    pub no_console: Option<&'static str>,
    /// When a change of the field at this JSON pointer takes effect on a running instance, or why
    /// it cannot be changed. The limits are the instance's before and after the change.
    pub effect: fn(pointer: &str, before: &Limits, after: &Limits) -> Result<Effect, &'static str>,
}

/// Checks every limit against its range and the host.
///
/// # Errors
/// The first limit at fault, by its pointer from the instance's root.
pub fn check(limits: &Limits, rules: &Rules, host: &Capacity) -> Result<(), FieldError> {
    check_cpu(limits, host)?;
    check_memory(limits, rules, host)?;
    if let Some(max) = limits.pids.max
        && !(1..=PIDS_MAX).contains(&max)
    {
        return Err(FieldError::new(
            "/limits/pids/max",
            format!("must be from 1 to {PIDS_MAX}, not {max}"),
        ));
    }
    check_disk(&limits.disk, rules)?;
    let network = &limits.network;
    for (pointer, rate) in [
        ("/limits/network/ingress_bps", network.ingress_bps),
        ("/limits/network/egress_bps", network.egress_bps),
    ] {
        check_rate(pointer, rate)?;
    }
    Ok(())
}

fn check_cpu(limits: &Limits, host: &Capacity) -> Result<(), FieldError> {
    let cpus = host.cpus.len();
    if let Some(cores) = limits.cpu.cores {
        #[expect(clippy::cast_precision_loss, reason = "a host has few processors")]
        let most = cpus as f64;
        if !(CPU_CORES_MIN..=most).contains(&cores) {
            return Err(FieldError::new(
                "/limits/cpu/cores",
                format!("must be from {CPU_CORES_MIN} to {cpus}, not {cores}"),
            )
            .hint(format!("this host has {cpus} processors")));
        }
    }
    if let Some(weight) = limits.cpu.weight
        && !(1..=CPU_WEIGHT_MAX).contains(&weight)
    {
        return Err(FieldError::new(
            "/limits/cpu/weight",
            format!("must be from 1 to {CPU_WEIGHT_MAX}, not {weight}"),
        ));
    }
    if let Some(set) = &limits.cpu.set {
        let wanted = parse_cpu_set(set).ok_or_else(|| {
            FieldError::new(
                "/limits/cpu/set",
                "must be a list of processors such as `0-2,4`",
            )
        })?;
        if let Some(absent) = wanted.difference(&host.cpus).next() {
            return Err(FieldError::new(
                "/limits/cpu/set",
                format!("processor {absent} is not online on this host"),
            ));
        }
    }
    Ok(())
}

fn check_memory(limits: &Limits, rules: &Rules, host: &Capacity) -> Result<(), FieldError> {
    let Some(max) = limits.memory.max else {
        return Ok(());
    };
    let most = rules.memory_overhead.most_within(host.memory_bytes);
    if max < rules.memory_min_bytes {
        return Err(FieldError::new(
            "/limits/memory/max",
            format!(
                "must be at least {}, not {max}",
                in_bytes(rules.memory_min_bytes)
            ),
        ));
    }
    if max > most {
        return Err(FieldError::new(
            "/limits/memory/max",
            format!("must be at most {}, not {max}", in_bytes(most)),
        )
        .hint(format!(
            "this host has {} MiB of memory",
            host.memory_bytes / MIB
        )));
    }
    Ok(())
}

/// An amount as the field has it, and as people say it.
fn in_bytes(bytes: u64) -> String {
    format!("{bytes} bytes ({} MiB)", bytes / MIB)
}

fn check_disk(disk: &DiskLimits, rules: &Rules) -> Result<(), FieldError> {
    if let Some(size) = disk.size {
        if !rules.disk_size {
            return Err(FieldError::new(
                "/limits/disk/size",
                "the writable layer of this kind of isolation cannot be bounded",
            )
            .hint("leave it out, or use isolation `vm`"));
        }
        if !(DISK_SIZE_MIN_BYTES..=DISK_SIZE_MAX_BYTES).contains(&size) {
            return Err(FieldError::new(
                "/limits/disk/size",
                format!(
                    "must be from {} to {}, not {size}",
                    in_bytes(DISK_SIZE_MIN_BYTES),
                    in_bytes(DISK_SIZE_MAX_BYTES)
                ),
            ));
        }
    }
    for (pointer, rate) in [
        ("/limits/disk/read_bps", disk.read_bps),
        ("/limits/disk/write_bps", disk.write_bps),
        ("/limits/disk/read_iops", disk.read_iops),
        ("/limits/disk/write_iops", disk.write_iops),
    ] {
        check_rate(pointer, rate)?;
    }
    Ok(())
}

fn check_rate(pointer: &str, rate: Option<u64>) -> Result<(), FieldError> {
    match rate {
        Some(0) => {
            Err(FieldError::new(pointer, "must be at least 1, not 0")
                .hint("leave it out for no limit"))
        }
        Some(rate) if i64::try_from(rate).is_err() => Err(FieldError::new(
            pointer,
            format!("must be at most {}, not {rate}", i64::MAX),
        )),
        _ => Ok(()),
    }
}

/// The processors of a list such as `0-2,4`; `None` if it is not one.
pub fn parse_cpu_set(text: &str) -> Option<BTreeSet<u32>> {
    /// More processors than any Linux supports.
    const CPU_MAX: u32 = 8191;
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (parse_cpu(first)?, parse_cpu(last)?);
        if first > last || last > CPU_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

fn parse_cpu(text: &str) -> Option<u32> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// A block device, as the kernel counts them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BlockDevice {
    pub major: i64,
    pub minor: i64,
}

/// The limits on the cgroup of an instance, in the terms of the OCI runtime specification.
///
/// What is not limited is said to be so, since the same is used to take a limit away. To
/// `memory.max` is added `memory_overhead`; disk rates apply to `disk`, if it is given. Swap
/// is not counted as memory: an instance gets none beyond its limit.
///
/// # Errors
/// Never, short of a mistake in this function: every field has been set.
pub fn to_oci(
    limits: &Limits,
    memory_overhead: Overhead,
    disk: Option<BlockDevice>,
    host: &Capacity,
) -> Result<LinuxResources, OciSpecError> {
    let memory = limits.memory.max.map_or(UNLIMITED, |max| {
        i64::try_from(memory_overhead.with(max)).unwrap_or(i64::MAX)
    });
    let pids = limits.pids.max.map_or(UNLIMITED, i64::from);
    let resources = LinuxResourcesBuilder::default()
        .cpu(to_oci_cpu(limits, host)?)
        .memory(
            LinuxMemoryBuilder::default()
                .limit(memory)
                .swap(memory)
                .build()?,
        )
        .pids(LinuxPidsBuilder::default().limit(pids).build()?);
    let resources = match disk {
        Some(device) => resources.block_io(to_oci_disk(&limits.disk, device)?),
        None => resources,
    };
    if host.cgroup_v2 {
        let weight = ("cpu.weight".to_owned(), weight_of(limits).to_string());
        return resources.unified(HashMap::from([weight])).build();
    }
    resources.build()
}

fn weight_of(limits: &Limits) -> u32 {
    limits.cpu.weight.unwrap_or(CPU_WEIGHT_DEFAULT)
}

fn to_oci_cpu(limits: &Limits, host: &Capacity) -> Result<LinuxCpu, OciSpecError> {
    let all = || {
        host.cpus
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(",")
    };
    let cpu = LinuxCpuBuilder::default()
        .period(CPU_PERIOD_US)
        .quota(limits.cpu.cores.map_or(UNLIMITED, cpu_quota_us))
        .cpus(limits.cpu.set.clone().unwrap_or_else(all));
    // On v2 the weight goes straight to its file: as shares it would be bent by a conversion.
    if host.cgroup_v2 {
        cpu.build()
    } else {
        cpu.shares(cpu_shares(weight_of(limits))).build()
    }
}

/// The quota in each period of 100 ms, rounded down; the kernel takes no less than 1 ms.
fn cpu_quota_us(cores: f64) -> i64 {
    #[expect(clippy::cast_precision_loss, reason = "100000 is exact")]
    let quota = cores * CPU_PERIOD_US as f64;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the limit has been checked to be at most the host's processors"
    )]
    let quota = quota as i64;
    quota.max(1000)
}

/// The shares of cgroup v1 that stand for a weight: the default of the one for the default of the
/// other, and all else in proportion.
fn cpu_shares(weight: u32) -> u64 {
    (u64::from(weight) * CPU_SHARES_DEFAULT / u64::from(CPU_WEIGHT_DEFAULT)).max(CPU_SHARES_MIN)
}

fn to_oci_disk(disk: &DiskLimits, device: BlockDevice) -> Result<LinuxBlockIo, OciSpecError> {
    // A rate of zero is no limit.
    let throttle = |rate: Option<u64>| -> Result<Vec<LinuxThrottleDevice>, OciSpecError> {
        let device = LinuxThrottleDeviceBuilder::default()
            .major(device.major)
            .minor(device.minor)
            .rate(rate.unwrap_or(0));
        Ok(vec![device.build()?])
    };
    LinuxBlockIoBuilder::default()
        .throttle_read_bps_device(throttle(disk.read_bps)?)
        .throttle_write_bps_device(throttle(disk.write_bps)?)
        .throttle_read_iops_device(throttle(disk.read_iops)?)
        .throttle_write_iops_device(throttle(disk.write_iops)?)
        .build()
}

/// The virtual processors of a VM: as many as its share of time can keep busy.
pub fn vcpu_count(limits: &Limits) -> u8 {
    /// As `vmm::spec::Cpus::count`.
    const VCPUS_MAX: f64 = 32.0;
    let cores = limits.cpu.cores.unwrap_or(1.0).ceil().clamp(1.0, VCPUS_MAX);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 1 to 32"
    )]
    let count = cores as u8;
    count
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn host() -> Capacity {
        Capacity {
            cpus: [0, 1].into(),
            memory_bytes: 1 << 30,
            cgroup_v2: false,
        }
    }

    fn rules() -> Rules {
        Rules {
            memory_min_bytes: 6 * MIB,
            memory_overhead: Overhead::NONE,
            memory_default_bytes: None,
            mounts: true,
            user_namespace: true,
            disk_size: true,
            memory_snapshots: true,
            no_console: None,
            effect: |_, _, _| Ok(Effect::Live),
        }
    }

    /// As that of virtual machines, with less that is fixed.
    fn overhead() -> Overhead {
        Overhead {
            fixed_bytes: MIB,
            per_256_bytes: 1,
        }
    }

    #[test]
    fn tables_grow_with_the_memory_that_they_map() {
        const GIB: u64 = 1024 * MIB;
        for (memory, tables) in [
            (0, 0),
            (64 * MIB, MIB / 4),
            (512 * MIB, 2 * MIB),
            (16 * GIB, 64 * MIB),
            (30 * GIB, 120 * MIB),
        ] {
            let total = memory + tables + MIB;
            assert_eq!(overhead().with(memory), total);
            assert_eq!(overhead().most_within(total), memory);
            assert_eq!(Overhead::NONE.with(memory), memory);
            assert_eq!(Overhead::NONE.most_within(memory), memory);
        }
        // What is between is never too much, and wastes less than its part.
        for total in (0..4 * MIB).step_by(4099).chain([u64::MAX]) {
            let most = overhead().most_within(total);
            assert!(overhead().with(most) <= total.max(MIB), "{total}");
            assert!(overhead().with(most + 2) >= total, "{total}");
        }
        assert_eq!(overhead().with(u64::MAX), u64::MAX);
    }

    #[test]
    fn the_host_has_to_have_room_for_what_comes_with_the_memory() {
        let rules = Rules {
            memory_overhead: overhead(),
            ..rules()
        };
        let most = (1 << 30) - 5 * MIB;
        for (max, fits) in [(most, true), (most + MIB, false), (1 << 30, false)] {
            let mut limits = Limits::default();
            limits.memory.max = Some(max);
            assert_eq!(check(&limits, &rules, &host()).is_ok(), fits, "{max}");
        }
    }

    #[test]
    fn a_limit_out_of_range_is_refused_by_its_name() {
        for (value, field) in [
            (json!({"cpu": {"cores": 0.0}}), "/limits/cpu/cores"),
            (json!({"cpu": {"cores": -1.0}}), "/limits/cpu/cores"),
            (json!({"cpu": {"cores": 2.5}}), "/limits/cpu/cores"),
            (json!({"cpu": {"weight": 0}}), "/limits/cpu/weight"),
            (json!({"cpu": {"weight": 10001}}), "/limits/cpu/weight"),
            (json!({"cpu": {"set": "0-"}}), "/limits/cpu/set"),
            (json!({"cpu": {"set": ""}}), "/limits/cpu/set"),
            (json!({"cpu": {"set": "+1"}}), "/limits/cpu/set"),
            (json!({"cpu": {"set": "1,2"}}), "/limits/cpu/set"),
            (json!({"memory": {"max": 4096}}), "/limits/memory/max"),
            (
                json!({"memory": {"max": 1_u64 << 31}}),
                "/limits/memory/max",
            ),
            (json!({"pids": {"max": 0}}), "/limits/pids/max"),
            (json!({"disk": {"size": 1}}), "/limits/disk/size"),
            (json!({"disk": {"read_bps": 0}}), "/limits/disk/read_bps"),
            (
                json!({"disk": {"write_iops": u64::MAX}}),
                "/limits/disk/write_iops",
            ),
            (
                json!({"network": {"egress_bps": 0}}),
                "/limits/network/egress_bps",
            ),
        ] {
            let limits = serde_json::from_value(value).unwrap();
            let error = check(&limits, &rules(), &host()).unwrap_err();
            assert_eq!(error.field, field);
        }
    }

    #[test]
    fn not_a_number_is_no_number_of_cores() {
        let mut limits = Limits::default();
        limits.cpu.cores = Some(f64::NAN);
        assert!(check(&limits, &rules(), &host()).is_err());
    }

    #[test]
    fn limits_within_range_are_accepted() {
        let limits = serde_json::from_value(json!({
            "cpu": {"cores": 1.5, "weight": 10000, "set": "0-1"},
            "memory": {"max": 64 * MIB}, "pids": {"max": 1},
            "disk": {"read_bps": 1}, "network": {"ingress_bps": 1},
        }))
        .unwrap();
        check(&limits, &rules(), &host()).unwrap();
        check(&Limits::default(), &rules(), &host()).unwrap();
    }

    #[test]
    fn weights_are_in_proportion_on_v1_and_exact_on_v2() {
        for (weight, shares) in [
            (None, 1024),
            (Some(1), 10),
            (Some(200), 2048),
            (Some(10_000), 102_400),
        ] {
            let mut limits = Limits::default();
            limits.cpu.weight = weight;
            let value = |host: &Capacity| {
                serde_json::to_value(to_oci(&limits, Overhead::NONE, None, host).unwrap()).unwrap()
            };
            assert_eq!(value(&host())["cpu"]["shares"], shares);
            let unified = value(&Capacity {
                cgroup_v2: true,
                ..host()
            });
            let weight = weight.unwrap_or(CPU_WEIGHT_DEFAULT).to_string();
            assert_eq!(unified["unified"]["cpu.weight"], weight);
            assert_eq!(unified["cpu"]["shares"], serde_json::Value::Null);
        }
    }

    #[test]
    fn oci_resources_carry_every_limit() {
        let limits = serde_json::from_value(json!({
            "cpu": {"cores": 0.5, "set": "1"}, "memory": {"max": 64 * MIB},
            "pids": {"max": 7}, "disk": {"write_bps": 1000},
        }))
        .unwrap();
        let disk = BlockDevice {
            major: 8,
            minor: 16,
        };
        let resources = to_oci(&limits, overhead(), Some(disk), &host()).unwrap();
        let value = serde_json::to_value(resources).unwrap();
        assert_eq!(value["cpu"]["quota"], 50_000);
        assert_eq!(value["cpu"]["period"], 100_000);
        assert_eq!(value["cpu"]["cpus"], "1");
        let memory = 65 * MIB + MIB / 4;
        assert_eq!(value["memory"]["limit"], memory);
        assert_eq!(value["memory"]["swap"], memory);
        assert_eq!(value["pids"]["limit"], 7);
        let throttle = &value["blockIO"]["throttleWriteBpsDevice"][0];
        assert_eq!(
            (&throttle["major"], &throttle["rate"]),
            (&json!(8), &json!(1000))
        );
    }

    #[test]
    fn what_is_not_limited_is_said_to_be_so() {
        let disk = BlockDevice {
            major: 8,
            minor: 16,
        };
        let resources = to_oci(&Limits::default(), overhead(), Some(disk), &host()).unwrap();
        let value = serde_json::to_value(resources).unwrap();
        assert_eq!(value["cpu"]["quota"], -1);
        assert_eq!(value["cpu"]["cpus"], "0,1");
        assert_eq!(
            (&value["memory"]["limit"], &value["pids"]["limit"]),
            (&json!(-1), &json!(-1))
        );
        assert_eq!(value["blockIO"]["throttleReadIOPSDevice"][0]["rate"], 0);
    }

    #[test]
    fn a_vm_has_as_many_processors_as_its_share_can_keep_busy() {
        for (cores, count) in [(None, 1), (Some(0.2), 1), (Some(1.0), 1), (Some(1.1), 2)] {
            let mut limits = Limits::default();
            limits.cpu.cores = cores;
            assert_eq!(vcpu_count(&limits), count);
        }
    }
}
