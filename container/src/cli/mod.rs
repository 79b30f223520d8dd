//! The command line: one file a verb, and the options that come before it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use container::create::{Grouping, Stdio};
use container::log::{self, Format, Log};
use container::verbs::run::default_root;

mod checkpoint;
mod create;
mod delete;
mod events;
mod exec;
mod kill;
mod list;
mod monitor;
mod pause;
mod ps;
mod spec;
mod state;
mod update;

/// In runc's form, which engines read.
const VERSION: &str = concat!(
    "version ",
    env!("CARGO_PKG_VERSION"),
    "\ncommit: v",
    env!("CARGO_PKG_VERSION"),
    "\nspec: 1.3.0"
);

/// Runs containers as the Open Container Initiative specifies them.
#[derive(Debug, Parser)]
#[command(name = "hostd-oci", version = VERSION, disable_version_flag = true)]
pub(crate) struct Arguments {
    /// Show the version, and that of the specification
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Args, Debug)]
pub(crate) struct Global {
    /// Directory that holds the containers' states
    #[arg(long, value_name = "DIR", default_value = default_root().as_os_str())]
    root: PathBuf,
    /// File to write errors and warnings to, beside standard error
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Format of that file
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Write details, too
    #[arg(long)]
    debug: bool,
    /// Have systemd manage control groups: linux.cgroupsPath is SLICE:PREFIX:NAME
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted as crun does: `systemd`, `disabled`, or `cgroupfs`, which is the default
    #[arg(long, value_enum, default_value_t = CgroupManager::Cgroupfs, hide = true)]
    cgroup_manager: CgroupManager,
    /// CRIU's program, for checkpoint and restore; `criu` in PATH if not given
    #[arg(long, value_name = "FILE")]
    criu: Option<PathBuf>,
    /// Accepted as runc does; whether rights are missing is found out
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    rootless: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CgroupManager {
    Cgroupfs,
    Systemd,
    Disabled,
}

impl Global {
    fn grouping(&self) -> Grouping {
        match self.cgroup_manager {
            CgroupManager::Disabled => Grouping::None,
            CgroupManager::Cgroupfs if !self.systemd_cgroup => Grouping::Files,
            CgroupManager::Cgroupfs | CgroupManager::Systemd => Grouping::Systemd,
        }
    }

    pub(crate) fn log(&self) -> Log {
        let format = match self.log_format {
            LogFormat::Text => Format::Text,
            LogFormat::Json => Format::Json,
        };
        Log {
            file: self.log.clone(),
            format,
            debug: self.debug,
        }
    }
}

// Deferred: only the verb that is given gets its options made, which saves half of the time that reading
// the command line takes.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Verb {
    /// Create a container, to be started later
    Create(create::Create),
    /// Start a created container
    Start(create::Start),
    /// Create and start a container, and wait for it
    Run(create::Run),
    /// Show a container's state as JSON
    State(state::Show),
    /// Send a signal to a container
    Kill(kill::Kill),
    /// Delete a container
    Delete(delete::Delete),
    /// List the containers
    List(list::List),
    /// Start a workload and stay with it, for a daemon
    #[command(hide = true)]
    Monitor(monitor::Monitor),
    /// Run a process in a container
    Exec(exec::Exec),
    /// List the processes of a container
    Ps(ps::Ps),
    /// Freeze the processes of a container
    Pause(pause::Pause),
    /// Let the processes of a paused container go on
    Resume(pause::Resume),
    /// Change the limits of a container
    Update(update::Update),
    /// Show what a container uses, and when it is short of memory
    Events(events::Show),
    /// Write a configuration to start from
    Spec(spec::Spec),
    /// Show what this runtime can do as JSON
    Features(spec::Features),
    /// Write a running container to files, with CRIU
    Checkpoint(checkpoint::Checkpoint),
    /// Make a container from such files, with CRIU
    Restore(checkpoint::Restore),
}

impl Verb {
    /// Whether a process of this program will be in a container. The same words are in `entry`.
    fn enters(&self) -> bool {
        matches!(
            self,
            Verb::Create(_) | Verb::Run(_) | Verb::Exec(_) | Verb::Monitor(_)
        )
    }
}

