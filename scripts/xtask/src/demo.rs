//! `scripts/demo`: the main job, once, for a person to watch.

use std::fs;
use std::io::{self, Write};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use tempfile::TempDir;

use crate::sim_host::{self, Machine, Options};
use crate::step::{command, step};
use crate::{binaries, fixtures, guest, host_image, packages, paths};

/// Runs a VM and a container from one image, with limits that bind, and cleans up
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Leaves a shell with `hostctl` ready instead of running the demonstration
    #[arg(long)]
    shell: bool,
}

/// What is shown: a remark, and the command that it is about. A command may fail only if it is
/// marked with `!`, as the memory hogs do.
const SCENE: &[(&str, &str)] = &[
    ("One image.", "hostctl image list"),
    (
        "A container from it, with limits.",
        "hostctl run -d --name box --cpus 0.5 --memory 64M --pids 50 busybox sleep 1000000",
    ),
    (
        "A virtual machine from the same image: only --isolation differs.",
        "hostctl run -d --name machine --isolation vm --cpus 0.5 --memory 256M --pids 50 \
         busybox sleep 1000000",
    ),
    ("Both, side by side.", "hostctl list"),
    ("The host's kernel …", "uname -rv"),
    ("… is the container's …", "hostctl exec box uname -rv"),
    (
        "… and not the VM's, which booted its own.",
        "hostctl exec machine sh -c 'uname -rv; uptime'",
    ),
    (
        "What they use, of what they may.",
        "hostctl stats --no-stream",
    ),
    (
        "A limit moves while they run.",
        "hostctl update --pids 40 --cpus 0.3 box machine",
    ),
    (
        "A memory hog in a container is stopped by its limit …",
        "!hostctl run --name hog-box --memory 64M busybox sh -c 'head -c 300m /dev/zero | tail -c 299m'",
    ),
    (
        "… and so is one in a VM.",
        "!hostctl run --name hog-machine --isolation vm --memory 128M busybox \
         sh -c 'head -c 300m /dev/zero | tail -c 299m'",
    ),
    ("How each of them ended.", "hostctl list --all"),
    (
        "Clean removal.",
        "hostctl rm --force box machine hog-box hog-machine",
    ),
    ("Nothing is left.", "hostctl list --all"),
];

/// Runs the scene where VMs can run: here, or in the simulated host.
pub(crate) fn demo(arguments: &Arguments) -> Result<ExitCode> {
    packages::ensure(packages::ALL)?;
    binaries::build()?;
    let stage = match kvm()? {
        Kvm::Real => Stage::native()?,
        Kvm::Unusable(why) => {
            say(&format!(
                "{why} The demonstration runs in the simulated host."
            ))?;
            let image = host_image::build()?;
            let dir = sim_host::new_dir();
            Stage::Simulated(Machine::boot(&image, &dir, Options::default())?)
        }
    };
    if arguments.shell {
        return stage.shell();
    }
    for (remark, line) in SCENE {
        let (line, may_fail) = line
            .strip_prefix('!')
            .map_or((*line, false), |line| (line, true));
        say(&format!("\n# {remark}\n$ {line}"))?;
        let status = stage.command(line).status().context("Cannot run a shell")?;
        if !status.success() && !may_fail {
            bail!("`{line}` ended with {status}");
        }
        if may_fail {
            say(&format!(
                "(ended with status {})",
                status.code().unwrap_or(-1)
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn say(text: &str) -> Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{text}")?;
    out.flush().context("Cannot write to standard output")
}

enum Kvm {
    Real,
    Unusable(String),
}

/// Asks `hostctl doctor`, which knows how to tell a KVM that boots stock kernels from others.
fn kvm() -> Result<Kvm> {
    let hostctl = paths::binaries().join("hostctl");
    let output = Command::new(hostctl).args(["doctor", "--json"]).output()?;
    let findings: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("hostctl doctor printed no JSON")?;
    let findings = findings
        .as_array()
        .context("hostctl doctor printed no list")?;
    let kvm = findings
        .iter()
        .find(|finding| finding["check"] == "kvm")
        .context("hostctl doctor does not look at KVM")?;
    if kvm["level"] == "ok" {
        return Ok(Kvm::Real);
    }
    Ok(Kvm::Unusable(
        kvm["detail"]
            .as_str()
            .unwrap_or("KVM is not usable here.")
            .to_owned(),
    ))
}

/// Where the scene is played.
enum Stage {
    Simulated(Machine),
    Native(NativeDaemon),
}

/// A daemon of our own on this machine, gone with the demonstration.
struct NativeDaemon {
    daemon: Child,
    dir: TempDir,
}

impl Stage {
    fn native() -> Result<Self> {
        let image = fixtures::busybox()?;
        let guest = guest::build()?;
        let dir = TempDir::with_prefix("hostd-demo-")?;
        let guest_dir = dir.path().join("guest");
        fs::create_dir(&guest_dir)?;
        fs::copy(guest.kernel, guest_dir.join("kernel"))?;
        fs::copy(guest.initramfs, guest_dir.join("initramfs.cpio"))?;
        let log = fs::File::create(dir.path().join("hostd.log"))?;
        let daemon = Command::new(paths::binaries().join("hostd"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .arg("--socket")
            .arg(dir.path().join("hostd.sock"))
            .arg("--guest-dir")
            .arg(guest_dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("Cannot start hostd")?;
        let stage = Self::Native(NativeDaemon { daemon, dir });
        let line = format!(
            "hostctl --wait 30s image import --name busybox:latest {}",
            image.display()
        );
        let import = || Ok(stage.command(&line).stdout(Stdio::null()).status()?);
        if !step("Import the image", import)?.success() {
            bail!("The image could not be imported");
        }
        Ok(stage)
    }

    /// A shell's line, run where the daemon is.
    fn command(&self, line: &str) -> Command {
        match self {
            Self::Simulated(machine) => {
                machine.command(&["sh", "-c", line].map(str::to_owned), false)
            }
            Self::Native(native) => {
                let mut shell = command("sh", ["-c", line]);
                native.environment(&mut shell);
                shell
            }
        }
    }

    fn shell(&self) -> Result<ExitCode> {
        say("hostctl is ready; `exit` ends the demonstration.")?;
        let status = match self {
            Self::Simulated(machine) => machine.run(&[], true)?,
            Self::Native(native) => {
                let mut shell = Command::new("bash");
                native.environment(&mut shell);
                shell.status().context("Cannot run a shell")?
            }
        };
        Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

impl NativeDaemon {
    fn environment(&self, command: &mut Command) {
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", paths::binaries().display()))
            .env("HOSTD_SOCKET", self.dir.path().join("hostd.sock"));
    }
}

impl Drop for NativeDaemon {
    fn drop(&mut self) {
        let remove = "hostctl list --all --quiet | xargs -r hostctl rm --force";
        let mut shell = command("sh", ["-c", remove]);
        self.environment(&mut shell);
        // The daemon goes whatever becomes of the last instances.
        let _ = shell.status();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
