//! Memory limits: `linux.resources.memory` as values of the memory controller.

use std::path::Path;

use libcgroups::stats::parse_single_value;
use oci_spec::runtime::LinuxMemory;

use super::{
    CgroupError, Directory,
    hierarchy::Version,
    setting::{Absent, Setting},
    stats::V1_UNLIMITED_FROM,
};

/// The highest swappiness; above 100 swap is preferred to the page cache.
const SWAPPINESS_MAX: u64 = 200;

/// Swap in the sense of the kernel, next to memory and not with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Swap {
    Unset,
    Unlimited,
    Bytes(i64),
}

pub(super) fn plan(
    directory: &Directory,
    memory: &LinuxMemory,
) -> Result<Vec<Setting>, CgroupError> {
    for (field, value) in [
        ("memory.limit", memory.limit()),
        ("memory.reservation", memory.reservation()),
        ("memory.swap", memory.swap()),
        ("memory.kernel", memory.kernel()),
        ("memory.kernelTCP", memory.kernel_tcp()),
    ] {
        if let Some(value) = value.filter(|value| *value < -1) {
            let reason = "it is bytes, or -1 for no limit";
            return Err(CgroupError::invalid(field, value, reason));
        }
    }
    if let Some(value) = memory.swappiness().filter(|value| *value > SWAPPINESS_MAX) {
        let reason = "it is between 0 and 200";
        return Err(CgroupError::invalid("memory.swappiness", value, reason));
    }
    let limit = limit_beside_swap(directory, memory);
    let swap = swap(memory, limit)?;
    check_before_update(directory, memory)?;
    match directory.version {
        Version::V1 => plan_v1(&directory.path, memory, swap, limit),
        Version::V2 => plan_v2(&directory.path, memory, swap),
    }
}

/// The limit that `memory.swap` includes: the one beside it, else the one that the group has; 0 if there
/// is none.
fn limit_beside_swap(directory: &Directory, memory: &LinuxMemory) -> i64 {
    let limit = memory.limit().unwrap_or(0);
    if limit != 0 || memory.swap().is_none_or(|swap| swap <= 0) {
        return limit;
    }
    let file = match directory.version {
        Version::V1 => "memory.limit_in_bytes",
        Version::V2 => "memory.max",
    };
    let current = parse_single_value(&directory.path.join(file)).ok();
    let current = current.filter(|value| *value < V1_UNLIMITED_FROM);
    current
        .and_then(|value| i64::try_from(value).ok())
        .unwrap_or(0)
}

/// What `memory.swap` means, which is memory and swap together.
fn swap(memory: &LinuxMemory, limit: i64) -> Result<Swap, CgroupError> {
    match memory.swap().unwrap_or(0) {
        // As the other runtimes do: who takes the limit away does not expect swap to keep one.
        0 if limit == -1 => Ok(Swap::Unlimited),
        0 => Ok(Swap::Unset),
        -1 => Ok(Swap::Unlimited),
        both if limit == 0 || limit == -1 => {
            let reason = "it needs memory.limit beside it, which it includes";
            Err(CgroupError::invalid("memory.swap", both, reason))
        }
        both if both < limit => {
            let reason = "it includes memory.limit, so it cannot be lower";
            Err(CgroupError::invalid("memory.swap", both, reason))
        }
        both => Ok(Swap::Bytes(both - limit)),
    }
}

/// Refuses a limit below what is used now where the configuration asks for that check; without it
/// the kernel reclaims, and kills if it must.
fn check_before_update(directory: &Directory, memory: &LinuxMemory) -> Result<(), CgroupError> {
    let limit = memory.limit().filter(|limit| *limit > 0);
    let Some(limit) = limit.filter(|_| memory.check_before_update() == Some(true)) else {
        return Ok(());
    };
    let file = match directory.version {
        Version::V1 => "memory.usage_in_bytes",
        Version::V2 => "memory.current",
    };
    let used = parse_single_value(&directory.path.join(file)).map_err(CgroupError::Library)?;
    if i64::try_from(used).is_ok_and(|used| used <= limit) {
        return Ok(());
    }
    let reason = format!("{used} bytes are in use, and checkBeforeUpdate is set");
    Err(CgroupError::invalid("memory.limit", limit, reason))
}

