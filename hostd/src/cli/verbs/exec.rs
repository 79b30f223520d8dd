//! `hostctl exec`: runs a process beside a workload.

use std::process::ExitCode;

use clap::Args;
use futures::SinkExt;
use tokio_tungstenite::tungstenite::Message;

use super::attach::finish;
use crate::api::types::ExecRequest;
use crate::cli::client::instance;
use crate::cli::error::CliError;
use crate::cli::session::{Input, Signals, converse};
use crate::cli::spec::variables;
use crate::cli::{Context, terminal};

/// Run a process in a running instance
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl exec -it web sh\n  hostctl exec web cat /etc/hostname\n  \
                        echo text | hostctl exec -i web wc -c"
)]
pub(in crate::cli) struct Arguments {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable; without a value, to its value here
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The instance
    name: String,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let Arguments {
        interactive,
        tty,
        name,
        ..
    } = arguments;
    if tty && interactive && !terminal::is_input() {
        return Err(CliError::Usage {
            message: "standard input is not a terminal".into(),
            hint: "Leave out -t.",
        });
    }
    let request = ExecRequest {
        command: arguments.command,
        env: variables(&arguments.env),
        user: arguments.user,
        working_dir: arguments.workdir,
        tty,
        input: None,
        timeout_ms: None,
    };
    let signals = Signals::listen(tty)?;
    let mut socket = context
        .client
        .converse(&format!("{}/exec", instance(&name)))
        .await?;
    let request = serde_json::to_string(&request).map_err(CliError::Answer)?;
    let sent = socket.send(Message::Text(request.into())).await;
    sent.map_err(|error| CliError::Socket(Box::new(error)))?;
    let input = if interactive {
        Input::Ours
    } else {
        Input::Empty
    };
    let ending = converse(socket, input, tty, signals).await?;
    finish("attach", &name, &ending)
}
