//! What a container that is being created consists of so far, each part unmade if a later one fails.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use libc::MOUNT_ATTR_RDONLY;

use super::scope::Scope;
use super::{CreateError, CreateOptions, Starter, Stdio, step, write_pid_file};
use crate::cgroup::Cgroup;
use crate::handshake::{self, Channel, Message};
use crate::hooks::{HookError, Surroundings};
use crate::network_devices::{self, Moved};
use crate::plan::Plan;
use crate::plan::mounts::{MountKind, MountPlan};
use crate::plan::namespaces::Kind;
use crate::process::Process;
use crate::rights::is_host_root;
use crate::spec::Config;
use crate::state::{Home, INIT_SOCKET, Record, Status};
use crate::verbs::delete::run_poststop;
use crate::verbs::state::oci_state;
use crate::{hooks, launch, readiness, tty};

/// Where CRIU has the root file system of a container, in its own mount namespace.
const SCAFFOLD: &str = "criu-root";

/// What has been made so far, and is unmade when dropped.
pub(super) struct Making {
    home: Option<Home>,
    record: Record,
    scope: Option<Scope>,
    cgroup: Option<Cgroup>,
    process: Option<Process>,
    network_devices: Option<Moved>,
}

impl Making {
    /// Takes the id, and records what is about to be made under it.
    pub(super) fn claim(
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
            scope: plan.scope.as_ref().map(|scope| scope.unit.clone()),
            resctrl: None,
            shares_mounts: plan.namespaces.shares_mounts(),
            no_new_keyring: options.no_new_keyring,
            annotations: map_or_empty(config.spec.annotations()),
            poststart: plan.hooks.poststart().clone().unwrap_or_default(),
            poststop: plan.hooks.poststop().clone().unwrap_or_default(),
        };
        let home = Home::claim(&options.root, &options.id)?;
        let making = Self {
            home: Some(home),
            record,
            scope: None,
            cgroup: None,
            process: None,
            network_devices: None,
        };
        making.home().write_config(&config.text)?;
        making.home().write_record(&making.record)?;
        Ok(making)
    }

    fn home(&self) -> &Home {
        self.home
            .as_ref()
            .expect("it is taken only by the methods that consume the value")
    }

    /// The path of the group that was made; empty if there is none.
    pub(super) fn cgroup_path(&self) -> &str {
        &self.record.cgroup
    }

    pub(super) fn annotations(&self) -> &BTreeMap<String, String> {
        &self.record.annotations
    }

    /// Lets the container say that it is ready.
    pub(super) fn prepare_readiness(&self, plan: &mut Plan) -> Result<(), CreateError> {
        let (mounts, process) = (&mut plan.mounts, &mut plan.process);
        Ok(readiness::prepare(self.home(), mounts, process)?)
    }

    pub(super) fn make_cgroup(&mut self, plan: &Plan) -> Result<Cgroup, CreateError> {
        let cgroup = if let Some(scope) = &plan.scope {
            let (scope, path) = Scope::start(scope, &self.record.id)?;
            let scope = self.scope.insert(scope);
            let cgroup = scope.make_cgroup(&path, plan)?;
            self.record.cgroup = path;
            self.home().write_record(&self.record)?;
            cgroup
        } else if plan.cgroup.is_empty() {
            Cgroup::open("")?
        } else {
            Cgroup::create(&plan.cgroup, plan.resources.as_ref())?
        };
        self.cgroup = Some(cgroup.clone());
        match cgroup_owner(plan) {
            Some(0) | None => {}
            Some(owner) => cgroup.give_to(owner)?,
        }
        Ok(cgroup)
    }

    /// Makes the container's share of caches and memory bandwidth, if it has one.
    pub(super) fn make_resctrl(&mut self, plan: &Plan) -> Result<(), CreateError> {
        let Some(plan) = &plan.resctrl else {
            return Ok(());
        };
        // Recorded first, so that what a killed creator leaves is found.
        let groups = self.record.resctrl.insert(plan.groups()).clone();
        self.home().write_record(&self.record)?;
        // What was not made is not to be unmade.
        Ok(plan
            .make(&groups)
            .inspect_err(|_| self.record.resctrl = None)?)
    }

    /// Where the process will wait for `start`, if it shall; and the mark that it is not started.
    pub(super) fn listen(&self, starter: Starter) -> Result<Option<OwnedFd>, CreateError> {
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

    pub(super) fn record_process(&mut self, process: Process) -> Result<(), CreateError> {
        self.record.pid = process.pid();
        self.record.start_time = process.start_time();
        let process = self.process.insert(process);
        if let Some(home) = &self.home {
            home.write_process(process)?;
        }
        // Those that it makes are then there, too.
        match &self.record.resctrl {
            Some(groups) => Ok(groups.add(self.record.pid)?),
            None => Ok(()),
        }
    }

    pub(super) fn has_process(&self) -> bool {
        self.process.is_some()
    }

    /// Whether the process cannot be made in its group: systemd alone may move it there.
    pub(super) fn joins_later(&self) -> bool {
        self.scope.is_some() && !is_host_root()
    }

    /// Has systemd move the process into its group, if that is the way.
    pub(super) fn join_scope(&mut self) -> Result<(), CreateError> {
        let later = self.joins_later();
        match &mut self.scope {
            Some(scope) if later => scope.adopt(self.record.pid),
            _ => Ok(()),
        }
    }

    /// Sends a descriptor of the process to whoever wants to watch it.
    pub(super) fn hand_over_process(&self, socket: &Path) -> io::Result<()> {
        let process = self.process.as_ref();
        process.map_or(Ok(()), |process| process.hand_over(socket))
    }

    /// Gives the process its network devices. It is in its network namespace, and still waits.
    pub(super) fn move_network_devices(&mut self, plan: &Plan) -> Result<(), CreateError> {
        let devices = &plan.network_devices;
        self.network_devices = network_devices::attach(devices, &plan.namespaces, self.record.pid)?;
        Ok(())
    }

    /// Gives the process its standard streams, where it cannot take them over itself.
    pub(super) fn give_pipes(&self, plan: &Plan, stdio: &Stdio) -> Result<(), CreateError> {
        let (namespaces, process) = (&plan.namespaces, &plan.process);
        let given = launch::give_pipes_into(namespaces, self.record.pid, process, stdio);
        step("give the standard streams to the user", given)
    }

    /// Leads the first process through its set-up, to where only `start` is missing. Returns the
    /// terminal's master, if nobody else took it.
    pub(super) fn conduct(
        &self,
        channel: &Channel,
        plan: &Plan,
        console_socket: Option<&UnixStream>,
    ) -> Result<Option<OwnedFd>, CreateError> {
        self.set_score(plan)?;
        let raised = launch::raise_limits(&plan.process, self.record.pid);
        step("raise process.rlimits", raised)?;
        let proceed = || step("go on", channel.send(&Message::Proceed));
        // If the process is dead, what it had to say is still there to be received.
        let _ = proceed();
        let mut console = None;
        loop {
            match step("hear from the first process", channel.receive())? {
                Some(Message::Hooks) => {
                    self.run_hooks(plan)?;
                    let _ = proceed();
                }
                Some(Message::Console(Some(master))) => {
                    let kept = tty::hand_on(console_socket, master);
                    console = step("hand over the terminal", kept)?;
                }
                Some(Message::Ready) => {
                    return Ok(console);
                }
                Some(Message::Failed(failure)) => return Err(failure.into()),
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

    /// Those that belong into the namespaces of the caller.
    pub(super) fn run_hooks(&self, plan: &Plan) -> Result<(), HookError> {
        let state = oci_state(&self.record, Status::Created, self.record.pid);
        let around = Surroundings {
            state: &state,
            directory: Some(self.record.bundle.clone()),
            env: None,
        };
        let mut lists = hooks::lists(&plan.hooks).into_iter().take(2);
        lists.try_for_each(|(list, name)| hooks::run(list, name, &around))
    }

    /// The process is in its group: systemd can be told what it is about.
    pub(super) fn settle(&mut self, cgroup: &Cgroup, plan: &Plan) -> Result<(), CreateError> {
        match &mut self.scope {
            Some(scope) => scope.settle(cgroup, plan),
            None => Ok(()),
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

    /// What CRIU has brought back runs as soon as this process says so.
    pub(super) fn mark_started(&self) -> Result<(), CreateError> {
        Ok(self.home().mark_started()?)
    }

    /// An empty directory, for as long as the container is being restored, by its absolute path.
    pub(super) fn make_scaffold(&self) -> io::Result<PathBuf> {
        let path = self.home().path().canonicalize()?.join(SCAFFOLD);
        std::fs::create_dir(&path)?;
        Ok(path)
    }

    pub(super) fn explain_death(&self) -> CreateError {
        let kills = self.cgroup.as_ref().map(Cgroup::oom_kills);
        if kills.is_some_and(|kills| kills.is_ok_and(|kills| kills > 0)) {
            return CreateError::Memory;
        }
        CreateError::InitDied
    }

    pub(super) fn publish(
        &self,
        starter: Starter,
        pid_file: Option<&Path>,
    ) -> Result<(), CreateError> {
        if starter == Starter::Later {
            self.home().publish_start_socket()?;
        }
        match pid_file {
            Some(path) => step("write the pid file", write_pid_file(path, self.record.pid)),
            None => Ok(()),
        }
    }

    /// All went well: what was made stays.
    pub(super) fn finish(mut self) -> Result<Process, CreateError> {
        self.home = None;
        self.cgroup = None;
        if let Some(scope) = self.scope.take() {
            scope.keep();
        }
        if let Some(moved) = self.network_devices.take() {
            moved.keep();
        }
        self.process.take().ok_or(CreateError::InitDied)
    }

    /// In the first process, which has nothing to undo: the copy of the directory's handle is closed,
    /// since the lock would last as long as it. The rest is only memory, which the process shares with
    /// its creator: to free it would be to copy it first.
    pub(super) fn leave_to_creator(mut self) -> &'static Record {
        if let Some(home) = self.home.take() {
            home.close();
        }
        &Box::leak(Box::new(self)).record
    }
}

impl Drop for Making {
    /// Undoes in reverse order, and as `delete` does it. Each step is tried, whatever became of the others.
    fn drop(&mut self) {
        // With the process its network namespace goes, and all that is virtual in it.
        self.network_devices = None;
        let was_made = self.process.is_some();
        if let Some(process) = self.process.take() {
            let _ = process.signal(libc::SIGKILL);
            let _ = process.wait();
        }
        if let Some(cgroup) = self.cgroup.take() {
            let _ = cgroup.remove();
        }
        self.scope = None;
        if let Some(home) = self.home.take() {
            if let Some(groups) = &self.record.resctrl {
                let _ = groups.remove();
            }
            let _ = home.remove();
        }
        // What hooks set up is theirs to undo, also if one of them failed.
        if was_made {
            for warning in run_poststop(&self.record) {
                crate::log::warn(&warning);
            }
        }
    }
}

/// The user who may manage the group from inside (config-linux.md, Cgroup ownership): that of the program,
/// if the container sees the group as the root of all groups, and can write there.
fn cgroup_owner(plan: &Plan) -> Option<u32> {
    let is_root = plan.namespaces.makes(Kind::CGROUP);
    let writable = |mount: &MountPlan| {
        let attributes = mount.options.attributes.set | mount.options.recursive.set;
        matches!(mount.what, MountKind::Cgroup) && attributes & MOUNT_ATTR_RDONLY == 0
    };
    let may = is_root && plan.mounts.iter().any(writable);
    plan.namespaces
        .host_user(plan.process.user.uid)
        .filter(|_| may)
}

fn map_or_empty(map: &Option<HashMap<String, String>>) -> BTreeMap<String, String> {
    let entries = map.iter().flatten();
    entries
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}
