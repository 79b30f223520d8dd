//! A process, known by its pid and its start time, and held by a descriptor.
//!
//! A pid alone means nothing after the process has ended: the kernel gives it to another one.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

use crate::{handshake, sys};

/// More than a stat file has: 52 numbers, and a name of at most 64 bytes.
const STAT_BYTES: usize = 1024;

/// A process of this host that existed when the value was made.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    start_time: u64,
    pidfd: OwnedFd,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    /// It exited with this status, 0 to 255.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Exit {
    /// The status that a shell would report: 128 + the signal's number if a signal killed it.
    pub fn status(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 + signal,
        }
    }
}

impl Process {
    /// A child that nobody has waited for, so that its pid cannot have been given to another. It may have
    /// ended.
    pub(crate) fn from_child(pid: i32, pidfd: OwnedFd) -> io::Result<Self> {
        let start_time = stat(pid)?.ok_or(Errno::SRCH)?.start_time;
        Ok(Self {
            pid,
            start_time,
            pidfd,
        })
    }

    /// The process that had this pid and this start time; nothing if it is gone, or a zombie.
    ///
    /// # Errors
    /// When /proc or the pidfd cannot be read: not knowing is not the same as gone.
    pub fn find(pid: i32, start_time: u64) -> io::Result<Option<Self>> {
        let Some(raw) = Pid::from_raw(pid).filter(|_| pid > 0) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // The other two, by kernel, where the number is that of a process group or a session that
            // lives on, or a thread's by now.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Read after the descriptor was opened: if the time is right now, the descriptor was right.
        match self::start_time(pid)? {
            Some(found) if found == start_time => Ok(Some(Self {
                pid,
                start_time,
                pidfd,
            })),
            _ => Ok(None),
        }
    }

    /// The pid, in the pid namespace of the caller.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Field 22 of /proc/PID/stat: clock ticks since boot.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Sends a signal, which reaches this process or none.
    ///
    /// # Errors
    /// ESRCH if it has ended; EINVAL if there is no such signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        sys::pidfd_send_signal(self.pidfd.as_fd(), signal)
    }

    /// Sends the descriptor to whoever listens at a unix stream socket.
    pub(crate) fn hand_over(&self, socket: &Path) -> io::Result<()> {
        let socket = UnixStream::connect(socket)?;
        handshake::send_descriptor(socket.as_fd(), b"pidfd", self.as_fd())
    }

    /// Waits until the process has ended, whoever its parent is; false if `milliseconds` went by first.
    ///
    /// # Errors
    /// The system call's.
    pub fn ended_within(&self, milliseconds: u32) -> io::Result<bool> {
        let timeout = Timespec {
            tv_sec: i64::from(milliseconds / 1000),
            tv_nsec: i64::from(milliseconds % 1000) * 1_000_000,
        };
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a child of this process to end, and reaps it.
    ///
    /// # Errors
    /// ECHILD if it is not a child of the caller, or has been reaped.
    pub fn wait(&self) -> io::Result<Exit> {
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    return Ok(match status.exit_status() {
                        Some(code) => Exit::Code(code),
                        None => Exit::Signal(status.terminating_signal().unwrap_or_default()),
                    });
                }
                Ok(None) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// A copy of a descriptor that this program was started with.
///
/// # Errors
/// EBADF if there is none of this number.
pub fn copy_inherited(number: i32) -> io::Result<OwnedFd> {
    sys::copy_inherited(number)
}

/// When the process was started, in clock ticks since boot; nothing if it is gone or has ended.
///
/// # Errors
/// When its stat file cannot be read or understood.
pub fn start_time(pid: i32) -> io::Result<Option<u64>> {
    let lives = |stat: &Stat| !stat.has_ended;
    Ok(stat(pid)?.filter(lives).map(|stat| stat.start_time))
}

/// What a stat file tells of a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stat {
    /// It may wait to be reaped.
    has_ended: bool,
    /// In clock ticks since boot.
    start_time: u64,
}

/// Nothing if there is no such process.
fn stat(pid: i32) -> io::Result<Option<Stat>> {
    let path = format!("/proc/{pid}/stat");
    // Read at once: the kernel would make the text anew for each part.
    let mut text = Vec::with_capacity(STAT_BYTES);
    match std::fs::File::open(&path).and_then(|mut file| file.read_to_end(&mut text)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    let malformed = || io::Error::other(format!("{path} is malformed"));
    parse_stat(&text).map(Some).ok_or_else(malformed)
}

/// Fields 3 (state) and 22 (start time) of a stat file: the name before them may hold any character,
/// also `)`.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let name_end = text.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(text.get(name_end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    Some(Stat {
        has_ended: matches!(state, "Z" | "X" | "x"),
        start_time: fields.nth(18)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name_is() {
        let rest = "1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 99 1";
        for (name, state, has_ended) in [
            ("sh", "S", false),
            ("a) R (b", "S", false),
            ("sh", "Z", true),
        ] {
            let line = format!("7 ({name}) {state} {rest}");
            let expected = Stat {
                has_ended,
                start_time: 4242,
            };
            assert_eq!(parse_stat(line.as_bytes()), Some(expected), "{line}");
        }
        assert_eq!(parse_stat(b"7 (sh"), None);
    }

    #[test]
    fn a_child_may_have_ended_before_it_is_looked_at() {
        let sys::Cloned::Parent { pid, pidfd } = sys::clone3(0, None).unwrap() else {
            sys::exit_now(7);
        };
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        waitid(WaitId::PidFd(pidfd.as_fd()), flags).unwrap();
        assert_eq!(start_time(pid).unwrap(), None);
        let child = Process::from_child(pid, pidfd).unwrap();
        assert_eq!(child.wait().unwrap(), Exit::Code(7));
    }

    #[test]
    fn a_process_is_not_found_under_another_start_time() {
        let pid = std::process::id().cast_signed();
        let start = start_time(pid).unwrap().unwrap();
        assert!(Process::find(pid, start).unwrap().is_some());
        assert!(Process::find(pid, start + 1).unwrap().is_none());
        assert!(Process::find(0, start).unwrap().is_none());
    }
}
