//! One qemu process and what belongs to it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::ssh::Ssh;
use crate::host_image::{self, HostImage};
use crate::step::{command, run, step};

/// The line of the host image that says that hostd answers and its images are there.
const READY: &str = "hostd-host: ready";

/// Emulation is slow and the real machine may be busy; a host that is well is up in under 20 s.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// The emulated time-stamp counters run alike, but the emulated processor does not say so. Left to
/// itself the kernel distrusts them: it reads the far slower HPET instead, and KVM holds each
/// guest's counter and lets it jump whenever the guest was not running, which it does on no real
/// processor that has virtualization and a constant counter.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable";

/// The data disk is sparse: it takes what is written to it.
const DATA_DISK_BYTES: u64 = 32 << 30;

/// The size of a simulated host.
///
/// It has one processor unless more are asked for. With several, qemu (7.2, as Debian 12 has it) runs each
/// in a thread, and about once in two hundred boots of guests one of them ended with a triple fault (its
/// VMRUN had loaded a state that is not the guest's, or had left nested paging off), or the host hung,
/// both processors in an endless exception in its scheduler. At least two faults of qemu's lie between
/// its threads: code that another processor rewrites while it is being translated stays as it was (mended
/// in 8.1), and an interrupt that VMRUN has injected is delivered a second time if another processor asks
/// for a moment to itself before the next exit (not mended in 10.0).
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Options {
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    /// It may outlive this process; otherwise it ends with it, however that ends.
    pub(crate) stays: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 3072,
            cpus: 1,
            stays: false,
        }
    }
}

/// A simulated host that is up. It goes down when dropped, unless it is [kept](Machine::keep).
#[derive(Debug)]
pub(crate) struct Machine {
    record: Record,
    dir: PathBuf,
    child: Option<Child>,
}

/// What it takes to find a kept machine again.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Record {
    pid: i32,
    /// Field 22 of /proc/PID/stat: with it, the pid means this process and no later one.
    start_time: u64,
    port: u16,
}

impl Machine {
    /// Boots a machine whose files live in `dir`, and waits until hostd answers in it.
    pub(crate) fn boot(image: &HostImage, dir: &Path, options: Options) -> Result<Self> {
        if dir.exists() {
            fs::remove_dir_all(dir).context("Cannot remove what the last run left")?;
        }
        fs::create_dir_all(dir)?;
        step("Boot the simulated host", || {
            Self::launch(dir, image, options)
        })
    }

