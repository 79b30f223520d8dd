//! System calls that neither rustix nor nix offers safely. No policy here.
//!
//! UNSAFETY: each function wraps one system call whose arguments are plain numbers or references
//! that outlive the call. `clone3` is called without CLONE_VM, so parent and child share no memory;
//! it is safe only because the caller has a single thread, or its child does next to nothing (see
//! [`clone3`]).
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::signal::{self, SigHandler, Signal};

/// `CLONE_PIDFD`: the parent gets a descriptor of the child.
const CLONE_PIDFD: u64 = 0x1000;
/// `CLONE_PARENT`: the child's parent is the caller's parent.
pub(crate) const CLONE_PARENT: u64 = 0x8000;
/// `CLONE_INTO_CGROUP`: the child starts in the cgroup of `CloneArguments::cgroup`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// One side of a [`clone3`].
#[derive(Debug)]
pub(crate) enum Cloned {
    /// The caller: the child's pid in the caller's pid namespace, and its descriptor.
    Parent { pid: i32, pidfd: OwnedFd },
    /// The new process.
    Child,
}

/// Forks into the new namespaces of `flags`, and into a cgroup v2 if one is given.
///
/// The caller must have a single thread: no lock of the allocator or of the standard streams can then
/// be held by a thread that the child lacks, and the child may run ordinary Rust code. Or the child makes
/// system calls and nothing else.
///
/// # Errors
/// The system call's.
pub(crate) fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // With CLONE_PARENT the exit signal is the caller's own, and must not be given.
    let exit_signal = if flags & CLONE_PARENT == 0 {
        libc::SIGCHLD
    } else {
        0
    };
    let into_cgroup = if cgroup.is_some() {
        CLONE_INTO_CGROUP
    } else {
        0
    };
    let mut arguments = libc::clone_args {
        flags: flags | CLONE_PIDFD | into_cgroup,
        pidfd: (&raw mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::from(exit_signal.unsigned_abs()),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs())),
    };
    // SAFETY: the structure and `pidfd` outlive the call; without CLONE_VM and with no stack given
    // this is a fork, and the caller has promised to have one thread or to make system calls only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    match result {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel has just made this descriptor for the caller, who owns it alone.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent {
                pid: i32::try_from(pid).map_err(io::Error::other)?,
                pidfd,
            })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Mount attributes that [`mount_setattr`] changes, in the kernel's `MOUNT_ATTR_*` bits.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct MountAttributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// `MS_SHARED` and its like, or 0.
    pub(crate) propagation: u64,
}

impl MountAttributes {
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// Changes the attributes of the mount whose root `mount` is, and of those below with `recursive`;
/// an id mapping is taken from `user_namespace`.
///
/// # Errors
/// The system call's.
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    attributes: MountAttributes,
    recursive: bool,
    user_namespace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let argument = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: user_namespace.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs())),
    };
    let empty: &CStr = c"";
    // SAFETY: the string and the structure outlive the call, and the size is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            empty.as_ptr(),
            flags,
            &raw const argument,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result)
}

/// Closes every descriptor from `first` on but those of `kept`, whoever owns it: for a process that is
/// about to execute another program, and uses none of its own any more.
///
/// # Errors
/// The system call's.
pub(crate) fn close_from(first: RawFd, kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    numbers.sort_unstable();
    let mut from = first;
    for number in numbers {
        if from < number {
            close_range(from.unsigned_abs(), number.unsigned_abs() - 1)?;
        }
        from = from.max(number + 1);
    }
    close_range(from.unsigned_abs(), u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: only numbers are passed. The values that owned the descriptors are never used or dropped
    // again, since the callers go on to exec, or end.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    check(result)
}

/// Makes `number` a copy of `descriptor` that exec keeps. What was open under that number is closed:
/// for a process that is about to execute another program, and uses none of its own any more.
///
/// # Errors
/// The system call's.
pub(crate) fn place_descriptor(descriptor: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: only numbers are passed. The value that owned `number` is never used again, since the
    // callers go on to exec.
    let result = unsafe { libc::dup2(descriptor.as_raw_fd(), number) };
    check(result.into())
}

/// A copy of a descriptor that this program was started with.
///
/// # Errors
/// EBADF if there is none of this number.
pub(crate) fn copy_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only numbers are passed, and the copy is new.
    let result = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for the caller, who owns it alone.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

/// Puts every signal that can be caught back to its default action, since ignored ones would stay ignored
/// in the container's program. But for SIGPIPE: a hook that does not read must not end this process.
pub(crate) fn reset_signal_handlers() {
    for number in Signal::iterator() {
        if !matches!(number, Signal::SIGKILL | Signal::SIGSTOP) {
            set_signal_action(number, SigHandler::SigDfl);
        }
    }
    set_signal_action(Signal::SIGPIPE, SigHandler::SigIgn);
}

/// Has this process end by the signals with which one is asked to end. The first process of a pid namespace
/// would otherwise not hear of them. The program that it executes does as it likes.
pub(crate) fn end_when_asked() {
    extern "C" fn end(number: libc::c_int) {
        // As a shell reports the end by a signal.
        exit_now(128 + number)
    }
    for number in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
    ] {
        set_signal_action(number, SigHandler::Handler(end));
    }
}

