//! Makes a running system out of a kernel that has just started the agent from the initramfs.
//!
//! Read [`set_up`]: it is the list of what happens, in order. The parts are in the modules below.

mod disks;
mod files;
mod host_keys;
mod modules;
mod mounts;
mod netlink;
mod network;
mod system;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::libc::SIGHUP;
use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::sync;

use crate::console::say;
use crate::power_button;
use crate::protocol::{CONFIG_PATH, Config, Network, Renewal};
use crate::sys;

pub use self::host_keys::HostKeyError;

/// Where control groups are found.
pub const CGROUP: &str = "/sys/fs/cgroup";

/// A machine that is ready for its workload.
#[derive(Debug)]
pub struct Machine {
    /// /proc/meminfo, open.
    pub memory: File,
    /// The device of the power button, open, if there is one.
    pub power_button: Option<File>,
    /// The root directory of the writable disk.
    writable: File,
}

/// Why the machine could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    #[error("Failed to read the configuration at {CONFIG_PATH}")]
    ReadConfig(#[source] io::Error),
    #[error("The configuration at {CONFIG_PATH} is malformed")]
    Config(#[source] serde_json::Error),
    #[error("Failed to load the kernel module {path}")]
    Module { path: String, source: io::Error },
    #[error("Failed to look for disks")]
    Disks(#[source] io::Error),
    #[error("There is no disk with the serial number `{serial}`; found: {found}")]
    NoDisk { serial: String, found: String },
    #[error("Failed to mount {what} at {target}")]
    Mount {
        what: String,
        target: String,
        source: Errno,
    },
    #[error("Failed to make the joined file systems the root")]
    Root(#[source] Errno),
    #[error("Failed to write {path}")]
    File { path: String, source: io::Error },
    #[error("There is no network interface with the address {mac}")]
    NoInterface { mac: String },
    #[error("Failed to look for network interfaces")]
    Interfaces(#[source] io::Error),
    #[error("Failed to {action}")]
    Network {
        action: &'static str,
        source: io::Error,
    },
    #[error("Failed to {action}")]
    System { action: &'static str, source: Errno },
    #[error("Failed to renew the ssh host keys")]
    HostKeys(#[from] HostKeyError),
}

/// Reads what the host wants run.
pub fn read_config() -> Result<Config, SetUpError> {
    let text = fs::read(CONFIG_PATH).map_err(SetUpError::ReadConfig)?;
    serde_json::from_slice(&text).map_err(SetUpError::Config)
}

/// Sets everything up but the workload. From then on the image is the root file system.
pub fn set_up(config: &Config) -> Result<Machine, SetUpError> {
    mounts::mount_kernel_file_systems()?;
    modules::load_all()?;
    system::set_clock(config.clock_ns)?;
    system::set_host_name(&config.hostname)?;
    system::raise_limits()?;
    system::be_like_a_container();
    let memory = system::open_memory_information()?;
    let power_button = power_button::open().unwrap_or_else(|error| {
        // A workload can do without.
        say(&format!("The power button cannot be heard: {error}"));
        None
    });

    let image = disks::find(&config.image_serial)?;
    let writable = disks::find(&config.writable_serial)?;
    let writable = mounts::join_disks(&image, &config.image_fs, &writable)?;
    system::drop_initramfs();
    mounts::enter_root()?;
    mounts::mount_device_file_systems()?;
    let machine_id = config.machine_id.as_deref();
    // Before it has its own machine-id, so that a start that is cut off here does it again.
    if files::is_of_another(machine_id) {
        renew_host_keys(|command| command.status().map(|status| status.success()))?;
    }
    files::write_identity(&config.hostname, config.network.as_ref(), machine_id)?;

    network::bring_up_loopback()?;
    if let Some(network) = &config.network {
        network::configure(network)?;
    }
    Ok(Machine {
        memory,
        power_button,
        writable,
    })
}

/// Sets the clock of a machine that did not run for a while, unless it shows the host's `now_ns`.
pub fn adjust_clock(now_ns: Option<i64>) -> Result<(), SetUpError> {
    system::adjust_clock(now_ns)
}

/// Makes the machine, which has gone on from the memory of another, one of its own. `former` is what
/// its network interface is set to; `execute` runs a program to its end, and tells whether it succeeded.
pub fn renew(
    renewal: &Renewal,
    former: Option<&Network>,
    execute: impl FnMut(&mut Command) -> io::Result<bool>,
) -> Result<(), SetUpError> {
    system::set_host_name(&renewal.hostname)?;
    renew_host_keys(execute)?;
    for server in host_keys::servers() {
        // It has the old keys in its memory. One that has gone needs to hear nothing.
        let _ = sys::kill(server, SIGHUP);
    }
    files::write_identity(
        &renewal.hostname,
        renewal.network.as_ref(),
        renewal.machine_id.as_deref(),
    )?;
    match (former, &renewal.network) {
        (Some(former), Some(network)) if former != network => network::change(former, network),
        _ => Ok(()),
    }
}

fn renew_host_keys(
    execute: impl FnMut(&mut Command) -> io::Result<bool>,
) -> Result<(), HostKeyError> {
    host_keys::renew(
        Path::new(host_keys::DIRECTORY),
        host_keys::generator(),
        execute,
    )
}

impl Machine {
    /// Brings the writable disk into the state of a clean unmount. Writers wait from then on.
    pub fn settle(&self) {
        sync();
        if let Err(error) = sys::freeze(self.writable.as_fd()) {
            say(&format!("The disk was not settled: {error}"));
        }
    }
}

/// Turns the machine off. Returns only if the kernel refuses.
pub fn power_off() {
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    say(&format!("Failed to power off: {error}"));
}
