//! `create`, `start` and `run`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use container::create::{self, CreateOptions};
use container::log;
use container::readiness::ServiceManager;
use container::verbs;
use container::verbs::run::RunMode;

use super::Global;

/// What all that make a container have in common.
#[derive(Args, Debug)]
pub(super) struct Place {
    /// Directory of the bundle: config.json and, usually, the root file system
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(super) bundle: PathBuf,
    /// Configuration in place of the bundle's config.json, looked for in the bundle
    #[arg(short = 'f', long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Unix socket that gets the other side of the terminal
    #[arg(long, value_name = "SOCKET")]
    pub(super) console_socket: Option<PathBuf>,
    /// Unix socket that gets a pidfd of the first process
    #[arg(long, value_name = "SOCKET")]
    pub(super) pidfd_socket: Option<PathBuf>,
    /// File to write the pid of the first process to
    #[arg(long, value_name = "FILE")]
    pub(super) pid_file: Option<PathBuf>,
    /// Accepted as runc does; a root that cannot be pivoted from is handled without it
    #[arg(long)]
    no_pivot: bool,
}

/// What becomes of a container that runs.
#[derive(Args, Debug)]
pub(super) struct Attendance {
    /// Return as soon as the container runs
    #[arg(short, long)]
    detach: bool,
    /// Do not delete the container at its end
    #[arg(long)]
    keep: bool,
    /// Do not become the parent of processes that the container leaves without one
    #[arg(long)]
    no_subreaper: bool,
}

impl Attendance {
    pub(super) fn mode(&self) -> RunMode {
        RunMode {
            detach: self.detach,
            keep: self.keep,
            no_subreaper: self.no_subreaper,
        }
    }
}

/// What `create` and `run` have in common.
#[derive(Args, Debug)]
struct Making {
    #[command(flatten)]
    place: Place,
    /// Pass this many descriptors more than the standard streams
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u16,
    /// Keep the caller's session keyring
    #[arg(long)]
    no_new_keyring: bool,
    /// Name of the container
    id: String,
}

#[derive(Args, Debug)]
pub(super) struct Create {
    #[command(flatten)]
    making: Making,
}

#[derive(Args, Debug)]
pub(super) struct Run {
    #[command(flatten)]
    making: Making,
    #[command(flatten)]
    attendance: Attendance,
}

#[derive(Args, Debug)]
pub(super) struct Start {
    /// Name of the container
    id: String,
}

impl Making {
    /// `stays` is whether this program attends the container to its end.
    fn options(self, global: &Global, stays: bool) -> Result<CreateOptions> {
        let activated = super::activated();
        let preserved = self.preserve_fds.saturating_add(activated.unwrap_or(0));
        Ok(CreateOptions {
            root: global.root.clone(),
            id: self.id,
            bundle: self.place.bundle,
            config: self.place.config,
            env: activated.map(super::activation).unwrap_or_default(),
            stdio: super::stdio(self.place.console_socket, stays),
            executable: None,
            descriptors: super::preserved(preserved)?,
            pid_file: self.place.pid_file,
            pidfd_socket: self.place.pidfd_socket,
            no_new_keyring: self.no_new_keyring,
            grouping: global.grouping(),
            service_manager: ServiceManager::from_environment()?,
        })
    }
}

impl Create {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let created = create::create(self.making.options(global, false)?)?;
        created
            .warnings
            .iter()
            .for_each(|warning| log::warn(warning));
        Ok(0)
    }
}

impl Start {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let service_manager = ServiceManager::from_environment()?;
        verbs::start::start(&global.root, &self.id, service_manager.as_ref())?;
        Ok(0)
    }
}

impl Run {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let mode = self.attendance.mode();
        let exit = verbs::run::run(self.making.options(global, !mode.detach)?, mode)?;
        Ok(exit.map_or(0, container::process::Exit::status))
    }
}
