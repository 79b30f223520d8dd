//! How each virtual machine monitor is told to run the same machine: one processor, 128 MiB, the
//! guest as its kernel, and the devices that a measurement needs.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::place::{Place, TAP};
use crate::bench::program::forget_pages;
use crate::paths;

pub(crate) const MEMORY_MIB: u64 = 128;

/// Mappings of this size or more are the guest's memory, not the monitor's own.
pub(crate) const GUEST_BYTES: u64 = MEMORY_MIB << 20;

/// Devices of a machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Devices {
    None,
    Disk,
    Net,
}

/// A virtual machine monitor.
#[derive(Clone, Debug)]
pub(crate) struct Monitor {
    kind: Kind,
    program: PathBuf,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Hostd,
    Firecracker,
    Qemu,
}

impl fmt::Display for Monitor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.kind {
            Kind::Hostd => "hostd-vmm",
            Kind::Firecracker => "firecracker",
            Kind::Qemu => "qemu microvm",
        })
    }
}

impl Monitor {
    /// The one that is measured.
    pub(crate) fn ours() -> Monitor {
        Monitor {
            kind: Kind::Hostd,
            program: paths::binaries().join("hostd-vmm"),
        }
    }

    /// The peer that every machine can have.
    pub(crate) fn qemu() -> Monitor {
        Monitor {
            kind: Kind::Qemu,
            program: "qemu-system-x86_64".into(),
        }
    }

    /// From `KIND=PATH`.
    pub(crate) fn parse(text: &str) -> Result<Monitor> {
        let (kind, program) = text
            .split_once('=')
            .context("A peer is KIND=PATH, as in firecracker=/usr/bin/firecracker")?;
        let kind = match kind {
            "hostd" => Kind::Hostd,
            "firecracker" => Kind::Firecracker,
            "qemu" => Kind::Qemu,
            _ => bail!("Only firecracker, qemu and hostd can be peers, not {kind}"),
        };
        Ok(Monitor {
            kind,
            program: program.into(),
        })
    }

    /// Has its program read from the disk, as after the host's start.
    pub(crate) fn settle(&self) -> Result<()> {
        // One without a folder is found by the shell's rules, and was not just built.
        if self.program.parent() == Some(Path::new("")) {
            return Ok(());
        }
        forget_pages(&self.program)
            .with_context(|| format!("Cannot have {} read anew", self.program.display()))
    }

    /// The command that runs this machine; none for peers.
    pub(crate) fn run_machine(&self, place: &Place, machine: &Value) -> Result<Option<Command>> {
        configure(place, machine)?;
        Ok(self.tool().map(|mut command| {
            command.arg("--config").arg(place.configuration());
            command
        }))
    }

    /// Our program, for what only it does.
    pub(crate) fn tool(&self) -> Option<Command> {
        (self.kind == Kind::Hostd).then(|| Command::new(&self.program))
    }

    /// The command that runs the guest with these words on its command line.
    pub(crate) fn command(&self, place: &Place, devices: Devices, words: &str) -> Result<Command> {
        let mut command = if devices == Devices::Net {
            let [program, first @ ..] = place.in_network();
            let mut command = Command::new(program);
            command.args(first).arg(&self.program);
            command
        } else {
            Command::new(&self.program)
        };
        match self.kind {
            Kind::Hostd => {
                command.arg("--boot-timer").arg("--config");
                configure(place, &hostd(place, devices, words))?;
                command.arg(place.configuration());
            }
            Kind::Firecracker => {
                command.args(["--no-api", "--boot-timer", "--level", "Info"]);
                configure(place, &firecracker(place, devices, words))?;
                command.arg("--config-file").arg(place.configuration());
            }
            Kind::Qemu => {
                qemu(&mut command, place, devices, words);
            }
        }
        Ok(command)
    }
}

fn configure(place: &Place, configuration: &Value) -> Result<()> {
    fs::write(place.configuration(), configuration.to_string())
        .context("Cannot write a configuration")
}

fn hostd(place: &Place, devices: Devices, words: &str) -> Value {
    let mut machine = json!({
        "boot": {"kernel": place.kernel(), "cmdline": words},
        "memory": {"size_mib": MEMORY_MIB},
        "rng": false,
        "console": "stdio",
    });
    match devices {
        Devices::None => {}
        Devices::Disk => machine["disks"] = json!([{"path": place.disk()}]),
        Devices::Net => machine["nets"] = json!([{"tap": TAP}]),
    }
    machine
}

fn firecracker(place: &Place, devices: Devices, words: &str) -> Value {
    let mut machine = json!({
        "boot-source": {"kernel_image_path": place.kernel(), "boot_args": words},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
        "drives": [],
    });
    match devices {
        Devices::None => {}
        Devices::Disk => {
            machine["drives"] = json!([{
                "drive_id": "disk",
                "path_on_host": place.disk(),
                "is_root_device": false,
                "is_read_only": false,
                "io_engine": "Async",
            }]);
        }
        Devices::Net => {
            machine["network-interfaces"] = json!([{"iface_id": "net", "host_dev_name": TAP}]);
        }
    }
    machine
}

fn qemu(command: &mut Command, place: &Place, devices: Devices, words: &str) {
    command
        .args(["-bios", "qboot.rom", "-M"])
        .arg("microvm,x-option-roms=off,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on")
        // Some hosts' KVM promises this feature and then refuses its register.
        .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m"])
        .arg(MEMORY_MIB.to_string())
        .args(["-smp", "1", "-nodefaults", "-no-user-config", "-nographic"])
        .args(["-no-reboot", "-serial", "stdio", "-kernel"])
        .arg(place.kernel())
        .args(["-append", words])
        .args(["-global", "virtio-mmio.force-legacy=false"]);
    match devices {
        Devices::None => {}
        Devices::Disk => {
            let drive = format!(
                "id=disk,if=none,format=raw,cache=writeback,aio=io_uring,file={}",
                place.disk().display()
            );
            command.args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"]);
        }
        Devices::Net => {
            let tap = format!("tap,id=net,ifname={TAP},script=no,downscript=no");
            command.args(["-netdev", &tap, "-device", "virtio-net-device,netdev=net"]);
        }
    }
}
