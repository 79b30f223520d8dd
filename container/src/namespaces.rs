//! Makes the first process of a container in its namespaces.
//!
//! Whatever the namespaces are, the process becomes a direct child of the caller, so that the caller can
//! wait for it. Where a process must first join namespaces with rights that it then loses to a user
//! namespace, or make a time namespace, which only holds for its children, a helper does so and makes
//! the first process as its *sibling* (CLONE_PARENT).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::handshake::{Channel, Message, Reason};
use crate::plan::namespaces::{Kind, NamespacePlan};
use crate::process::Process;
use crate::rights::is_host_root;
use crate::rootfs;
use crate::sys::{self, Cloned};

/// Which side of a [`fork`] this is.
#[derive(Debug)]
pub(crate) enum Forked {
    Parent(Process),
    /// The first process. It is in all namespaces but those that [`enter`] joins or makes, and must not
    /// do anything before it was told to go on.
    Child,
}

/// How a process gets into a pid namespace where others may see it, and with the right to trace could
/// follow its root and its descriptors: with nothing of the host's. A helper does what has to be done
/// outside, and then makes it.
pub(crate) struct Discretion<'a> {
    /// Done first, outside of all namespaces.
    pub(crate) settle: &'a dyn Fn() -> io::Result<()>,
    /// The root directory, where the mount namespace does not say which it is.
    pub(crate) root: Option<BorrowedFd<'a>>,
    /// What the process keeps, beside its end of the channel. What owns any other descriptor must be
    /// forgotten in it, not dropped: they are closed.
    pub(crate) kept: Vec<BorrowedFd<'a>>,
}

/// Forks the first process. `ours` and `theirs` are the ends of the channel between the two; `cgroup`
/// is a cgroup of v2 that it shall start in. With an `unseen` plan there is a `discretion`.
///
/// The caller must have a single thread.
pub(crate) fn fork(
    plan: &NamespacePlan,
    cgroup: Option<BorrowedFd<'_>>,
    discretion: Option<&Discretion<'_>>,
    ours: &Channel,
    theirs: &Channel,
) -> io::Result<Forked> {
    if needs_helper(plan) {
        return fork_by_helper(plan, cgroup, discretion, ours, theirs);
    }
    // A pid namespace is joined by the parent, for its next children, and left again.
    let own_pid_namespace = match plan.joined(Kind::PID) {
        Some(namespace) => {
            let own = std::fs::File::open("/proc/self/ns/pid")?;
            setns(namespace, CloneFlags::CLONE_NEWPID)?;
            Some(own)
        }
        None => None,
    };
    let cloned = sys::clone3(made_by_clone(plan), cgroup);
    if let (Some(own), false) = (own_pid_namespace, matches!(cloned, Ok(Cloned::Child))) {
        setns(own, CloneFlags::CLONE_NEWPID)?;
    }
    match cloned? {
        Cloned::Child => Ok(Forked::Child),
        Cloned::Parent { pid, pidfd } => {
            let process = Process::from_child(pid, pidfd)?;
            if let Err(error) = write_maps(plan, pid) {
                // It has done nothing yet.
                let _ = process.signal(libc::SIGKILL);
                process.wait()?;
                return Err(error);
            }
            Ok(Forked::Parent(process))
        }
    }
}

/// The child's part: joins and makes what its parent could not.
pub(crate) fn enter(plan: &NamespacePlan) -> io::Result<()> {
    if !needs_helper(plan) {
        if plan.makes(Kind::USER) {
            become_root(&own_process()?, plan.keep_groups)?;
        }
        join(plan, |kind| kind != Kind::PID)?;
    }
    // Now that the process is in its cgroup, which becomes the root of what it sees.
    if plan.makes(Kind::CGROUP) {
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
    }
    Ok(())
}

