//! `scripts/bench oci`: hostd-oci beside other OCI runtimes, on the same bundles, one run of each in
//! turn, so that whatever else the machine does meanwhile meets them all.

mod bundle;
mod goals;
mod order;
mod report;
mod runtime;
mod scenes;
mod seccomp;

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::prctl::set_child_subreaper;
use nix::unistd::Uid;

use self::bundle::Bundles;
use self::runtime::{Peer, Runtime};
use crate::bench::place;
use crate::step::step;
use crate::{binaries, packages};

/// Measures hostd-oci beside other OCI runtimes: run, create + start + delete, exec, memory
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Runtimes to compare with, comma-separated: crun and runc from Debian, or NAME=PATH
    #[arg(
        long,
        value_name = "PEERS",
        value_delimiter = ',',
        default_value = "crun,runc"
    )]
    peers: Vec<Peer>,
    /// How often each runtime does each thing
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    runs: u32,
    /// Measure nothing: have the linker put together what is executed (container/functions.order)
    #[arg(long)]
    order: bool,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

/// What making the bundles takes: the root's busybox, podman's seccomp profile, and the measure of
/// memory.
const PACKAGES: &[&str] = &["busybox-static", "golang-github-containers-common", "time"];

/// Measures, and prints the figures on standard output.
pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    if !Uid::effective().is_root() {
        bail!("Containers with limits need root: run this with sudo");
    }
    let peers = arguments.peers.iter().filter_map(|peer| peer.package());
    packages::ensure(&PACKAGES.iter().copied().chain(peers).collect::<Vec<_>>())?;
    binaries::build_one("hostd-oci")?;
    place::enter_own_mounts()?;
    // What `create` leaves behind becomes our child: its end can be waited for, and its time counted.
    set_child_subreaper(true).context("Cannot become the reaper")?;

    let work = tempfile::Builder::new()
        .prefix("hostd-bench-")
        .tempdir_in("/tmp")?;
    // Where runtimes keep their states: mostly a tmpfs.
    let states = tempfile::Builder::new()
        .prefix("hostd-bench-")
        .tempdir_in("/run")?;
    let bundles = Bundles::make(work.path())?;
    let mut runtimes = vec![Runtime::ours(states.path())?];
    if arguments.order {
        return order::write(&runtimes[0], &bundles, work.path());
    }
    for peer in &arguments.peers {
        runtimes.push(Runtime::of(peer, states.path())?);
    }
    let mut rows = Vec::new();
    for scene in scenes::ALL {
        rows.push(step(scene.title, || {
            scenes::play(scene, &runtimes, &bundles, arguments.runs)
        })?);
    }
    let report = if arguments.json {
        report::json(&runtimes, &rows)?
    } else {
        report::text(&runtimes, &rows)
    };
    io::stdout()
        .write_all(report.as_bytes())
        .context("Cannot print the figures")
}
