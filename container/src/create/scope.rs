//! The scope of a container that is being created. A scope is around processes, and there is none yet
//! when its group is needed: one that does nothing stands in for it.

use std::io;

use oci_spec::runtime::LinuxResources;
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

use super::{CreateError, step};
use crate::cgroup::Cgroup;
use crate::plan::Plan;
use crate::process::Process;
use crate::sys::{self, Cloned};
use crate::systemd::{ScopePlan, Systemd};

/// A scope that was started, and is stopped if nobody keeps it.
#[derive(Debug)]
pub(super) struct Scope {
    systemd: Systemd,
    unit: String,
    stand_in: Option<Process>,
    kept: bool,
}

impl Scope {
    /// Starts the scope, and says which group it has in all hierarchies.
    pub(super) fn start(plan: &ScopePlan, id: &str) -> Result<(Self, String), CreateError> {
        let systemd = Systemd::connect()?;
        let stand_in = step("fork for the scope", stand_in())?;
        let pid = stand_in.pid();
        let mut scope = Self {
            systemd,
            unit: plan.unit.clone(),
            stand_in: Some(stand_in),
            kept: false,
        };
        let path = scope.systemd.start(plan, id, pid)?;
        Ok((scope, path))
    }

    /// Makes the rest of the group, and limits it.
    pub(super) fn make_cgroup(&self, path: &str, plan: &Plan) -> Result<Cgroup, CreateError> {
        let mut resources = plan.resources.clone();
        // The stand-in counts as long as it is there.
        let pids = resources.as_mut().and_then(|it| it.pids_mut().as_mut());
        if let Some(pids) = pids.filter(|pids| pids.limit() > 0) {
            pids.set_limit(pids.limit().saturating_add(1));
        }
        let occupant = self.stand_in.as_ref().map(Process::pid);
        Ok(Cgroup::create_around(path, resources.as_ref(), occupant)?)
    }

    /// Moves a process of this user into the group. From a session of the user, which lies below a group
    /// of root's, it could not move itself.
    pub(super) fn adopt(&mut self, pid: i32) -> Result<(), CreateError> {
        Ok(self.systemd.attach(&self.unit, pid)?)
    }

    /// Now that the container's process is in the group, the stand-in leaves, and systemd hears of the
    /// limits.
    pub(super) fn settle(&mut self, cgroup: &Cgroup, plan: &Plan) -> Result<(), CreateError> {
        step("end the stand-in of the scope", self.end_stand_in())?;
        let none = LinuxResources::default();
        let resources = plan.resources.as_ref().unwrap_or(&none);
        if let Some(pids) = resources.pids() {
            let mut only = LinuxResources::default();
            only.set_pids(Some(*pids));
            cgroup.update(&only)?;
        }
        let properties = cgroup.properties(resources, true)?;
        Ok(self.systemd.set(&self.unit, &properties)?)
    }

    /// The container exists: the scope stays until it is deleted.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }

    fn end_stand_in(&mut self) -> io::Result<()> {
        let Some(stand_in) = self.stand_in.take() else {
            return Ok(());
        };
        // It may have been killed as everybody in a group that is given up.
        let _ = stand_in.signal(libc::SIGKILL);
        stand_in.wait().map(|_| ())
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let _ = self.end_stand_in();
        if !self.kept {
            // Without processes it would end by itself, but a moment later.
            let _ = self.systemd.stop(&self.unit);
        }
    }
}

/// Forks a process that waits for its end, at the latest that of its parent.
fn stand_in() -> io::Result<Process> {
    let parent = getpid();
    match sys::clone3(0, None)? {
        Cloned::Parent { pid, pidfd } => Process::from_child(pid, pidfd),
        Cloned::Child => {
            let follows = set_parent_process_death_signal(Some(Signal::KILL)).is_ok();
            // It may have been too late.
            while follows && getppid() == Some(parent) {
                nix::unistd::pause();
            }
            sys::exit_now(0);
        }
    }
}
