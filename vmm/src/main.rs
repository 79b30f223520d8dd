//! `hostd-vmm`: the command line of the machine.

use std::fs::OpenOptions;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use vmm::control::{ExitReason, ExitStatus};
use vmm::descriptors::Inherited;
use vmm::devices::boot_timer::Start;
use vmm::exit::chain;
use vmm::machine::{Machine, Options};
use vmm::plan::Plan;
use vmm::spec::Spec;

/// The longest specification, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Runs one KVM virtual machine.
///
/// Exits with the code that the guest reported, 0 if it switched itself off without one, 137 if it
/// was killed, and 125 if the machine failed.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The machine, as JSON: a file, fd:N, or - for standard input
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

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
        eprintln!("hostd-vmm: this is a bug: {panic}");
        std::process::exit(ExitStatus::FAILURE_CODE.into());
    }));
}

#[expect(clippy::print_stderr, reason = "the user's error message")]
fn run(arguments: &Arguments, start: Start) -> anyhow::Result<u8> {
    let spec = read_spec(arguments).context("the configuration is not usable")?;
    let mut plan = Plan::new(&spec).context("the configuration is not usable")?;
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

fn read_spec(arguments: &Arguments) -> anyhow::Result<Spec> {
    let path = &arguments.config;
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
    serde_json::from_str(&text).with_context(|| format!("{} is not a machine", path.display()))
}
