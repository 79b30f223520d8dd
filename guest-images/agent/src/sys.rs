//! The system calls and instructions that no crate wraps safely.
//!
//! UNSAFETY: a child between fork and exec may only make plain system calls; ioctls, signals beyond
//! the 31 that nix names and I/O ports have no safe form. Nothing else is in here.
#![expect(
    unsafe_code,
    reason = "pre_exec, raw wait and kill, ioctls and I/O ports"
)]

use std::arch::asm;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::ptr;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::pty::Winsize;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid, write};

/// The soft limit on open files: what programs that use select(2) can stand. Servers raise it.
const OPEN_FILES: u64 = 1024;

nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);
nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);
// FIFREEZE of linux/fs.h.
nix::ioctl_readwrite!(freeze_file_system, b'X', 119, libc::c_int);

/// What a child does to itself before it becomes the program.
#[derive(Debug)]
pub(crate) struct Preparation {
    /// `cgroup.procs` of the group to join, open for writing.
    pub(crate) cgroup: OwnedFd,
    /// Whether the child is the first of a pid namespace and mounts that namespace's /proc.
    pub(crate) mount_proc: bool,
    /// Whether standard input is the terminal to be controlled by.
    pub(crate) terminal: bool,
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
}

/// Lets `command`'s child prepare itself. An error of a step is the error of the spawning.
pub(crate) fn prepare(command: &mut Command, preparation: Preparation) {
    // SAFETY: `become_session` makes system calls only. It neither allocates nor takes locks (nix
    // copies short paths to the stack), so it is safe in the child of a process with threads.
    unsafe { command.pre_exec(move || become_session(&preparation)) };
}

fn become_session(preparation: &Preparation) -> io::Result<()> {
    setsid()?;
    write(&preparation.cgroup, b"0")?;
    if preparation.mount_proc {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)?;
    }
    if preparation.terminal {
        // SAFETY: TIOCSCTTY takes a plain number, and a wrong descriptor is an error.
        unsafe { set_controlling_terminal(libc::STDIN_FILENO, 0) }?;
    }
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.min(most), most)?;
    reset_signals();
    SigSet::empty().thread_set_mask()?;
    setgroups(&preparation.groups)?;
    setresgid(preparation.gid, preparation.gid, preparation.gid)?;
    setresuid(preparation.uid, preparation.uid, preparation.uid)?;
    Ok(())
}

/// Gives every signal its default action: one that is ignored would stay so in the program, and a shell
/// cannot even trap it then.
fn reset_signals() {
    for number in 1..=libc::SIGRTMAX() {
        // SAFETY: the default action runs no code of this process. It is refused for signals that
        // always have it.
        let _ = unsafe { libc::signal(number, libc::SIG_DFL) };
    }
}

/// Takes one child that has ended off the kernel's list, if there is one.
pub(crate) fn reap() -> Option<(i32, ExitStatus)> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then(|| (pid, ExitStatus::from_raw(status)))
}

/// Sends a signal of any number. A negative pid is a process group, as in kill(2).
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain numbers.
    let result = unsafe { libc::kill(pid, signal) };
    Errno::result(result)?;
    Ok(())
}

/// A descriptor that stands for a process, whatever becomes of its number.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let descriptor = i32::try_from(Errno::result(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Waits as poll(2) does. nix's form of it loses a state that it has no name for (POLLRDHUP).
pub(crate) fn poll(descriptors: &mut [libc::pollfd], timeout_ms: i32) -> io::Result<()> {
    let count = libc::nfds_t::try_from(descriptors.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes within the slice, whose length it is given.
    let result = unsafe { libc::poll(descriptors.as_mut_ptr(), count, timeout_ms) };
    Errno::result(result)?;
    Ok(())
}

/// Waits for a connection, of whatever family the listening socket is.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let nowhere = ptr::null_mut();
    // SAFETY: no address is asked for, so nothing is written.
    let result = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            nowhere,
            ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    };
    let descriptor = Errno::result(result)?;
    // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

pub(crate) fn set_terminal_size(terminal: BorrowedFd<'_>, rows: u16, cols: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `size` outlives the call, and the kernel only reads it.
    unsafe { set_window_size(terminal.as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// Writes everything of a file system to its disk and blocks writers from then on, so that the disk
/// is as clean as after an unmount.
pub(crate) fn freeze(file_system: BorrowedFd<'_>) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: FIFREEZE ignores its argument, which outlives the call.
    unsafe { freeze_file_system(file_system.as_raw_fd(), &raw mut unused) }?;
    Ok(())
}

/// Writes `value` to an I/O port that reads as `magic`; whether that has come about.
///
/// A process of its own does it: where the kernel grants ports and the processor refuses them, as some
/// do in a machine that went on from a snapshot, that one is killed, and not the first process of all.
pub(crate) fn write_port(port: u16, magic: u32, value: u32) -> io::Result<bool> {
    in_child(|| {
        Ports::open(port).is_ok_and(|ports| {
            let there = ports.read() == magic;
            if there {
                ports.write(value);
            }
            there
        })
    })
}

/// Whether `act` returns true in a child, which ends with it. It may only make system calls and use
/// ports. The child is taken off the kernel's list by whoever takes all.
fn in_child(act: impl FnOnce() -> bool) -> io::Result<bool> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: the child makes system calls and uses ports, and ends. It takes no locks.
    let pid = Errno::result(unsafe { libc::fork() })?;
    if pid == 0 {
        if act() {
            // Nobody hears of it if the parent is gone.
            let _ = write(&writer, b"1");
        }
        // SAFETY: ends the child without running anything else.
        unsafe { libc::_exit(0) };
    }
    drop(writer);
    Ok(reader.read(&mut [0])? == 1)
}

/// Four I/O ports that the calling thread may use until this is dropped. Programs that it starts in
/// the meantime would inherit the permission.
#[derive(Debug)]
struct Ports {
    first: u16,
}

impl Ports {
    fn open(first: u16) -> io::Result<Ports> {
        // SAFETY: ioperm takes plain numbers.
        let result = unsafe { libc::ioperm(first.into(), 4, 1) };
        Errno::result(result)?;
        Ok(Ports { first })
    }

    /// One 32-bit read.
    fn read(&self) -> u32 {
        let value;
        // SAFETY: the ports may be used as long as `self` lives. They are a virtual machine's status
        // register or nothing; reading does not change the memory of the process.
        unsafe {
            asm!(
                "in eax, dx",
                in("dx") self.first,
                out("eax") value,
                options(nomem, nostack, preserves_flags)
            );
        };
        value
    }

    /// One 32-bit write.
    fn write(&self, value: u32) {
        // SAFETY: as in `read`; what writing does, it does to the virtual machine as a whole.
        unsafe {
            asm!(
                "out dx, eax",
                in("dx") self.first,
                in("eax") value,
                options(nomem, nostack, preserves_flags)
            );
        };
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        // SAFETY: ioperm takes plain numbers. Giving up what one has does not fail.
        unsafe { libc::ioperm(self.first.into(), 4, 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_faults_is_the_end_of_a_child_alone() {
        assert!(in_child(|| true).unwrap());
        assert!(!in_child(|| false).unwrap());
        // Nobody has asked for the port.
        assert!(!in_child(|| Ports { first: 0x610 }.read() != 0).unwrap());
    }
}