    fn launch(dir: &Path, image: &HostImage, options: Options) -> Result<Self> {
        Ssh::make_key(dir)?;
        let initramfs = add_key(dir, &image.initramfs)?;
        let disk = make_data_disk(dir)?;
        let console = dir.join("console.sock");
        let listener = UnixListener::bind(&console)?;
        let port = free_port()?;
        let mut qemu = if options.stays {
            Command::new("qemu-system-x86_64")
        } else {
            command(
                "setpriv",
                ["--pdeathsig", "KILL", "--", "qemu-system-x86_64"],
            )
        };
        qemu.args(["-nodefaults", "-no-reboot"]);
        qemu.args([
            "-M",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "EPYC,+svm,+npt",
        ])
        .args(["-display", "none", "-m", &options.memory_mib.to_string()])
        .args(["-smp", &options.cpus.to_string()])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&initramfs)
        .args(["-append", KERNEL_ARGUMENTS])
        .arg("-chardev")
        .arg(format!(
            "socket,id=console,path={},logfile={}",
            console.display(),
            dir.join("console.log").display()
        ))
        .args(["-serial", "chardev:console"])
        .arg("-drive")
        .arg(format!(
            "if=virtio,format=raw,cache=unsafe,file={}",
            disk.display()
        ))
        .arg("-netdev")
        .arg(format!(
            "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"
        ))
        .args(["-device", "virtio-net-pci,netdev=net"])
        .stdin(Stdio::null())
        .stdout(File::create(dir.join("qemu.log"))?)
        .stderr(File::options().append(true).open(dir.join("qemu.log"))?)
        // A group of its own: an interrupt at the terminal is for the command in the machine.
        .process_group(0);
        let mut child = qemu.spawn().context("Cannot start qemu-system-x86_64")?;
        let awaited = wait_until_ready(&listener, &mut child, dir);
        let pid = i32::try_from(child.id()).context("A pid fits an i32")?;
        let record = Record {
            pid,
            start_time: start_time(pid).unwrap_or(0),
            port,
        };
        let machine = Self {
            record,
            dir: dir.to_owned(),
            child: Some(child),
        };
        awaited?;
        machine.ssh().open()?;
        Ok(machine)
    }

    /// Lets the machine run on after this process.
    pub(crate) fn keep(mut self) -> Result<()> {
        let record = serde_json::to_vec(&self.record)?;
        fs::write(self.dir.join("machine.json"), record)?;
        self.child = None;
        Ok(())
    }

    /// The machine that was kept in `dir`, if it still runs.
    pub(crate) fn find(dir: &Path) -> Option<Self> {
        let record: Record =
            serde_json::from_slice(&fs::read(dir.join("machine.json")).ok()?).ok()?;
        (start_time(record.pid) == Some(record.start_time)).then(|| Self {
            record,
            dir: dir.to_owned(),
            child: None,
        })
    }

    /// Ends a kept machine.
    pub(crate) fn end(self) -> Result<()> {
        self.ssh().close();
        kill(Pid::from_raw(self.record.pid), Signal::SIGTERM).context("Cannot end qemu")?;
        fs::remove_file(self.dir.join("machine.json")).context("Cannot forget the machine")
    }

    /// Runs a command in the machine with this process's own streams.
    pub(crate) fn run(&self, arguments: &[String], terminal: bool) -> Result<ExitStatus> {
        self.ssh()
            .command(arguments, terminal)
            .status()
            .context("Cannot run ssh")
    }

    /// A command that runs in the machine, for a caller that wants its streams.
    pub(crate) fn command(&self, arguments: &[String], terminal: bool) -> Command {
        self.ssh().command(arguments, terminal)
    }

    /// Copies a program into the machine.
    pub(crate) fn push(&self, program: &Path, target: &str) -> Result<()> {
        let script = format!("cat >{target} && chmod 755 {target}");
        let mut copy = self.command(&["sh".to_owned(), "-c".to_owned(), script], false);
        let status = copy
            .stdin(File::open(program)?)
            .status()
            .context("Cannot run ssh")?;
        if !status.success() {
            bail!(
                "{} could not be copied into the simulated host",
                program.display()
            );
        }
        Ok(())
    }

    fn ssh(&self) -> Ssh<'_> {
        Ssh {
            dir: &self.dir,
            port: self.record.port,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.ssh().close();
        }
        if let Some(child) = &mut self.child {
            // It holds nothing that anybody needs, and it may have gone by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The kernel takes several archives one after the other: the second holds the key.
fn add_key(dir: &Path, initramfs: &Path) -> Result<PathBuf> {
    let root = dir.join("key-root");
    fs::create_dir_all(root.join("root/.ssh"))?;
    fs::copy(dir.join("key.pub"), root.join("root/.ssh/authorized_keys"))?;
    let key = dir.join("key.cpio");
    host_image::archive(&root, &key)?;
    let combined = dir.join("initramfs.cpio");
    let mut out = File::create(&combined)?;
    for part in [initramfs, &key] {
        std::io::copy(&mut File::open(part)?, &mut out)?;
    }
    Ok(combined)
}

fn make_data_disk(dir: &Path) -> Result<PathBuf> {
    let disk = dir.join("data.raw");
    File::create(&disk)?.set_len(DATA_DISK_BYTES)?;
    run(command(
        "mke2fs",
        ["-q", "-t", "ext4", "-L", "hostd-data", "-O", "^has_journal"],
    )
    .arg(&disk))?;
    Ok(disk)
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Reads the console until the machine says that it is ready.
fn wait_until_ready(listener: &UnixListener, child: &mut Child, dir: &Path) -> Result<()> {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    let result = await_line(listener, deadline);
    if result.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    result.with_context(|| {
        let tail = |name: &str| {
            let text = fs::read(dir.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().rev().take(20).collect();
            lines.into_iter().rev().collect::<Vec<_>>().join("\n")
        };
        format!(
            "The simulated host did not come up; qemu said:\n{}\nits console:\n{}",
            tail("qemu.log"),
            tail("console.log")
        )
    })
}

fn await_line(listener: &UnixListener, deadline: Instant) -> Result<()> {
    wait_readable(listener, deadline)?;
    let (console, _) = listener.accept()?;
    let mut lines = BufReader::new(console);
    let mut line = Vec::new();
    loop {
        if lines.buffer().is_empty() {
            wait_readable(lines.get_ref(), deadline)?;
        }
        let available = lines.fill_buf()?;
        if available.is_empty() {
            bail!("qemu ended");
        }
        let end = available.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(available.len(), |end| end + 1);
        line.extend_from_slice(&available[..taken]);
        lines.consume(taken);
        if end.is_some() {
            if String::from_utf8_lossy(&line).contains(READY) {
                return Ok(());
            }
            line.clear();
        }
    }
}

fn wait_readable(fd: &impl std::os::fd::AsFd, deadline: Instant) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).context("The timeout is too long to poll for")?;
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, timeout)? == 0 {
        bail!("It was not ready within {} s", BOOT_TIMEOUT.as_secs());
    }
    Ok(())
}

fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything; field 3 follows the last of them.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}
