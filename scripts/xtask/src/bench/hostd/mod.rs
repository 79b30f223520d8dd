//! `scripts/bench hostd`: the daemon and its command line beside podman, on the same image, one run of
//! each in turn.

mod engine;
mod report;
mod scenes;

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::unistd::Uid;

use self::engine::{Hostd, Podman};
use super::place;
use crate::step::step;
use crate::{binaries, fixtures, packages};

/// Measures hostctl beside podman: run, exec, list, memory per instance
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How often each engine does each thing
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    runs: u32,
    /// How many instances idle while memory is measured
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=200))]
    instances: u32,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

const PACKAGES: &[&str] = &[
    "busybox-static",
    "crun",
    "iproute2",
    "nftables",
    "podman",
    "umoci",
];

/// Measures, and prints the figures on standard output.
pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    if !Uid::effective().is_root() {
        bail!("Containers with limits need root: run this with sudo");
    }
    packages::ensure(PACKAGES)?;
    binaries::build()?;
    let image = fixtures::busybox()?;
    place::enter_own_mounts()?;
    place::enter_own_network()?;
    let work = tempfile::Builder::new()
        .prefix("hostd-bench-")
        .tempdir_in("/var/tmp")?;
    let hostd = step("Start hostd", || Hostd::start(work.path(), &image))?;
    let podman = step("Set podman up", || Podman::set_up(work.path(), &image))?;
    let mut rows = Vec::new();
    for scene in scenes::ALL {
        rows.push(step(scene.title, || {
            scenes::play(scene, &hostd, &podman, arguments.runs)
        })?);
    }
    rows.push(step(scenes::MEMORY, || {
        scenes::memory(&hostd, &podman, arguments.instances)
    })?);
    let report = if arguments.json {
        let mut text = serde_json::to_string_pretty(&rows)?;
        text.push('\n');
        text
    } else {
        report::text(&rows)
    };
    io::stdout()
        .write_all(report.as_bytes())
        .context("Cannot print the figures")
}
