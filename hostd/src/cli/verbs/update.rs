//! `hostctl update`: changes limits and labels, also of what runs.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value};

use super::each;
use crate::api::types::{Effect, InstancePatch, PatchResult};
use crate::cli::client::{instance, with_query};
use crate::cli::error::CliError;
use crate::cli::limits::LimitFlags;
use crate::cli::spec::label;
use crate::cli::{Context, output};

/// Change limits and labels; what can take effect at once does
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl update --memory 512M --cpus 2 web\n  \
                        hostctl update --net-egress none web\n  \
                        hostctl update --dry-run --cpu-set 0-1 web"
)]
pub(in crate::cli) struct Arguments {
    /// Say what would happen and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = label)]
    label: Vec<(String, String)>,
    /// Take a label away
    #[arg(long, value_name = "KEY")]
    remove_label: Vec<String>,
    #[command(flatten)]
    limits: LimitFlags,
    /// The instances
    #[arg(required = true)]
    names: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let removed = arguments
        .remove_label
        .into_iter()
        .map(|key| (key, Value::Null));
    let set = arguments
        .label
        .into_iter()
        .map(|(key, value)| (key, Value::from(value)));
    let labels: Map<String, Value> = removed.chain(set).collect();
    let patch = InstancePatch {
        limits: arguments.limits.to_patch(),
        labels: (!labels.is_empty()).then_some(Value::Object(labels)),
    };
    if patch == InstancePatch::default() {
        return Err(CliError::Usage {
            message: "nothing to change was given".into(),
            hint: "Give at least one limit or label; see `hostctl update --help`.",
        });
    }
    let dry_run = arguments.dry_run.then(|| "true".to_owned());
    let act = async |name: &str| {
        let path = with_query(&instance(name), &[("dry_run", dry_run.clone())]);
        context.client.patch::<PatchResult>(&path, &patch).await
    };
    each(&arguments.names, act, |name, result| {
        if context.json {
            output::json_line(&result)
        } else {
            output::line(&plan(name, &result))
        }
    })
    .await
}

fn plan(name: &str, result: &PatchResult) -> String {
    let mut lines = vec![name.to_owned()];
    for (field, effect) in &result.plan {
        let effect = match effect {
            Effect::Live => "in force now",
            Effect::AtRestart => "in force at the next start",
        };
        let value = serde_json::to_value(&result.instance.spec)
            .ok()
            .and_then(|spec| spec.pointer(field).cloned())
            .filter(|value| !value.is_null())
            .map_or_else(|| "none".to_owned(), |value| value.to_string());
        lines.push(format!(
            "  {} = {value}: {effect}",
            field.trim_start_matches("/limits/")
        ));
    }
    lines.join("\n")
}
