//! One run of a machine: started, listened to, and waited for.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::time::{ClockId, clock_gettime};

use super::machine::GUEST_BYTES;

/// The longest that one measurement may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a machine has been idle when its memory is measured.
const SETTLING: Duration = Duration::from_secs(2);

/// What a guest says when it is there to be looked at.
const HOLDING: &str = "holding";

/// What a run came to.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// From before the process was started until it was gone.
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
    /// When it was started, by the monotonic clock.
    pub(crate) started: Duration,
    /// Standard output and standard error.
    pub(crate) output: String,
}

/// Runs a machine to its end.
pub(crate) fn run(command: &mut Command) -> Result<Run> {
    let cpu = children_cpu();
    let started = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let clock = Instant::now();
    let mut process = Process::start(command)?;
    process.read_until(|_| false)?;
    let status = process.child.wait()?;
    let wall = clock.elapsed();
    if !status.success() {
        bail!("{command:?} ended with {status}:\n{}", process.output);
    }
    Ok(Run {
        wall,
        cpu: children_cpu().saturating_sub(cpu),
        started,
        output: std::mem::take(&mut process.output),
    })
}

/// Runs a machine whose guest holds, and returns the bytes of memory that are the monitor's own:
/// resident, and of these private and changed.
pub(crate) fn memory(command: &mut Command) -> Result<[u64; 2]> {
    let mut process = Process::start(command)?;
    process.read_until(|output| output.contains(HOLDING))?;
    thread::sleep(SETTLING);
    let maps = fs::read_to_string(format!("/proc/{}/smaps", process.child.id()))
        .context("Cannot read a process's memory map")?;
    Ok(own_memory(&maps))
}

/// A process and what it said. Ends with this.
pub(super) struct Process {
    child: Child,
    pipe: fs::File,
    output: String,
}

impl Process {
    /// Starts it, and listens to it.
    pub(super) fn start(command: &mut Command) -> Result<Process> {
        let (read, write) = nix::unistd::pipe()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(write.try_clone()?)
            .stderr(write)
            .spawn()
            .with_context(|| format!("Cannot run {command:?}"))?;
        // The command keeps its ends of the pipe, and would keep it open.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Process {
            child,
            pipe: read.into(),
            output: String::new(),
        })
    }

    /// What it has said so far.
    pub(super) fn output(&self) -> &str {
        &self.output
    }

    /// Reads until `enough` of the output is there, or until its end.
    pub(super) fn read_until(&mut self, enough: impl Fn(&str) -> bool) -> Result<()> {
        let start = Instant::now();
        let mut bytes = [0; 4096];
        while !enough(&self.output) {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let mut waiting = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
            if poll(&mut waiting, PollTimeout::try_from(left)?)? == 0 {
                bail!("A machine does not end; it said:\n{}", self.output);
            }
            match self.pipe.read(&mut bytes)? {
                0 => break,
                count => self.output += &String::from_utf8_lossy(&bytes[..count]),
            }
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor time of all processes that were started and have ended.
fn children_cpu() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else {
        return Duration::ZERO;
    };
    let of = |time: TimeVal| Duration::from_micros(time.num_microseconds().unsigned_abs());
    of(usage.user_time()) + of(usage.system_time())
}

/// Sums over all mappings but the guest's memory of Rss and Private_Dirty.
fn own_memory(maps: &str) -> [u64; 2] {
    let mut sums = [0, 0];
    let mut own = true;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let bytes = value.parse::<u64>().unwrap_or_default() * 1024;
        match name {
            "Size:" => own = bytes < GUEST_BYTES,
            "Rss:" if own => sums[0] += bytes,
            "Private_Dirty:" if own => sums[1] += bytes,
            _ => {}
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_not_the_monitors() {
        let map = |size: u64, rss: u64, dirty: u64| {
            format!(
                "1000-2000 rw-p 00000000 00:00 0\nSize: {size} kB\nRss: {rss} kB\nPrivate_Dirty: {dirty} kB\nVmFlags: rd\n"
            )
        };
        let maps = map(64, 32, 4) + &map(GUEST_BYTES / 1024, 9000, 9000) + &map(8, 8, 8);
        assert_eq!(own_memory(&maps), [40 << 10, 12 << 10]);
    }
}
