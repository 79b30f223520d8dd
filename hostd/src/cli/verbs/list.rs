//! `hostctl list`: the instances of this host.

use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;
use nix::sys::signal::Signal;

use crate::api::types::{Instance, InstanceState, Isolation, PortSpec, Protocol, StateReason};
use crate::cli::client::with_query;
use crate::cli::error::CliError;
use crate::cli::output::Table;
use crate::cli::{Context, output, units};

/// List instances
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl list\n  hostctl list --running --label tier=web\n  \
                        hostctl rm --force $(hostctl list --quiet)"
)]
pub(in crate::cli) struct Arguments {
    /// Those in every state, which is the default
    #[arg(short, long, conflicts_with = "running")]
    all: bool,
    /// Only those that run or are paused
    #[arg(long)]
    running: bool,
    /// Only those with this label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    label: Vec<String>,
    /// Only the names
    #[arg(short, long)]
    quiet: bool,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let labels = (!arguments.label.is_empty()).then(|| arguments.label.join(","));
    let states = arguments
        .running
        .then(|| "starting,running,paused,stopping".to_owned());
    let path = with_query("/v1/instances", &[("label", labels), ("state", states)]);
    let instances: Vec<Instance> = context.client.get(&path).await?;
    if context.json {
        output::json(&instances)?;
    } else if arguments.quiet {
        for instance in &instances {
            output::line(&instance.name)?;
        }
    } else {
        output::line(&table(&instances, Timestamp::now()).render())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(instances: &[Instance], now: Timestamp) -> Table {
    let headings = [
        "NAME",
        "STATE",
        "ISOLATION",
        "IMAGE",
        "CPUS",
        "MEMORY",
        "ADDRESS",
        "PORTS",
        "SINCE",
    ];
    let mut table = Table::new(headings);
    for instance in instances {
        let limits = &instance.spec.limits;
        table.row([
            instance.name.clone(),
            state(instance),
            isolation(instance.spec.isolation).to_owned(),
            instance.spec.image.clone(),
            limits
                .cpu
                .cores
                .map(|cores| cores.to_string())
                .unwrap_or_default(),
            limits.memory.max.map(units::size).unwrap_or_default(),
            instance
                .address
                .map(|address| address.to_string())
                .unwrap_or_default(),
            ports(&instance.spec.network.ports),
            units::age(since(instance), now),
        ]);
    }
    table
}

/// When the instance came into its state.
fn since(instance: &Instance) -> Timestamp {
    let moment = match instance.state {
        InstanceState::Created => None,
        InstanceState::Stopped | InstanceState::Failed => instance.finished_at,
        InstanceState::Starting
        | InstanceState::Running
        | InstanceState::Paused
        | InstanceState::Stopping => instance.started_at,
    };
    moment.unwrap_or(instance.created_at)
}

/// The state, and how it ended if it did.
pub(super) fn state(instance: &Instance) -> String {
    let name = output::state(instance.state);
    let ended = matches!(
        instance.state,
        InstanceState::Stopped | InstanceState::Failed
    );
    let Some(exit) = instance.exit.filter(|_| ended) else {
        return name;
    };
    let how = match (exit.oom, exit.code, exit.signal) {
        _ if instance.reason == Some(StateReason::Crashed) => "crashed".to_owned(),
        (true, ..) => "out of memory".to_owned(),
        (_, Some(code), _) => code.to_string(),
        (_, None, Some(signal)) => signal_name(signal),
        (_, None, None) => return name,
    };
    format!("{name} ({how})")
}

fn signal_name(number: i32) -> String {
    match Signal::try_from(number) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) => format!("signal {number}"),
    }
}

pub(super) fn isolation(isolation: Isolation) -> &'static str {
    match isolation {
        Isolation::Container => "container",
        Isolation::Vm => "vm",
    }
}

/// `8080:80, 127.0.0.1:53:53/udp`, as they are given to `run`.
pub(super) fn ports(ports: &[PortSpec]) -> String {
    let shown: Vec<String> = ports
        .iter()
        .map(|port| {
            let ip = port.host_ip.map(|ip| format!("{ip}:")).unwrap_or_default();
            let protocol = match port.protocol {
                Protocol::Tcp => "",
                Protocol::Udp => "/udp",
            };
            format!("{ip}{}:{}{protocol}", port.host, port.instance)
        })
        .collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use crate::api::types::{Exit, InstanceSpec};

    use super::*;

    fn instance(name: &str, state: InstanceState) -> Instance {
        let moment = |text: &str| text.parse::<Timestamp>().unwrap();
        Instance {
            name: name.into(),
            state,
            reason: None,
            exit: None,
            error: None,
            spec: InstanceSpec {
                image: "busybox".into(),
                ..InstanceSpec::default()
            },
            image_digest: "sha256:0".into(),
            pid: None,
            address: None,
            created_at: moment("2026-01-01T00:00:00Z"),
            started_at: Some(moment("2026-01-01T00:01:00Z")),
            finished_at: Some(moment("2026-01-01T00:02:00Z")),
            start_us: std::collections::BTreeMap::new(),
            snapshots: Vec::new(),
            generation: 1,
        }
    }

    fn rows(instances: &[Instance]) -> Vec<Vec<String>> {
        let now = "2026-01-01T01:03:00Z".parse().unwrap();
        let text = table(instances, now).render();
        let cells = |line: &str| -> Vec<String> {
            let cells = line
                .split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty());
            cells.map(str::to_owned).collect()
        };
        console::strip_ansi_codes(&text)
            .lines()
            .skip(1)
            .map(cells)
            .collect()
    }

    #[test]
    fn the_table_says_what_runs_with_which_limits_and_how_long() {
        let mut web = instance("web", InstanceState::Running);
        web.spec.isolation = Isolation::Vm;
        web.spec.limits.cpu.cores = Some(0.5);
        web.spec.limits.memory.max = Some(256 << 20);
        web.address = Some([10, 209, 0, 2].into());
        let port = |host_ip, host, instance, protocol| PortSpec {
            host_ip,
            host,
            instance,
            protocol,
        };
        let local = Some([127, 0, 0, 1].into());
        web.spec.network.ports = vec![
            port(None, 8080, 80, Protocol::Tcp),
            port(local, 53, 53, Protocol::Udp),
        ];
        let found = rows(&[web, instance("new", InstanceState::Created)]);
        let ports = "8080:80, 127.0.0.1:53:53/udp";
        let web = [
            "web",
            "running",
            "vm",
            "busybox",
            "0.5",
            "256 MiB",
            "10.209.0.2",
            ports,
            "1h 2m",
        ];
        assert_eq!(found[0], web);
        assert_eq!(
            found[1],
            [
                "new",
                "created",
                "container",
                "busybox",
                "-",
                "-",
                "-",
                "-",
                "1h 3m"
            ]
        );
    }

    #[test]
    fn the_table_says_how_what_ended_ended() {
        let table = [
            (Some(3), None, false, "stopped (3)"),
            (None, Some(15), false, "stopped (SIGTERM)"),
            (Some(137), None, true, "stopped (out of memory)"),
        ];
        for (code, signal, oom, expected) in table {
            let mut job = instance("job", InstanceState::Stopped);
            job.exit = Some(Exit { code, signal, oom });
            assert_eq!(rows(&[job])[0][1], expected);
        }
        let mut job = instance("job", InstanceState::Stopped);
        job.exit = Some(Exit {
            code: Some(125),
            signal: None,
            oom: false,
        });
        job.reason = Some(StateReason::Crashed);
        assert_eq!(rows(&[job])[0][1], "stopped (crashed)");
    }
}
