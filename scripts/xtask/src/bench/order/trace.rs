//! Which functions of a program are executed, in the order of their first time: it stops at the first
//! instruction of each, also in processes that it forks.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use rustix::process::{self, WaitOptions};

/// Waits for a line, and becomes the program: there is time to hold on to the process before.
const WAITING: &str = "read go; exec \"$@\"";

/// The instruction at which a traced process stops.
const BREAKPOINT: u8 = 0xcc;

/// The instruction that ends a function.
const RETURN: u8 = 0xc3;

/// What has been executed so far.
#[derive(Debug)]
pub(super) struct Trace {
    /// The program's file: device and inode.
    file: (u64, u64),
    /// Where its functions begin, from where a process has the file, and the bytes there.
    functions: BTreeMap<u64, u8>,
    /// Those that shall do nothing.
    hindered: Vec<u64>,
    /// The functions that were executed, in the order of their first time.
    pub(super) executed: Vec<u64>,
    seen: HashSet<u64>,
}

impl Trace {
    /// Of a program with these functions, of which the `hindered` are not to do what they do.
    pub(super) fn of(
        program: &Path,
        functions: impl Iterator<Item = u64>,
        hindered: Vec<u64>,
    ) -> Result<Self> {
        Ok(Self {
            file: identity(program)?,
            functions: functions.map(|address| (address, BREAKPOINT)).collect(),
            hindered,
            executed: Vec::new(),
            seen: HashSet::new(),
        })
    }

    /// Runs a call of the program to its end, with whatever it leaves running.
    pub(super) fn run(&mut self, call: &Command) -> Result<()> {
        let mut child = Command::new("sh")
            .args(["-c", WAITING, "sh"])
            .arg(call.get_program())
            .args(call.get_args())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("Cannot run a shell")?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let options = Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_EXITKILL;
        ptrace::seize(pid, options).context("Cannot trace")?;
        let mut input = child.stdin.take().context("The shell has no input")?;
        input.write_all(b"go\n")?;
        drop(input);
        match self.until_end(pid)? {
            0 => Ok(()),
            status => bail!("{:?} ended with {status}", call.get_args()),
        }
    }

    /// Leads all processes until this one has ended, and returns with which status.
    fn until_end(&mut self, first: Pid) -> Result<i32> {
        let mut begun = false;
        loop {
            let (pid, change) = wait()?;
            let led = match change {
                Change::Ended(status) if pid == first => return Ok(status),
                Change::Killed(signal) if pid == first => bail!("It was killed by {signal}"),
                Change::Event(event) if event == Event::PTRACE_EVENT_EXEC as i32 => {
                    // It may still be about to become the shell.
                    begun |= pid == first && self.is_program(pid);
                    if pid == first && !begun {
                        go_on(pid, None)
                    } else {
                        self.lead_into_program(pid)
                    }
                }
                Change::Event(_) => go_on(pid, None),
                Change::Stopped(signal) if signal == Signal::SIGTRAP as i32 => self.note(pid),
                // A real-time signal has no name here. Those of hostd-vmm get a processor out of guest mode,
                // which this has done, too.
                Change::Stopped(signal) => go_on(pid, Signal::try_from(signal).ok()),
                Change::Ended(_) | Change::Killed(_) => Ok(()),
            };
            led.context("Cannot lead a process")?;
        }
    }

    /// Where a process has the program's file, which is another place each time.
    fn base(&self, pid: Pid) -> Result<u64> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let inode = self.file.1.to_string();
        let ours = maps
            .lines()
            .find(|line| line.split_whitespace().nth(4) == Some(&inode));
        let start = ours.and_then(|line| line.split('-').next());
        let start = start.with_context(|| format!("{pid} is not the program any more"))?;
        u64::from_str_radix(start, 16).context("A mapping has no address")
    }

    fn is_program(&self, pid: Pid) -> bool {
        identity(Path::new(&format!("/proc/{pid}/exe"))).ok() == Some(self.file)
    }

    /// Sees to it that a process stops where it is to, if it has become the program. Another is let go of.
    fn lead_into_program(&mut self, pid: Pid) -> Result<()> {
        if !self.is_program(pid) {
            return Ok(ptrace::detach(pid, None)?);
        }
        let (memory, base) = (memory(pid)?, self.base(pid)?);
        for (address, original) in &mut self.functions {
            let mut byte = [0];
            memory.read_exact_at(&mut byte, base + *address)?;
            [*original] = byte;
            memory.write_all_at(&[BREAKPOINT], base + *address)?;
        }
        for address in &self.hindered {
            memory.write_all_at(&[RETURN], base + *address)?;
        }
        go_on(pid, None)
    }

    /// A process has stopped at a function, and will not do so again there.
    fn note(&mut self, pid: Pid) -> Result<()> {
        let mut registers = ptrace::getregs(pid)?;
        let place = registers.rip.saturating_sub(1);
        let address = place.wrapping_sub(self.base(pid)?);
        let Some(original) = self.functions.get(&address) else {
            bail!("{pid} has stopped at {place:#x}, where no function is");
        };
        memory(pid)?.write_all_at(&[*original], place)?;
        registers.rip = place;
        ptrace::setregs(pid, registers)?;
        if self.seen.insert(address) {
            self.executed.push(address);
        }
        go_on(pid, None)
    }
}

/// What a process has come to.
enum Change {
    /// With this status.
    Ended(i32),
    /// By this signal.
    Killed(i32),
    /// Its tracer is told of this (`PTRACE_EVENT_*`).
    Event(i32),
    /// It is about to get this signal.
    Stopped(i32),
}

/// Waits for a process, or a thread, to come to something.
fn wait() -> Result<(Pid, Change)> {
    let all = WaitOptions::from_bits_retain(WaitPidFlag::__WALL.bits().cast_unsigned());
    let (pid, status) = process::wait(all)
        .context("Cannot wait")?
        .context("Nobody is waited for")?;
    let change = if let Some(status) = status.exit_status() {
        Change::Ended(status)
    } else if let Some(signal) = status.terminating_signal() {
        Change::Killed(signal)
    } else {
        let signal = status.stopping_signal();
        match (status.as_raw() >> 16, signal) {
            (0, Some(signal)) => Change::Stopped(signal),
            (event, _) => Change::Event(event),
        }
    };
    Ok((Pid::from_raw(pid.as_raw_nonzero().get()), change))
}

fn memory(pid: Pid) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
}

/// One that was killed meanwhile has been told to, or is told next.
fn go_on(pid: Pid, signal: Option<Signal>) -> Result<()> {
    match ptrace::cont(pid, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn identity(file: &Path) -> Result<(u64, u64)> {
    let found = fs::metadata(file).with_context(|| format!("Cannot find {}", file.display()))?;
    Ok((found.dev(), found.ino()))
}
