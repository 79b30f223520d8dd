//! Gives a process the label of a mandatory access control system that its program will have.
//!
//! The kernel reads it from a file of /proc. In the container anything may be mounted there, also another
//! file of a procfs, which would get what is written (CVE-2019-16884, CVE-2025-52881).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{
    CWD, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, fstat, fstatfs, openat, openat2,
};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use crate::launch::{LaunchError, step};
use crate::plan::process::Label;

/// The inode number of each procfs's root (`PROC_ROOT_INO`, include/linux/proc_fs.h).
const PROC_ROOT_INO: u64 = 1;

/// The file that the kernel reads the label from.
#[derive(Debug)]
pub(crate) struct LabelFile<'a> {
    file: File,
    text: &'a str,
    is_apparmor: bool,
}

impl<'a> LabelFile<'a> {
    /// For this process, while /proc is the host's; another one, also a child, may not write to them.
    pub(crate) fn open_all(labels: &'a [Label]) -> Result<Vec<Self>, LaunchError> {
        Self::open_below(labels, host_proc)
    }

    /// The same in a container.
    pub(crate) fn open_all_inside(labels: &'a [Label]) -> Result<Vec<Self>, LaunchError> {
        Self::open_below(labels, || new_proc().or_else(|_| own_proc()))
    }

    fn open_below(
        labels: &'a [Label],
        proc: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> Result<Vec<Self>, LaunchError> {
        if labels.is_empty() {
            return Ok(Vec::new());
        }
        let proc = step("open /proc for the security label", proc())?;
        let open = |label| Self::open(&proc, label);
        labels.iter().map(open).collect()
    }

    fn open(proc: &OwnedFd, label: &'a Label) -> Result<Self, LaunchError> {
        let open = |path: &str| {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            // Nothing that is mounted over a file is followed.
            let how = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
            let file = openat2(proc, path, flags, Mode::empty(), how)?;
            Ok::<_, io::Error>(File::from(file))
        };
        let shared = "self/attr/exec";
        let (file, text, is_apparmor) = match label {
            // Older kernels have only the file that all systems share.
            Label::AppArmor(profile) => {
                let own = open("self/attr/apparmor/exec");
                (own.or_else(|_| open(shared)), profile, true)
            }
            Label::Selinux(label) => (open(shared), label, false),
        };
        Ok(Self {
            file: step("open the file for the security label", file)?,
            text,
            is_apparmor,
        })
    }

    /// Sets the label that exec gives.
    pub(crate) fn write(mut self) -> Result<(), LaunchError> {
        let written = if self.is_apparmor {
            self.file
                .write_all(format!("exec {}", self.text).as_bytes())
        } else {
            self.file.write_all(self.text.as_bytes())
        };
        step("set the security label", written)
    }
}

fn host_proc() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(CWD, "/proc", flags, Mode::empty())?)
}

/// A procfs of the container's pid namespace that nobody else has, with processes only. A user namespace
/// may not have one where the container's own is masked.
fn new_proc() -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "subset", "pid")?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// The container's, if it is the root of a procfs.
fn own_proc() -> io::Result<OwnedFd> {
    let proc = host_proc()?;
    let is_proc = fstatfs(&proc)?.f_type == PROC_SUPER_MAGIC;
    if is_proc && fstat(&proc)?.st_ino == PROC_ROOT_INO {
        return Ok(proc);
    }
    Err(io::Error::other("the container's /proc is no procfs"))
}
