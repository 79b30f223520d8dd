//! `hostctl attach`: joins the streams of a workload that runs.

use std::process::ExitCode;

use clap::Args;

use crate::api::types::{Instance, InstanceState};
use crate::cli::client::{instance, with_query};
use crate::cli::error::CliError;
use crate::cli::session::{Ending, Input, Signals, converse, status};
use crate::cli::{Context, output};

/// Join the streams of a workload, or wait for its start to; ctrl-p ctrl-q leaves it again
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  hostctl attach web\n  hostctl attach --no-stdin web")]
pub(in crate::cli) struct Arguments {
    /// Only watch
    #[arg(long)]
    no_stdin: bool,
    /// The instance
    name: String,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let name = arguments.name.as_str();
    let found: Instance = context.client.get(&instance(name)).await?;
    if matches!(found.state, InstanceState::Stopped | InstanceState::Failed) {
        return Err(CliError::Usage {
            message: format!("`{name}` does not run"),
            hint: "Start it with `hostctl start`, or read what it wrote with `hostctl logs`.",
        });
    }
    let stdin = found.spec.stdin && !arguments.no_stdin;
    let signals = Signals::listen(found.spec.tty)?;
    let socket = context.client.converse(&attach_path(name, stdin)).await?;
    let input = if stdin { Input::Ours } else { Input::NotOurs };
    let ending = converse(socket, input, found.spec.tty, signals).await?;
    finish("attach", name, &ending)
}

pub(super) fn attach_path(name: &str, stdin: bool) -> String {
    with_stdin(&format!("{}/attach", instance(name)), stdin)
}

/// The path of a conversation that is to have our input, or not.
pub(super) fn with_stdin(path: &str, stdin: bool) -> String {
    with_query(path, &[("stdin", stdin.then(|| "true".to_owned()))])
}

/// What a conversation's end means for our own; `again` is the verb that goes on with it.
pub(super) fn finish(
    again: &'static str,
    name: &str,
    ending: &Ending,
) -> Result<ExitCode, CliError> {
    match ending {
        Ending::Exit(exit) => {
            if exit.oom {
                output::remark(&format!(
                    "`{name}` exceeded its memory limit and was killed"
                ));
            }
            Ok(ExitCode::from(status(exit)))
        }
        Ending::Error { code, message } => {
            let code = u8::try_from(*code).unwrap_or(125);
            Err(CliError::Command {
                code,
                message: message.clone(),
            })
        }
        Ending::Detached => {
            output::remark(&format!("\nleft `{name}`; it goes on"));
            Ok(ExitCode::SUCCESS)
        }
        Ending::Lost => Err(CliError::Lost {
            name: name.into(),
            again,
        }),
    }
}
