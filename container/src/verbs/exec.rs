//! `exec`: runs one more process in a container.

mod entering;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxSeccomp, Process as ProcessSpec, Spec};

use self::entering::{Wiring, enter, settle};
use crate::cgroup::{Cgroup, CgroupError, Entry};
use crate::create::{CreateError, Stdio, connect_console, harden, write_pid_file};
use crate::handshake::{Channel, Failure, Message};
use crate::launch;
use crate::log;
use crate::namespaces::{self, Discretion, Forked};
use crate::notify;
use crate::plan::memory::{self, MemoryPolicy};
use crate::plan::namespaces::NamespacePlan;
use crate::plan::process::ProcessPlan;
use crate::plan::{PlanError, capability, keeps_groups};
use crate::process::Process;
use crate::resctrl::ResctrlError;
use crate::rights::is_host_root;
use crate::seccomp::{self, Filter};
use crate::spec::{Config, SpecError, load_process};
use crate::state::{Home, Record, StateError, Status};
use crate::systemd::{Systemd, SystemdError};
use crate::tty;
use crate::verbs::inside::Inside;
use crate::verbs::start::{StartError, await_exec};

/// What to run, and where.
#[derive(Debug)]
pub struct ExecOptions {
    pub root: PathBuf,
    pub id: String,
    pub what: What,
    pub stdio: Stdio,
    /// They become the descriptors 3, 4, … of the process.
    pub descriptors: Vec<OwnedFd>,
    /// Written, atomically, when the program runs.
    pub pid_file: Option<PathBuf>,
    /// A unix stream socket that gets a pidfd of the process before its program runs.
    pub pidfd_socket: Option<PathBuf>,
    /// Wait for a paused container to be resumed, instead of refusing.
    pub ignore_paused: bool,
    /// Groups below the container's own to run in, as `[CONTROLLER,…:]PATH`; in its own if empty.
    pub cgroups: Vec<String>,
}

/// The process of an [`exec`].
#[derive(Clone, Debug)]
pub enum What {
    /// The container's own `process`, changed.
    Changed(Changes),
    /// A file with a whole `process` object.
    File(PathBuf),
}

/// How the process differs from the container's own.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    pub args: Vec<String>,
    /// Added to the environment, `NAME=VALUE`.
    pub env: Vec<String>,
    pub cwd: Option<PathBuf>,
    /// User and, with it, group.
    pub user: Option<(u32, Option<u32>)>,
    pub additional_gids: Vec<u32>,
    /// Added to the capabilities.
    pub capabilities: Vec<String>,
    pub terminal: bool,
    pub no_new_privileges: bool,
    pub apparmor_profile: Option<String>,
    pub selinux_label: Option<String>,
}

/// A process that runs in a container.
#[derive(Debug)]
pub struct Executed {
    /// A child of the caller, who must wait for it.
    pub process: Process,
    /// The other side of the terminal, if there is one and no console socket took it.
    pub console: Option<OwnedFd>,
}

