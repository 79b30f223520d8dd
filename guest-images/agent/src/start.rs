//! Starts a process in the root file system: the workload, or one beside it.

use nix::unistd::{Gid, Uid};

use crate::cgroup::Cgroup;
use crate::launch::{Launch, LaunchError, launch};
use crate::protocol;
use crate::reaper::{PidNamespace, Process, Reaper};
use crate::streams::Streams;
use crate::sys::{self, Preparation};

/// A process that runs, and the agent's ends of its streams.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) process: Process,
    pub(crate) streams: Streams,
}

/// Starts what `description` says. An error means that nothing runs.
pub(crate) fn start(
    description: &protocol::Process,
    cgroup: &Cgroup,
    namespace: PidNamespace<'_>,
    reaper: &Reaper,
) -> Result<Started, LaunchError> {
    let mut launch = launch(description)?;
    let failed = |source| LaunchError::start(&launch.program, source);
    let streams =
        Streams::connect(&mut launch.command, description, &launch.account).map_err(failed)?;
    prepare(&mut launch, description.tty, cgroup, namespace)?;
    // The command is dropped at the end and with it the agent's copies of the process's ends.
    match reaper.spawn(&mut launch.command, namespace) {
        Ok(process) => Ok(Started { process, streams }),
        Err(source) => Err(LaunchError::start(&launch.program, source)),
    }
}

fn prepare(
    launch: &mut Launch,
    terminal: bool,
    cgroup: &Cgroup,
    namespace: PidNamespace<'_>,
) -> Result<(), LaunchError> {
    let account = &launch.account;
    let preparation = Preparation {
        cgroup: cgroup.procs()?,
        mount_proc: matches!(namespace, PidNamespace::New),
        terminal,
        uid: Uid::from_raw(account.uid),
        gid: Gid::from_raw(account.gid),
        groups: account.groups.iter().copied().map(Gid::from_raw).collect(),
    };
    sys::prepare(&mut launch.command, preparation);
    Ok(())
}
