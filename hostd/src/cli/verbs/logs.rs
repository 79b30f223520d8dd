//! `hostctl logs`: what a workload has written.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use hyper::http::Method;
use jiff::Timestamp;

use crate::api::types::LogLine;
use crate::cli::client::{EMPTY, NDJSON, instance, with_query};
use crate::cli::error::CliError;
use crate::cli::units::parse_moment;
use crate::cli::{Context, output};

/// Show what a workload has written
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl logs --tail 20 web\n  hostctl logs -f --since 10m web"
)]
pub(in crate::cli) struct Arguments {
    /// Go on with what is written from now on, until the instance stops
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines of what is there
    #[arg(short = 'n', long, value_name = "COUNT")]
    tail: Option<usize>,
    /// Only what was written after a moment: RFC 3339, or how long ago, e.g. 10m
    #[arg(long, value_name = "MOMENT", value_parser = |text: &str| parse_moment(text, Timestamp::now()))]
    since: Option<Timestamp>,
    /// Show when each line was written
    #[arg(short, long)]
    timestamps: bool,
    /// The instance
    name: String,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let path = with_query(
        &format!("{}/logs", instance(&arguments.name)),
        &[
            ("follow", arguments.follow.then(|| "true".to_owned())),
            ("since", arguments.since.map(|moment| moment.to_string())),
            ("tail", arguments.tail.map(|count| count.to_string())),
        ],
    );
    let mut lines = context
        .client
        .lines(Method::GET, &path, NDJSON, EMPTY)
        .await?;
    while let Some(line) = lines.next_json::<LogLine>().await? {
        if context.json {
            output::json_line(&line)?;
        } else {
            write(&line, arguments.timestamps)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Each stream to its own. A line without an end was a part of one, and so it is written.
fn write(line: &LogLine, timestamps: bool) -> Result<(), CliError> {
    let text = if timestamps {
        format!("{} {}", line.at, line.text)
    } else {
        line.text.clone()
    };
    let written = if line.stream == "stderr" {
        io::stderr().lock().write_all(text.as_bytes())
    } else {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    };
    written.map_err(CliError::Output)
}