/// Why a process was not run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot exec in container `{id}`: it is {status}")]
    Status { id: String, status: Status },
    #[error("cannot exec in a paused container: `{id}`, as it is paused, without --ignore-paused")]
    Paused { id: String },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    /// The process says why it gave up.
    #[error(transparent)]
    Failed(#[from] Failure),
    #[error("the process died before it executed the program")]
    Died,
    #[error(transparent)]
    Setting(#[from] CreateError),
    #[error(transparent)]
    Resctrl(#[from] ResctrlError),
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
}

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, ExecError> {
    result.map_err(|error| ExecError::Step {
        step,
        source: error.into(),
    })
}

/// Runs a process in a running container, and returns when its program was executed.
///
/// # Errors
/// Those of [`ExecError`]; no process is left. The caller must have a single thread.
pub fn exec(options: ExecOptions) -> Result<Executed, ExecError> {
    let home = Home::open(&options.root, &options.id)?;
    let record = home.record()?;
    let init = find_init(&home, &record, options.ignore_paused)?;
    let config = Config::load_file(&home.config_path())?;
    let inside = step(
        "open the container's namespaces",
        Inside::open(&init, &record, keeps_groups(&config.spec)),
    )?;
    let plan = plan(&options.what, &config.spec, inside.namespaces())?;
    let console_socket = connect_console(plan.process.terminal.is_some(), &options.stdio)?;
    let cgroup = Cgroup::open(&record.cgroup)?;
    let entry = if options.cgroups.is_empty() {
        cgroup.entry_beside(init.pid())?
    } else {
        cgroup.entry_below(&options.cgroups)?
    };
    let (ours, theirs) = step("make a socket pair", Channel::pair())?;
    // Before the fork: the child is in the container's pid namespace at once.
    step("stop being traceable", harden())?;
    let ways = Ways {
        options: &options,
        plan: &plan,
        record: &record,
        inside: &inside,
        entry: &entry,
    };
    let (forked, attach) = step("make the process", ways.fork(&ours, &theirs))?;
    match forked {
        Forked::Child => {
            let outside = (ours, home, init, console_socket);
            let inside = if inside.namespaces().unseen {
                // It is inside, and has none of these open.
                std::mem::forget((outside, inside, entry));
                None
            } else {
                drop(outside);
                Some((inside, entry))
            };
            let keyring = format!("_ses.{}", options.id);
            let keyring = (!record.no_new_keyring).then(|| CString::new(keyring).ok());
            let wiring = Wiring {
                channel: theirs,
                inside,
                stdio: options.stdio,
                descriptors: options.descriptors,
                keyring: keyring.flatten(),
            };
            enter(&plan, wiring)
        }
        Forked::Parent(process) => {
            drop(theirs);
            let child = Child(Some(process));
            place(child.pid(), attach, &record)?;
            if let Some(path) = &options.pidfd_socket {
                step("send the pidfd", child.hand_over(path))?;
            }
            let (inside, user) = (inside.namespaces(), &plan.process);
            let given = launch::give_pipes_into(inside, child.pid(), user, &options.stdio);
            step("give the standard streams to the user", given)?;
            let console = child.conduct(&ours, &plan, &record, console_socket.as_ref())?;
            if let Some(path) = &options.pid_file {
                step("write the pid file", write_pid_file(path, child.pid()))?;
            }
            let process = child.into_process()?;
            Ok(Executed { process, console })
        }
    }
}

/// The ways into the container.
struct Ways<'a> {
    options: &'a ExecOptions,
    plan: &'a ExecPlan,
    record: &'a Record,
    inside: &'a Inside,
    entry: &'a Entry,
}

impl<'a> Ways<'a> {
    /// Makes the process, and says to which unit of systemd it is still to be attached.
    fn fork(&self, ours: &Channel, theirs: &Channel) -> io::Result<(Forked, Option<&'a str>)> {
        let settle = || settle(self.plan, self.entry);
        let streams = self.options.stdio.streams().into_iter().flatten();
        let descriptors = self.options.descriptors.iter().map(AsFd::as_fd);
        let discretion = Discretion {
            settle: &settle,
            root: self.inside.root(),
            kept: streams.chain(descriptors).collect(),
        };
        let namespaces = self.inside.namespaces();
        let discretion = namespaces.unseen.then_some(&discretion);
        let fork = |cgroup| namespaces::fork(namespaces, cgroup, discretion, ours, theirs);
        let otherwise = self.entry.otherwise();
        // From a session of the user, which lies below a group of root's, only systemd may lead into the
        // scope.
        let scope = self.record.scope.as_deref();
        let scope = scope.filter(|_| self.options.cgroups.is_empty() && !is_host_root());
        match fork(self.entry.clone_into()) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && otherwise.is_some() => {
                Ok((fork(otherwise)?, None))
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && scope.is_some() => {
                Ok((fork(None)?, scope))
            }
            forked => Ok((forked?, None)),
        }
    }
}

/// Puts a process where it cannot be made: into the unit's group, and to the container's share of caches.
fn place(pid: i32, unit: Option<&str>, record: &Record) -> Result<(), ExecError> {
    if let Some(unit) = unit {
        Systemd::connect()?.attach(unit, pid)?;
    }
    match &record.resctrl {
        Some(groups) => Ok(groups.add(pid)?),
        None => Ok(()),
    }
}

/// What will be done.
#[derive(Debug)]
struct ExecPlan {
    process: ProcessPlan,
    filter: Option<Filter>,
    /// Where the listener of the filter goes, if it has one.
    seccomp: Option<LinuxSeccomp>,
    personality: Option<oci_spec::runtime::LinuxPersonalityDomain>,
    memory_policy: Option<MemoryPolicy>,
}

fn plan(what: &What, spec: &Spec, namespaces: &NamespacePlan) -> Result<ExecPlan, ExecError> {
    let process = match what {
        What::Changed(changes) => changed(spec, changes)?,
        What::File(path) => load_process(path)?,
    };
    let available = capability::available_in(namespaces);
    let mut process = ProcessPlan::new(&process, available)?;
    process.user.keep_groups = namespaces.keep_groups;
    if let What::Changed(changes) = what {
        for name in &changes.capabilities {
            if !process.capabilities.add(name) {
                // As where a configuration has it.
                log::warn(&format!("capability `{name}` is unknown: it is left out"));
            }
        }
    }
    let linux = spec.linux().as_ref();
    let seccomp: Option<&LinuxSeccomp> = linux.and_then(|linux| linux.seccomp().as_ref());
    let filter = seccomp
        .map(seccomp::compile)
        .transpose()
        .map_err(PlanError::from)?;
    let personality = linux.and_then(|linux| linux.personality().as_ref());
    let memory_policy = linux.map(memory::plan).transpose()?.flatten();
    Ok(ExecPlan {
        memory_policy,
        process,
        filter,
        seccomp: seccomp.cloned(),
        personality: personality.map(|given| given.domain()),
    })
}

/// The container's own process with the changes made.
fn changed(spec: &Spec, changes: &Changes) -> Result<ProcessSpec, ExecError> {
    let missing = || PlanError::invalid("process", "it is needed");
    let mut process = spec.process().clone().ok_or_else(missing)?;
    process.set_args(Some(changes.args.clone()));
    process.set_terminal(Some(changes.terminal));
    if !changes.terminal {
        process.set_console_size(None);
    }
    process
        .env_mut()
        .get_or_insert_default()
        .extend(changes.env.iter().cloned());
    if let Some(cwd) = &changes.cwd {
        process.set_cwd(cwd.clone());
    }
    if changes.no_new_privileges {
        process.set_no_new_privileges(Some(true));
    }
    if changes.apparmor_profile.is_some() {
        process.set_apparmor_profile(changes.apparmor_profile.clone());
    }
    if changes.selinux_label.is_some() {
        process.set_selinux_label(changes.selinux_label.clone());
    }
    let user = process.user_mut();
    if let Some((uid, gid)) = changes.user {
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    user.additional_gids_mut()
        .get_or_insert_default()
        .extend(&changes.additional_gids);
    Ok(process)
}

/// The first process of a container that can take one more.
fn find_init(home: &Home, record: &Record, ignore_paused: bool) -> Result<Process, ExecError> {
    let (status, process) = home.observe(record)?;
    let refused = || {
        let id = record.id.clone();
        if status == Status::Paused {
            ExecError::Paused { id }
        } else {
            ExecError::Status { id, status }
        }
    };
    let can = match status {
        Status::Created | Status::Running => true,
        Status::Paused => ignore_paused,
        Status::Creating | Status::Stopped => false,
    };
    process.filter(|_| can).ok_or_else(refused)
}

/// The process from the creator's side; killed if it comes to nothing.
struct Child(Option<Process>);

impl Child {
    fn pid(&self) -> i32 {
        self.0.as_ref().map_or(0, Process::pid)
    }

    fn hand_over(&self, socket: &Path) -> io::Result<()> {
        self.0
            .as_ref()
            .map_or(Ok(()), |process| process.hand_over(socket))
    }

    fn into_process(mut self) -> Result<Process, ExecError> {
        self.0.take().ok_or(ExecError::Died)
    }

    fn conduct(
        &self,
        channel: &Channel,
        plan: &ExecPlan,
        record: &Record,
        console_socket: Option<&UnixStream>,
    ) -> Result<Option<OwnedFd>, ExecError> {
        if let Some(score) = plan.process.oom_score_adj {
            let path = format!("/proc/{}/oom_score_adj", self.pid());
            step(
                "set process.oomScoreAdj",
                std::fs::write(path, score.to_string()),
            )?;
        }
        step(
            "raise process.rlimits",
            launch::raise_limits(&plan.process, self.pid()),
        )?;
        let proceed = || channel.send(&Message::Proceed);
        // If the process is dead, what it had to say is still there to be received.
        let _ = proceed();
        let mut console = None;
        loop {
            match step("hear from the process", channel.receive())? {
                Some(Message::Console(Some(master))) => {
                    let kept = tty::hand_on(console_socket, master);
                    console = step("hand over the terminal", kept)?;
                }
                Some(Message::Ready) => break,
                Some(Message::Failed(failure)) => return Err(failure.into()),
                Some(_) => {}
                None => return Err(ExecError::Died),
            }
        }
        let _ = proceed();
        let agent = |listener| seccomp_agent(plan, record, self.pid(), &listener);
        match await_exec(channel, agent) {
            Ok(()) => Ok(console),
            Err(StartError::Failed(failure)) => Err(failure.into()),
            Err(_) => Err(ExecError::Died),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            let _ = process.signal(libc::SIGKILL);
            let _ = process.wait();
        }
    }
}

fn seccomp_agent(plan: &ExecPlan, record: &Record, pid: i32, listener: &OwnedFd) -> io::Result<()> {
    let Some(seccomp) = &plan.seccomp else {
        return Ok(());
    };
    notify::hand_over(seccomp, record, Status::Running, pid, listener)
}
