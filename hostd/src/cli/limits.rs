//! The flags that limit an instance, the same for `run`, `create` and `update`.

use std::str::FromStr;

use clap::Args;
use serde_json::{Map, Value, json};

use super::units::parse_size;
use crate::api::types::{CpuLimits, DiskLimits, Limits, MemoryLimits, NetworkLimits, PidsLimits};

/// A value, or `none` to have no limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Limit<T> {
    None,
    Of(T),
}

impl<T> Limit<T> {
    fn parse(text: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Self, String> {
        if text == "none" {
            Ok(Limit::None)
        } else {
            parse(text).map(Limit::Of)
        }
    }
}

fn size(text: &str) -> Result<Limit<u64>, String> {
    Limit::parse(text, parse_size)
}

fn number<T: FromStr<Err: ToString>>(text: &str) -> Result<Limit<T>, String> {
    Limit::parse(text, |text| {
        text.parse().map_err(|error: T::Err| error.to_string())
    })
}

fn list(text: &str) -> Result<Limit<String>, String> {
    Limit::parse(text, |text| Ok(text.to_owned()))
}

/// Limits. Sizes and rates take K, M, G and T (powers of 1024); `none` takes a limit away.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitFlags {
    /// Processors' worth of time, e.g. 0.5
    #[arg(long, value_name = "CORES", value_parser = number::<f64>)]
    cpus: Option<Limit<f64>>,
    /// Share of processor time under contention, 1 to 10000
    #[arg(long, value_name = "WEIGHT", value_parser = number::<u32>)]
    cpu_weight: Option<Limit<u32>>,
    /// Processors that may be used, e.g. 0-2,4
    #[arg(long, value_name = "LIST", value_parser = list)]
    cpu_set: Option<Limit<String>>,
    /// Memory, e.g. 256M
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    memory: Option<Limit<u64>>,
    /// Processes and threads
    #[arg(long, value_name = "COUNT", value_parser = number::<u32>)]
    pids: Option<Limit<u32>>,
    /// Size of the writable layer or disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk_size: Option<Limit<u64>>,
    /// Bytes read from disk per second, e.g. 10M
    #[arg(long, value_name = "RATE", value_parser = size)]
    disk_read_bps: Option<Limit<u64>>,
    /// Bytes written to disk per second
    #[arg(long, value_name = "RATE", value_parser = size)]
    disk_write_bps: Option<Limit<u64>>,
    /// Disk reads per second
    #[arg(long, value_name = "RATE", value_parser = number::<u64>)]
    disk_read_iops: Option<Limit<u64>>,
    /// Disk writes per second
    #[arg(long, value_name = "RATE", value_parser = number::<u64>)]
    disk_write_iops: Option<Limit<u64>>,
    /// Bytes from the network per second
    #[arg(long, value_name = "RATE", value_parser = size)]
    net_ingress: Option<Limit<u64>>,
    /// Bytes to the network per second
    #[arg(long, value_name = "RATE", value_parser = size)]
    net_egress: Option<Limit<u64>>,
}

impl LimitFlags {
    /// The limits of a new instance, where no limit and `none` are the same.
    pub(super) fn to_limits(&self) -> Limits {
        fn value<T: Clone>(flag: Option<&Limit<T>>) -> Option<T> {
            match flag {
                Some(Limit::Of(value)) => Some(value.clone()),
                Some(Limit::None) | None => None,
            }
        }
        Limits {
            cpu: CpuLimits {
                cores: value(self.cpus.as_ref()),
                weight: value(self.cpu_weight.as_ref()),
                set: value(self.cpu_set.as_ref()),
            },
            memory: MemoryLimits {
                max: value(self.memory.as_ref()),
            },
            pids: PidsLimits {
                max: value(self.pids.as_ref()),
            },
            disk: DiskLimits {
                size: value(self.disk_size.as_ref()),
                read_bps: value(self.disk_read_bps.as_ref()),
                write_bps: value(self.disk_write_bps.as_ref()),
                read_iops: value(self.disk_read_iops.as_ref()),
                write_iops: value(self.disk_write_iops.as_ref()),
            },
            network: NetworkLimits {
                ingress_bps: value(self.net_ingress.as_ref()),
                egress_bps: value(self.net_egress.as_ref()),
            },
        }
    }

    /// A merge patch (RFC 7396) with what was given; `none` becomes null. `None` if nothing was.
    pub(super) fn to_patch(&self) -> Option<Value> {
        let mut patch = Map::new();
        let mut set = |group: &str, key: &str, value: Option<Value>| {
            if let Some(value) = value {
                let group = patch.entry(group).or_insert_with(|| json!({}));
                group[key] = value;
            }
        };
        fn value<T: Into<Value> + Clone>(flag: Option<&Limit<T>>) -> Option<Value> {
            flag.map(|flag| match flag {
                Limit::Of(value) => value.clone().into(),
                Limit::None => Value::Null,
            })
        }
        set("cpu", "cores", value(self.cpus.as_ref()));
        set("cpu", "weight", value(self.cpu_weight.as_ref()));
        set("cpu", "set", value(self.cpu_set.as_ref()));
        set("memory", "max", value(self.memory.as_ref()));
        set("pids", "max", value(self.pids.as_ref()));
        set("disk", "size", value(self.disk_size.as_ref()));
        set("disk", "read_bps", value(self.disk_read_bps.as_ref()));
        set("disk", "write_bps", value(self.disk_write_bps.as_ref()));
        set("disk", "read_iops", value(self.disk_read_iops.as_ref()));
        set("disk", "write_iops", value(self.disk_write_iops.as_ref()));
        set("network", "ingress_bps", value(self.net_ingress.as_ref()));
        set("network", "egress_bps", value(self.net_egress.as_ref()));
        (!patch.is_empty()).then_some(Value::Object(patch))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        limits: LimitFlags,
    }

    fn flags(line: &str) -> LimitFlags {
        Line::try_parse_from(line.split(' ')).unwrap().limits
    }

    #[test]
    fn only_what_was_given_is_in_the_patch_and_none_is_null() {
        let flags = flags("x --cpus 0.3 --memory none --net-egress 1M --disk-read-iops 5");
        assert_eq!(
            flags.to_patch().unwrap(),
            json!({
                "cpu": {"cores": 0.3},
                "memory": {"max": null},
                "network": {"egress_bps": 1 << 20},
                "disk": {"read_iops": 5},
            })
        );
        assert_eq!(LimitFlags::default().to_patch(), None);
    }

    #[test]
    fn every_flag_lands_in_its_own_limit() {
        let flags = flags(
            "x --cpus 1.5 --cpu-weight 2 --cpu-set 0-3 -m 4k --pids 5 --disk-size 6k \
             --disk-read-bps 7k --disk-write-bps 8k --disk-read-iops 9 --disk-write-iops 10 \
             --net-ingress 11k --net-egress 12k",
        );
        let limits = serde_json::to_value(flags.to_limits()).unwrap();
        assert_eq!(
            limits,
            json!({
                "cpu": {"cores": 1.5, "weight": 2, "set": "0-3"},
                "memory": {"max": 4096},
                "pids": {"max": 5},
                "disk": {
                    "size": 6 << 10, "read_bps": 7 << 10, "write_bps": 8 << 10,
                    "read_iops": 9, "write_iops": 10,
                },
                "network": {"ingress_bps": 11 << 10, "egress_bps": 12 << 10},
            })
        );
        assert_eq!(limits, flags.to_patch().unwrap());
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        let error = Line::try_parse_from(["x", "--memory", "lots"])
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("`lots` is not a size such as"), "{error}");
    }
}
