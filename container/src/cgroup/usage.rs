//! What a group uses, in full and in the form of `runc events`, which tools read. For the few
//! figures that hostd itself reads see `stats`.
//!
//! A figure that the host has no controller or no file for is left out, or 0 where the form has
//! always had a number.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use libcgroups::stats::supported_page_sizes;
use serde_json::{Map, Value, json};

use super::stats::{flat, read};
use super::{Cgroup, CgroupError, Directory, hierarchy::Version};

/// The lists of block I/O, each by its name in the form and by the file of v1 that it comes from.
const BLOCK_FILES_V1: [(&str, &str); 8] = [
    (
        "ioServiceBytesRecursive",
        "blkio.throttle.io_service_bytes_recursive",
    ),
    (
        "ioServicedRecursive",
        "blkio.throttle.io_serviced_recursive",
    ),
    ("ioQueueRecursive", "blkio.bfq.io_queued_recursive"),
    (
        "ioServiceTimeRecursive",
        "blkio.bfq.io_service_time_recursive",
    ),
    ("ioWaitTimeRecursive", "blkio.bfq.io_wait_time_recursive"),
    ("ioMergedRecursive", "blkio.bfq.io_merged_recursive"),
    ("ioTimeRecursive", "blkio.bfq.time_recursive"),
    ("sectorsRecursive", "blkio.bfq.sectors_recursive"),
];

/// The lists of block I/O, each by its name in the form and with the keys of io.stat (v2) that are
/// its reads and writes.
const BLOCK_KEYS_V2: [(&str, [(&str, &str); 3]); 2] = [
    (
        "ioServiceBytesRecursive",
        [
            ("rbytes", "Read"),
            ("wbytes", "Write"),
            ("dbytes", "Discard"),
        ],
    ),
    (
        "ioServicedRecursive",
        [("rios", "Read"), ("wios", "Write"), ("dios", "Discard")],
    ),
];

impl Cgroup {
    /// The `data` of a `stats` event of runc.
    ///
    /// # Errors
    /// If the group does not exist, or a file of it cannot be read.
    pub fn usage(&self) -> Result<Value, CgroupError> {
        Ok(json!({
            "cpu": self.cpu_usage()?,
            "cpuset": self.directory_of("cpuset").map_or_else(|| json!({}), set_usage),
            "memory": self.memory_usage()?,
            "pids": self.pids_usage()?,
            "blkio": self.block_usage(),
            "hugetlb": self.directory_of("hugetlb").map_or_else(|| json!({}), huge_page_usage),
            "intel_rdt": {},
            "network_interfaces": null,
        }))
    }

    /// Times are in nanoseconds.
    fn cpu_usage(&self) -> Result<Value, CgroupError> {
        const NANOSECONDS_PER_MICROSECOND: u64 = 1000;
        let stats = self.stats()?.cpu;
        let nanoseconds = |microseconds: u64| microseconds * NANOSECONDS_PER_MICROSECOND;
        let accounting = self.directory_of("cpuacct");
        let per_processor = accounting
            .filter(|directory| directory.version == Version::V1)
            .map(|directory| numbers(&directory.path.join("cpuacct.usage_percpu")))
            .unwrap_or_default();
        Ok(json!({
            "usage": {
                "total": nanoseconds(stats.usage_us),
                "percpu": per_processor,
                "kernel": nanoseconds(stats.system_us),
                "user": nanoseconds(stats.user_us),
            },
            "throttling": {
                "periods": stats.periods,
                "throttledPeriods": stats.throttled_periods,
                "throttledTime": nanoseconds(stats.throttled_us),
            },
        }))
    }

    fn memory_usage(&self) -> Result<Value, CgroupError> {
        let Some(directory) = self.directory_of("memory") else {
            return Ok(json!({}));
        };
        let path = &directory.path;
        let text = read(&path.join("memory.stat"))?;
        let raw = text.lines().filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        });
        let raw: BTreeMap<String, u64> = raw.collect();
        Ok(match directory.version {
            Version::V1 => json!({
                "cache": flat(&text, "total_cache"),
                "usage": entry_v1(path, "memory"),
                "swap": entry_v1(path, "memory.memsw"),
                "kernel": entry_v1(path, "memory.kmem"),
                "kernelTCP": entry_v1(path, "memory.kmem.tcp"),
                "raw": raw,
            }),
            Version::V2 => {
                let usage = entry_v2(path, "memory");
                let swap = entry_v2(path, "memory.swap");
                // The form has always meant memory and swap together.
                let sum = |key: &str| {
                    let value = |entry: &Value| entry[key].as_u64().unwrap_or(0);
                    value(&usage).saturating_add(value(&swap))
                };
                let both = json!({"limit": sum("limit"), "usage": sum("usage"), "failcnt": 0});
                json!({
                    "cache": flat(&text, "file"),
                    "usage": usage,
                    "swap": both,
                    "kernel": {"limit": 0, "failcnt": 0},
                    "kernelTCP": {"limit": 0, "failcnt": 0},
                    "raw": raw,
                })
            }
        })
    }

    fn pids_usage(&self) -> Result<Value, CgroupError> {
        let stats = self.stats()?.pids;
        Ok(json!({"current": stats.current, "limit": stats.limit.unwrap_or(0)}))
    }

    fn block_usage(&self) -> Value {
        let mut lists = Map::new();
        if let Some(directory) = self.directory_of("blkio") {
            for (name, file) in BLOCK_FILES_V1 {
                let entries = block_v1(&text(&directory.path.join(file)));
                if !entries.is_empty() {
                    lists.insert(name.to_owned(), entries.into());
                }
            }
        } else if let Some(directory) = self.directory_of("io") {
            let text = text(&directory.path.join("io.stat"));
            for (name, keys) in BLOCK_KEYS_V2 {
                let entries = block_v2(&text, &keys);
                if !entries.is_empty() {
                    lists.insert(name.to_owned(), entries.into());
                }
            }
        }
        lists.into()
    }
}

