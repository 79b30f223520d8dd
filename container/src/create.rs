//! Creates a container: the creator's side.
//!
//! Everything is checked and opened before anything is made (`plan`). Then, in this order, each undone
//! if a later step fails: the container's directory, with its record; its cgroup; its first process,
//! recorded before it is allowed to do anything. If the creator itself dies, the process sees its socket
//! close and ends; what is left is a directory without a live process, which `delete` and the next
//! `create` of the same id remove.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::CWD;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::cgroup::{Cgroup, CgroupError};
use crate::handshake::{self, Channel, Message};
use crate::hooks::HookError;
use crate::idmap::IdMapError;
use crate::init::{self, Wiring};
use crate::mounts::CgroupTrees;
use crate::namespaces::{self, Forked};
use crate::plan::mounts::{MountKind, clone_tree};
use crate::plan::{Inherited, Plan, PlanError, Setting};
use crate::process::Process;
use crate::spec::{Config, SpecError};
use crate::state::{Home, INIT_SOCKET, Record, StateError, Status};
use crate::verbs::delete::{DeleteOptions, delete};
use crate::verbs::start::{StartError, await_exec, hand_over_listener, run_poststart};
use crate::verbs::state::oci_state;
use crate::{hooks, idmap, launch, tty};

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

impl Stdio {
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
    pub stdio: Stdio,
    /// A static program to execute in place of what `process.args[0]` names in the root, which may
    /// then be empty. Such a container gets no devices but those of its configuration.
    pub executable: Option<OwnedFd>,
    /// They become the descriptors 3, 4, … of the process.
    pub descriptors: Vec<OwnedFd>,
    /// Written, atomically, when the container is created.
    pub pid_file: Option<PathBuf>,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
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
    IdMap(#[from] IdMapError),
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The first process says why it gave up.
    #[error("{message}")]
    Init { message: String },
    #[error("the container's first process died while it was set up")]
    InitDied,
    #[error(
        "the container's first process was killed for want of memory while it was set up: \
         linux.resources.memory.limit is too low"
    )]
    Memory,
    #[error(transparent)]
    Start(#[from] StartError),
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
    let (created, channel) = make(options, Starter::Creator)?;
    let started = step(
        "start the program",
        channel.send(&Message::Proceed {
            state: String::new(),
        }),
    )
    .and_then(|()| Ok(await_start(&root, &id, &channel)?));
    if let Err(error) = started {
        // What is reported is the first error; the second could only be that something is left.
        let _ = delete(&DeleteOptions {
            root,
            id,
            force: true,
        });
        let _ = created.process.wait();
        return Err(error);
    }
    Ok(created)
}

