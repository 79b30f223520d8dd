//! `hostctl`: the command line. A thin client of the API: it can do nothing that curl cannot.
//!
//! One file for each verb in `verbs`; here is the list of them. What a verb prints goes to standard
//! output, remarks and errors to standard error. The exit status is 0, or 125 if the command line or
//! hostd failed, or that of the workload (128 and the signal's number if it was killed; 126 and 127
//! if it could not be run).

mod client;
mod error;
mod limits;
mod output;
mod session;
mod spec;
mod terminal;
mod transfer;
mod units;
mod verbs;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tokio::runtime;

use self::client::Client;
use self::error::CliError;
use self::verbs::{
    attach, console, copy, create, doctor, events, exec, image, info, inspect, kill, list, logs,
    pause, remove, restart, resume, run, snapshot, start, stats, stop, update, version, wait,
};

/// The exit status where the command line is wrong.
const USAGE: u8 = 125;

const EXAMPLES: &str = "\
Examples:
  hostctl image pull docker.io/library/busybox
  hostctl run --rm -it busybox sh
  hostctl run -d --name web -p 8080:80 --memory 256M nginx
  hostctl run -d --name box --isolation vm --cpus 2 --memory 1G nginx
  hostctl exec -it web sh
  hostctl update --memory 512M web";

/// Virtual machines and containers through one lifecycle
#[derive(Debug, Parser)]
#[command(name = "hostctl", version, after_help = EXAMPLES, max_term_width = 100)]
struct CommandLine {
    /// Where hostd listens
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "HOSTD_SOCKET",
        value_name = "PATH",
        default_value = "/run/hostd/hostd.sock",
        hide_env_values = true
    )]
    socket: PathBuf,
    /// Wait so long for a hostd that is not up yet, e.g. 30s
    #[arg(long, global = true, help_heading = "Global options", value_name = "TIME",
          value_parser = units::parse_duration,
          default_value = "0s", hide_default_value = true)]
    wait: Duration,
    /// Print JSON
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(run::Arguments),
    Create(create::Arguments),
    Start(start::Arguments),
    Stop(stop::Arguments),
    Restart(restart::Arguments),
    Kill(kill::Arguments),
    Pause(pause::Arguments),
    Resume(resume::Arguments),
    #[command(visible_alias = "remove")]
    Rm(remove::Arguments),
    #[command(visible_aliases = ["ls", "ps"])]
    List(list::Arguments),
    Inspect(inspect::Arguments),
    Logs(logs::Arguments),
    Exec(exec::Arguments),
    Attach(attach::Arguments),
    Console(console::Arguments),
    Wait(wait::Arguments),
    Stats(stats::Arguments),
    Update(update::Arguments),
    Snapshot(snapshot::Arguments),
    #[command(visible_alias = "cp")]
    Copy(copy::Arguments),
    Events(events::Arguments),
    Image(image::Arguments),
    Doctor(doctor::Arguments),
    Info(info::Arguments),
    Version(version::Arguments),
}

/// What every verb works with.
#[derive(Debug)]
struct Context {
    client: Client,
    /// Print JSON, not text for people.
    json: bool,
}

/// Does what the command line says, and answers with the exit status.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let line = match CommandLine::try_parse_from(arguments) {
        Ok(line) => line,
        Err(error) => {
            let failed = error.use_stderr();
            // Nobody can be told if it cannot be printed.
            let _ = error.print();
            return if failed {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let result = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| CliError::Terminal {
            action: "start",
            source,
        })
        .and_then(|runtime| runtime.block_on(dispatch(line)));
    match result {
        Ok(status) => status,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            output::remark(&error.text());
            ExitCode::from(error.exit_code())
        }
    }
}

async fn dispatch(line: CommandLine) -> Result<ExitCode, CliError> {
    let client = Client {
        socket: line.socket,
        patience: line.wait,
    };
    let context = &Context {
        client,
        json: line.json,
    };
    match line.verb {
        Verb::Run(arguments) => run::run(context, arguments).await,
        Verb::Create(arguments) => create::run(context, arguments).await,
        Verb::Start(arguments) => start::run(context, arguments).await,
        Verb::Stop(arguments) => stop::run(context, arguments).await,
        Verb::Restart(arguments) => restart::run(context, arguments).await,
        Verb::Kill(arguments) => kill::run(context, arguments).await,
        Verb::Pause(arguments) => pause::run(context, arguments).await,
        Verb::Resume(arguments) => resume::run(context, arguments).await,
        Verb::Rm(arguments) => remove::run(context, arguments).await,
        Verb::List(arguments) => list::run(context, arguments).await,
        Verb::Inspect(arguments) => inspect::run(context, arguments).await,
        Verb::Logs(arguments) => logs::run(context, arguments).await,
        Verb::Exec(arguments) => exec::run(context, arguments).await,
        Verb::Attach(arguments) => attach::run(context, arguments).await,
        Verb::Console(arguments) => console::run(context, arguments).await,
        Verb::Wait(arguments) => wait::run(context, arguments).await,
        Verb::Stats(arguments) => stats::run(context, arguments).await,
        Verb::Update(arguments) => update::run(context, arguments).await,
        Verb::Snapshot(arguments) => snapshot::run(context, arguments).await,
        Verb::Copy(arguments) => copy::run(context, arguments).await,
        Verb::Events(arguments) => events::run(context, arguments).await,
        Verb::Image(arguments) => image::run(context, arguments).await,
        Verb::Doctor(arguments) => doctor::run(context, arguments).await,
        Verb::Info(arguments) => info::run(context, arguments).await,
        Verb::Version(arguments) => version::run(context, arguments).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_does_not_contradict_itself() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn global_flags_go_before_or_after_the_verb_but_not_into_the_command() {
        let parse = |line: &str| CommandLine::try_parse_from(line.split(' ')).unwrap();
        assert!(parse("hostctl --json list").json);
        assert!(parse("hostctl list --json").json);
        assert!(!parse("hostctl run busybox prog --json").json);
        assert!(!parse("hostctl exec web prog --json").json);
        let line = parse("hostctl --wait 30s info --socket /s");
        assert_eq!(
            (line.wait, line.socket),
            (Duration::from_secs(30), "/s".into())
        );
    }
}
