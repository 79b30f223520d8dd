//! Starts processes and hears of their ends.
//!
//! The agent is the first process, so children that it never started end up with it too. One thread
//! waits for SIGCHLD and takes every ended child off the kernel's list; each process that the agent
//! did start is told of through a pipe, which others can poll. Starting and reaping exclude each
//! other: no child ends unheard before it is known, and no signal reaches a stranger who was given
//! the number of a process that has ended.

use std::collections::HashMap;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};

use crate::sys;

/// The highest signal number.
const SIGNAL_MAX: i32 = 64;

/// For threads that call a few functions deep.
pub(crate) const STACK_BYTES: usize = 128 * 1024;

/// Where a process is put.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PidNamespace<'a> {
    /// It is the first process of a namespace of its own.
    New,
    /// It joins the namespace of the process behind this descriptor of pidfd_open(2).
    Of(BorrowedFd<'a>),
}

/// A started process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    descriptor: OwnedFd,
    end: PipeReader,
}

/// How a process ended: `code` or `signal`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ProcessEnd {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
}

/// Knows the processes that were started and have not ended.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    running: Mutex<HashMap<i32, PipeWriter>>,
}

impl Reaper {
    /// Blocks SIGCHLD for the calling thread and all that it makes from now on, and starts reaping.
    pub(crate) fn start() -> io::Result<Arc<Reaper>> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block()?;
        let reaper = Arc::new(Reaper::default());
        let own = Arc::clone(&reaper);
        thread::Builder::new()
            .name("reaper".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                loop {
                    own.reap();
                    // A child that ends from here on leaves the signal pending.
                    signals
                        .wait()
                        .expect("the set holds a signal that is blocked");
                }
            })?;
        Ok(reaper)
    }

    /// Starts a process.
    pub(crate) fn spawn(
        &self,
        command: &mut Command,
        namespace: PidNamespace<'_>,
    ) -> io::Result<Process> {
        let (end, notice) = io::pipe()?;
        let mut running = self.running();
        let pid = spawn_in(command, namespace)?;
        running.insert(pid, notice);
        // Nothing is reaped now, so the number still stands for the process even if it has ended.
        let descriptor = sys::pidfd_open(pid)?;
        Ok(Process {
            pid,
            descriptor,
            end,
        })
    }

    /// Sends a signal to a process, or with `group` to its process group as well. Does nothing if
    /// the process has ended.
    pub(crate) fn signal(&self, process: &Process, signal: i32, group: bool) -> io::Result<()> {
        if !(1..=SIGNAL_MAX).contains(&signal) {
            let message = format!("There is no signal {signal}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let running = self.running();
        if !running.contains_key(&process.pid) {
            return Ok(());
        }
        if group {
            // The group is gone if the process has made itself another one.
            let _ = sys::kill(-process.pid, signal);
        }
        sys::kill(process.pid, signal)
    }

    fn reap(&self) {
        let mut running = self.running();
        while let Some((pid, status)) = sys::reap() {
            if let Some(mut notice) = running.remove(&pid) {
                // Nobody listens any more if this fails.
                let _ = notice.write_all(&status.into_raw().to_ne_bytes());
            }
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<i32, PipeWriter>> {
        // The map is whole at every point where a holder could panic.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts `command` from a thread of its own: that a thread's children go into another pid namespace
/// cannot be undone.
fn spawn_in(command: &mut Command, namespace: PidNamespace<'_>) -> io::Result<i32> {
    thread::scope(|scope| {
        let spawner = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || {
                match namespace {
                    PidNamespace::New => unshare(CloneFlags::CLONE_NEWPID)?,
                    PidNamespace::Of(process) => setns(process, CloneFlags::CLONE_NEWPID)?,
                }
                let child = command.spawn()?;
                i32::try_from(child.id()).map_err(io::Error::other)
            })?;
        spawner.join().expect("the spawner does not panic")
    })
}

impl Process {
    /// Of pidfd_open(2), for joining the process's namespaces.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// Becomes readable when the process has ended.
    pub(crate) fn ended(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Waits for the end and says what it was, once.
    pub(crate) fn wait(&self) -> io::Result<ProcessEnd> {
        let mut status = [0; 4];
        (&self.end).read_exact(&mut status)?;
        let status = ExitStatus::from_raw(i32::from_ne_bytes(status));
        Ok(ProcessEnd {
            code: status.code(),
            signal: status.signal(),
        })
    }
}

impl ProcessEnd {
    /// One number for both, as a shell has it.
    pub(crate) fn shell_code(self) -> u8 {
        let code = match (self.code, self.signal) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => 0,
        };
        u8::try_from(code).unwrap_or(u8::MAX)
    }

    /// Whether it looks as if the kernel had killed the process, or a process that a shell ran.
    pub(crate) fn is_kill(self) -> bool {
        self.signal == Some(libc::SIGKILL) || self.code == Some(128 + libc::SIGKILL)
    }
}