/// A file that need not be there.
fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A file with one number, or `max`; 0 if it is not there.
fn number(path: &Path) -> u64 {
    match text(path).trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// A file with numbers in one line.
fn numbers(path: &Path) -> Vec<u64> {
    let text = text(path);
    text.split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect()
}

fn entry_v1(path: &Path, prefix: &str) -> Value {
    let file = |name: &str| number(&path.join(format!("{prefix}.{name}")));
    json!({
        "limit": file("limit_in_bytes"),
        "usage": file("usage_in_bytes"),
        "max": file("max_usage_in_bytes"),
        "failcnt": file("failcnt"),
    })
}

fn entry_v2(path: &Path, prefix: &str) -> Value {
    let file = |name: &str| number(&path.join(format!("{prefix}.{name}")));
    json!({
        "limit": file("max"),
        "usage": file("current"),
        "max": file("peak"),
        "failcnt": 0,
    })
}

fn set_usage(directory: &Directory) -> Value {
    let list = |name: &str| members(&text(&directory.path.join(format!("cpuset.{name}"))));
    let file = |name: &str| number(&directory.path.join(format!("cpuset.{name}")));
    json!({
        "cpus": list("cpus"),
        "mems": list("mems"),
        "cpu_exclusive": file("cpu_exclusive"),
        "mem_hardwall": file("mem_hardwall"),
        "mem_exclusive": file("mem_exclusive"),
        "memory_migrate": file("memory_migrate"),
        "memory_spread_page": file("memory_spread_page"),
        "memory_spread_slab": file("memory_spread_slab"),
        "memory_pressure": file("memory_pressure"),
        "sched_load_balance": file("sched_load_balance"),
        "sched_relax_domain_level": file("sched_relax_domain_level"),
    })
}

/// The members of a list as `0-2,7`.
fn members(list: &str) -> Vec<u16> {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

fn huge_page_usage(directory: &Directory) -> Value {
    let sizes = supported_page_sizes().unwrap_or_default();
    let usage = sizes.into_iter().map(|size| {
        let file = |name: &str| number(&directory.path.join(format!("hugetlb.{size}.{name}")));
        let usage = match directory.version {
            Version::V1 => json!({
                "usage": file("usage_in_bytes"),
                "max": file("max_usage_in_bytes"),
                "failcnt": file("failcnt"),
            }),
            Version::V2 => json!({"usage": file("current"), "failcnt": 0}),
        };
        (size, usage)
    });
    usage.collect::<Map<_, _>>().into()
}

/// Lines as `8:0 Read 4096`, and without the operation where there is but one kind.
fn block_v1(text: &str) -> Vec<Value> {
    let entry = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let (device, operation, value) = match words.as_slice() {
            [device, value] => (device, "", value),
            [device, operation, value] => (device, *operation, value),
            _ => return None,
        };
        let (major, minor) = device.split_once(':')?;
        Some(block_entry(major, minor, operation, value))
    };
    text.lines().filter_map(entry).collect()
}

/// Lines as `8:0 rbytes=4096 wbytes=0`.
fn block_v2(text: &str, keys: &[(&str, &str)]) -> Vec<Value> {
    let entries = |line: &str| -> Option<Vec<Value>> {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let entry = |word: &str| {
            let (key, value) = word.split_once('=')?;
            let (_, operation) = keys.iter().find(|(known, _)| *known == key)?;
            Some(block_entry(major, minor, operation, value))
        };
        Some(rest.split(' ').filter_map(entry).collect())
    };
    text.lines().filter_map(entries).flatten().collect()
}

fn block_entry(major: &str, minor: &str, operation: &str, value: &str) -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "major": number(major),
        "minor": number(minor),
        "op": operation,
        "value": number(value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_both_versions_become_the_same_entries() {
        let read = json!([{"major": 8, "minor": 16, "op": "Read", "value": 4096}]);
        assert_eq!(Value::from(block_v1("8:16 Read 4096\nTotal 4096\n")), read);
        let keys = BLOCK_KEYS_V2[0].1;
        assert_eq!(
            Value::from(block_v2("8:16 rbytes=4096 rios=1\n8:0 \n", &keys)),
            read
        );
        assert_eq!(block_v1("8:0 77\n")[0]["op"], "");
    }

    #[test]
    fn a_list_of_ranges_is_counted_out() {
        assert_eq!(members("0-2,7\n"), [0, 1, 2, 7]);
        assert_eq!(members("\n"), [0; 0]);
    }
}
