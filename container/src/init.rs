//! The first process of a container, from the fork to the exec: a straight list of small steps.
//!
//! It runs with the creator's memory, copied, and all it needs was prepared and opened there. It must
//! not return into the creator's code: [`run`] ends in exec or in the process's end. An error goes to
//! whoever waits: the creator until the container is created, `start` afterwards.
//!
//! The process is not dumpable until it executes its program, so that nobody in the container can trace
//! it or follow `/proc/PID/exe` to the host's file of this program (CVE-2019-5736, CVE-2016-9962). What
//! remains is a container program that is a link to /proc/self/exe; the binary therefore runs from a
//! read-only copy of its mount (see `sealed`).

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use libc::MS_SHARED;
use nix::sys::signal::SigSet;
use rustix::net::{SocketFlags, accept_with};
use rustix::process::setsid;
use rustix::system::{setdomainname, sethostname};

use crate::cgroup::Entry;
use crate::create::Stdio;
use crate::handshake::{Channel, Message};
use crate::hooks::Surroundings;
use crate::label::LabelFile;
use crate::launch::{self, Ending};
use crate::mounts::{self, CgroupTrees};
use crate::plan::namespaces::Kind;
use crate::plan::{Inherited, Plan};
use crate::program::Program;
use crate::root::Root;
use crate::rootfs::Scaffold;
use crate::state::{Record, Status};
use crate::tty::{self, Terminal};
use crate::verbs::state::oci_state;
use crate::{devices, environment, hooks, masks, namespaces, rights, rootfs, sys};

/// What connects the first process to the outside.
#[derive(Debug)]
pub(crate) struct Wiring {
    /// To the creator.
    pub(crate) channel: Channel,
    /// What hooks hear of the container.
    pub(crate) record: &'static Record,
    /// The way into the cgroup, until it is taken.
    pub(crate) entry: Option<Entry>,
    /// Where `start` will connect. Without it the creator itself starts the container.
    pub(crate) listener: Option<OwnedFd>,
    pub(crate) stdio: Stdio,
    pub(crate) inherited: Inherited,
    pub(crate) cgroups: Vec<CgroupTrees>,
    /// The name of a session keyring to start; none to keep the caller's.
    pub(crate) keyring: Option<std::ffi::CString>,
}

type Error = Box<dyn std::error::Error>;

/// Sets the container up, waits for `start`, and becomes the program. Never returns.
pub(crate) fn run(plan: &Plan, mut wiring: Wiring) -> ! {
    let prepared = match prepare(plan, &mut wiring) {
        Ok(prepared) => prepared,
        Err(error) => launch::fail(&wiring.channel, &*error),
    };
    match await_start(wiring, &prepared.program) {
        Ok((starter, descriptors)) => match launch(plan, prepared, &starter, descriptors) {
            Ok(never) => match never {},
            Err(error) => launch::fail(&starter, &*error),
        },
        // The creator has died, or the container is deleted: there is nobody to tell.
        Err(_) => sys::exit_now(1),
    }
}

/// What the last steps need.
struct Prepared {
    program: Program,
    env: Vec<std::ffi::CString>,
    /// The OCI state, for hooks.
    state: String,
    has_identity: bool,
    in_directory: bool,
}

fn prepare(plan: &Plan, wiring: &mut Wiring) -> Result<Prepared, Error> {
    sys::reset_signal_handlers();
    SigSet::empty().thread_set_mask()?;
    if let Some(entry) = wiring.entry.take() {
        step("enter the cgroup", entry.join())?;
    }
    sys::reset_affinity();
    let labels = LabelFile::open_all(&plan.process.labels)?;
    wiring.channel.await_proceed()?;
    let state = state_for_hooks(plan, wiring.record);
    step("enter the namespaces", namespaces::enter(&plan.namespaces))?;
    let scaffold = plan.namespaces.shares_mounts().then(Scaffold::enter);
    let scaffold = step("make a place to mount in", scaffold.transpose())?;
    step("start a session", setsid())?;
    if let Some(name) = &wiring.keyring {
        launch::join_keyring(name)?;
    }
    set_names(plan)?;

    let root = step(
        "attach the root file system",
        rootfs::attach(&plan.rootfs, &plan.rootfs_path),
    )?;
    let spread = matches!(plan.root_propagation, Some((MS_SHARED, _)));
    mounts::make(&plan.mounts, &root, &wiring.cgroups, spread)?;
    let in_user_namespace = plan.namespaces.has(Kind::USER) || rights::in_user_namespace();
    devices::make(&plan.devices, plan.device_links, in_user_namespace, &root)?;
    // It need not exist in the image. On a read-only root it stays as it is, and the change fails.
    let _ = root.make_directory(&plan.process.cwd);
    run_hooks(plan, &wiring.channel, &root, &state)?;
    let terminal = open_terminal(plan, &root)?;
    masks::hide(&plan.masked_paths, &root)?;
    set_sysctl(plan)?;
    masks::make_readonly(&plan.readonly_paths, &root)?;
    mounts::finish(&plan.mounts, &root)?;
    for label in labels {
        label.write()?;
    }
    let replaced = match scaffold {
        Some(scaffold) => scaffold.leave(&root),
        None => rootfs::pivot(&root).map(|()| root),
    };
    let root = step("make the root file system `/`", replaced)?;
    step("finish the root file system", rootfs::finish(plan, &root))?;
    drop(root);

    set_streams(terminal, wiring)?;
    let in_directory = launch::try_directory(&plan.process)?;
    let memory_policy = plan.memory_policy.as_ref();
    launch::set_attributes(&plan.process, plan.personality, memory_policy)?;
    let program = match wiring.inherited.executable.take() {
        Some(file) => Program::Descriptor(file),
        None => Program::find(&plan.process)?,
    };
    let env = environment::environment(&plan.process);
    let has_identity = launch::identity_first(&plan.process, plan.filter.as_ref());
    if has_identity {
        launch::take_on_identity(&plan.process, in_directory)?;
    }
    Ok(Prepared {
        program,
        env,
        state,
        has_identity,
        in_directory,
    })
}

