//! Small settings of the kernel and of the agent itself.

use std::fs::{self, File};
use std::time::Duration;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::sethostname;

use super::SetUpError;
use crate::protocol::CONFIG_PATH;

/// A clock that is further ahead of the time of the launch is wrong: no boot takes this long.
const BOOT_TIME_MAX: Duration = Duration::from_secs(600);

/// A clock that is closer to the host's is left alone: a step back is worse.
const CLOCK_ERROR_MAX: Duration = Duration::from_secs(1);

/// Files that a process may open if it raises its soft limit.
const OPEN_FILES_MAX: u64 = 524_288;

const MEMORY_INFORMATION: &str = "/proc/meminfo";

/// Sysctls that make the machine one where things go as in a container: a workload that is not root
/// has ports below 1024 and can ping; and memory can be asked for beyond what there is, since it is
/// its use that the limit is about.
const SETTINGS: [(&str, &str); 3] = [
    ("/proc/sys/vm/overcommit_memory", "1"),
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
];

/// Sets the clock if it cannot be right, given that the machine was launched at `launch_ns`.
pub(super) fn set_clock(launch_ns: Option<i64>) -> Result<(), SetUpError> {
    let Some(launch_ns) = launch_ns.filter(|time| *time > 0) else {
        return Ok(());
    };
    let failed = |source| SetUpError::System {
        action: "set the clock",
        source,
    };
    let launch = Duration::from_nanos(launch_ns.unsigned_abs());
    let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).map_err(failed)?);
    if is_right(now, launch) {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(launch)).map_err(failed)
}

/// Sets the clock of a machine that did not run for a while, if it is wrong by more than a moment.
pub(super) fn adjust_clock(now_ns: Option<i64>) -> Result<(), SetUpError> {
    let Some(now_ns) = now_ns.filter(|time| *time > 0) else {
        return Ok(());
    };
    let failed = |source| SetUpError::System {
        action: "set the clock",
        source,
    };
    let host = Duration::from_nanos(now_ns.unsigned_abs());
    let ours = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).map_err(failed)?);
    if ours.abs_diff(host) <= CLOCK_ERROR_MAX {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(host)).map_err(failed)
}

fn is_right(now: Duration, launch: Duration) -> bool {
    (launch..=launch + BOOT_TIME_MAX).contains(&now)
}

pub(super) fn set_host_name(name: &str) -> Result<(), SetUpError> {
    sethostname(name).map_err(|source| SetUpError::System {
        action: "set the host name",
        source,
    })
}

/// Sets what processes inherit. The number of processes is limited by the control group, for all
/// users together.
pub(super) fn raise_limits() -> Result<(), SetUpError> {
    umask(Mode::from_bits_truncate(0o022));
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES_MAX, OPEN_FILES_MAX)
        .and_then(|()| setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY))
        .map_err(|source| SetUpError::System {
            action: "raise the limits of processes",
            source,
        })
}

pub(super) fn be_like_a_container() {
    for (path, value) in SETTINGS {
        // A kernel without the setting is no reason to run nothing.
        let _ = fs::write(path, value);
    }
}

pub(super) fn open_memory_information() -> Result<File, SetUpError> {
    File::open(MEMORY_INFORMATION).map_err(|source| SetUpError::File {
        path: MEMORY_INFORMATION.into(),
        source,
    })
}

/// Gives back the memory of the initramfs' files, which nothing can reach once the root is another.
pub(super) fn drop_initramfs() {
    for path in [CONFIG_PATH, "/hostd/modules", "/init"] {
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_dir_all("/hostd/kernel");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_right_from_the_launch_to_the_longest_boot() {
        let launch = Duration::from_secs(1_800_000_000);
        let second = Duration::from_secs(1);
        let table = [
            (Duration::ZERO, false),
            (launch - second, false),
            (launch, true),
            (launch + BOOT_TIME_MAX, true),
            (launch + BOOT_TIME_MAX + second, false),
        ];
        for (now, want) in table {
            assert_eq!(is_right(now, launch), want, "{now:?}");
        }
    }
}
