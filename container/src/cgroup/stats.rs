//! What a group uses, in the same units whatever the version.

use std::{fs, path::Path};

use libcgroups::stats::parse_single_value;
use serde::{Deserialize, Serialize};

use super::{Cgroup, CgroupError, Directory, hierarchy::Version};

/// v1 says "no limit" with the highest multiple of a page that a signed number holds; nothing near
/// it is a limit.
pub(super) const V1_UNLIMITED_FROM: u64 = 1 << 62;

const NANOSECONDS_PER_MICROSECOND: u64 = 1000;

/// A look at a group. What the host has no controller for is zero or `None`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Stats {
    pub cpu: CpuStats,
    pub memory: MemoryStats,
    pub pids: PidsStats,
    pub io: IoStats,
}

/// Times are in microseconds since the group was made.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct CpuStats {
    pub usage_us: u64,
    pub user_us: u64,
    pub system_us: u64,
    /// Periods of the quota so far, and those in which it was used up.
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_us: u64,
}

/// Sizes are in bytes.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct MemoryStats {
    /// With the page cache.
    pub current: u64,
    /// `None` on v2 before Linux 5.19.
    pub peak: Option<u64>,
    /// `None` is no limit.
    pub limit: Option<u64>,
    /// Swap alone; `None` if it is not accounted for.
    pub swap_current: Option<u64>,
    /// Memory of the processes themselves.
    pub anonymous: u64,
    /// The page cache, and the part of it that is reclaimed first: what remains of `current`
    /// without it is the working set.
    pub file: u64,
    pub inactive_file: u64,
    /// Processes that the kernel killed for want of memory, here or below.
    pub oom_kills: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct PidsStats {
    /// Threads count.
    pub current: u64,
    /// `None` is no limit.
    pub limit: Option<u64>,
}

/// Block I/O, over all devices, since the group was made.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct IoStats {
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub read_operations: u64,
    pub write_operations: u64,
}

impl Cgroup {
    /// # Errors
    ///
    /// If the group does not exist, or a file of it cannot be read.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        Ok(Stats {
            cpu: self.cpu_stats()?,
            memory: self.memory_stats()?,
            pids: self.pids_stats()?,
            io: self.io_stats()?,
        })
    }

    /// Processes that the kernel killed for want of memory, in the group or below it.
    ///
    /// # Errors
    ///
    /// If the group does not exist, or the file cannot be read.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        match self.directory_of("memory") {
            None => Ok(0),
            Some(directory) => match directory.version {
                Version::V1 => oom_kills_v1(&directory.path),
                Version::V2 => Ok(flat(
                    &read(&directory.path.join("memory.events"))?,
                    "oom_kill",
                )),
            },
        }
    }

    fn cpu_stats(&self) -> Result<CpuStats, CgroupError> {
        if self.legacy().next().is_none() {
            // Usage is there without the controller, throttling only with it.
            return match self.unified() {
                None => Ok(CpuStats::default()),
                Some(directory) => Ok(cpu_v2(&read(&directory.path.join("cpu.stat"))?)),
            };
        }
        let mut stats = CpuStats::default();
        if let Some(Directory { path, .. }) = self.directory_of("cpuacct") {
            let time = |file| Ok(single(&path.join(file))? / NANOSECONDS_PER_MICROSECOND);
            stats.usage_us = time("cpuacct.usage")?;
            stats.user_us = time("cpuacct.usage_user")?;
            stats.system_us = time("cpuacct.usage_sys")?;
        }
        if let Some(Directory { path, .. }) = self.directory_of("cpu") {
            let text = read(&path.join("cpu.stat"))?;
            stats.periods = flat(&text, "nr_periods");
            stats.throttled_periods = flat(&text, "nr_throttled");
            stats.throttled_us = flat(&text, "throttled_time") / NANOSECONDS_PER_MICROSECOND;
        }
        Ok(stats)
    }

    fn memory_stats(&self) -> Result<MemoryStats, CgroupError> {
        let Some(directory) = self.directory_of("memory") else {
            return Ok(MemoryStats::default());
        };
        let path = &directory.path;
        let text = read(&path.join("memory.stat"))?;
        let oom_kills = self.oom_kills()?;
        Ok(match directory.version {
            Version::V1 => {
                let current = single(&path.join("memory.usage_in_bytes"))?;
                let with_swap = single(&path.join("memory.memsw.usage_in_bytes")).ok();
                MemoryStats {
                    current,
                    peak: Some(single(&path.join("memory.max_usage_in_bytes"))?),
                    limit: limited(single(&path.join("memory.limit_in_bytes"))?),
                    swap_current: with_swap.map(|both| both.saturating_sub(current)),
                    anonymous: flat(&text, "total_rss"),
                    file: flat(&text, "total_cache"),
                    inactive_file: flat(&text, "total_inactive_file"),
                    oom_kills,
                }
            }
            Version::V2 => MemoryStats {
                current: single(&path.join("memory.current"))?,
                peak: single(&path.join("memory.peak")).ok(),
                limit: limited(single(&path.join("memory.max"))?),
                swap_current: single(&path.join("memory.swap.current")).ok(),
                anonymous: flat(&text, "anon"),
                file: flat(&text, "file"),
                inactive_file: flat(&text, "inactive_file"),
                oom_kills,
            },
        })
    }

    fn pids_stats(&self) -> Result<PidsStats, CgroupError> {
        let Some(Directory { path, .. }) = self.directory_of("pids") else {
            return Ok(PidsStats::default());
        };
        Ok(PidsStats {
            current: single(&path.join("pids.current"))?,
            limit: limited(single(&path.join("pids.max"))?),
        })
    }

    fn io_stats(&self) -> Result<IoStats, CgroupError> {
        if let Some(Directory { path, .. }) = self.directory_of("blkio") {
            let bytes = read(&path.join("blkio.throttle.io_service_bytes_recursive"))?;
            let operations = read(&path.join("blkio.throttle.io_serviced_recursive"))?;
            return Ok(IoStats {
                read_bytes: blkio_sum(&bytes, "Read"),
                write_bytes: blkio_sum(&bytes, "Write"),
                read_operations: blkio_sum(&operations, "Read"),
                write_operations: blkio_sum(&operations, "Write"),
            });
        }
        let Some(Directory { path, .. }) = self.directory_of("io") else {
            return Ok(IoStats::default());
        };
        Ok(io_v2(&read(&path.join("io.stat"))?))
    }
}

