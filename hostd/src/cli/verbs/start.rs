//! `hostctl start`: starts instances that are created or stopped.

use std::process::ExitCode;

use clap::Args;

use super::change;
use crate::cli::Context;
use crate::cli::error::CliError;

/// Start instances
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  hostctl start web")]
pub(in crate::cli) struct Arguments {
    /// The instances
    #[arg(required = true)]
    names: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    change(context, &arguments.names, "start", &[]).await
}
