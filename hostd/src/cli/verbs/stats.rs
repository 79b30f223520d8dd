//! `hostctl stats`: what instances use, of what they may.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use console::Term;
use serde::Serialize;
use tokio::time::sleep;

use crate::api::types;
use crate::api::types::Stats;
use crate::cli::client::instance;
use crate::cli::error::CliError;
use crate::cli::output::Table;
use crate::cli::{Context, output, units};

/// The time that a rate is measured over, and between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Show what instances use, of what they may
#[derive(Args, Debug)]
#[command(
    after_help = "STEAL is how long a VM's processors waited for the host's, EXITS/S how often they needed \
                        their VMM. --json has all counters, also those of a VM's devices.\n\n\
                        Examples:\n  hostctl stats\n  hostctl stats --no-stream --json web"
)]
pub(in crate::cli) struct Arguments {
    /// Look once
    #[arg(long)]
    no_stream: bool,
    /// The instances; all that run if absent
    names: Vec<String>,
}

/// One line of `--json`.
#[derive(Clone, Debug, Serialize)]
struct Named {
    name: String,
    #[serde(flatten)]
    stats: Stats,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    if context.json {
        return json(context, &arguments).await;
    }
    let mut before = look(context, &arguments.names).await?;
    let mut at = Instant::now();
    let live = !arguments.no_stream && output::is_watched();
    loop {
        sleep(INTERVAL).await;
        let now = look(context, &arguments.names).await?;
        let elapsed = at.elapsed();
        at = Instant::now();
        let text = table(&before, &now, elapsed).render();
        if live {
            // On top of the last one, as `top` does.
            Term::stdout().clear_screen().map_err(CliError::Output)?;
        }
        output::line(&text)?;
        if arguments.no_stream {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

/// A list with `--no-stream`; otherwise a line for each instance and look.
async fn json(context: &Context, arguments: &Arguments) -> Result<ExitCode, CliError> {
    loop {
        let all = look(context, &arguments.names).await?;
        if arguments.no_stream {
            output::json(&all)?;
            return Ok(ExitCode::SUCCESS);
        }
        for named in &all {
            output::json_line(named)?;
        }
        sleep(INTERVAL).await;
    }
}

async fn look(context: &Context, names: &[String]) -> Result<Vec<Named>, CliError> {
    let names = if names.is_empty() {
        let path = "/v1/instances?state=running,paused";
        let running: Vec<types::Instance> = context.client.get(path).await?;
        running.into_iter().map(|instance| instance.name).collect()
    } else {
        names.to_vec()
    };
    let mut all = Vec::new();
    for name in names {
        let stats = context
            .client
            .get(&format!("{}/stats", instance(&name)))
            .await?;
        all.push(Named { name, stats });
    }
    Ok(all)
}

/// Columns of what only VMs have.
const STEAL: usize = 2;
const EXITS: usize = 3;

fn table(before: &[Named], now: &[Named], elapsed: Duration) -> Table {
    let headings = [
        "NAME",
        "CPU",
        "STEAL",
        "EXITS/S",
        "MEMORY",
        "PIDS",
        "NET IN / OUT",
        "DISK READ / WRITE",
    ];
    let mut table = Table::new(headings);
    let earlier: BTreeMap<&str, &Stats> = before
        .iter()
        .map(|named| (named.name.as_str(), &named.stats))
        .collect();
    for Named { name, stats } in now {
        let earlier = earlier.get(name.as_str()).copied();
        // What has come since; nothing is said of what was not there before.
        let since = |read: fn(&Stats) -> Option<u64>| {
            Some(read(stats)?.saturating_sub(earlier.and_then(read)?))
        };
        let share = |used: Option<u64>| used.map(|used| percent(used, elapsed)).unwrap_or_default();
        let pair = |one, other| format!("{} / {}", units::size(one), units::size(other));
        let of = |used: String, limit: Option<String>| match limit {
            Some(limit) => format!("{used} / {limit}"),
            None => used,
        };
        table.row([
            name.clone(),
            share(since(|stats| Some(stats.cpu_usage_us))),
            share(since(steal_us)),
            since(exits)
                .map(|exits| per_second(exits, elapsed))
                .unwrap_or_default(),
            of(
                units::size(stats.memory_bytes),
                stats.memory_limit_bytes.map(units::size),
            ),
            of(
                stats.pids.to_string(),
                stats.pids_limit.map(|limit| limit.to_string()),
            ),
            pair(stats.network_ingress_bytes, stats.network_egress_bytes),
            pair(stats.disk_read_bytes, stats.disk_write_bytes),
        ]);
    }
    // From the right, so that the other keeps its number.
    table.hide_if_empty(EXITS);
    table.hide_if_empty(STEAL);
    table
}

/// How long the virtual processors waited for the host's, if it is known.
fn steal_us(stats: &Stats) -> Option<u64> {
    let vcpus = &stats.vm.as_ref()?.vcpus;
    let mut times = vcpus.iter().map(|vcpu| vcpu.steal_us);
    times.try_fold(0_u64, |sum, time| Some(sum.saturating_add(time?)))
}

/// How often the virtual processors needed their VMM.
fn exits(stats: &Stats) -> Option<u64> {
    let vcpus = stats.vm.as_ref()?.vcpus.iter();
    Some(vcpus.fold(0, |sum, vcpu| sum.saturating_add(vcpu.exits.total)))
}

fn per_second(count: u64, elapsed: Duration) -> String {
    let elapsed_us = elapsed.as_micros().max(1);
    ((u128::from(count) * 1_000_000 + elapsed_us / 2) / elapsed_us).to_string()
}

/// Processor time over time, as a share of one processor, with one decimal.
fn percent(used_us: u64, elapsed: Duration) -> String {
    let elapsed_us = elapsed.as_micros().max(1);
    let tenths = (u128::from(used_us) * 1000 + elapsed_us / 2) / elapsed_us;
    format!("{}.{}%", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{VcpuExits, VcpuStats, VmStats};

    fn named(name: &str, cpu_usage_us: u64) -> Named {
        let stats = Stats {
            cpu_usage_us,
            memory_bytes: 10 << 20,
            memory_limit_bytes: Some(64 << 20),
            pids: 3,
            network_ingress_bytes: 1024,
            ..Stats::default()
        };
        Named {
            name: name.into(),
            stats,
        }
    }

    #[test]
    fn processor_time_is_a_share_of_one_processor() {
        let table = [
            (0, "0.0%"),
            (500_000, "50.0%"),
            (1_499_600, "150.0%"),
            (333_333, "33.3%"),
        ];
        for (used, expected) in table {
            assert_eq!(percent(used, Duration::from_secs(1)), expected);
        }
    }

    #[test]
    fn a_machine_has_columns_of_its_own_if_there_is_one() {
        let machine = |steal_us, total| {
            let vcpu = VcpuStats {
                steal_us,
                exits: VcpuExits {
                    total,
                    ..VcpuExits::default()
                },
                ..VcpuStats::default()
            };
            let mut named = named("box", 0);
            named.stats.vm = Some(VmStats {
                vcpus: vec![vcpu; 2],
                ..VmStats::default()
            });
            named
        };
        let lines = |before: &[Named], now: &[Named]| {
            let text = table(before, now, Duration::from_secs(2)).render();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let before = [named("web", 0), machine(Some(0), 1000)];
        let now = [named("web", 0), machine(Some(500_000), 1300)];
        let both = lines(&before, &now);
        assert!(both[0].starts_with("NAME   CPU    STEAL   EXITS/S   MEMORY"));
        assert!(both[1].starts_with("web    0.0%   -       -         10 MiB"));
        assert!(both[2].starts_with("box    0.0%   50.0%   300       10 MiB"));
        let container = lines(&before[..1], &now[..1]);
        assert!(container[0].starts_with("NAME   CPU    MEMORY"));
        // Numbers of a machine that has been taken over, on a host that does not tell of times.
        let now = [machine(None, u64::MAX)];
        let lies = lines(&before, &now);
        assert!(lies[0].starts_with("NAME   CPU    EXITS/S               MEMORY"));
    }

    #[test]
    fn an_instance_that_was_not_there_before_has_no_share_yet() {
        let before = [named("web", 1_000_000)];
        let now = [named("web", 1_250_000), named("new", 5)];
        let text = table(&before, &now, Duration::from_secs(1)).render();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("web    25.0%   10 MiB / 64 MiB   3 "),
            "{text}"
        );
        assert!(
            lines[2].starts_with("new    -       10 MiB / 64 MiB   3 "),
            "{text}"
        );
        assert!(lines[1].contains("1 KiB / 0 B"), "{text}");
    }
}
