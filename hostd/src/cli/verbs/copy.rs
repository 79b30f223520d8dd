//! `hostctl copy`: makes an instance that is a clone of a snapshot.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value};

use crate::api::types::Instance;
use crate::cli::client::with_query;
use crate::cli::error::CliError;
use crate::cli::limits::LimitFlags;
use crate::cli::spec::label;
use crate::cli::{Context, output};

/// Make an instance from a snapshot of another
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  hostctl copy web/before-upgrade web-2\n  \
                        hostctl copy --start --memory 1G box/snap0 box-2\n\n\
                        The copy has an address, a host name and a machine id of its own. It has the \
                        limits and labels of the snapshot unless others are given, and publishes no \
                        ports.")]
pub(in crate::cli) struct Arguments {
    /// Start it as well
    #[arg(long)]
    start: bool,
    /// Start from the files of the snapshot even if it has memory to go on from
    #[arg(long)]
    no_memory: bool,
    /// Host name; the name if absent
    #[arg(long)]
    hostname: Option<String>,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = label)]
    label: Vec<(String, String)>,
    #[command(flatten)]
    limits: LimitFlags,
    /// The snapshot
    #[arg(value_name = "INSTANCE/SNAPSHOT")]
    source: String,
    /// Name of the copy; one is chosen if absent
    name: Option<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    if !arguments.source.contains('/') {
        return Err(CliError::Usage {
            message: format!("`{}` names no snapshot", arguments.source),
            hint: "Take one with `hostctl snapshot create`, and name it as INSTANCE/SNAPSHOT.",
        });
    }
    let start = arguments.start.then(|| "true".to_owned());
    let stateful = arguments.no_memory.then(|| "false".to_owned());
    let parameters = [("start", start), ("stateful", stateful)];
    let path = with_query("/v1/instances", &parameters);
    let copy: Instance = context.client.post(&path, Some(&wanted(arguments))).await?;
    if context.json {
        output::json(&copy)?;
    } else {
        output::line(&copy.name)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is said here and nothing else: the rest is as in the snapshot.
fn wanted(arguments: Arguments) -> Map<String, Value> {
    let labels: Map<String, Value> = arguments
        .label
        .into_iter()
        .map(|(key, value)| (key, Value::from(value)))
        .collect();
    let members = [
        ("from_snapshot", Some(Value::from(arguments.source))),
        ("name", arguments.name.map(Value::from)),
        ("hostname", arguments.hostname.map(Value::from)),
        ("limits", arguments.limits.to_patch()),
        (
            "labels",
            (!labels.is_empty()).then_some(Value::Object(labels)),
        ),
    ];
    members
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn only_what_is_given_is_asked_for() {
        let wanted_by = |line: &str| {
            let words = ["copy"].into_iter().chain(line.split(' '));
            Value::Object(wanted(Line::parse_from(words).arguments))
        };
        assert_eq!(wanted_by("web/a"), json!({"from_snapshot": "web/a"}));
        assert_eq!(
            wanted_by("--memory 1G --cpus none -l a=b web/a two"),
            json!({
                "from_snapshot": "web/a", "name": "two", "labels": {"a": "b"},
                "limits": {"memory": {"max": 1_073_741_824_u64}, "cpu": {"cores": null}},
            })
        );
    }
}
