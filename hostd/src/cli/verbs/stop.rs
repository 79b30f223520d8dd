//! `hostctl stop`: asks workloads to end, and kills those that do not.

use std::process::ExitCode;

use clap::Args;

use super::change;
use crate::cli::Context;
use crate::cli::error::CliError;

/// Stop instances: politely at first
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  hostctl stop --time 30 web")]
pub(in crate::cli) struct Arguments {
    /// Seconds between the polite signal and the kill; the instance's own if absent
    #[arg(short, long, value_name = "SECONDS")]
    time: Option<u32>,
    /// The instances
    #[arg(required = true)]
    names: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let timeout = arguments.time.map(|seconds| seconds.to_string());
    change(context, &arguments.names, "stop", &[("timeout_s", timeout)]).await
}
