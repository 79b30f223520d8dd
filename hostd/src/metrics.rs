//! The stats of the instances as Prometheus text (exposition format 0.0.4).

mod machines;

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
        "disk_read_operations_total",
        "counter",
        "Operations that read from disk",
        |stats| stats.disk_read_ops,
    ),
    (
        "disk_write_operations_total",
        "counter",
        "Operations that wrote to disk",
        |stats| stats.disk_write_ops,
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
    (
        "network_ingress_packets_total",
        "counter",
        "Packets towards the instance",
        |stats| stats.network_ingress_packets,
    ),
    (
        "network_egress_packets_total",
        "counter",
        "Packets from the instance",
        |stats| stats.network_egress_packets,
    ),
    (
        "network_ingress_dropped_total",
        "counter",
        "Packets towards the instance that were dropped",
        |stats| stats.network_ingress_dropped,
    ),
    (
        "network_egress_dropped_total",
        "counter",
        "Packets from the instance that were dropped",
        |stats| stats.network_egress_dropped,
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
    let told = || {
        let told = asked.iter();
        told.filter_map(|(name, stats)| Some((name, stats.as_ref()?)))
    };
    for (metric, kind, help, read) in METRICS {
        head(&mut text, metric, kind, help);
        for (name, stats) in told() {
            sample(&mut text, metric, name, "", read(stats));
        }
    }
    for (metric, kind, help, read) in machines::METRICS {
        head(&mut text, metric, kind, help);
        for (name, stats) in told() {
            for (labels, value) in stats.vm.as_ref().map(read).unwrap_or_default() {
                sample(&mut text, metric, name, &labels, value);
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

/// `labels` are those beside the instance's name, each with a comma before it.
fn sample(text: &mut String, metric: &str, name: &str, labels: &str, value: u64) {
    line(
        text,
        &format!("hostd_instance_{metric}{{name=\"{name}\"{labels}}} {value}"),
    );
}

fn head(text: &mut String, metric: &str, kind: &str, help: &str) {
    line(text, &format!("# HELP hostd_instance_{metric} {help}."));
    line(text, &format!("# TYPE hostd_instance_{metric} {kind}"));
}

fn line(text: &mut String, line: &str) {
    writeln!(text, "{line}").expect("a string takes everything");
}
