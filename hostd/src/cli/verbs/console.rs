//! `hostctl console`: the console of a VM.

use std::process::ExitCode;

use clap::Args;

use super::attach::{finish, with_stdin};
use crate::cli::client::instance;
use crate::cli::error::CliError;
use crate::cli::session::{Input, Signals, converse};
use crate::cli::{Context, output, terminal};

/// Be at the console of a VM, the serial port of its guest; ctrl-p ctrl-q leaves it again
#[derive(Args, Debug)]
#[command(
    after_help = "Shows the last of what the guest has written there. Many can watch, and one can type.\n\n\
                        Examples:\n  hostctl console box\n  hostctl console --no-stdin box"
)]
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
    let stdin = !arguments.no_stdin;
    let tty = terminal::is_input();
    let signals = Signals::listen(tty)?;
    let path = with_stdin(&format!("{}/console", instance(name)), stdin);
    let socket = context.client.converse(&path).await?;
    if stdin && tty {
        output::remark(&format!(
            "at the console of `{name}`; ctrl-p ctrl-q leaves it"
        ));
    }
    let input = if stdin { Input::Ours } else { Input::NotOurs };
    let ending = converse(socket, input, tty, signals).await?;
    finish("console", name, &ending)
}
