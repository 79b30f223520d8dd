//! `hostctl wait`: waits until an instance has ended, and ends as it did.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use crate::api::types::{Instance, InstanceState};
use crate::cli::client::{instance, with_query};
use crate::cli::error::CliError;
use crate::cli::session::status;
use crate::cli::units::parse_duration;
use crate::cli::{Context, output};

/// What one request waits for at most; there is a next one.
const ROUND: Duration = Duration::from_secs(600);

/// Wait until an instance has ended; the exit status is the workload's
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl wait job; echo $?\n  hostctl wait --timeout 5m job\n  \
                        hostctl wait --state running web"
)]
pub(in crate::cli) struct Arguments {
    /// States to wait for, separated by commas; the exit status is then 0
    #[arg(long, value_name = "STATES")]
    state: Option<String>,
    /// Give up after this time, with status 125
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// The instance
    name: String,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let Arguments {
        state,
        timeout,
        name,
    } = arguments;
    let ended = wait_for(context, &name, state.as_ref(), timeout).await?;
    if context.json {
        output::json(&ended)?;
    }
    if state.is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    match (&ended.exit, ended.state) {
        (Some(exit), _) => Ok(ExitCode::from(status(exit))),
        (None, InstanceState::Failed) if ended.error.is_some() => {
            let message = ended.error.unwrap_or_default();
            Err(CliError::Command { code: 125, message })
        }
        (None, _) => Err(CliError::NoExit { name }),
    }
}

async fn wait_for(
    context: &Context,
    name: &str,
    state: Option<&String>,
    timeout: Option<Duration>,
) -> Result<Instance, CliError> {
    let path = format!("{}/wait", instance(name));
    let mut left = timeout;
    loop {
        let round = left.map_or(ROUND, |left| left.min(ROUND));
        let seconds = round.as_secs().max(1).to_string();
        let parameters = [("state", state.cloned()), ("timeout_s", Some(seconds))];
        let waited = context.client.get(&with_query(&path, &parameters)).await;
        left = left.map(|left| left.saturating_sub(round));
        match waited {
            Err(error) if error.has_code("wait_timeout") && left != Some(Duration::ZERO) => {}
            waited => return waited,
        }
    }
}
