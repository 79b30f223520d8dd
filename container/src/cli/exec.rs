//! `exec`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use container::log;
use container::verbs::exec::{Changes, ExecOptions, What, exec};
use container::verbs::run::{Signals, attend};

use super::Global;

/// The status of an `exec` that did not get to its program, as with runc: 1 may be the program's own.
const FAILED: i32 = 255;

#[derive(Args, Debug)]
pub(super) struct Exec {
    /// Unix socket that gets the other side of the terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Add to the environment
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// User, and group, by number
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Additional groups, by number
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// File with the whole process as JSON
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Return as soon as the program runs
    #[arg(short, long)]
    detach: bool,
    /// Unix socket that gets a pidfd of the process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// File to write the pid of the process to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// AppArmor profile of the process
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// SELinux label of the process
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Run in a group below the container's
    #[arg(long, value_name = "[CONTROLLER,…:]PATH")]
    cgroup: Vec<String>,
    /// Forbid the process to gain rights
    #[arg(long)]
    no_new_privs: bool,
    /// Add a capability
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Pass this many descriptors more than the standard streams
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u16,
    /// Wait for a paused container to go on
    #[arg(long)]
    ignore_paused: bool,
    /// Name of the container
    id: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let detach = self.detach;
        // Before there is a child, so that no signal for it is lost.
        let signals = if detach {
            None
        } else {
            Some(Signals::block()?)
        };
        let executed = match exec(self.options(global)?) {
            Ok(executed) => executed,
            Err(error) => {
                log::error(&format!("exec failed: {}", container::error::chain(&error)));
                return Ok(FAILED);
            }
        };
        match signals {
            Some(signals) => {
                let exit = attend(&executed.process, &signals, executed.console, None)
                    .context("cannot wait for the process")?;
                Ok(exit.status())
            }
            None => Ok(0),
        }
    }

    fn options(self, global: &Global) -> Result<ExecOptions> {
        let what = match self.process {
            Some(path) => What::File(path),
            None if self.command.is_empty() => bail!("give a program, or --process FILE"),
            None => What::Changed(Changes {
                args: self.command,
                env: self.env,
                cwd: self.cwd,
                user: self.user.as_deref().map(parse_user).transpose()?,
                additional_gids: self.additional_gids,
                capabilities: self.cap,
                terminal: self.tty,
                no_new_privileges: self.no_new_privs,
                apparmor_profile: self.apparmor,
                selinux_label: self.process_label,
            }),
        };
        Ok(ExecOptions {
            root: global.root.clone(),
            id: self.id,
            what,
            stdio: super::stdio(self.console_socket, !self.detach),
            descriptors: super::preserved(self.preserve_fds)?,
            pid_file: self.pid_file,
            pidfd_socket: self.pidfd_socket,
            ignore_paused: self.ignore_paused,
            cgroups: self.cgroup,
        })
    }
}

fn parse_user(text: &str) -> Result<(u32, Option<u32>)> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let number = |text: &str| {
        text.parse::<u32>()
            .with_context(|| format!("--user: `{text}` is not a number"))
    };
    Ok((number(user)?, group.map(number).transpose()?))
}