fn await_start(root: &Path, id: &str, channel: &Channel) -> Result<(), StartError> {
    let home = Home::open(root, id)?;
    let record = home.record()?;
    await_exec(channel, |listener| {
        hand_over_listener(&home, &record, &listener)
    })?;
    home.mark_started()?;
    run_poststart(&home, &record)
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
    let config = Config::load(&bundle)?;
    let setting = Setting {
        id: &options.id,
        bundle: &bundle,
        bare: options.executable.is_some(),
    };
    let plan = Plan::new(&config, &setting)?;
    idmap::apply(&plan.mounts)?;
    let console_socket = connect_console(plan.process.terminal.is_some(), &options.stdio)?;

    let mut making = Making::claim(&options, bundle, &config, &plan)?;
    let cgroup = making.make_cgroup(&plan)?;
    let entry = cgroup.entry()?;
    let listener = making.listen(starter)?;
    let cgroups = cgroup_trees(&cgroup, &plan)?;
    let (ours, theirs) = step("make a socket pair", Channel::pair())?;
    // Before the fork: the child may be in a pid namespace with others at once.
    step("stop being traceable", harden())?;
    let forked = namespaces::fork(&plan.namespaces, entry.clone_into(), &ours, &theirs);
    match step("make the container's first process", forked)? {
        Forked::Child => {
            drop(ours);
            making.leave_to_creator();
            let keyring = format!("_ses.{}", options.id);
            let keyring = (!options.no_new_keyring).then(|| CString::new(keyring).ok());
            let wiring = Wiring {
                channel: theirs,
                listener,
                entry,
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
            let console = making.conduct(&ours, &plan, console_socket.as_ref())?;
            making.publish(starter, options.pid_file.as_deref())?;
            // Only now: the process must not wait for `start` under a name that nobody knows.
            if starter == Starter::Later {
                step(
                    "finish the container",
                    ours.send(&Message::Proceed {
                        state: String::new(),
                    }),
                )?;
            }
            let process = making.finish()?;
            Ok((
                Created {
                    process,
                    console,
                    warnings: config.warnings,
                },
                ours,
            ))
        }
    }
}

/// What has been made so far, and is unmade when dropped.
struct Making {
    home: Option<Home>,
    record: Record,
    cgroup: Option<Cgroup>,
    process: Option<Process>,
}

impl Making {
    /// Takes the id, and records what is about to be made under it.
    fn claim(
        options: &CreateOptions,
        bundle: PathBuf,
        config: &Config,
        plan: &Plan,
    ) -> Result<Self, CreateError> {
        let record = Record {
            oci_version: config.spec.version().clone(),
            id: options.id.clone(),
            bundle,
            rootfs: plan.rootfs_path.clone(),
            created: Timestamp::now(),
            owner: rustix::process::getuid().as_raw(),
            pid: 0,
            start_time: 0,
            cgroup: plan.cgroup.clone(),
            annotations: map_or_empty(config.spec.annotations()),
            poststart: plan.hooks.poststart().clone().unwrap_or_default(),
            poststop: plan.hooks.poststop().clone().unwrap_or_default(),
        };
        let home = Home::claim(&options.root, &options.id)?;
        let making = Self {
            home: Some(home),
            record,
            cgroup: None,
            process: None,
        };
        making.home().write_record(&making.record)?;
        making.home().write_config(&config.text)?;
        Ok(making)
    }

    fn home(&self) -> &Home {
        self.home
            .as_ref()
            .expect("it is taken only by the methods that consume the value")
    }

    fn make_cgroup(&mut self, plan: &Plan) -> Result<Cgroup, CreateError> {
        let cgroup = Cgroup::create(&plan.cgroup, plan.resources.as_ref())?;
        self.cgroup = Some(cgroup.clone());
        Ok(cgroup)
    }

    /// Where the process will wait for `start`, if it shall; and the mark that it is not started.
    fn listen(&self, starter: Starter) -> Result<Option<OwnedFd>, CreateError> {
        match starter {
            Starter::Later => {
                let listener = handshake::listen(&self.home().socket_path(INIT_SOCKET));
                step("listen for `start`", listener).map(Some)
            }
            Starter::Creator => {
                self.home().mark_unstarted()?;
                Ok(None)
            }
        }
    }

    fn record_process(&mut self, process: Process) -> Result<(), CreateError> {
        self.record.pid = process.pid();
        self.record.start_time = process.start_time();
        self.process = Some(process);
        Ok(self.home().write_record(&self.record)?)
    }

    /// Leads the first process through its set-up, to where only `start` is missing. Returns the
    /// terminal's master, if nobody else took it.
    fn conduct(
        &self,
        channel: &Channel,
        plan: &Plan,
        console_socket: Option<&UnixStream>,
    ) -> Result<Option<OwnedFd>, CreateError> {
        let state = oci_state(&self.record, Status::Created, self.record.pid);
        self.set_score(plan)?;
        let raised = launch::raise_limits(&plan.process, self.record.pid);
        step("raise process.rlimits", raised)?;
        let proceed = || {
            step(
                "go on",
                channel.send(&Message::Proceed {
                    state: state.clone(),
                }),
            )
        };
        // If the process is dead, what it had to say is still there to be received.
        let _ = proceed();
        let mut console = None;
        loop {
            match step("hear from the first process", channel.receive())? {
                Some(Message::Hooks) => {
                    for (list, name) in hooks::lists(&plan.hooks).into_iter().take(2) {
                        hooks::run(list, name, &state)?;
                    }
                    proceed()?;
                }
                Some(Message::Console(Some(master))) => match console_socket {
                    Some(socket) => {
                        step("hand over the terminal", tty::hand_over(socket, &master))?;
                    }
                    None => console = Some(master),
                },
                Some(Message::Ready) => {
                    return Ok(console);
                }
                Some(Message::Failed { message }) => return Err(CreateError::Init { message }),
                Some(other) => {
                    let source = io::Error::other(format!("an unexpected message: {other:?}"));
                    return Err(CreateError::Step {
                        step: "hear from the first process",
                        source,
                    });
                }
                None => return Err(self.explain_death()),
            }
        }
    }

    /// Done from outside, where the rights are that a container need not have.
    fn set_score(&self, plan: &Plan) -> Result<(), CreateError> {
        let Some(score) = plan.process.oom_score_adj else {
            return Ok(());
        };
        let path = format!("/proc/{}/oom_score_adj", self.record.pid);
        step(
            "set process.oomScoreAdj",
            std::fs::write(path, score.to_string()),
        )
    }

    fn explain_death(&self) -> CreateError {
        let kills = self.cgroup.as_ref().map(Cgroup::oom_kills);
        if kills.is_some_and(|kills| kills.is_ok_and(|kills| kills > 0)) {
            return CreateError::Memory;
        }
        CreateError::InitDied
    }

    fn publish(&self, starter: Starter, pid_file: Option<&Path>) -> Result<(), CreateError> {
        if starter == Starter::Later {
            self.home().publish_start_socket()?;
        }
        match pid_file {
            Some(path) => step("write the pid file", write_pid_file(path, self.record.pid)),
            None => Ok(()),
        }
    }

    /// All went well: what was made stays.
    fn finish(mut self) -> Result<Process, CreateError> {
        self.home = None;
        self.cgroup = None;
        self.process.take().ok_or(CreateError::InitDied)
    }

    /// In the first process: the copies of the creator's handles are closed, and nothing is undone.
    fn leave_to_creator(mut self) {
        self.home = None;
        self.cgroup = None;
        self.process = None;
    }
}

impl Drop for Making {
    /// Undoes in reverse order. Each step is tried, whatever became of the others.
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.signal(libc::SIGKILL);
            let _ = process.wait();
        }
        if let Some(cgroup) = self.cgroup.take() {
            let _ = cgroup.remove();
        }
        if let Some(home) = self.home.take() {
            let _ = home.remove();
        }
    }
}

fn map_or_empty(map: &Option<HashMap<String, String>>) -> BTreeMap<String, String> {
    let entries = map.iter().flatten();
    entries
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
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
fn cgroup_trees(cgroup: &Cgroup, plan: &Plan) -> Result<CgroupTrees, CreateError> {
    if !plan
        .mounts
        .iter()
        .any(|mount| matches!(mount.what, MountKind::Cgroup))
    {
        return Ok(CgroupTrees::new());
    }
    let open = |(name, path): (String, PathBuf)| {
        let tree = clone_tree(CWD, &path, false);
        step("copy the mount of the cgroup", tree).map(|tree| (name, tree))
    };
    cgroup.views().into_iter().map(open).collect()
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
