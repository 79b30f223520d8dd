//! Creates a container: the creator's side.
//!
//! Everything is checked and opened before anything is made (`plan`). Then, in this order, each undone
//! if a later step fails: the container's directory, with its record; its cgroup; its first process,
//! recorded before it is allowed to do anything. If the creator itself dies, the process sees its socket
//! close and ends; what is left is a directory without a live process, which `delete` and the next
//! `create` of the same id remove.

mod making;
mod restore;
mod scope;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::cgroup::{Cgroup, CgroupError};
use crate::criu::CriuError;
use crate::footprint;
use crate::handshake::{Channel, Failure, Message};
use crate::hooks::HookError;
use crate::idmap;
use crate::idmap::IdMapError;
use crate::init::{self, Wiring};
use crate::mounts::CgroupTrees;
use crate::namespaces::{self, Forked};
use crate::network_devices::NetworkDeviceError;
use crate::open_files::Raised;
use crate::plan::capability;
use crate::plan::mounts::{MountKind, MountPlan, clone_tree};
use crate::plan::{Inherited, Plan, PlanError, Setting};
use crate::process::Process;
use crate::readiness::{Proxy, ReadinessError, ServiceManager};
use crate::relay::Relay;
use crate::resctrl::ResctrlError;
use crate::spec::{Config, SpecError};
use crate::state::{Home, StateError};
use crate::systemd::SystemdError;
use crate::verbs::delete::delete_failed;
use crate::verbs::start::{StartError, await_exec, hand_over_listener, run_poststart};

use self::making::Making;
pub use self::restore::{RestoreOptions, restore};

/// Where the standard streams of a process come from.
#[derive(Debug)]
pub enum Stdio {
    /// The caller's own; or a terminal, whose other side the caller gets.
    Inherit,
    /// The caller's own, by a caller who does not stay: nobody would hold the terminal's other side.
    InheritWithoutTerminal,
    /// These.
    Fds {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// A terminal, whose other side is sent to whoever listens at this unix stream socket.
    ConsoleSocket(PathBuf),
}

/// This process's own.
pub(crate) fn standard_streams() -> [BorrowedFd<'static>; 3] {
    [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ]
}

impl Stdio {
    /// Those that exist before the process does; nothing if it gets a terminal.
    pub(crate) fn streams(&self) -> Option<[BorrowedFd<'_>; 3]> {
        match self {
            Stdio::Inherit | Stdio::InheritWithoutTerminal => Some(standard_streams()),
            Stdio::Fds {
                stdin,
                stdout,
                stderr,
            } => Some([stdin, stdout, stderr].map(AsFd::as_fd)),
            Stdio::ConsoleSocket(_) => None,
        }
    }

    /// Makes them the standard streams of this process. A terminal is taken on elsewhere.
    pub(crate) fn take_on(&self) -> io::Result<()> {
        if let Stdio::Fds {
            stdin,
            stdout,
            stderr,
        } = self
        {
            rustix::stdio::dup2_stdin(stdin)?;
            rustix::stdio::dup2_stdout(stdout)?;
            rustix::stdio::dup2_stderr(stderr)?;
        }
        Ok(())
    }
}

/// What is to be created.
#[derive(Debug)]
pub struct CreateOptions {
    /// The directory that holds the states of all containers.
    pub root: PathBuf,
    pub id: String,
    /// The directory that holds `config.json`.
    pub bundle: PathBuf,
    /// Another name for that file, looked for in the bundle.
    pub config: Option<PathBuf>,
    pub stdio: Stdio,
    /// A static program to execute in place of what `process.args[0]` names in the root, which may
    /// then be empty. Such a container gets no devices but those of its configuration.
    pub executable: Option<OwnedFd>,
    /// They become the descriptors 3, 4, … of the process.
    pub descriptors: Vec<OwnedFd>,
    /// Added to the environment of the process, `NAME=VALUE`.
    pub env: Vec<String>,
    /// Written, atomically, when the container is created.
    pub pid_file: Option<PathBuf>,
    /// A unix stream socket that gets a pidfd of the first process before anything is set up.
    pub pidfd_socket: Option<PathBuf>,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    pub grouping: Grouping,
    /// Who is told when the program says that it is ready.
    pub service_manager: Option<ServiceManager>,
}

/// How a container gets its control group.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Grouping {
    /// It is made in the file systems of control groups, at `linux.cgroupsPath`.
    Files,
    /// systemd makes it: `linux.cgroupsPath` is SLICE:PREFIX:NAME.
    Systemd,
    /// It gets none, and stays in its creator's.
    None,
}

/// A created container.
#[derive(Debug)]
pub struct Created {
    /// Its first process: a child of the caller, who must wait for it.
    pub process: Process,
    /// The other side of the terminal, if `process.terminal` asked for one and no console socket took
    /// it.
    pub console: Option<OwnedFd>,
    /// What the specification wants reported, but not refused.
    pub warnings: Vec<String>,
    /// Hears whether it is ready, if it was started for a service manager.
    pub(crate) proxy: Option<Proxy>,
}

