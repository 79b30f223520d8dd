//! `hostctl run`: makes an instance, starts it and stays with it until it ends.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use super::attach::{attach_path, finish};
use super::create::{Pull, create_instance};
use crate::api::types::Instance;
use crate::cli::client::{EMPTY, instance};
use crate::cli::error::CliError;
use crate::cli::session::{Input, Signals, Socket, converse};
use crate::cli::spec::SpecFlags;
use crate::cli::{Context, output, terminal};

/// How long hostd may take to accept the client that waits for the start. It does so at once, unless
/// it answers only when the workload runs.
const ATTACH_DEADLINE: Duration = Duration::from_secs(2);

const EXAMPLES: &str = "\
Examples:
  hostctl run --rm -it busybox sh
  hostctl run -d --name web -p 8080:80 --memory 256M --cpus 0.5 nginx
  hostctl run --rm --isolation vm busybox uname -r
  hostctl run -d -v /srv/data:/data:ro -e MODE=test --restart on-failure app serve";

/// Make an instance, start it and stay with it until it ends
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Arguments {
    /// Print the name and leave it running
    #[arg(short, long)]
    detach: bool,
    /// When to pull the image
    #[arg(long, value_enum, default_value_t)]
    pull: Pull,
    #[command(flatten)]
    spec: SpecFlags,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let Arguments { detach, pull, spec } = arguments;
    if spec.tty && spec.interactive && !detach && !terminal::is_input() {
        return Err(CliError::Usage {
            message: "standard input is not a terminal".into(),
            hint: "Leave out -t.",
        });
    }
    let spec = spec.into_spec()?;
    // From here on a signal is the workload's.
    let signals = if detach {
        None
    } else {
        Some(Signals::listen(spec.tty)?)
    };
    let created = create_instance(context, &spec, pull).await?;
    let name = created.name.as_str();
    let Some(signals) = signals else {
        let started = or_remove(context, &created, start(context, name)).await?;
        return if context.json {
            output::json(&started).map(|()| ExitCode::SUCCESS)
        } else {
            output::line(name).map(|()| ExitCode::SUCCESS)
        };
    };
    let input = if spec.stdin {
        Input::Ours
    } else {
        Input::NotOurs
    };
    let joined = start_attached(context, name, input == Input::Ours);
    let socket = or_remove(context, &created, joined).await?;
    let ending = converse(socket, input, spec.tty, signals).await?;
    finish("attach", name, &ending)
}

async fn start(context: &Context, name: &str) -> Result<Instance, CliError> {
    context
        .client
        .post(&format!("{}/start", instance(name)), EMPTY)
        .await
}

/// Joins the workload before it starts, so that none of its output is lost.
async fn start_attached(context: &Context, name: &str, stdin: bool) -> Result<Socket, CliError> {
    let path = attach_path(name, stdin);
    let mut joining = Box::pin(context.client.converse(&path));
    match timeout(ATTACH_DEADLINE, &mut joining).await {
        Ok(socket) => {
            let socket = socket?;
            start(context, name).await?;
            Ok(socket)
        }
        Err(_) => {
            start(context, name).await?;
            joining.await
        }
    }
}

/// An instance that is refused its start, or has no program to run, is of no use and is removed. One
/// that was started and failed stays, since its log may tell why, unless it was to be removed when it stops.
async fn or_remove<T>(
    context: &Context,
    created: &Instance,
    start: impl Future<Output = Result<T, CliError>>,
) -> Result<T, CliError> {
    let result = start.await;
    if let Err(error) = &result
        && (created.spec.auto_remove || error.is_refusal() && !error.has_code("start_failed"))
    {
        // The first error is the one to tell; hostd may have removed it already.
        let _ = context
            .client
            .delete(&format!("{}?force=true", instance(&created.name)))
            .await;
    }
    result
}
