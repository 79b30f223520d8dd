//! The side of the process that is made: it enters the container and becomes the program.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::SigSet;
use rustix::process::setsid;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::ExecPlan;
use crate::cgroup::Entry;
use crate::create::Stdio;
use crate::handshake::{Channel, Message};
use crate::label::LabelFile;
use crate::program::Program;
use crate::root::Root;
use crate::tty::{self, Terminal};
use crate::verbs::inside::Inside;
use crate::{environment, launch, sys};

/// What connects the process to the outside.
pub(super) struct Wiring {
    pub(super) channel: Channel,
    /// Where to go, and by which groups; none if the process is there.
    pub(super) inside: Option<(Inside, Entry)>,
    pub(super) stdio: Stdio,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) keyring: Option<CString>,
}

type Error = Box<dyn std::error::Error>;

/// The process's side: enters the container and becomes the program. Never returns.
pub(super) fn enter(plan: &ExecPlan, wiring: Wiring) -> ! {
    let Wiring {
        channel,
        inside,
        stdio,
        descriptors,
        keyring,
    } = wiring;
    let prepare = || -> Result<(Program, bool), Error> {
        sys::reset_signal_handlers();
        SigSet::empty().thread_set_mask()?;
        let inside = match inside {
            None => None,
            Some((inside, entry)) => {
                settle(plan, &entry)?;
                // A directory of the host's: the container has no use for it.
                drop(entry);
                Some(inside)
            }
        };
        let (_, after) = &plan.process.affinity;
        set_affinity(after.as_ref())?;
        let labels = match &inside {
            Some(_) => LabelFile::open_all(&plan.process.labels),
            None => LabelFile::open_all_inside(&plan.process.labels),
        }?;
        channel.await_proceed()?;
        inside.map_or(Ok(()), Inside::enter)?;
        setsid()?;
        if let Some(name) = &keyring {
            launch::join_keyring(name)?;
        }
        for label in labels {
            label.write()?;
        }
        set_streams(plan, &stdio, &channel)?;
        let in_directory = launch::try_directory(&plan.process)?;
        let memory_policy = plan.memory_policy.as_ref();
        launch::set_attributes(&plan.process, plan.personality, memory_policy)?;
        let program = Program::find(&plan.process)?;
        channel.send(&Message::Ready)?;
        channel.await_proceed()?;
        Ok((program, in_directory))
    };
    let (program, in_directory) = prepare().unwrap_or_else(|error| launch::fail(&channel, &*error));
    let ending = launch::Ending {
        process: &plan.process,
        filter: plan.filter.as_ref(),
        env: environment::environment(&plan.process),
        program,
        has_identity: false,
        in_directory,
        start_hooks: &[],
        state: "",
    };
    match ending.launch(&channel, descriptors) {
        Ok(never) => match never {},
        Err(error) => launch::fail(&channel, &error),
    }
}

/// What is done before the container is entered: the processors that are asked for until then, and its
/// groups.
pub(super) fn settle(plan: &ExecPlan, entry: &Entry) -> io::Result<()> {
    let (before, after) = &plan.process.affinity;
    set_affinity(before.as_ref())?;
    entry.join()?;
    if before.is_none() && after.is_none() {
        sys::reset_affinity();
    }
    Ok(())
}

fn set_affinity(processors: Option<&CpuSet>) -> io::Result<()> {
    let Some(processors) = processors else {
        return Ok(());
    };
    let failed = |error| {
        let message = format!("cannot set process.execCPUAffinity: {error}");
        io::Error::new(io::Error::from(error).kind(), message)
    };
    sched_setaffinity(None, processors).map_err(failed)
}

fn set_streams(plan: &ExecPlan, stdio: &Stdio, channel: &Channel) -> Result<(), Error> {
    let Some(size) = plan.process.terminal else {
        return Ok(stdio.take_on()?);
    };
    let Terminal { master, slave } =
        Terminal::open(&Root::current()?, size, plan.process.user.uid)?;
    tty::take_on(slave.as_fd())?;
    channel.send(&Message::Console(Some(master)))?;
    Ok(())
}
