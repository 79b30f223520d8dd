//! The last steps of a process before it is the container's program: who it is, what it may do, exec.
//! Shared by the first process and by `exec`.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::personality::{self, Persona};
use oci_spec::runtime::{Hook, LinuxPersonalityDomain};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::{Pid, Rlimit, fchdir, getcwd, getrlimit, prlimit, setrlimit, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::create::{Stdio, standard_streams};
use crate::handshake::{Channel, Message, Reason};
use crate::hooks::{self, HookError, Surroundings};
use crate::plan::capability::{self, Capabilities};
use crate::plan::memory::MemoryPolicy;
use crate::plan::namespaces::{Kind, NamespacePlan};
use crate::plan::process::{ProcessPlan, UserPlan};
use crate::program::Program;
use crate::rights::{self, is_host_root};
use crate::root::Root;
use crate::seccomp::{Filter, SeccompError};
use crate::sys;

/// Why the program could not be executed. Engines tell the kinds apart by these texts; who has the
/// error itself, by [`Reason`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("executable file `{name}` not found in $PATH")]
    NotInPath { name: String, source: io::Error },
    #[error("cannot exec `{name}`")]
    Execute { name: String, source: io::Error },
    #[error("cannot change to the working directory `{path}`")]
    WorkingDirectory { path: String, source: io::Error },
    #[error("the working directory `{path}` is outside of the container")]
    Outside { path: String },
    #[error("linux.seccomp")]
    Filter(#[from] SeccompError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
}

impl LaunchError {
    fn reason(&self) -> Reason {
        match self {
            Self::NotInPath { .. } => Reason::ProgramNotFound,
            Self::Execute { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Reason::ProgramNotFound
            }
            Self::Execute { .. } => Reason::ProgramNotExecutable,
            Self::Hook(_) => Reason::Hook,
            Self::WorkingDirectory { .. }
            | Self::Outside { .. }
            | Self::Filter(_)
            | Self::Step { .. } => Reason::Other,
        }
    }
}

/// `PER_LINUX32` of <linux/personality.h>.
const PER_LINUX32: i32 = 0x0008;

/// Names the step that failed.
pub(crate) fn step<T, E: Into<io::Error>>(
    step: &'static str,
    result: Result<T, E>,
) -> Result<T, LaunchError> {
    result.map_err(|error| LaunchError::Step {
        step,
        source: error.into(),
    })
}

/// Changes to the working directory; false if that must wait until the user is taken on, who may be
/// allowed what this process is not: in a user namespace, or on a network's file system.
pub(crate) fn try_directory(process: &ProcessPlan) -> Result<bool, LaunchError> {
    match change_directory(process) {
        Ok(()) => Ok(true),
        Err(LaunchError::WorkingDirectory { source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Changes to the working directory and makes sure that it is inside: a descriptor that leaked could
/// otherwise be used as one (CVE-2024-21626).
fn change_directory(process: &ProcessPlan) -> Result<(), LaunchError> {
    let path = || process.cwd.display().to_string();
    // Links of the kernel, as /proc/self/fd/7, are not followed: this process has descriptors that the
    // program will not have.
    let change = || -> io::Result<()> {
        let directory = Root::current()?.open(&process.cwd, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(fchdir(directory)?)
    };
    change().map_err(|source| LaunchError::WorkingDirectory {
        path: path(),
        source,
    })?;
    match getcwd(Vec::new()) {
        Ok(directory) if directory.to_bytes().starts_with(b"/") => Ok(()),
        _ => Err(LaunchError::Outside { path: path() }),
    }
}

/// Takes on what must be done with all rights: label, scheduling, personality.
pub(crate) fn set_attributes(
    process: &ProcessPlan,
    domain: Option<LinuxPersonalityDomain>,
    memory: Option<&MemoryPolicy>,
) -> Result<(), LaunchError> {
    if let Some(priority) = process.io_priority {
        step("set the I/O priority", sys::set_io_priority(priority))?;
    }
    if let Some(scheduler) = process.scheduler {
        step("set the scheduler", sys::set_scheduler(scheduler))?;
    }
    if let Some(MemoryPolicy { mode, nodes }) = memory {
        let set = sys::set_memory_policy(*mode, nodes);
        step("set linux.memoryPolicy", set)?;
    }
    if let Some(domain) = domain {
        let persona = match domain {
            LinuxPersonalityDomain::PerLinux => Persona::empty(),
            LinuxPersonalityDomain::PerLinux32 => Persona::from_bits_retain(PER_LINUX32),
        };
        step("set the personality", personality::set(persona))?;
    }
    Ok(())
}

/// Starts a session keyring of its own.
pub(crate) fn join_keyring(name: &CStr) -> Result<(), LaunchError> {
    match sys::join_session_keyring(name) {
        // No keyrings in this kernel, or no quota left for one: then there are no keys to hide either.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EDQUOT)) => Ok(()),
        result => step("start a session keyring", result),
    }
}

/// Lets a process that was just forked have the hard limits of its program that are above the caller's
/// own: the process itself may lack the right to raise them, and sets its limits only at its end.
pub(crate) fn raise_limits(process: &ProcessPlan, pid: i32) -> io::Result<()> {
    // No limit is the highest.
    let above = |one: Option<u64>, other: Option<u64>| {
        other.is_some_and(|other| one.is_none_or(|one| one > other))
    };
    for (resource, limit) in &process.limits {
        let own = getrlimit(*resource);
        if above(limit.maximum, own.maximum) {
            let raised = Rlimit {
                maximum: limit.maximum,
                ..own
            };
            let failed = |error: rustix::io::Errno| {
                let error = io::Error::from(error);
                let limit = limit.maximum.unwrap_or(u64::MAX);
                io::Error::new(error.kind(), format!("{resource:?} to {limit}: {error}"))
            };
            prlimit(Pid::from_raw(pid), *resource, raised).map_err(failed)?;
        }
    }
    Ok(())
}

/// Takes on the user, its groups and its capabilities, and then the working directory unless that is done.
/// Nothing that is given up comes back.
pub(crate) fn take_on_identity(
    process: &ProcessPlan,
    in_directory: bool,
) -> Result<(), LaunchError> {
    step(
        "give the standard streams to the user",
        give_pipes(standard_streams(), process.user.uid),
    )?;
    drop_bounding(process.capabilities.bounding)?;
    // The change of user would take away what the configuration grants.
    step("keep the capabilities", set_keep_capabilities(true))?;
    set_user(&process.user)?;
    step(
        "keep the capabilities no longer",
        set_keep_capabilities(false),
    )?;
    set_capability_sets(&process.capabilities)?;
    if process.no_new_privileges {
        step("set no_new_privs", set_no_new_privs(true))?;
    }
    if in_directory {
        return Ok(());
    }
    change_directory(process)
}

/// Gives standard streams that are pipes to the user, who could otherwise not open /dev/stdout. What is
/// no pipe is not the container's own: a file of the host, or its null device, keeps its owner.
fn give_pipes(streams: [BorrowedFd<'_>; 3], uid: u32) -> io::Result<()> {
    for stream in streams {
        // A closed stream is the caller's choice.
        let Ok(stat) = rustix::fs::fstat(stream) else {
            continue;
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo || stat.st_uid == uid {
            continue;
        }
        match rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), None) {
            // In a user namespace that does not map the pipe's owner.
            Ok(()) | Err(rustix::io::Errno::PERM | rustix::io::Errno::INVAL) => {}
            failed => failed?,
        }
    }
    Ok(())
}

/// Gives standard streams that are pipes to the user of a process that was just forked into a user
/// namespace: from inside, the pipes of somebody who is not mapped cannot be taken over.
pub(crate) fn give_pipes_into(
    namespaces: &NamespacePlan,
    pid: i32,
    process: &ProcessPlan,
    stdio: &Stdio,
) -> io::Result<()> {
    if !namespaces.has(Kind::USER) || !is_host_root() || process.terminal.is_some() {
        return Ok(());
    }
    // Also where the namespace is one that was joined.
    let map = std::fs::read_to_string(format!("/proc/{pid}/uid_map"))?;
    match (stdio.streams(), rights::outside(&map, process.user.uid)) {
        (Some(streams), Some(uid)) => give_pipes(streams, uid),
        _ => Ok(()),
    }
}

fn drop_bounding(keep: CapabilitySet) -> Result<(), LaunchError> {
    for index in 0..capability::COUNT {
        let bit = CapabilitySet::from_bits_retain(1 << index);
        if keep.contains(bit) {
            continue;
        }
        match remove_capability_from_bounding_set(bit) {
            // An older kernel has fewer.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            failed => return step("limit the capabilities", failed),
        }
    }
    Ok(())
}

fn set_user(user: &UserPlan) -> Result<(), LaunchError> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    if !user.keep_groups {
        set_groups(&user.groups)?;
    }
    step("set the group id", set_thread_res_gid(gid, gid, gid))?;
    step("set the user id", set_thread_res_uid(uid, uid, uid))?;
    if let Some(mask) = user.umask {
        umask(Mode::from_raw_mode(mask & 0o777));
    } else {
        umask(Mode::from_raw_mode(0o022));
    }
    Ok(())
}

fn set_groups(groups: &[u32]) -> Result<(), LaunchError> {
    let groups = groups.iter().map(|group| Gid::from_raw(*group));
    let groups: Vec<Gid> = groups.collect();
    match set_thread_groups(&groups) {
        // In a user namespace of a user without rights, groups can be neither set nor given up.
        Err(rustix::io::Errno::PERM) if groups.is_empty() => Ok(()),
        result => step("set the groups", result),
    }
}

fn set_capability_sets(asked: &Capabilities) -> Result<(), LaunchError> {
    let sets = CapabilitySets {
        effective: asked.effective,
        permitted: asked.permitted,
        inheritable: asked.inheritable,
    };
    step("set the capabilities", set_capabilities(None, sets))?;
    step(
        "clear the ambient capabilities",
        clear_ambient_capability_set(),
    )?;
    for bit in asked.ambient.iter() {
        // The kernel takes only what is permitted and inheritable; the others do not give more either.
        match configure_capability_in_ambient_set(bit, true) {
            Ok(()) | Err(rustix::io::Errno::PERM) => {}
            failed => step("set the ambient capabilities", failed)?,
        }
    }
    Ok(())
}

/// The very last steps, when everything else is set up.
#[derive(Debug)]
pub(crate) struct Ending<'a> {
    pub(crate) process: &'a ProcessPlan,
    pub(crate) filter: Option<&'a Filter>,
    pub(crate) env: Vec<CString>,
    pub(crate) program: Program,
    /// Whether the identity was taken on before.
    pub(crate) has_identity: bool,
    /// Whether the working directory was; if not, the user must be taken on first.
    pub(crate) in_directory: bool,
    /// What runs before the program, as the program would: its user, rights, limits and filter.
    pub(crate) start_hooks: &'a [Hook],
    /// The OCI state, for the hooks.
    pub(crate) state: &'a str,
}

/// Whether the identity may be taken on before the filter is installed: without no_new_privs the
/// installation needs rights. The filter comes last in any case, so that it need not allow what
/// happens before.
pub(crate) fn identity_first(process: &ProcessPlan, filter: Option<&Filter>) -> bool {
    filter.is_none() || process.no_new_privileges
}

impl Ending<'_> {
    /// Becomes the program. `starter` hears that it is about to happen, gets the listener of the
    /// filter if it has one, and sees the end of the stream when it has happened.
    pub(crate) fn launch(
        self,
        starter: &Channel,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Infallible, LaunchError> {
        let starter = step("keep the channel", lift(starter, descriptors.len()))?;
        let starter = Channel::new(starter);
        let error = self.finish(&starter, descriptors);
        // The original channel is closed, or its number is one of the program's descriptors.
        error.or_else(|error| fail(&starter, &error))
    }

    fn finish(
        self,
        starter: &Channel,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Infallible, LaunchError> {
        let program = match &self.program {
            Program::Descriptor(file) => {
                Program::Descriptor(step("keep the program", lift(file, descriptors.len()))?)
            }
            Program::Paths(paths) => Program::Paths(paths.clone()),
        };
        step("report", starter.send(&Message::Executing))?;
        let first = identity_first(self.process, self.filter);
        if first && !self.has_identity {
            take_on_identity(self.process, self.in_directory)?;
        }
        let mut kept = vec![starter.as_fd()];
        if let Program::Descriptor(file) = &program {
            kept.push(file.as_fd());
        }
        step(
            "place the descriptors",
            place_descriptors(descriptors, &kept),
        )?;
        self.execute(&program, starter, first)
    }

    fn execute(
        &self,
        program: &Program,
        starter: &Channel,
        identity_first: bool,
    ) -> Result<Infallible, LaunchError> {
        // As late as possible: a low limit must not stop what comes before.
        for (resource, limit) in &self.process.limits {
            step("set process.rlimits", setrlimit(*resource, *limit))?;
        }
        install(self.filter, starter)?;
        if !identity_first {
            take_on_identity(self.process, self.in_directory)?;
        }
        let around = Surroundings {
            state: self.state,
            directory: None,
            env: Some(&self.env),
        };
        hooks::run(self.start_hooks, "startContainer", &around)?;
        program.execute(&self.process.args, &self.env)
    }
}

/// Tells the other side why this process gives up, and ends it.
pub(crate) fn fail(channel: &Channel, error: &(dyn std::error::Error + 'static)) -> ! {
    let reason = error
        .downcast_ref()
        .map_or(Reason::Other, LaunchError::reason);
    let message = crate::error::chain(error);
    // If the other side is gone there is nobody to tell.
    let _ = channel.send(&Message::failed(reason, message));
    sys::exit_now(1)
}

fn install(filter: Option<&Filter>, starter: &Channel) -> Result<(), LaunchError> {
    let Some(filter) = filter else { return Ok(()) };
    if let Some(listener) = filter.install()? {
        let message = Message::Notify(Some(listener));
        step(
            "send the listener of the seccomp filter",
            starter.send(&message),
        )?;
        // The program must not run before there is somebody to answer for it.
        let handed_over = starter.await_proceed();
        step("wait for the agent of the seccomp filter", handed_over)?;
    }
    Ok(())
}

/// A copy of a descriptor with a number that is not in the way of those that will be inherited.
fn lift(descriptor: impl AsFd, inherited: usize) -> io::Result<OwnedFd> {
    let first_free = 3 + i32::try_from(inherited).map_err(io::Error::other)?;
    Ok(rustix::io::fcntl_dupfd_cloexec(descriptor, first_free)?)
}

/// Puts descriptors at 3, 4, …, to be inherited, and closes all others but those of `kept`, which have
/// higher numbers. That exec would close them is not enough: it does so after it has found the program, and
/// an image's program may be a link that leads by one of them to the host (CVE-2024-21626).
fn place_descriptors(descriptors: Vec<OwnedFd>, kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count = u32::try_from(descriptors.len()).map_err(io::Error::other)?;
    let first_free = 3 + count.cast_signed();
    // First out of the way of the numbers that will be used.
    let moved: Vec<OwnedFd> = descriptors
        .iter()
        .map(|descriptor| rustix::io::fcntl_dupfd_cloexec(descriptor, first_free))
        .collect::<Result<_, _>>()?;
    for (number, descriptor) in (3..first_free).zip(&moved) {
        sys::place_descriptor(descriptor.as_fd(), number)?;
    }
    sys::close_from(first_free, kept)?;
    // They are closed, or their numbers are those of the copies.
    descriptors
        .into_iter()
        .chain(moved)
        .for_each(std::mem::forget);
    Ok(())
}
