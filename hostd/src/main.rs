//! The daemon's command line.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use hostd::daemon::{self, Options};
use hostd::doctor;
use hostd::network::NetworkConfig;
use hostd::paths::Paths;
use ipnet::Ipv4Net;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Runs virtual machines and containers through one API on a local socket.
///
/// SIGTERM and SIGINT end the daemon; the instances stay, and the next daemon finds them.
#[derive(Debug, Parser)]
#[command(name = "hostd", version)]
struct Arguments {
    /// Where the API listens [default: RUN_DIR/hostd.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// What survives a reboot: images, instances, the database
    #[arg(long, value_name = "DIR", default_value = doctor::STATE_DIR)]
    state_dir: PathBuf,
    /// What dies with the host: sockets, mounts, network namespaces
    #[arg(long, value_name = "DIR", default_value = "/run/hostd")]
    run_dir: PathBuf,
    /// Where hostd-oci and hostd-vmm are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    helpers_dir: Option<PathBuf>,
    /// The guests' `kernel` and `initramfs`
    #[arg(long, value_name = "DIR", default_value = doctor::GUEST_DIR)]
    guest_dir: PathBuf,
    /// The cgroup that holds those of the instances
    #[arg(long, value_name = "PATH", default_value = "/hostd")]
    cgroup_parent: String,
    /// The bridge that the instances are on
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,
    /// The instances' addresses, e.g. 10.90.0.0/16
    #[arg(long, value_name = "NET")]
    subnet: Option<Ipv4Net>,
    /// A name server for the instances, in place of the host's; may be given more than once
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<IpAddr>,
}

impl Arguments {
    fn options(self) -> Result<Options> {
        let helpers = match self.helpers_dir {
            Some(directory) => directory,
            None => std::env::current_exe()
                .context("this program's own place is not known; give --helpers-dir")?
                .parent()
                .context("this program has no directory; give --helpers-dir")?
                .to_owned(),
        };
        let run = absolute(&self.run_dir)?;
        let mut network = NetworkConfig {
            netns_dir: run.join("netns"),
            ..NetworkConfig::default()
        };
        network.bridge = self.bridge.unwrap_or(network.bridge);
        network.subnet = self.subnet.unwrap_or(network.subnet);
        if !self.dns.is_empty() {
            network.fallback_dns = self.dns;
        }
        Ok(Options {
            socket: self.socket.unwrap_or_else(|| run.join("hostd.sock")),
            paths: Paths {
                state: absolute(&self.state_dir)?,
                run,
                helpers,
                guest: absolute(&self.guest_dir)?,
            },
            network,
            cgroup_parent: self.cgroup_parent,
        })
    }
}

/// Monitors run in `/`, so that no path may depend on where hostd was started.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{} cannot be used", path.display()))
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("HOSTD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    let options = arguments.options()?;
    let stopping = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn({
        let stopping = stopping.clone();
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopping.cancel();
        }
    });
    daemon::run(options, stopping).await?;
    Ok(())
}
