//! `hostctl events`: what happens on this host.

use std::process::ExitCode;

use clap::Args;
use hyper::http::Method;

use crate::api::types::Event;
use crate::cli::client::{EMPTY, with_query};
use crate::cli::error::CliError;
use crate::cli::{Context, output, units};

/// Show what happens: instances that start and stop, images that come and go
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl events\n  hostctl events --since 0 --no-follow --json"
)]
pub(in crate::cli) struct Arguments {
    /// Start after the event of this number; 0 for all that are kept
    #[arg(long, value_name = "SEQUENCE")]
    since: Option<u64>,
    /// Only what has happened
    #[arg(long, requires = "since")]
    no_follow: bool,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let path = with_query(
        "/v1/events",
        &[
            ("since", arguments.since.map(|number| number.to_string())),
            ("follow", arguments.no_follow.then(|| "false".to_owned())),
        ],
    );
    let mut lines = context
        .client
        .lines(Method::GET, &path, "text/event-stream", EMPTY)
        .await?;
    while let Some(line) = lines.next().await? {
        // Of server-sent events, the data is all that is needed: it holds number and kind too.
        let Some(data) = line.strip_prefix("data:") else {
            continue;
        };
        let event: Event = serde_json::from_str(data).map_err(CliError::Answer)?;
        if context.json {
            output::json_line(&event)?;
        } else {
            output::line(&describe(&event))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(event: &Event) -> String {
    let mut text = format!(
        "{}  {:<20} {}",
        units::moment(event.at),
        event.kind,
        event.subject
    );
    let empty = event.data.is_null()
        || event
            .data
            .as_object()
            .is_some_and(serde_json::Map::is_empty);
    if !empty {
        text.push_str(&format!("  {}", event.data));
    }
    text
}
