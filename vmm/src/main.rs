//! `hostd-vmm`: the command line of the machine.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{ArgGroup, Parser};
use serde::de::DeserializeOwned;
use vmm::console::client as console;
use vmm::containment::is_contained;
use vmm::control::{ExitReason, ExitStatus};
use vmm::descriptors::Inherited;
use vmm::devices::boot_timer::Start;
use vmm::exit::chain;
use vmm::hotplug::client as hotplug;
use vmm::machine::{Machine, Options};
use vmm::plan::Plan;
use vmm::snapshot::client;
use vmm::snapshot::file::Kind;
use vmm::snapshot::restore::{Restore, SnapshotFiles};
use vmm::spec::Spec;

/// The longest specification, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Runs one KVM virtual machine.
///
/// Exits with the code that the guest reported, 0 if it switched itself off without one, 137 if it
/// was killed, and 125 if the machine failed.
#[derive(Debug, Parser)]
#[command(version)]
#[command(group(ArgGroup::new("mode").required(true).multiple(true)))]
#[command(group(ArgGroup::new("request").requires("control").conflicts_with_all(["config", "restore", "check"])))]
struct Arguments {
    /// The machine, as JSON: a file, fd:N, or - for standard input; with --restore, what of it is
    /// to be another
    #[arg(long, value_name = "FILE", group = "mode")]
    config: Option<PathBuf>,

    /// Go on from a snapshot, and differences on top of it, oldest first; without a folder, those
    /// that --config names
    #[arg(long, value_name = "FOLDER", num_args = 0.., group = "mode")]
    restore: Option<Vec<PathBuf>>,

    /// Take a snapshot of the machine behind --control into a new folder
    #[arg(long, value_name = "FOLDER", groups = ["mode", "request"])]
    snapshot: Option<PathBuf>,

    /// Attach a disk to the machine behind --control, as JSON in FILE (or - for standard input)
    #[arg(long, value_name = "FILE", groups = ["mode", "request"])]
    attach_disk: Option<PathBuf>,

    /// Attach a network interface to the machine behind --control, as JSON in FILE
    #[arg(long, value_name = "FILE", groups = ["mode", "request"])]
    attach_net: Option<PathBuf>,

    /// Have the guest behind --control let go of a disk or network interface, and wait until it has
    #[arg(long, value_name = "DEVICE", groups = ["mode", "request"])]
    detach: Option<String>,

    /// With --detach: take the device away at once, also from a guest that does not let go of it
    #[arg(long, requires = "detach")]
    force: bool,

    /// Show the console of the machine behind --control, and type there; control and ] leave it
    #[arg(long, groups = ["mode", "request"])]
    console: bool,

    /// With --console: look on, and type nothing
    #[arg(long, requires = "console")]
    look_on: bool,

    /// The control socket of the machine to snapshot, or to change
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["config", "restore", "check"])]
    control: Option<PathBuf>,

    /// With --snapshot: only what was written since the last one
    #[arg(long, requires = "snapshot")]
    diff: bool,

    /// Say on standard error how long the guest took until it wrote byte 123 to address 0xc0000000
    #[arg(long)]
    boot_timer: bool,

    /// Allow all system calls, to find out what a violation was about; not for guests one does not trust
    #[arg(long)]
    no_seccomp: bool,

    /// Check the configuration and open its files, but start nothing
    #[arg(long)]
    check: bool,
}

#[expect(clippy::print_stderr, reason = "the user's error message")]
fn main() -> ExitCode {
    let start = Start::now();
    end_on_panic();
    match run(&Arguments::parse(), start) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("hostd-vmm: {error:#}");
            ExitCode::from(ExitStatus::FAILURE_CODE)
        }
    }
}

/// A bug in one thread ends the machine: without that thread it would hang, or worse.
#[expect(clippy::print_stderr, reason = "the user's error message")]
#[expect(clippy::exit, reason = "other threads cannot be asked to end any more")]
fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        if is_contained() {
            return;
        }
        eprintln!("hostd-vmm: this is a bug: {panic}");
        std::process::exit(ExitStatus::FAILURE_CODE.into());
    }));
}

