//! The stats of the instances as Prometheus text (exposition format 0.0.4).

use std::fmt::Write;

use futures::stream::{self, StreamExt};

use crate::api::types::{Instance, Stats};
use crate::instance::Instances;
use crate::lifecycle;

/// Instances asked for their stats at a time.
const ASKED_AT_A_TIME: usize = 16;

/// A metric's name, its type, what it says, and where it is in the stats.
type Metric = (&'static str, &'static str, &'static str, fn(&Stats) -> u64);

const METRICS: &[Metric] = &[
    (
        "cpu_usage_microseconds_total",
        "counter",
        "Processor time used",
        |stats| stats.cpu_usage_us,
    ),
    (
        "cpu_throttled_microseconds_total",
        "counter",
        "Time held back by cpu.cores",
        |stats| stats.cpu_throttled_us,
    ),
    ("memory_bytes", "gauge", "Memory used", |stats| {
        stats.memory_bytes
    }),
    ("memory_peak_bytes", "gauge", "Most memory used", |stats| {
        stats.memory_peak_bytes
    }),
    (
        "oom_kills_total",
        "counter",
        "Processes killed for want of memory",
        |stats| stats.oom_kills,
    ),
    ("pids", "gauge", "Processes and threads", |stats| stats.pids),
    (
        "disk_read_bytes_total",
        "counter",
        "Bytes read from disk",
        |stats| stats.disk_read_bytes,
    ),
    (
        "disk_write_bytes_total",
        "counter",
        "Bytes written to disk",
        |stats| stats.disk_write_bytes,
    ),
    (
        "network_ingress_bytes_total",
        "counter",
        "Bytes towards the instance",
        |stats| stats.network_ingress_bytes,
    ),
    (
        "network_egress_bytes_total",
        "counter",
        "Bytes from the instance",
        |stats| stats.network_egress_bytes,
    ),
];

/// The metrics of all instances; one that cannot be asked has none.
pub async fn render(instances: &Instances) -> String {
    let all = instances.list();
    let asked: Vec<(String, Option<Stats>)> = stream::iter(
        all.iter()
            .filter(|instance| lifecycle::is_live(instance.state))
            .map(|instance| instance.name.clone())
            .collect::<Vec<_>>(),
    )
    .map(async |name| {
        let stats = instances.stats(&name).await.ok();
        (name, stats)
    })
    .buffered(ASKED_AT_A_TIME)
    .collect()
    .await;
    let mut text = states(&all);
    for (metric, kind, help, read) in METRICS {
        head(&mut text, metric, kind, help);
        for (name, stats) in &asked {
            if let Some(stats) = stats {
                line(
                    &mut text,
                    &format!("hostd_instance_{metric}{{name=\"{name}\"}} {}", read(stats)),
                );
            }
        }
    }
    text
}

fn states(all: &[Instance]) -> String {
    let mut text = String::new();
    head(
        &mut text,
        "info",
        "gauge",
        "1 for each instance, with its isolation and state",
    );
    for instance in all {
        let isolation = serde_json::to_value(instance.spec.isolation).unwrap_or_default();
        line(
            &mut text,
            &format!(
                "hostd_instance_info{{name=\"{}\",isolation={isolation},state=\"{}\"}} 1",
                instance.name,
                lifecycle::name(instance.state)
            ),
        );
    }
    text
}

fn head(text: &mut String, metric: &str, kind: &str, help: &str) {
    line(text, &format!("# HELP hostd_instance_{metric} {help}."));
    line(text, &format!("# TYPE hostd_instance_{metric} {kind}"));
}

fn line(text: &mut String, line: &str) {
    writeln!(text, "{line}").expect("a string takes everything");
}
