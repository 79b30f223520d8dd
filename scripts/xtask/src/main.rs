//! The developer's commands behind `scripts/`: what it takes to build, boot, test and measure hostd.

mod fixtures;
mod guest;
mod kernel;
mod packages;
mod paths;
mod step;

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
    /// Makes the OCI images of the tests and the demo
    Fixtures,
    /// Fetches Debian's cloud kernel
    Kernel,
    /// Builds the kernel and the initramfs of VMs that start from OCI images
    Guest,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Packages => packages::ensure(packages::ALL),
        Command::Fixtures => fixtures::busybox().map(|_| ()),
        Command::Kernel => kernel::Kernel::fetch().map(|_| ()),
        Command::Guest => guest::command_line(),
    }
}
