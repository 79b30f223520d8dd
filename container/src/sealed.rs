//! Runs the rest from a read-only view of this program's file.
//!
//! A container whose program is a link to /proc/self/exe executes this file, and may then open it by
//! /proc/PID/exe and write to it once nobody runs it any more: with root's rights that replaces the
//! host's program (CVE-2019-5736). Opened through a mount that is read-only it cannot be written to,
//! whatever the rights. So this program executes itself again through a read-only copy of the mount,
//! attached nowhere, which copies nothing. Mostly that has happened before the C library was set up (see
//! `entry` in the program), and there is nothing left to do here.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use nix::fcntl::AtFlags;
use nix::unistd::execveat;
use rustix::fs::{CWD, StatVfsMountFlags, statvfs};

use crate::log;
use crate::mounts::set_attributes;
use crate::plan::mounts::clone_tree;

/// Returns when this program's file is on a read-only mount, or cannot be put there: without the right
/// to copy mounts, there is no right to the host's files in the container either.
pub fn seal() {
    let read_only = statvfs("/proc/self/exe")
        .is_ok_and(|mount| mount.f_flag.contains(StatVfsMountFlags::RDONLY));
    if read_only {
        return;
    }
    let c_string = |text: std::ffi::OsString| CString::new(text.into_vec()).ok();
    let args: Option<Vec<CString>> = std::env::args_os().map(c_string).collect();
    let env: Option<Vec<CString>> = std::env::vars_os()
        .map(|(name, value)| {
            let mut entry = name;
            entry.push("=");
            entry.push(value);
            c_string(entry)
        })
        .collect();
    if let (Some(args), Some(env)) = (args, env)
        && let Err(error) = execute(&args, &env)
    {
        log::debug(&format!("the program's file stays writable: {error}"));
    }
}

/// Does not return on success.
fn execute(args: &[CString], env: &[CString]) -> io::Result<Infallible> {
    let file = clone_tree(CWD, Path::new("/proc/self/exe"), false)?;
    set_attributes(file.as_fd(), libc::MOUNT_ATTR_RDONLY)?;
    Ok(execveat(&file, c"", args, env, AtFlags::AT_EMPTY_PATH)?)
}