/// What the hooks that run in the container's namespaces read, if there are any: the pid is the one that it
/// has there, as with runc.
fn state_for_hooks(plan: &Plan, record: &Record) -> String {
    let lists = [plan.hooks.create_container(), plan.hooks.start_container()];
    if lists.into_iter().flatten().all(Vec::is_empty) {
        return String::new();
    }
    oci_state(record, Status::Created, std::process::id().cast_signed())
}

/// Tells the creator that all is set up, and waits until someone says that the program may run.
///
/// Others may join the container's namespaces meanwhile, and with the right to trace they can follow the
/// descriptors of this process: it keeps none that leads to the host, of ours or of the caller's.
fn await_start(wiring: Wiring, program: &Program) -> io::Result<(Channel, Vec<OwnedFd>)> {
    let Wiring {
        channel,
        listener,
        inherited,
        entry,
        stdio,
        cgroups,
        record: _,
        keyring: _,
    } = wiring;
    // Whatever else owns descriptors is the creator's, copied, and is never dropped here.
    drop((entry, stdio, cgroups));
    let mut kept: Vec<_> = inherited.descriptors.iter().map(AsFd::as_fd).collect();
    kept.push(channel.as_fd());
    kept.extend(listener.as_ref().map(AsFd::as_fd));
    kept.extend(program.descriptor());
    sys::close_from(3, &kept)?;
    // Who only waits has nothing to lose.
    sys::end_when_asked();
    channel.send(&Message::Ready)?;
    channel.await_proceed()?;
    let Some(listener) = listener else {
        return Ok((channel, inherited.descriptors));
    };
    drop(channel);
    loop {
        let starter = Channel::new(accept_with(&listener, SocketFlags::CLOEXEC)?);
        // A starter that dies before it has said so has not started anything.
        if starter.await_proceed().is_ok() {
            return Ok((starter, inherited.descriptors));
        }
    }
}

fn launch(
    plan: &Plan,
    prepared: Prepared,
    starter: &Channel,
    descriptors: Vec<OwnedFd>,
) -> Result<Infallible, Error> {
    let ending = Ending {
        process: &plan.process,
        filter: plan.filter.as_ref(),
        env: prepared.env,
        program: prepared.program,
        has_identity: prepared.has_identity,
        in_directory: prepared.in_directory,
        start_hooks: plan.hooks.start_container().as_deref().unwrap_or_default(),
        state: &prepared.state,
    };
    Ok(ending.launch(starter, descriptors)?)
}

/// A failed step, by what it was to do.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
struct StepError {
    step: &'static str,
    source: io::Error,
}

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, StepError> {
    result.map_err(|error| StepError {
        step,
        source: error.into(),
    })
}

fn set_names(plan: &Plan) -> Result<(), StepError> {
    if let Some(name) = &plan.hostname {
        step("set the host name", sethostname(name.as_bytes()))?;
    }
    if let Some(name) = &plan.domainname {
        step("set the domain name", setdomainname(name.as_bytes()))?;
    }
    Ok(())
}

/// Has the creator run its hooks, and runs those that belong into the container's namespaces. Both
/// see the mounts, and the host's tree as `/`.
fn run_hooks(plan: &Plan, channel: &Channel, root: &Root, state: &str) -> Result<(), Error> {
    let some = |hooks: &Option<Vec<_>>| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty());
    if some(plan.hooks.prestart()) || some(plan.hooks.create_runtime()) {
        channel.send(&Message::Hooks)?;
        channel.await_proceed()?;
    }
    let hooks = plan.hooks.create_container().as_deref().unwrap_or_default();
    let around = Surroundings {
        state,
        // The root has no path of its own yet.
        directory: Some(PathBuf::from(format!(
            "/proc/self/fd/{}",
            root.as_fd().as_raw_fd()
        ))),
        env: None,
    };
    Ok(hooks::run(hooks, "createContainer", &around)?)
}

/// Writes through the host's /proc, which nothing in the container can have replaced
/// (CVE-2025-52881); the files there act on the namespaces of the writer.
fn set_sysctl(plan: &Plan) -> Result<(), Error> {
    for (path, value) in &plan.sysctl {
        let path = Path::new("/proc/sys").join(path);
        std::fs::write(&path, value)
            .map_err(|error| format!("cannot write `{value}` to {}: {error}", path.display()))?;
    }
    Ok(())
}

fn open_terminal(plan: &Plan, root: &Root) -> Result<Option<Terminal>, StepError> {
    let Some(size) = plan.process.terminal else {
        return Ok(None);
    };
    let terminal = Terminal::open(root, size, plan.process.user.uid);
    let terminal = step("open a terminal of the container's /dev/pts", terminal)?;
    step(
        "bind the terminal on /dev/console",
        terminal.bind_console(root),
    )?;
    Ok(Some(terminal))
}

fn set_streams(terminal: Option<Terminal>, wiring: &Wiring) -> Result<(), Error> {
    if let Some(Terminal { master, slave }) = terminal {
        step("take on the terminal", tty::take_on(slave.as_fd()))?;
        wiring.channel.send(&Message::Console(Some(master)))?;
        return Ok(());
    }
    Ok(step("set the standard streams", wiring.stdio.take_on())?)
}