#[expect(clippy::print_stderr, reason = "the user's error message")]
fn run(arguments: &Arguments, start: Start) -> anyhow::Result<u8> {
    if let Some(control) = &arguments.control {
        let machine = UnixStream::connect(control)
            .with_context(|| format!("cannot reach a machine at {}", control.display()))?;
        if arguments.console {
            return attach(&machine, arguments.look_on);
        }
        return ask(arguments, &machine);
    }
    let mut plan = plan(arguments).context("the configuration is not usable")?;
    if arguments.check {
        return Ok(0);
    }
    if arguments.no_seccomp {
        eprintln!("hostd-vmm: warning: runs without system call filters");
    }
    let mut exit_status = plan.exit_status.take();
    let options = Options {
        boot_timer: arguments.boot_timer.then_some(start),
        no_seccomp: arguments.no_seccomp,
    };
    let status = match Machine::build(plan, options) {
        Ok(machine) => {
            let missing = machine.missing_features().join(", ");
            if !missing.is_empty() {
                eprintln!("hostd-vmm: warning: the host lacks features of the template: {missing}");
            }
            machine.run()
        }
        Err(error) => ExitStatus {
            error: Some(format!("cannot be started: {}", chain(&error))),
            ..ExitStatus::new(ExitReason::Error)
        },
    };
    if let Some(error) = &status.error {
        eprintln!("hostd-vmm: the machine {error}");
    }
    if let Some(file) = &mut exit_status {
        serde_json::to_writer(file, &status).context("cannot write the exit status")?;
    }
    Ok(status.process_code())
}

/// Does what takes another machine.
#[expect(clippy::print_stdout, reason = "the user's answer")]
fn ask(arguments: &Arguments, machine: &UnixStream) -> anyhow::Result<u8> {
    if let Some(folder) = &arguments.snapshot {
        let kind = if arguments.diff {
            Kind::Diff
        } else {
            Kind::Full
        };
        let report = client::snapshot(machine, folder, kind)
            .with_context(|| format!("there is no snapshot in {}", folder.display()))?;
        println!("{}", serde_json::to_string(&report)?);
    } else if let Some(path) = &arguments.attach_disk {
        let name = hotplug::attach_disk(machine, read(path)?);
        println!("{}", name.context("the disk is not attached")?);
    } else if let Some(path) = &arguments.attach_net {
        let name = hotplug::attach_net(machine, read(path)?);
        println!("{}", name.context("the network interface is not attached")?);
    } else if let Some(name) = &arguments.detach {
        hotplug::detach(machine, name.clone(), arguments.force)
            .with_context(|| format!("{name} stays"))?;
    }
    Ok(0)
}

/// Until the machine ends, or whoever types.
fn attach(machine: &UnixStream, look_on: bool) -> anyhow::Result<u8> {
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let keys = (!look_on).then_some(input).transpose()?;
    console::attach(machine, keys.map(File::from), std::io::stdout().lock())?;
    Ok(0)
}

fn plan(arguments: &Arguments) -> anyhow::Result<Plan> {
    let config = arguments.config.as_deref();
    let Some(folders) = &arguments.restore else {
        let path = config.context("--config names no machine")?;
        return Ok(Plan::new(&read::<Spec>(path)?)?);
    };
    let mut restore = match config {
        Some(path) => read(path)?,
        None => Restore::default(),
    };
    let folders = folders.iter();
    let named: Vec<_> = folders
        .map(|folder| SnapshotFiles::of_folder(folder))
        .collect();
    if !named.is_empty() {
        restore.snapshots = named;
    }
    Ok(Plan::restore(&restore)?)
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin()
            .take(CONFIG_BYTES_MAX)
            .read_to_string(&mut text)
    } else {
        Inherited::default()
            .open(path, OpenOptions::new().read(true))?
            .take(CONFIG_BYTES_MAX)
            .read_to_string(&mut text)
    };
    read.with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is not what it should be", path.display()))
}