pub(super) fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

/// A file with one number, or `max`.
fn single(path: &Path) -> Result<u64, CgroupError> {
    parse_single_value(path).map_err(CgroupError::Library)
}

fn limited(value: u64) -> Option<u64> {
    (value < V1_UNLIMITED_FROM).then_some(value)
}

/// The number after `key` in lines of `key number`; 0 if there is none.
pub(super) fn flat(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| {
        let (have, value) = line.split_once(' ')?;
        (have == key).then_some(value)
    });
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

fn cpu_v2(text: &str) -> CpuStats {
    CpuStats {
        usage_us: flat(text, "usage_usec"),
        user_us: flat(text, "user_usec"),
        system_us: flat(text, "system_usec"),
        periods: flat(text, "nr_periods"),
        throttled_periods: flat(text, "nr_throttled"),
        throttled_us: flat(text, "throttled_usec"),
    }
}

/// v1 counts at the group of the process that was killed, so the groups below are asked too.
fn oom_kills_v1(directory: &Path) -> Result<u64, CgroupError> {
    let mut kills = flat(&read(&directory.join("memory.oom_control"))?, "oom_kill");
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // A group that goes away meanwhile takes its count with it.
            kills += oom_kills_v1(&entry.path()).unwrap_or(0);
        }
    }
    Ok(kills)
}

/// Sums lines of `8:0 Read 4096` for one kind of operation.
fn blkio_sum(text: &str, operation: &str) -> u64 {
    let values = text.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        (words.next()? == operation)
            .then(|| words.next())??
            .parse::<u64>()
            .ok()
    });
    values.sum()
}

/// Sums the lines of io.stat, `8:0 rbytes=4096 wbytes=0 …`; a device that did nothing may be a line
/// of nothing but its number.
fn io_v2(text: &str) -> IoStats {
    let sum = |key: &str| {
        let values = text.split_whitespace().filter_map(|word| {
            let (have, value) = word.split_once('=')?;
            (have == key).then(|| value.parse::<u64>().ok())?
        });
        values.sum()
    };
    IoStats {
        read_bytes: sum("rbytes"),
        write_bytes: sum("wbytes"),
        read_operations: sum("rios"),
        write_operations: sum("wios"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_formats_are_read() {
        let stat = "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 3\n";
        let cpu = cpu_v2(stat);
        assert_eq!(
            (cpu.usage_us, cpu.user_us, cpu.periods, cpu.throttled_us),
            (1500, 1000, 3, 0)
        );
        let blkio = "8:0 Read 4096\n8:0 Write 1\n8:16 Read 512\n8:0 Total 4097\nTotal 4609\n";
        assert_eq!(
            (blkio_sum(blkio, "Read"), blkio_sum(blkio, "Write")),
            (4608, 1)
        );
        let io = io_v2("8:0 rbytes=5 wbytes=6 rios=1 wios=2\n8:16 \n8:32 rbytes=10\n");
        assert_eq!(
            (io.read_bytes, io.write_bytes, io.write_operations),
            (15, 6, 2)
        );
        assert_eq!(limited(9_223_372_036_854_771_712), None);
        assert_eq!(limited(u64::MAX), None);
        assert_eq!(limited(4096), Some(4096));
    }
}
