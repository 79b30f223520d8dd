//! `hostctl kill`: ends workloads at once, or sends them a signal.

use std::process::ExitCode;

use clap::Args;

use super::change;
use crate::cli::Context;
use crate::cli::error::CliError;

/// Kill instances, or send them a signal
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  hostctl kill web\n  hostctl kill --signal HUP web")]
pub(in crate::cli) struct Arguments {
    /// Name or number of the signal; KILL if absent
    #[arg(short, long)]
    signal: Option<String>,
    /// The instances
    #[arg(required = true)]
    names: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    change(
        context,
        &arguments.names,
        "kill",
        &[("signal", arguments.signal)],
    )
    .await
}