/// The command line; or the status to exit with. What is wrong with it engines look for in the file that
/// it names, as for any other error.
pub(crate) fn parse() -> Result<Arguments, i32> {
    Arguments::try_parse().map_err(|error| {
        if !error.use_stderr() {
            // What was asked for, as the help.
            return i32::from(error.print().is_err());
        }
        log::set(stated_log(std::env::args()));
        let text = error.to_string();
        let text = text.trim_end();
        log::error(text.strip_prefix("error: ").unwrap_or(text));
        1
    })
}

/// The log that a command line names, of which nothing else need be right.
fn stated_log(arguments: impl Iterator<Item = String>) -> Log {
    let mut log = Log::default();
    let mut arguments = arguments.skip(1).peekable();
    while let Some(argument) = arguments.next_if(|argument| argument.starts_with("--")) {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        let mut value = || value.clone().or_else(|| arguments.next());
        match name {
            "--log" => log.file = value().map(PathBuf::from),
            "--log-format" if value().as_deref() == Some("json") => log.format = Format::Json,
            "--root" | "--criu" | "--cgroup-manager" => drop(value()),
            _ => {}
        }
    }
    log
}

/// Carries out the command, and says with which status to exit.
pub(crate) fn run(arguments: Arguments) -> Result<i32> {
    let Arguments { global, verb, .. } = arguments;
    if verb.enters() {
        container::sealed::seal();
    }
    match verb {
        Verb::Create(create) => create.run(&global),
        Verb::Start(start) => start.run(&global),
        Verb::Run(run) => run.run(&global),
        Verb::State(show) => show.run(&global),
        Verb::Kill(kill) => kill.run(&global),
        Verb::Delete(delete) => delete.run(&global),
        Verb::List(list) => list.run(&global),
        Verb::Monitor(monitor) => monitor.run(),
        Verb::Exec(exec) => exec.run(&global),
        Verb::Ps(ps) => ps.run(&global),
        Verb::Pause(pause) => pause.run(&global),
        Verb::Resume(resume) => resume.run(&global),
        Verb::Update(update) => update.run(&global),
        Verb::Events(show) => show.run(&global),
        Verb::Spec(spec) => spec.run(&global),
        Verb::Features(features) => features.run(&global),
        Verb::Checkpoint(checkpoint) => checkpoint.run(&global),
        Verb::Restore(restore) => restore.run(&global),
    }
}

/// Prints a result: the one thing that standard output is for.
pub(crate) fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// The descriptors that follow the standard streams and are passed on.
pub(crate) fn preserved(count: u16) -> Result<Vec<std::os::fd::OwnedFd>> {
    let copy = |number: i32| {
        container::process::copy_inherited(number).with_context(|| {
            format!(
                "descriptor {number} (preserved-fd {}) is not open",
                number - 3
            )
        })
    };
    (3..3 + i32::from(count)).map(copy).collect()
}

/// How many descriptors systemd's socket activation gave this program, and not one that its variables were
/// left over from (sd_listen_fds(3)).
fn activated() -> Option<u16> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID")? != std::process::id() {
        return None;
    }
    u16::try_from(number("LISTEN_FDS")?).ok()
}

/// What tells a container's program about them: it is process 1.
fn activation(count: u16) -> Vec<String> {
    let mut env = vec![format!("LISTEN_FDS={count}"), "LISTEN_PID=1".to_owned()];
    env.extend(std::env::var("LISTEN_FDNAMES").map(|names| format!("LISTEN_FDNAMES={names}")));
    env
}

/// Where the standard streams come from; `stays` is whether this program stays beside the process.
fn stdio(console_socket: Option<PathBuf>, stays: bool) -> Stdio {
    match console_socket {
        Some(path) => Stdio::ConsoleSocket(path),
        None if stays => Stdio::Inherit,
        None => Stdio::InheritWithoutTerminal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_found_on_a_command_line_that_is_wrong() {
        let found = |words: &str| {
            let log = stated_log(words.split(' ').map(str::to_owned));
            (log.file, log.format)
        };
        let file = Some(PathBuf::from("f"));
        for (words, expected) in [
            (
                "oci --log f --log-format json nonsense",
                (file.clone(), Format::Json),
            ),
            (
                "oci --debug --root r --log=f nonsense",
                (file.clone(), Format::Text),
            ),
            ("oci --root --log f", (None, Format::Text)),
            ("oci run --log f", (None, Format::Text)),
            ("oci --log", (None, Format::Text)),
        ] {
            assert_eq!(found(words), expected, "{words}");
        }
    }
}
