//! Makes a container from a checkpoint: all that `create` makes around the processes, and these by CRIU.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use libc::MOUNT_ATTR_RDONLY;
use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::making::Making;
use super::{
    CreateError, CreateOptions, Created, Grouping, Starter, Stdio, check_single_thread,
    connect_console, read, step,
};
use crate::criu::{Criu, Point, Restore, Served, Source};
use crate::mounts::set_attributes;
use crate::plan::Plan;
use crate::process::{Exit, Process};
use crate::sys::{self, Cloned};
use crate::{rights, tty};

/// What is to be restored.
#[derive(Debug)]
pub struct RestoreOptions {
    /// The directory that holds the states of all containers.
    pub root: PathBuf,
    pub id: String,
    /// The directory that holds `config.json`.
    pub bundle: PathBuf,
    /// Another name for that file, looked for in the bundle.
    pub config: Option<PathBuf>,
    /// What takes the place of standard streams that led out of the container.
    pub stdio: Stdio,
    /// Written, atomically, when the container runs.
    pub pid_file: Option<PathBuf>,
    /// A unix stream socket that gets a pidfd of the first process.
    pub pidfd_socket: Option<PathBuf>,
    pub grouping: Grouping,
    pub from: Source,
}

impl RestoreOptions {
    /// What else may be said about a process that is made is in the images.
    fn split(self) -> (CreateOptions, Source) {
        let options = CreateOptions {
            root: self.root,
            id: self.id,
            bundle: self.bundle,
            config: self.config,
            stdio: self.stdio,
            executable: None,
            descriptors: Vec::new(),
            env: Vec::new(),
            pid_file: self.pid_file,
            pidfd_socket: self.pidfd_socket,
            no_new_keyring: false,
            grouping: self.grouping,
            service_manager: None,
        };
        (options, self.from)
    }
}

/// Restores a container, whose processes then run.
///
/// # Errors
/// Those of [`CreateError`]; nothing is left behind. The caller must have a single thread.
pub fn restore(options: RestoreOptions) -> Result<Created, CreateError> {
    check_single_thread()?;
    let criu = Criu::find(options.from.criu.as_deref())?;
    let (options, source) = options.split();
    let bundle = step("find the bundle", options.bundle.canonicalize())?;
    let (config, plan) = read(&options, &bundle, true)?;
    let console_socket = connect_console(plan.process.terminal.is_some(), &options.stdio)?;
    let mut making = Making::claim(&options, bundle.clone(), &config, &plan)?;
    let cgroup = making.make_cgroup(&plan)?;
    making.make_resctrl(&plan)?;
    let entry = cgroup.entry()?;
    making.listen(Starter::Creator)?;
    let scaffold = step("make a directory for CRIU", making.make_scaffold())?;
    let path = making.cgroup_path().to_owned();
    let annotations = making.annotations().clone();
    let task = Restore {
        spec: &config.spec,
        annotations: &annotations,
        bundle: &bundle,
        rootfs: &plan.rootfs_path,
        root_group: rights::outside(&plan.namespaces.gid_map, 0),
        scaffold: &scaffold,
        cgroup_path: &path,
        cgroup: &cgroup,
        entry: &entry,
        streams: options
            .stdio
            .streams()
            .filter(|_| plan.process.terminal.is_none()),
        source: &source,
    };
    let mut console = None;
    let restored = task.run(&criu, &mut |point| {
        attend(
            &mut making,
            &plan,
            point,
            console_socket.as_ref(),
            &mut console,
        )
    });
    step(
        "remove the directory for CRIU",
        std::fs::remove_dir(&scaffold),
    )?;
    restored.map_err(|error| match error {
        Served::Criu(error) => error.into(),
        Served::Caller(error) => error,
    })?;
    making.settle(&cgroup, &plan)?;
    if let Some(socket) = &options.pidfd_socket {
        step("send the pidfd", making.hand_over_process(socket))?;
    }
    making.publish(Starter::Creator, options.pid_file.as_deref())?;
    Ok(Created {
        process: making.finish()?,
        console,
        warnings: config.warnings,
        proxy: None,
    })
}

/// What is to be done at a point where CRIU waits.
fn attend(
    making: &mut Making,
    plan: &Plan,
    point: Point,
    console_socket: Option<&UnixStream>,
    console: &mut Option<OwnedFd>,
) -> Result<(), CreateError> {
    match point {
        Point::Namespaces { pid } => {
            record(making, pid)?;
            Ok(making.run_hooks(plan)?)
        }
        Point::Terminal(master) => {
            match console_socket {
                Some(socket) => step("hand over the terminal", tty::hand_over(socket, &master))?,
                None => *console = Some(master),
            }
            Ok(())
        }
        // From the answer on the processes run, whether this one lives or not.
        Point::Restored { pid } => {
            record(making, pid)?;
            if plan.readonly_root {
                // CRIU needs to write to it.
                let made = make_root_readonly(pid);
                step("make the root file system read-only", made)?;
            }
            making.mark_started()
        }
    }
}

/// Records the first process, once.
fn record(making: &mut Making, pid: i32) -> Result<(), CreateError> {
    if making.has_process() {
        return Ok(());
    }
    let process = step("find the container's first process", find_child(pid))?;
    making.record_process(process)
}

/// CRIU makes the first process as a child of this one.
fn find_child(pid: i32) -> io::Result<Process> {
    let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
    Process::from_child(pid, pidfd_open(raw, PidfdFlags::empty())?)
}

/// In a process of its own, since only who is in a mount namespace may change its mounts.
fn make_root_readonly(pid: i32) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = open(format!("/proc/{pid}/ns/mnt"), flags, Mode::empty())?;
    match sys::clone3(0, None)? {
        Cloned::Child => {
            let make = || -> io::Result<()> {
                setns(namespace, CloneFlags::CLONE_NEWNS)?;
                let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                set_attributes(root.as_fd(), MOUNT_ATTR_RDONLY)
            };
            let failed = make().map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
            sys::exit_now(failed.err().unwrap_or(0))
        }
        Cloned::Parent { pid, pidfd } => match Process::from_child(pid, pidfd)?.wait()? {
            Exit::Code(0) => Ok(()),
            Exit::Code(number) => Err(io::Error::from_raw_os_error(number)),
            Exit::Signal(_) => Err(io::ErrorKind::Interrupted.into()),
        },
    }
}
