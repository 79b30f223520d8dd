//! The developer's commands behind `scripts/`: what it takes to build, boot, test and measure hostd.

mod bench;
mod binaries;
mod debian;
mod demo;
mod fixtures;
mod fuzz;
mod guest;
mod host_image;
mod kernel;
mod packages;
mod paths;
mod peers;
mod sim_host;
mod step;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about = "Builds, boots, tests and measures hostd", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Installs the Debian packages that the other commands need
    Packages,
    /// Builds the kernel and the initramfs of VMs that start from OCI images
    Guest,
    /// Builds the host image: kernel and initramfs that boot into hostd
    HostImage,
    SimHost(sim_host::Arguments),
    Demo(demo::Arguments),
    Fuzz(fuzz::Arguments),
    Peers(peers::Arguments),
    Test(test::Arguments),
    Bench(bench::Arguments),
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Packages => packages::ensure(packages::ALL)?,
        Command::Guest => {
            packages::ensure(packages::ALL)?;
            binaries::build()?;
            guest::command_line()?;
        }
        Command::HostImage => {
            packages::ensure(packages::ALL)?;
            host_image::build()?;
        }
        Command::SimHost(arguments) => {
            packages::ensure(packages::ALL)?;
            return sim_host::run(&arguments);
        }
        Command::Demo(arguments) => return demo::demo(&arguments),
        Command::Fuzz(arguments) => fuzz::fuzz(&arguments)?,
        Command::Peers(arguments) => peers::peers(&arguments)?,
        Command::Test(arguments) => test::test(&arguments)?,
        Command::Bench(arguments) => bench::bench(&arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}
