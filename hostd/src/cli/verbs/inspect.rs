//! `hostctl inspect`: all there is to know of instances.

use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;

use super::each;
use super::list::{isolation, ports, state};
use crate::api::types::{Instance, Limits};
use crate::cli::client::instance;
use crate::cli::error::CliError;
use crate::cli::{Context, output, units};

/// Show all there is to know of instances
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl inspect web\n  hostctl inspect --json web | jq .address\n\n\
                        With --json and several names the output is a list."
)]
pub(in crate::cli) struct Arguments {
    /// The instances
    #[arg(required = true)]
    names: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let mut found = Vec::new();
    let act = async |name: &str| context.client.get::<Instance>(&instance(name)).await;
    let status = each(&arguments.names, act, |_, instance| {
        found.push(instance);
        Ok(())
    })
    .await;
    match (context.json, found.as_slice()) {
        (true, [only]) if arguments.names.len() == 1 => output::json(only)?,
        (true, all) if arguments.names.len() > 1 => output::json(&all)?,
        (true, _) => {}
        (false, all) => {
            let texts: Vec<String> = all
                .iter()
                .map(|instance| describe(instance, Timestamp::now()))
                .collect();
            if !texts.is_empty() {
                output::line(&texts.join("\n\n"))?;
            }
        }
    }
    status
}

fn describe(instance: &Instance, now: Timestamp) -> String {
    let spec = &instance.spec;
    let ago = |moment: Timestamp| {
        format!(
            "{} ({} ago)",
            units::moment(moment),
            units::age(moment, now)
        )
    };
    let words = |list: &Option<Vec<String>>| list.as_ref().map(|list| list.join(" "));
    let mut pairs = vec![
        ("name", instance.name.clone()),
        ("state", state(instance)),
        ("error", instance.error.clone().unwrap_or_default()),
        ("isolation", isolation(spec.isolation).to_owned()),
        ("image", spec.image.clone()),
        ("digest", instance.image_digest.clone()),
        ("entrypoint", words(&spec.entrypoint).unwrap_or_default()),
        ("command", words(&spec.command).unwrap_or_default()),
        ("user", spec.user.clone().unwrap_or_default()),
        (
            "address",
            instance
                .address
                .map(|address| address.to_string())
                .unwrap_or_default(),
        ),
        ("ports", ports(&spec.network.ports)),
        (
            "pid",
            instance.pid.map(|pid| pid.to_string()).unwrap_or_default(),
        ),
        ("created", ago(instance.created_at)),
        ("started", instance.started_at.map(ago).unwrap_or_default()),
        (
            "finished",
            instance.finished_at.map(ago).unwrap_or_default(),
        ),
    ];
    pairs.push(("clone of", spec.from_snapshot.clone().unwrap_or_default()));
    pairs.push(("snapshots", instance.snapshots.join(", ")));
    let limits = limits(&spec.limits);
    pairs.extend(
        limits
            .iter()
            .map(|(name, value)| (name.as_str(), value.clone())),
    );
    let mounts = spec.mounts.iter().map(|mount| {
        let mode = if mount.read_only { ":ro" } else { "" };
        ("mount", format!("{}:{}{mode}", mount.source, mount.target))
    });
    pairs.extend(mounts);
    pairs.extend(
        spec.env
            .iter()
            .map(|(key, value)| ("env", format!("{key}={value}"))),
    );
    pairs.extend(
        spec.labels
            .iter()
            .map(|(key, value)| ("label", format!("{key}={value}"))),
    );
    let phases = instance.start_us.iter().map(|(phase, us)| {
        let (whole, part) = (us / 1000, us % 1000);
        ("start phase", format!("{phase} {whole}.{part:03} ms"))
    });
    pairs.extend(phases);
    output::properties(&pairs)
}

/// The limits that there are.
fn limits(limits: &Limits) -> Vec<(String, String)> {
    let size = |value: Option<u64>| value.map(units::size);
    let rate = |value: Option<u64>| value.map(|rate| format!("{}/s", units::size(rate)));
    let count = |value: Option<u64>| value.map(|count| format!("{count}/s"));
    let all = [
        ("cpus", limits.cpu.cores.map(|cores| cores.to_string())),
        (
            "cpu weight",
            limits.cpu.weight.map(|weight| weight.to_string()),
        ),
        ("cpu set", limits.cpu.set.clone()),
        ("memory", size(limits.memory.max)),
        ("pids", limits.pids.max.map(|max| max.to_string())),
        ("disk size", size(limits.disk.size)),
        ("disk read", rate(limits.disk.read_bps)),
        ("disk write", rate(limits.disk.write_bps)),
        ("disk reads", count(limits.disk.read_iops)),
        ("disk writes", count(limits.disk.write_iops)),
        ("net ingress", rate(limits.network.ingress_bps)),
        ("net egress", rate(limits.network.egress_bps)),
    ];
    all.into_iter()
        .filter_map(|(name, value)| Some((format!("{name} limit"), value?)))
        .collect()
}