/// In a user namespace, the ids are the overflow ids until the mapped root is taken on; or, where nobody is
/// mapped to root, the first that is mapped. The process has all rights there in any case. `own` is
/// [`own_process`].
fn become_root(own: &OwnedFd, keep_groups: bool) -> io::Result<()> {
    if !keep_groups {
        // Not allowed where the mapping was written by a user without rights; the groups stay then.
        let _ = set_thread_groups(&[]);
    }
    let set_group = |gid| {
        let gid = Gid::from_raw(gid);
        set_thread_res_gid(gid, gid, gid)
    };
    let set_user = |uid| {
        let uid = Uid::from_raw(uid);
        set_thread_res_uid(uid, uid, uid)
    };
    match set_group(0) {
        Err(Errno::INVAL) => set_group(first_mapped(own, "gid_map")?)?,
        set => set?,
    }
    match set_user(0) {
        Err(Errno::INVAL) => set_user(first_mapped(own, "uid_map")?)?,
        set => set?,
    }
    Ok(())
}

/// The directory of this process in the caller's /proc, which nobody in a container can have replaced.
fn own_process() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, "/proc/self", flags, Mode::empty())?)
}

/// The first id of this process's namespace that there is.
fn first_mapped(own: &OwnedFd, file: &str) -> io::Result<u32> {
    let file = openat(own, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let map = io::read_to_string(std::fs::File::from(file))?;
    let first = map.split_whitespace().next();
    first
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| Errno::INVAL.into())
}

/// What is joined beside a new user namespace is its creator's, and so are the rights to join it. And a pid
/// namespace that is joined without the rights of the host's root cannot be left again.
fn needs_helper(plan: &NamespacePlan) -> bool {
    plan.unseen
        || plan.joined(Kind::USER).is_some()
        || plan.makes(Kind::TIME)
        || (plan.makes(Kind::USER) && !plan.joined.is_empty())
        || (plan.joined(Kind::PID).is_some() && !is_host_root())
}

/// What clone3 makes. A cgroup namespace is made later: its root is the cgroup at that time.
fn made_by_clone(plan: &NamespacePlan) -> u64 {
    plan.new & !Kind::CGROUP.0
}

fn fork_by_helper(
    plan: &NamespacePlan,
    cgroup: Option<BorrowedFd<'_>>,
    discretion: Option<&Discretion<'_>>,
    ours: &Channel,
    theirs: &Channel,
) -> io::Result<Forked> {
    // The cgroup is entered by the helper, and inherited: afterwards the right to may be gone.
    match sys::clone3(0, cgroup)? {
        Cloned::Child => {
            let made = help(plan, discretion, theirs);
            match made {
                Ok(Cloned::Child) => Ok(Forked::Child),
                Ok(Cloned::Parent { pid, pidfd }) => {
                    let message = Message::Forked {
                        pid,
                        pidfd: Some(pidfd),
                    };
                    let sent = theirs.send(&message);
                    sys::exit_now(i32::from(sent.is_err()));
                }
                Err(error) => {
                    let message = format!("cannot enter the namespaces: {error}");
                    // There is nobody else to tell.
                    let _ = theirs.send(&Message::failed(Reason::Other, message));
                    sys::exit_now(1);
                }
            }
        }
        Cloned::Parent { pid, pidfd } => {
            let made = attend_helper(plan, pid, &pidfd, ours);
            if made.is_err() {
                // It may have ended already.
                let _ = sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
            }
            waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
            made.map(Forked::Parent)
        }
    }
}

/// The parent's part: writes the mappings when the helper has its user namespace, and takes over the
/// process that it makes.
fn attend_helper(
    plan: &NamespacePlan,
    pid: i32,
    pidfd: &OwnedFd,
    ours: &Channel,
) -> io::Result<Process> {
    loop {
        match hear(ours, pidfd)? {
            Some(Message::Ready) => {
                write_maps(plan, pid)?;
                ours.send(&Message::Proceed)?;
            }
            Some(Message::Forked {
                pid,
                pidfd: Some(pidfd),
            }) => return Process::from_child(pid, pidfd),
            Some(Message::Failed(failure)) => return Err(io::Error::other(failure)),
            _ => {
                return Err(io::Error::other(
                    "the helper that makes the namespaces made none",
                ));
            }
        }
    }
}

