//! The Debian packages that building and testing need, and their installation.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::paths;
use crate::step::{command, run, step};

/// What the host needs to build hostd and its images and to run the simulated host.
pub(crate) const ALL: &[&str] = &[
    "build-essential", // Linker, and the C compiler for SQLite.
    "buildah",         // Builds images with hostd-oci in its tests.
    "busybox-static",  // The image of the tests and the demo.
    "containerd",      // Runs containers with hostd-oci in its tests.
    "cpio",            // Initramfs archives.
    "docker-registry", // A real registry for the image tests.
    "e2fsprogs",       // Writable disks of VMs.
    "erofs-utils",     // Image disks of VMs.
    "iproute2",        // The network tests look at what hostd made.
    "iptables",        // Podman's network.
    "kmod",            // Module dependencies of the kernels.
    "mmdebstrap",      // The host image's root.
    "nftables",        // NAT and published ports.
    "openssh-client",  // Commands in the simulated host.
    "podman",          // Runs containers with hostd-oci in its tests.
    "qemu-system-x86", // The simulated host.
    "skopeo",          // Pushes to the registry in the image tests.
    "systemd",         // Has limits set by it in the tests of hostd-oci.
    "umoci",           // OCI layouts from file trees.
    "xz-utils",        // Kernel modules.
];

/// Debian's newer builds of packages, for machines that have some of them installed already.
const BACKPORTS: &str = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                         http://deb.debian.org/debian bookworm-backports main\n";

/// Installs those of `names` that are not there. Does nothing, quickly, when all are.
pub(crate) fn ensure(names: &[&str]) -> Result<()> {
    let missing: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| !is_installed(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !Uid::effective().is_root() {
        bail!(
            "These Debian packages are missing; run `sudo apt-get install {}`",
            missing.join(" ")
        );
    }
    step("Update package lists", || run(&mut apt(["update", "-qq"])))?;
    step(&format!("Install {}", missing.join(", ")), || {
        install(&missing)
    })
}

fn is_installed(name: &str) -> bool {
    command("dpkg-query", ["-W", "-f=${db:Status-Status}", name])
        .output()
        .is_ok_and(|output| output.stdout == b"installed")
}

fn install(names: &[&str]) -> Result<()> {
    let plain = run(apt(["install", "-y", "--no-install-recommends"]).args(names));
    if plain.is_ok() {
        return Ok(());
    }
    // Packages from backports that are installed already can conflict with the stable builds of
    // others (qemu-utils with qemu-system-x86): take all from backports then, from lists of our
    // own, so that the machine's sources stay as they are.
    let backports = Backports::prepare()?;
    let mut command = backports.apt(["install", "-y", "--no-install-recommends"]);
    command.args(["-t", "bookworm-backports"]).args(names);
    match run(&mut command) {
        Ok(_) => Ok(()),
        Err(_) => plain.map(|_| ()),
    }
}

fn apt<const N: usize>(arguments: [&str; N]) -> Command {
    let mut apt = command("apt-get", arguments);
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

/// Package lists that include backports, kept apart from the machine's own.
struct Backports {
    options: [String; 2],
}

impl Backports {
    fn prepare() -> Result<Self> {
        let dir = paths::build().join("apt");
        let parts = dir.join("parts");
        fs::create_dir_all(dir.join("lists/partial"))
            .context("Cannot make the lists' directory")?;
        fs::create_dir_all(&parts).context("Cannot make the sources' directory")?;
        fs::write(parts.join("backports.list"), BACKPORTS).context("Cannot write a source")?;
        copy_debian_sources(&parts)?;
        let options = [
            format!("-oDir::Etc::sourceparts={}", parts.display()),
            format!("-oDir::State::lists={}", dir.join("lists").display()),
        ];
        let backports = Self { options };
        run(&mut backports.apt(["update", "-qq"]))?;
        Ok(backports)
    }

    fn apt<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut command = apt([]);
        command.args(&self.options).args(arguments);
        command
    }
}

fn copy_debian_sources(parts: &Path) -> Result<()> {
    let source = Path::new("/etc/apt/sources.list.d/debian.sources");
    if source.exists() {
        fs::copy(source, parts.join("debian.sources")).context("Cannot copy debian.sources")?;
    }
    Ok(())
}
