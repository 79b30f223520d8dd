//! `update`.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use container::log;
use container::spec::parse_resources;
use container::verbs::update::{Shares, update};
use serde_json::{Map, Value, json};

use super::Global;

/// Sizes are bytes, or have a suffix k, m, g or t; -1 is no limit.
#[derive(Args, Debug)]
pub(super) struct Update {
    /// File with the limits as JSON (`linux.resources`), or `-` for standard input
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    #[arg(long, value_name = "WEIGHT", help = "Weight of block I/O, 10 to 1000")]
    blkio_weight: Option<u16>,
    #[arg(long, value_name = "MICROSECONDS", help = "Period of the CPU quota")]
    cpu_period: Option<u64>,
    #[arg(
        long,
        value_name = "MICROSECONDS",
        allow_hyphen_values = true,
        help = "CPU time in a period"
    )]
    cpu_quota: Option<i64>,
    #[arg(long, value_name = "MICROSECONDS", help = "CPU time saved for bursts")]
    cpu_burst: Option<u64>,
    #[arg(
        long,
        value_name = "SHARES",
        help = "Share of the CPU time, against others"
    )]
    cpu_share: Option<u64>,
    #[arg(
        long,
        value_name = "MICROSECONDS",
        help = "Period of real-time scheduling"
    )]
    cpu_rt_period: Option<u64>,
    #[arg(
        long,
        value_name = "MICROSECONDS",
        allow_hyphen_values = true,
        help = "Real-time CPU time in a period"
    )]
    cpu_rt_runtime: Option<i64>,
    #[arg(
        long,
        value_name = "0|1",
        help = "Run only when nothing else wants the CPU"
    )]
    cpu_idle: Option<i64>,
    #[arg(long, value_name = "LIST", help = "CPUs to use, as 0-2,7")]
    cpuset_cpus: Option<String>,
    #[arg(long, value_name = "LIST", help = "Memory nodes to use")]
    cpuset_mems: Option<String>,
    #[arg(
        long,
        value_name = "SIZE",
        allow_hyphen_values = true,
        help = "Limit of memory"
    )]
    memory: Option<String>,
    #[arg(
        long,
        value_name = "SIZE",
        allow_hyphen_values = true,
        help = "Memory to keep when it is short"
    )]
    memory_reservation: Option<String>,
    #[arg(
        long,
        value_name = "SIZE",
        allow_hyphen_values = true,
        help = "Limit of memory and swap together"
    )]
    memory_swap: Option<String>,
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        help = "Limit of processes"
    )]
    pids_limit: Option<i64>,
    #[arg(
        long,
        value_name = "SIZE",
        allow_hyphen_values = true,
        hide = true,
        help = "Accepted as runc does: kernels count kernel memory with the other"
    )]
    kernel_memory: Option<String>,
    #[arg(
        long,
        value_name = "SIZE",
        allow_hyphen_values = true,
        hide = true,
        help = "Accepted as runc does, and not used"
    )]
    kernel_memory_tcp: Option<String>,
    #[arg(
        long,
        value_name = "SCHEMA",
        help = "Share of the L3 caches, as L3:0=7f0;1=1f"
    )]
    l3_cache_schema: Option<String>,
    #[arg(
        long,
        value_name = "SCHEMA",
        help = "Share of the memory bandwidth, as MB:0=20;1=70"
    )]
    mem_bw_schema: Option<String>,
    /// Name of the container
    id: String,
}

impl Update {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        if self.kernel_memory.is_some() || self.kernel_memory_tcp.is_some() {
            log::warn("limits of kernel memory are ignored: it counts with the other memory");
        }
        let resources = match &self.resources {
            Some(path) => read(path)?,
            None => self.value()?,
        };
        let resources = parse_resources(&resources)?;
        let shares = Shares {
            cache: self.l3_cache_schema,
            bandwidth: self.mem_bw_schema,
        };
        update(&global.root, &self.id, &resources, shares)?;
        Ok(0)
    }

    /// The flags that were given, in the form of the configuration.
    fn value(&self) -> Result<Value> {
        let size = |text: &Option<String>| text.as_deref().map(parse_size).transpose();
        let memory = object([
            ("limit", json!(size(&self.memory)?)),
            ("reservation", json!(size(&self.memory_reservation)?)),
            ("swap", json!(size(&self.memory_swap)?)),
        ]);
        let cpu = object([
            ("period", json!(self.cpu_period)),
            ("quota", json!(self.cpu_quota)),
            ("burst", json!(self.cpu_burst)),
            ("shares", json!(self.cpu_share)),
            ("realtimePeriod", json!(self.cpu_rt_period)),
            ("realtimeRuntime", json!(self.cpu_rt_runtime)),
            ("idle", json!(self.cpu_idle)),
            ("cpus", json!(self.cpuset_cpus)),
            ("mems", json!(self.cpuset_mems)),
        ]);
        let pids = object([("limit", json!(self.pids_limit))]);
        let block = object([("weight", json!(self.blkio_weight))]);
        Ok(object([
            ("memory", memory),
            ("cpu", cpu),
            ("pids", pids),
            ("blockIO", block),
        ]))
    }
}

/// An object of the members that are given; null if none is.
fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    let given = members.into_iter().filter(|(_, value)| !value.is_null());
    let map: Map<String, Value> = given
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    if map.is_empty() {
        Value::Null
    } else {
        Value::Object(map)
    }
}

fn read(path: &Path) -> Result<Value> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        text
    } else {
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
    };
    serde_json::from_str(&text)
        .with_context(|| format!("the limits in {} are not JSON", path.display()))
}

/// A number of bytes, with k, m, g or t, and perhaps b behind it.
fn parse_size(text: &str) -> Result<i64> {
    let wrong = || format!("`{text}` is not a size");
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches('b');
    let (number, factor) = match digits.strip_suffix(['k', 'm', 'g', 't']) {
        Some(number) => {
            let exponent = match digits.as_bytes().last() {
                Some(b'k') => 10,
                Some(b'm') => 20,
                Some(b'g') => 30,
                _ => 40,
            };
            (number, 1_i64 << exponent)
        }
        None => (digits, 1),
    };
    let number: i64 = number.parse().with_context(wrong)?;
    number.checked_mul(factor).with_context(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        for (text, size) in [
            ("1", Some(1)),
            ("-1", Some(-1)),
            ("64m", Some(64 << 20)),
            ("2GB", Some(2 << 30)),
            ("x", None),
            ("9999999999t", None),
        ] {
            assert_eq!(parse_size(text).ok(), size, "{text}");
        }
    }
}
