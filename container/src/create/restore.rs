//! Makes a container from a checkpoint: all that `create` makes around the processes, and these by CRIU.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::making::Making;
use super::{
    CreateError, CreateOptions, Created, Starter, check_single_thread, connect_console, read, step,
};
use crate::criu::{Criu, Point, Restore, RestoreOptions, Served};
use crate::plan::Plan;
use crate::process::Process;
use crate::tty;

/// Restores a container, whose processes then run.
///
/// # Errors
/// Those of [`CreateError`]; nothing is left behind. The caller must have a single thread.
pub fn restore(options: CreateOptions, from: &RestoreOptions) -> Result<Created, CreateError> {
    check_single_thread()?;
    let criu = Criu::find(from.criu.as_deref())?;
    let bundle = step("find the bundle", options.bundle.canonicalize())?;
    let (config, plan) = read(&options, &bundle, true)?;
    let console_socket = connect_console(plan.process.terminal.is_some(), &options.stdio)?;
    let mut making = Making::claim(&options, bundle.clone(), &config, &plan)?;
    let cgroup = making.make_cgroup(&plan)?;
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
        scaffold: &scaffold,
        cgroup_path: &path,
        cgroup: &cgroup,
        entry: &entry,
        streams: options
            .stdio
            .streams()
            .filter(|_| plan.process.terminal.is_none()),
        options: from,
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
    match restored {
        Ok(_) => {}
        Err(Served::Criu(error)) => return Err(error.into()),
        Err(Served::Caller(error)) => return Err(error),
    }
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
