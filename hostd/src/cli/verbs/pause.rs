//! `hostctl pause`: freezes every process of instances.

use std::process::ExitCode;

use clap::Args;

use super::change;
use crate::cli::Context;
use crate::cli::error::CliError;

/// Freeze every process of instances
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  hostctl pause web")]
pub(in crate::cli) struct Arguments {
    /// The instances
    #[arg(required = true)]
    names: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    change(context, &arguments.names, "pause", &[]).await
}
