//! `hostctl rm`: removes instances and all they have.

use std::process::ExitCode;

use clap::Args;

use super::each;
use crate::cli::client::{instance, with_query};
use crate::cli::error::CliError;
use crate::cli::{Context, output};

/// Remove instances and all they have
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  hostctl rm web\n  hostctl rm --force web box")]
pub(in crate::cli) struct Arguments {
    /// Kill those that run
    #[arg(short, long)]
    force: bool,
    /// The instances
    #[arg(required = true)]
    names: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let force = arguments.force.then(|| "true".to_owned());
    let act = async |name: &str| {
        let path = with_query(&instance(name), &[("force", force.clone())]);
        context.client.delete(&path).await
    };
    each(&arguments.names, act, |name, ()| {
        if context.json {
            Ok(())
        } else {
            output::line(name)
        }
    })
    .await
}