fn plan_v1(
    directory: &Path,
    memory: &LinuxMemory,
    swap: Swap,
    limit_beside_swap: i64,
) -> Result<Vec<Setting>, CgroupError> {
    let mut settings = Vec::new();
    let mut set = |field, file, value| settings.push(Setting::new(field, directory, file, value));
    let limit = memory.limit().unwrap_or(0);
    if limit != 0 {
        set("memory.limit", "memory.limit_in_bytes", limit);
    }
    let both = match swap {
        Swap::Unset => 0,
        Swap::Unlimited => -1,
        Swap::Bytes(bytes) => limit_beside_swap + bytes,
    };
    if both != 0 {
        set("memory.swap", "memory.memsw.limit_in_bytes", both);
    }
    for (field, file, value) in [
        (
            "memory.reservation",
            "memory.soft_limit_in_bytes",
            memory.reservation(),
        ),
        (
            "memory.kernel",
            "memory.kmem.limit_in_bytes",
            memory.kernel(),
        ),
        (
            "memory.kernelTCP",
            "memory.kmem.tcp.limit_in_bytes",
            memory.kernel_tcp(),
        ),
    ] {
        if let Some(value) = value.filter(|value| *value != 0) {
            set(field, file, value);
        }
    }
    if let Some(value) = memory.swappiness() {
        set(
            "memory.swappiness",
            "memory.swappiness",
            i64::from_ne_bytes(value.to_ne_bytes()),
        );
    }
    if let Some(disable) = memory.disable_oom_killer() {
        set(
            "memory.disableOOMKiller",
            "memory.oom_control",
            i64::from(disable),
        );
    }
    if let Some(value) = memory.use_hierarchy() {
        set(
            "memory.useHierarchy",
            "memory.use_hierarchy",
            i64::from(value),
        );
    }
    if swap == Swap::Unlimited {
        // No accounting of swap, no limit to it.
        for setting in settings
            .iter_mut()
            .filter(|setting| setting.field == "memory.swap")
        {
            setting.absent = Absent::Satisfied;
        }
    }
    Ok(settings)
}

fn plan_v2(
    directory: &Path,
    memory: &LinuxMemory,
    swap: Swap,
) -> Result<Vec<Setting>, CgroupError> {
    let bytes = |value: Option<i64>| value.filter(|value| *value != 0).map(|it| it.to_string());
    let flag = |value: Option<bool>, have: bool| {
        value
            .filter(|value| *value != have)
            .map(|it| it.to_string())
    };
    for (field, asked) in [
        ("memory.kernel", bytes(memory.kernel())),
        ("memory.kernelTCP", bytes(memory.kernel_tcp())),
        (
            "memory.swappiness",
            memory.swappiness().map(|value| value.to_string()),
        ),
        (
            "memory.disableOOMKiller",
            flag(memory.disable_oom_killer(), false),
        ),
        ("memory.useHierarchy", flag(memory.use_hierarchy(), true)),
    ] {
        if let Some(value) = asked {
            let reason = "cgroup v2 has no such setting";
            return Err(CgroupError::invalid(field, value, reason));
        }
    }
    let mut settings = Vec::new();
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        settings.push(Setting::new(
            "memory.limit",
            directory,
            "memory.max",
            or_max(limit),
        ));
    }
    let swap = match swap {
        Swap::Unset => None,
        Swap::Unlimited => Some(("max".to_owned(), Absent::Satisfied)),
        // Where swap is not accounted for there is none to limit.
        Swap::Bytes(0) => Some(("0".to_owned(), Absent::Satisfied)),
        Swap::Bytes(bytes) => Some((bytes.to_string(), Absent::Refused)),
    };
    if let Some((value, absent)) = swap {
        let setting = Setting::new("memory.swap", directory, "memory.swap.max", value);
        settings.push(Setting { absent, ..setting });
    }
    if let Some(value) = memory.reservation().filter(|value| *value != 0) {
        let setting = Setting::new("memory.reservation", directory, "memory.low", or_max(value));
        settings.push(setting);
    }
    Ok(settings)
}

