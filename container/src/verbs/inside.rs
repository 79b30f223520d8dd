//! What a further process enters: the namespaces and the root of a container's first one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use crate::plan::namespaces::{Kind, NamespacePlan};
use crate::process::Process;
use crate::state::Record;
use crate::{namespaces, rootfs};

/// The inside of a container, opened from the outside.
#[derive(Debug)]
pub(crate) struct Inside {
    /// Those that are not the caller's too.
    namespaces: NamespacePlan,
    /// Where the mount namespace does not say which it is.
    root: Option<OwnedFd>,
}

impl Inside {
    /// With `keep_groups` who enters keeps the additional groups.
    ///
    /// # Errors
    /// `ESRCH` if the first process has ended.
    pub(crate) fn open(init: &Process, record: &Record, keep_groups: bool) -> io::Result<Self> {
        let mut namespaces = open_namespaces(init)?;
        namespaces.keep_groups = keep_groups;
        let root = record.shares_mounts.then(|| open_root(init)).transpose()?;
        // Only now is it certain that the pid was still the right process's all the time.
        if init.ended_within(0)? {
            return Err(Errno::SRCH.into());
        }
        Ok(Self { namespaces, root })
    }

    pub(crate) fn namespaces(&self) -> &NamespacePlan {
        &self.namespaces
    }

    pub(crate) fn root(&self) -> Option<BorrowedFd<'_>> {
        self.root.as_ref().map(AsFd::as_fd)
    }

    /// The part of a child that was forked into [`Inside::namespaces`], if nobody there can see it.
    pub(crate) fn enter(self) -> io::Result<()> {
        namespaces::enter(&self.namespaces)?;
        // Now, as a mount namespace that is joined brings its root along.
        self.root.map_or(Ok(()), rootfs::change_root)
    }
}

fn open_namespaces(init: &Process) -> io::Result<NamespacePlan> {
    let mut plan = NamespacePlan::default();
    for (kind, name) in Kind::ALL {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = |pid: &str| openat(CWD, format!("/proc/{pid}/ns/{name}"), flags, Mode::empty());
        let (own, theirs) = match (open("self"), open(&init.pid().to_string())) {
            // The kernel does not have this kind.
            (Err(Errno::NOENT), _) => continue,
            (own, theirs) => (own?, theirs?),
        };
        let (mine, other) = (fstat(&own)?, fstat(&theirs)?);
        if mine.st_ino != other.st_ino {
            plan.joined.push((kind, theirs));
        }
    }
    plan.unseen = plan.joined(Kind::PID).is_some();
    Ok(plan)
}

fn open_root(init: &Process) -> io::Result<OwnedFd> {
    let path = format!("/proc/{}/root", init.pid());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}