/// The last of them, for a process that is about to execute another program.
pub(crate) fn reset_broken_pipe() {
    set_signal_action(Signal::SIGPIPE, SigHandler::SigDfl);
}

fn set_signal_action(number: Signal, action: SigHandler) {
    // SAFETY: neither the default action nor none runs code of this process, and the one handler there is
    // only makes a system call. It cannot fail for a signal that exists and can be caught.
    let _ = unsafe { signal::signal(number, action) };
}

/// Sends a signal of any number, real-time ones included.
///
/// # Errors
/// The system call's.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: only numbers and a null pointer, which the kernel allows here, are passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    };
    check(result)
}

/// Starts a session keyring of its own, so that the container does not have the caller's keys.
///
/// # Errors
/// The system call's; ENOSYS where the kernel has no keyrings.
pub(crate) fn join_session_keyring(name: &CStr) -> io::Result<()> {
    // SAFETY: the name outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING,
            name.as_ptr(),
        )
    };
    check(result)
}

/// Sets the I/O priority of the calling process: class in bits 13 to 15, level below.
///
/// # Errors
/// The system call's.
pub(crate) fn set_io_priority(value: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: only numbers are passed.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) };
    check(result)
}

/// `struct sched_attr` of the kernel.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct SchedulerAttributes {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
    pub(crate) util_min: u32,
    pub(crate) util_max: u32,
}

/// Sets the scheduling policy of the calling process.
///
/// # Errors
/// The system call's.
pub(crate) fn set_scheduler(mut attributes: SchedulerAttributes) -> io::Result<()> {
    attributes.size = u32::try_from(size_of::<SchedulerAttributes>()).map_err(io::Error::other)?;
    // SAFETY: the structure outlives the call and says its own size.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    check(result)
}

/// Sets the memory policy of the calling thread, and of the programs it executes. `nodes` has a bit for
/// each memory node.
///
/// # Errors
/// The system call's.
pub(crate) fn set_memory_policy(mode: i32, nodes: &[u64]) -> io::Result<()> {
    // The kernel looks at one bit less than it is told, and takes no bits only without a pointer.
    let (pointer, bits) = if nodes.is_empty() {
        (std::ptr::null(), 0)
    } else {
        (nodes.as_ptr(), nodes.len() * 64 + 1)
    };
    // SAFETY: the pointer is null, or the slice outlives the call and has the bits that are claimed but
    // for the last, which the kernel does not read.
    let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, pointer, bits) };
    check(result)
}

/// The namespace type of an open namespace file, as a `CLONE_NEW*` flag.
///
/// # Errors
/// ENOTTY if the file is no namespace.
pub(crate) fn namespace_type(file: BorrowedFd<'_>) -> io::Result<u64> {
    const NS_GET_NSTYPE: u64 = 0xb703;
    // SAFETY: this ioctl takes no argument and changes nothing.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::from(result.unsigned_abs()))
}

/// Lets this process run on every processor that its group may use, whatever its caller's own may be.
/// That is a courtesy: if the kernel refuses, nothing is lost but time.
pub(crate) fn reset_affinity() {
    let mut all = rustix::thread::CpuSet::new();
    (0..rustix::thread::CpuSet::MAX_CPU).for_each(|processor| all.set(processor));
    let _ = rustix::thread::sched_setaffinity(None, &all);
}

/// Ends the process at once: no destructors and no exit handlers, which belong to the parent.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` touches no memory of the process.
    unsafe { libc::_exit(status) }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