fn or_max(value: i64) -> String {
    if value == -1 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxMemoryBuilder;

    use super::*;

    fn text(version: Version, memory: &LinuxMemory) -> String {
        let directory = Directory::for_test(version, "memory", Path::new("/x"));
        match plan(&directory, memory) {
            Err(error) => format!("error: {error}"),
            Ok(settings) => {
                let lines = settings.iter().map(|setting| {
                    let file = setting.file.file_name().unwrap().to_str().unwrap();
                    format!("{file}={}", setting.value)
                });
                lines.collect::<Vec<_>>().join(" ")
            }
        }
    }

    #[test]
    fn memory_and_swap_mean_the_same_in_both_versions() {
        // limit, swap, v1, v2
        let table: &[(i64, i64, &str, &str)] = &[
            (0, 0, "", ""),
            (100, 0, "memory.limit_in_bytes=100", "memory.max=100"),
            (
                100,
                300,
                "memory.limit_in_bytes=100 memory.memsw.limit_in_bytes=300",
                "memory.max=100 memory.swap.max=200",
            ),
            (
                100,
                100,
                "memory.limit_in_bytes=100 memory.memsw.limit_in_bytes=100",
                "memory.max=100 memory.swap.max=0",
            ),
            (
                100,
                -1,
                "memory.limit_in_bytes=100 memory.memsw.limit_in_bytes=-1",
                "memory.max=100 memory.swap.max=max",
            ),
            (
                -1,
                0,
                "memory.limit_in_bytes=-1 memory.memsw.limit_in_bytes=-1",
                "memory.max=max memory.swap.max=max",
            ),
        ];
        for (limit, swap, v1, v2) in table {
            let memory = LinuxMemoryBuilder::default()
                .limit(*limit)
                .swap(*swap)
                .build()
                .unwrap();
            assert_eq!(text(Version::V1, &memory), *v1, "{limit} {swap}");
            assert_eq!(text(Version::V2, &memory), *v2, "{limit} {swap}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_the_name_of_the_field() {
        let new = LinuxMemoryBuilder::default;
        let table = [
            (new().limit(-2), "memory.limit"),
            (new().limit(100).swap(99), "memory.swap"),
            (new().swap(99), "memory.swap"),
            (new().limit(-1).swap(99), "memory.swap"),
            (new().swappiness(201u64), "memory.swappiness"),
        ];
        for (memory, field) in table {
            let memory = memory.build().unwrap();
            for version in [Version::V1, Version::V2] {
                let text = text(version, &memory);
                assert!(
                    text.starts_with(&format!("error: linux.resources.{field}")),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn what_only_v1_has_is_refused_on_v2() {
        let new = LinuxMemoryBuilder::default;
        for (memory, field) in [
            (new().disable_oom_killer(true), "memory.disableOOMKiller"),
            (new().swappiness(10u64), "memory.swappiness"),
            (new().kernel(5), "memory.kernel "),
        ] {
            let memory = memory.build().unwrap();
            let text = text(Version::V2, &memory);
            assert!(
                text.starts_with(&format!("error: linux.resources.{field}")),
                "{text}"
            );
            plan(
                &Directory::for_test(Version::V1, "memory", Path::new("/x")),
                &memory,
            )
            .unwrap();
        }
        let harmless = new()
            .disable_oom_killer(false)
            .use_hierarchy(true)
            .build()
            .unwrap();
        assert_eq!(text(Version::V2, &harmless), "");
    }
}
