//! `scripts/bench vmm --order`: what hostd-vmm is to be fast at, for the order of its functions.

use std::fs;
use std::process::Command;

use anyhow::{Context, Error, Result};

use super::machine::{Devices, Monitor};
use super::place::Place;
use super::snapshot;
use crate::bench::order::List;

const LIST: List = List {
    program: "hostd-vmm",
    file: "vmm/functions.order",
    bench: "vmm",
    hindered: &[],
};

/// Runs a machine that does not end by itself, long enough for it to be there although it is led from
/// function to function.
const ENDING: &str = "\"$@\" & sleep 3; kill $!; wait; true";

/// Has hostd-vmm do what is measured, and writes the list.
pub(super) fn write(place: &Place) -> Result<()> {
    let monitor = Monitor::ours();
    let start = |name: &str, devices| {
        monitor.command(place, devices, "")?;
        let file = place.path(name);
        fs::rename(place.configuration(), &file).context("Cannot keep a configuration")?;
        let mut command = tool(&monitor)?;
        command.arg("--config").arg(file);
        Ok::<_, Error>(command)
    };
    let bare = start("bare.json", Devices::None)?;
    let disk = start("disk.json", Devices::Disk)?;
    let folder = place.path("snapshot");
    snapshot::keep(&monitor, place, &folder)?;
    let mut restore = Command::new("sh");
    restore.args(["-c", ENDING, "sh"]);
    restore.arg(tool(&monitor)?.get_program());
    restore.arg("--restore").arg(&folder);
    LIST.write(&[
        ("start", vec![bare]),
        ("restore", vec![restore]),
        ("start with a disk", vec![disk]),
    ])
}

fn tool(monitor: &Monitor) -> Result<Command> {
    monitor.tool().context("It is ours")
}
