//! What this host is and has.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, io};

use nix::sys::stat::{major, minor};

use crate::limits::{self, BlockDevice, Capacity};

/// Why the host could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("{path} cannot be read")]
    Read {
        path: &'static str,
        source: io::Error,
    },
    #[error("{path} is not as Linux writes it")]
    Malformed { path: &'static str },
}

const CPUS_ONLINE: &str = "/sys/devices/system/cpu/online";
const MEMORY: &str = "/proc/meminfo";
const KERNEL: &str = "/proc/sys/kernel/osrelease";

/// What the host has to give to instances.
///
/// # Errors
/// The kernel does not say.
pub fn capacity() -> Result<Capacity, HostError> {
    let cpus: BTreeSet<u32> = limits::parse_cpu_set(&read(CPUS_ONLINE)?)
        .ok_or(HostError::Malformed { path: CPUS_ONLINE })?;
    let memory_bytes = parse_memory(&read(MEMORY)?).ok_or(HostError::Malformed { path: MEMORY })?;
    Ok(Capacity {
        cpus,
        memory_bytes,
        cgroup_v2: cgroup_layout() == "v2",
    })
}

/// The whole disk that `path` is on; `None` if it is not on one, as on a network file system or in
/// memory, or on several.
pub fn disk_of(path: &Path) -> Option<BlockDevice> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (major(device), minor(device));
    let entry = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = if entry.join("partition").exists() {
        entry.parent()?.to_owned()
    } else {
        entry
    };
    let numbers = fs::read_to_string(disk.join("dev")).ok()?;
    let (major, minor) = numbers.trim().split_once(':')?;
    Some(BlockDevice {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

/// The kernel's release, as `uname -r`.
pub fn kernel() -> String {
    read(KERNEL).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// `v1`, `hybrid` or `v2`, by what is mounted at the usual place.
pub fn cgroup_layout() -> &'static str {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        "v2"
    } else if Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists() {
        "hybrid"
    } else {
        "v1"
    }
}

fn parse_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

fn read(path: &'static str) -> Result<String, HostError> {
    fs::read_to_string(path).map_err(|source| HostError::Read { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_processors_and_memory() {
        let capacity = capacity().unwrap();
        assert!(!capacity.cpus.is_empty());
        assert!(capacity.memory_bytes > limits::MIB);
    }

    #[test]
    fn memory_is_read_in_kibibytes() {
        assert_eq!(
            parse_memory("MemTotal:  16 kB\nMemFree: 1 kB\n"),
            Some(16384)
        );
        assert_eq!(parse_memory("MemFree: 1 kB\n"), None);
    }
}
