//! Answers the host: one request a connection, one thread a connection.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::unistd::sync;

use crate::cgroup::{CgroupError, Cgroups};
use crate::console::{chain, say};
use crate::exec;
use crate::launch;
use crate::lines::{LineError, LineWriter, Lines};
use crate::machine::{self, SetUpError};
use crate::memory::Memory;
use crate::protocol::{Frame, Network, Process, Renewal, Request, Response};
use crate::reaper::{PidNamespace, Reaper, STACK_BYTES};
use crate::transport::Listener;
use crate::workload::Workload;

/// Connections beyond this are closed at once.
const CONNECTIONS_MAX: usize = 128;

/// Processes of exec at a time. Fewer than connections, so that a host can always signal and ask.
const EXECS_MAX: usize = 100;

/// A connection that has not said what it wants by then is closed.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("Failed to signal the workload")]
    Signal(#[source] io::Error),
    #[error("Failed to set the size of the workload's terminal")]
    Resize(#[source] io::Error),
    #[error("Failed to read how much memory is in use")]
    Memory(#[source] io::Error),
    #[error("Failed to become the machine that this is from now on")]
    Renew(#[source] SetUpError),
}

/// What requests are about.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) cgroups: Cgroups,
    pub(crate) workload: Workload,
    /// What the workload was started from.
    pub(crate) description: Process,
    /// Conversations of exec.
    pub(crate) execs: Slots,
    /// What the network interface is set to.
    pub(crate) network: Mutex<Option<Network>>,
    /// /proc/meminfo, open, since the workload may unmount /proc.
    pub(crate) memory: File,
    /// Before the workload ran.
    pub(crate) memory_at_start: Memory,
}

impl Agent {
    /// Sends the workload's process a signal, unless it has ended.
    pub(crate) fn signal_workload(&self, signal: i32) -> io::Result<()> {
        self.reaper.signal(self.workload.process(), signal, false)
    }
}

/// How many of something there are, with a bound.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    taken: Mutex<usize>,
    given_back: Condvar,
}

/// One of [`Slots`], until dropped.
struct Slot<'a> {
    slots: &'a Slots,
}

impl Slots {
    fn take(&self, max: usize) -> Option<Slot<'_>> {
        let mut taken = self.taken();
        (*taken < max).then(|| {
            *taken += 1;
            Slot { slots: self }
        })
    }

    /// Waits until all were given back, or for the whole of `timeout`.
    pub(crate) fn wait_for_all(&self, timeout: Duration) {
        let waited = self
            .given_back
            .wait_timeout_while(self.taken(), timeout, |taken| *taken > 0);
        drop(waited);
    }

    fn taken(&self) -> MutexGuard<'_, usize> {
        // A number is whole at any time.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.slots.taken() -= 1;
        self.slots.given_back.notify_all();
    }
}

/// Serves for ever, or until the listener fails.
pub(crate) fn serve(listener: &Listener, agent: &Agent) {
    let connections = Slots::default();
    thread::scope(|scope| {
        loop {
            let stream = match listener.accept() {
                Ok(stream) => stream,
                Err(error) => return say(&format!("The host's connections fail: {error}")),
            };
            let Some(slot) = connections.take(CONNECTIONS_MAX) else {
                continue;
            };
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            let spawned = thread.spawn_scoped(scope, move || {
                answer(agent, &stream);
                drop(slot);
            });
            if let Err(error) = spawned {
                say(&format!("A connection has no thread: {error}"));
            }
        }
    });
}

fn answer(agent: &Agent, stream: &UnixStream) {
    let mut lines = Lines::default();
    let request = match read_request(stream, &mut lines) {
        Ok(request) => request,
        // There was no question, so there is no answer.
        Err(error) if error.is_disconnect() => return,
        Err(error) => {
            let message = chain(&error);
            return reply(stream, &Response::Error { message });
        }
    };
    let Request::Exec(process) = request else {
        let response = respond(agent, &request).unwrap_or_else(|error| Response::Error {
            message: chain(&error),
        });
        return reply(stream, &response);
    };
    match agent.execs.take(EXECS_MAX) {
        Some(_slot) => exec::converse(agent, &process, stream, lines),
        None => {
            let last = Frame::Error {
                code: launch::FAILED.into(),
                message: format!("{EXECS_MAX} processes of exec run already"),
            };
            // A client that has gone does not hear it.
            let _ = LineWriter::new(stream).send(&last);
        }
    }
}

fn read_request(stream: &UnixStream, lines: &mut Lines) -> Result<Request, LineError> {
    let timeout = |timeout| stream.set_read_timeout(timeout).map_err(LineError::Stream);
    timeout(Some(REQUEST_TIME_MAX))?;
    let request = lines.wait(stream)?;
    timeout(None)?;
    Ok(request)
}

fn reply(stream: &UnixStream, response: &Response) {
    // A client that has gone does not hear it.
    let _ = LineWriter::new(stream).send(response);
}

fn respond(agent: &Agent, request: &Request) -> Result<Response, RequestError> {
    match request {
        // The agent listens only once the workload runs.
        Request::Ping {} => {}
        // It has a conversation of its own.
        Request::Exec(_) => {}
        Request::Signal { signal } => {
            agent
                .signal_workload(*signal)
                .map_err(RequestError::Signal)?;
        }
        Request::Resize { rows, cols } => {
            let resized = agent.workload.resize(*rows, *cols);
            resized.map_err(RequestError::Resize)?;
        }
        Request::Stats {} => return stats(agent),
        Request::SetPidsMax { max } => agent.cgroups.set_pids_max(*max)?,
        Request::SetMemory {
            at_start_bytes,
            now_bytes,
        } => {
            let memory = agent.memory_at_start.resized(*at_start_bytes, *now_bytes);
            agent.cgroups.set_memory_max(memory.for_workload())?;
        }
        Request::Hold { sync: writes } => {
            agent.cgroups.freeze()?;
            if *writes {
                sync();
            }
        }
        Request::Release { renewal, clock_ns } => release(agent, renewal.as_ref(), *clock_ns)?,
    }
    Ok(Response::Done {})
}

/// Sets what has changed while the machine did not run, and lets the workload go on. It does not if
/// that fails, since it would be taken for another machine.
fn release(
    agent: &Agent,
    renewal: Option<&Renewal>,
    clock_ns: Option<i64>,
) -> Result<(), RequestError> {
    machine::adjust_clock(clock_ns).map_err(RequestError::Renew)?;
    if let Some(renewal) = renewal {
        // One at a time, and nothing panics with it held.
        let mut network = agent.network.lock().unwrap_or_else(PoisonError::into_inner);
        let execute = |command: &mut Command| {
            let process = agent.reaper.spawn(command, PidNamespace::New)?;
            process.wait().map(|end| end.code == Some(0))
        };
        machine::renew(renewal, network.as_ref(), execute).map_err(RequestError::Renew)?;
        network.clone_from(&renewal.network);
    }
    Ok(agent.cgroups.thaw()?)
}

fn stats(agent: &Agent) -> Result<Response, RequestError> {
    let memory = Memory::read(&agent.memory).map_err(RequestError::Memory)?;
    Ok(Response::Stats {
        pids: agent.cgroups.pids()?,
        memory_used_bytes: memory.total.saturating_sub(memory.available),
        memory_total_bytes: memory.total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_and_come_back() {
        let slots = Slots::default();
        let one = slots.take(2);
        let two = slots.take(2);
        assert!(one.is_some() && two.is_some());
        assert!(slots.take(2).is_none());
        drop(one);
        assert!(slots.take(2).is_some());
    }
}