fn hear(ours: &Channel, helper: &OwnedFd) -> io::Result<Option<Message>> {
    // The parent holds a copy of the peer's end, so the end of the stream would not be seen; a helper
    // that dies without a word makes its descriptor readable.
    let mut fds = [
        rustix::event::PollFd::new(ours, rustix::event::PollFlags::IN),
        rustix::event::PollFd::new(helper, rustix::event::PollFlags::IN),
    ];
    rustix::event::poll(&mut fds, None)?;
    if fds[0].revents().is_empty() {
        return Err(io::Error::other(
            "the helper that makes the namespaces died",
        ));
    }
    ours.receive()
}

/// A namespace can be joined by who has rights over its owner, a user namespace. Whose the namespaces are
/// cannot be told: they may be the caller's, as the network of another container on the host, or the
/// container's own. So the caller's rights are tried first, and then those in the user namespace.
fn help(
    plan: &NamespacePlan,
    discretion: Option<&Discretion<'_>>,
    theirs: &Channel,
) -> io::Result<Cloned> {
    if let Some(discretion) = discretion {
        (discretion.settle)()?;
    }
    let own = own_process()?;
    let mut denied = Vec::new();
    for (kind, file) in plan.joined.iter().filter(|(kind, _)| *kind != Kind::USER) {
        match set_namespace(*kind, file) {
            Err(nix::Error::EPERM) if plan.has(Kind::USER) => denied.push((*kind, file)),
            result => result.map_err(|error| named(*kind, error))?,
        }
    }
    if plan.makes(Kind::USER) {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        theirs.send(&Message::Ready)?;
        theirs.await_proceed()?;
    }
    join(plan, |kind| kind == Kind::USER)?;
    if plan.makes(Kind::TIME) {
        unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))?;
        // As the user who owns the files of a process that cannot be traced: not yet as the container's
        // root.
        if !plan.time_offsets.is_empty() {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = openat(&own, "timens_offsets", flags, Mode::empty())?;
            rustix::io::write(file, plan.time_offsets.as_bytes())?;
        }
    }
    if plan.has(Kind::USER) {
        become_root(&own, plan.keep_groups)?;
    }
    for (kind, file) in denied {
        set_namespace(kind, file).map_err(|error| named(kind, error))?;
    }
    drop(own);
    if let Some(discretion) = discretion {
        // Now, as a mount namespace that is joined brings its root along.
        discretion.root.map_or(Ok(()), rootfs::change_root)?;
        let channel = std::iter::once(theirs.as_fd());
        let kept: Vec<_> = channel.chain(discretion.kept.iter().copied()).collect();
        sys::close_from(3, &kept)?;
    }
    let rest = made_by_clone(plan) & !(Kind::USER.0 | Kind::TIME.0);
    sys::clone3(rest | sys::CLONE_PARENT, None)
}

fn join(plan: &NamespacePlan, which: impl Fn(Kind) -> bool) -> io::Result<()> {
    for (kind, file) in plan.joined.iter().filter(|(kind, _)| which(*kind)) {
        set_namespace(*kind, file).map_err(|error| named(*kind, error))?;
    }
    Ok(())
}

fn set_namespace(kind: Kind, file: &OwnedFd) -> nix::Result<()> {
    let flag = i32::try_from(kind.0).map_err(|_| nix::Error::EINVAL)?;
    setns(file, CloneFlags::from_bits_retain(flag))
}

fn named(kind: Kind, error: nix::Error) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{}: {error}", kind.file_name()))
}

/// Writes the mappings of the user namespace, if there is a new one.
fn write_maps(plan: &NamespacePlan, pid: i32) -> io::Result<()> {
    if !plan.makes(Kind::USER) {
        return Ok(());
    }
    write_id_maps(pid, &plan.uid_map, &plan.gid_map)
}

/// Writes the mappings of a process's new user namespace from outside, where the rights are.
pub(crate) fn write_id_maps(pid: i32, uid_map: &str, gid_map: &str) -> io::Result<()> {
    let write = |file: &str, text: &str| std::fs::write(format!("/proc/{pid}/{file}"), text);
    if !rustix::process::geteuid().is_root() {
        // The kernel's condition for a mapping written by a user without rights (user_namespaces(7)).
        write("setgroups", "deny")?;
    }
    write("gid_map", gid_map)?;
    write("uid_map", uid_map)
}