/// Why a container was not created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    #[error(transparent)]
    Readiness(#[from] ReadinessError),
    #[error(transparent)]
    IdMap(#[from] IdMapError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    NetworkDevice(#[from] NetworkDeviceError),
    /// The first process says why it gave up.
    #[error(transparent)]
    Init(#[from] Failure),
    #[error("the container's first process died while it was set up")]
    InitDied,
    #[error(
        "the container's first process was killed for want of memory while it was set up: \
         linux.resources.memory.limit is too low"
    )]
    Memory,
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Criu(#[from] CriuError),
    #[error(transparent)]
    Resctrl(#[from] ResctrlError),
    #[error("a process with several threads cannot create a container")]
    Threads,
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
    #[error("{reason}")]
    Terminal { reason: &'static str },
}

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, CreateError> {
    result.map_err(|error| CreateError::Step {
        step,
        source: error.into(),
    })
}

/// Creates a container, whose program then waits for [`start`](crate::verbs::start::start).
///
/// # Errors
/// Those of [`CreateError`]; nothing is left behind. The caller must have a single thread.
pub fn create(options: CreateOptions) -> Result<Created, CreateError> {
    let (created, _) = make(options, Starter::Later)?;
    Ok(created)
}

/// Creates a container and starts its program at once.
///
/// # Errors
/// As [`create`]; also why the program could not be executed, and again nothing is left.
pub fn create_started(options: CreateOptions) -> Result<Created, CreateError> {
    let (root, id) = (options.root.clone(), options.id.clone());
    let manager = options.service_manager.clone();
    let (created, channel) = make(options, Starter::Creator)?;
    match await_start(&root, &id, manager.as_ref(), &channel) {
        Ok(proxy) => Ok(Created { proxy, ..created }),
        Err(error) => {
            delete_failed(&root, &id);
            let _ = created.process.wait();
            if let Some(Ok(mut relay)) = created.console.map(Relay::new) {
                // What a hook had to say before it failed.
                relay.drain();
            }
            Err(error)
        }
    }
}

/// Has the program executed. Returns what hears whether it is ready, if somebody wants to know.
fn await_start(
    root: &Path,
    id: &str,
    manager: Option<&ServiceManager>,
    channel: &Channel,
) -> Result<Option<Proxy>, CreateError> {
    let home = Home::open(root, id)?;
    let proxy = Proxy::listen(&home, manager)?;
    step("start the program", channel.send(&Message::Proceed))?;
    let record = home.record()?;
    await_exec(channel, |listener| {
        hand_over_listener(&home, &record, &listener)
    })?;
    home.mark_started()?;
    run_poststart(&record).map_err(StartError::from)?;
    Ok(proxy)
}

/// Who tells the first process to execute its program.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Starter {
    /// `start`, through a socket in the container's directory.
    Later,
    /// The creator, through its own channel.
    Creator,
}

fn make(options: CreateOptions, starter: Starter) -> Result<(Created, Channel), CreateError> {
    check_single_thread()?;
    let bundle = step("find the bundle", options.bundle.canonicalize())?;
    let (config, mut plan) = read(&options, &bundle, false)?;
    // What reads and checks a configuration is half of the program, and done.
    footprint::forget_code();
    idmap::apply(&plan.mounts, &plan.namespaces)?;
    let console_socket = connect_console(plan.process.terminal.is_some(), &options.stdio)?;

    let mut making = Making::claim(&options, bundle, &config, &plan)?;
    if options.service_manager.is_some() {
        making.prepare_readiness(&mut plan)?;
    }
    let cgroup = making.make_cgroup(&plan)?;
    making.make_resctrl(&plan)?;
    let entry = cgroup.entry()?;
    let listener = making.listen(starter)?;
    let cgroups = cgroup_trees(&cgroup, &plan)?;
    let (ours, theirs) = step("make a socket pair", Channel::pair())?;
    // Before the fork: the child may be in a pid namespace with others at once.
    step("stop being traceable", harden())?;
    let clone_into = entry.clone_into().filter(|_| !making.joins_later());
    let forked = namespaces::fork(&plan.namespaces, clone_into, None, &ours, &theirs);
    match step("make the container's first process", forked)? {
        Forked::Child => {
            drop(ours);
            let record = making.leave_to_creator();
            let keyring = format!("_ses.{}", options.id);
            let keyring = (!options.no_new_keyring).then(|| CString::new(keyring).ok());
            let wiring = Wiring {
                channel: theirs,
                record,
                listener,
                entry: Some(entry),
                stdio: options.stdio,
                inherited: Inherited {
                    executable: options.executable,
                    descriptors: options.descriptors,
                },
                cgroups,
                keyring: keyring.flatten(),
            };
            init::run(&plan, wiring)
        }
        Forked::Parent(process) => {
            drop((theirs, listener));
            making.record_process(process)?;
            making.join_scope()?;
            if let Some(path) = &options.pidfd_socket {
                step("send the pidfd", making.hand_over_process(path))?;
            }
            making.move_network_devices(&plan)?;
            making.give_pipes(&plan, &options.stdio)?;
            let console = making.conduct(&ours, &plan, console_socket.as_ref())?;
            making.settle(&cgroup, &plan)?;
            making.publish(starter, options.pid_file.as_deref())?;
            // Only now: the process must not wait for `start` under a name that nobody knows.
            if starter == Starter::Later {
                let proceed = Message::Proceed;
                if ours.send(&proceed).is_err() {
                    return Err(making.explain_death());
                }
            }
            let process = making.finish()?;
            Ok((
                Created {
                    process,
                    console,
                    warnings: config.warnings,
                    proxy: None,
                },
                ours,
            ))
        }
    }
}

/// With `check` nothing that is mounted is copied.
fn read(
    options: &CreateOptions,
    bundle: &Path,
    check: bool,
) -> Result<(Config, Plan), CreateError> {
    let mut config = match &options.config {
        Some(file) => Config::load_file(&bundle.join(file))?,
        None => Config::load(bundle)?,
    };
    let setting = Setting {
        id: &options.id,
        bundle,
        bare: options.executable.is_some(),
        grouping: options.grouping,
        check,
    };
    let raised = Raised::for_mounts(&config);
    let mut plan = Plan::new(&config, &setting)?;
    raised.keep_from(&mut plan.process);
    let added = options.env.iter().map(String::as_str).map(CString::new);
    plan.process.env.extend(added.flatten());
    let process = config.spec.process().as_ref();
    let asked = process.and_then(|process| process.capabilities().as_ref());
    let available = capability::available_in(&plan.namespaces);
    config
        .warnings
        .extend(capability::withheld(asked, available));
    Ok((config, plan))
}

/// The kernel counts a process's threads as directories of /proc/self/task.
fn check_single_thread() -> Result<(), CreateError> {
    let tasks = step("count the threads", rustix::fs::stat("/proc/self/task"))?;
    if tasks.st_nlink == 3 {
        Ok(())
    } else {
        Err(CreateError::Threads)
    }
}

/// Makes this process, and those that it forks until they execute a program, untraceable: nobody in a
/// container may look into them, or follow their /proc/PID/exe. A user without rights could not write
/// the id mappings of such a child; then root in the container has no rights over the host's files.
pub(crate) fn harden() -> rustix::io::Result<()> {
    if rustix::process::geteuid().is_root() {
        return set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
    Ok(())
}

pub(crate) fn connect_console(
    terminal: bool,
    stdio: &Stdio,
) -> Result<Option<UnixStream>, CreateError> {
    match (stdio, terminal) {
        (Stdio::ConsoleSocket(path), true) => {
            step("connect to the console socket", UnixStream::connect(path)).map(Some)
        }
        (Stdio::ConsoleSocket(_), false) => Err(CreateError::Terminal {
            reason: "a console socket is given, but process.terminal is not true",
        }),
        (Stdio::Fds { .. }, true) => Err(CreateError::Terminal {
            reason: "standard streams are given, but process.terminal is true",
        }),
        (Stdio::InheritWithoutTerminal, true) => Err(CreateError::Terminal {
            reason: "a terminal needs a console socket, since nobody stays to hold its other side",
        }),
        (Stdio::Inherit, _) | (Stdio::InheritWithoutTerminal | Stdio::Fds { .. }, false) => {
            Ok(None)
        }
    }
}

/// What a `cgroup` mount will show, if there is one.
fn cgroup_trees(cgroup: &Cgroup, plan: &Plan) -> Result<Vec<CgroupTrees>, CreateError> {
    let open = |(name, path): (String, PathBuf)| {
        let tree = clone_tree(CWD, &path, false);
        step("copy the mount of the cgroup", tree).map(|tree| (name, tree))
    };
    let shows = |mount: &&MountPlan| matches!(mount.what, MountKind::Cgroup);
    let mounts = plan.mounts.iter().filter(shows);
    mounts
        .map(|_| cgroup.views().into_iter().map(open).collect())
        .collect()
}

/// Written under another name first, so that whoever waits for the file finds it whole.
pub(crate) fn write_pid_file(path: &Path, pid: i32) -> io::Result<()> {
    let name = path.file_name().ok_or(rustix::io::Errno::INVAL)?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    let temporary = path.with_file_name(temporary);
    std::fs::write(&temporary, pid.to_string())?;
    std::fs::rename(temporary, path)
}
