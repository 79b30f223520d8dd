//! The guest image: the kernel and the initramfs that every VM of an OCI image starts from.
//!
//! The kernel is Debian's, taken out of its self-extracting wrapper: the VMM loads the ELF file at
//! once, whereas the guest would spend its first moments on decompression. The initramfs holds the
//! agent, the modules that reach the disks, the network and the host, and nothing else. It is not
//! compressed: the host's page cache holds it once for all VMs, and a guest unpacks it by copying.

mod vmlinux;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use agent::initramfs::Archive;
use anyhow::{Context, Result};

use crate::kernel::{Kernel, Series};
use crate::paths;
use crate::step::{command, run, step};

/// What the agent loads. ext4 is built into the kernel.
const MODULES: &[&str] = &[
    "virtio_mmio",                // How devices are found,
    "virtio_pci",                 // or on PCI.
    "virtio_blk",                 // Disks.
    "erofs",                      // The image disk.
    "overlay",                    // Joins it with the writable disk.
    "virtio_net",                 // The NIC.
    "vmw_vsock_virtio_transport", // The workload's streams and exec.
    "virtio_rng",                 // Entropy, before the workload wants any.
    "virtio_balloon",             // Memory that the guest does not use is the host's.
    "virtio_mem",                 // Memory that is plugged in later.
    "button",                     // The power button,
    "evdev",                      // And the device by which the agent hears of a press.
];

/// What guests need for images that they see as memory (virtio-pmem), which hostd gives to none of its own:
/// a second archive, for guests that the VMM runs by itself.
const PMEM_MODULES: &[&str] = &["virtio_pmem", "nd_pmem"];

/// Where the initramfs holds the modules' files, and where it says in which order they load.
const MODULES_DIR: &str = "hostd/kernel";
const MODULES_LIST: &str = "hostd/modules";
const PMEM_MODULES_LIST: &str = "hostd/modules.pmem";

/// A bootable pair of files, but for the segment with the VM's configuration (`agent::initramfs`)
/// that is to follow the initramfs.
#[derive(Debug)]
pub(crate) struct GuestImage {
    /// An ELF file.
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// An archive of modules that may follow the initramfs.
    pub(crate) pmem: PathBuf,
}

/// The command of the same name: builds both and prints where they are.
pub(crate) fn command_line() -> Result<()> {
    let image = build()?;
    writeln!(io::stdout(), "kernel {}", image.kernel.display())?;
    writeln!(io::stdout(), "initramfs {}", image.initramfs.display())?;
    writeln!(io::stdout(), "pmem {}", image.pmem.display())?;
    Ok(())
}

/// Builds both from the kernel package and the release build of the agent, which must be there.
pub(crate) fn build() -> Result<GuestImage> {
    let kernel = Kernel::fetch(Series::Guest)?;
    let dir = paths::build().join("guest");
    fs::create_dir_all(&dir)?;
    let (initramfs, pmem) = (dir.join("initramfs.cpio"), dir.join("pmem.cpio"));
    step("Assemble the guest's initramfs", || {
        let agent = stripped_agent(&dir)?;
        replace(&initramfs, &archive(&agent, &kernel)?)?;
        replace(&pmem, &pmem_archive(&kernel)?)
    })?;
    Ok(GuestImage {
        kernel: extracted(&kernel, &dir)?,
        initramfs,
        pmem,
    })
}

/// The ELF kernel, extracted once for each release of it.
fn extracted(kernel: &Kernel, dir: &Path) -> Result<PathBuf> {
    let target = dir.join(format!("vmlinux-{}", kernel.release));
    if !target.exists() {
        step("Extract the guest's kernel", || {
            replace(&target, &vmlinux::extract(&kernel.image())?)
        })?;
    }
    Ok(target)
}

fn archive(agent: &[u8], kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    // The kernel opens the console for the first process, and a Rust program falls back to
    // /dev/null where there is none; both before anything is mounted.
    archive.directory("dev", 0o755)?;
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.character_device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, agent)?;
    add_modules(&mut archive, kernel, MODULES, MODULES_LIST)?;
    Ok(archive.finish()?)
}

fn pmem_archive(kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    add_modules(&mut archive, kernel, PMEM_MODULES, PMEM_MODULES_LIST)?;
    Ok(archive.finish()?)
}

/// Adds modules and what they need, and a list of them in the order in which they load.
fn add_modules(
    archive: &mut Archive<Vec<u8>>,
    kernel: &Kernel,
    names: &[&str],
    list: &str,
) -> Result<()> {
    archive.directory("hostd", 0o755)?;
    archive.directory(MODULES_DIR, 0o755)?;
    let mut order = String::new();
    for module in kernel.modules(names)? {
        let name = module.file_name().and_then(|name| name.to_str());
        let path = format!("{MODULES_DIR}/{}", name.context("A module has no name")?);
        let file = kernel.modules_dir().join(&module);
        let content = fs::read(&file).with_context(|| format!("Cannot read {}", file.display()))?;
        archive.file(&path, 0o644, &content)?;
        order.push_str(&format!("/{path}\n"));
    }
    archive.file(list, 0o644, order.as_bytes())?;
    Ok(())
}

/// The agent without symbols and line tables, which would be most of the initramfs.
fn stripped_agent(dir: &Path) -> Result<Vec<u8>> {
    let stripped = dir.join("hostd-agent");
    let agent = paths::binaries().join("hostd-agent");
    run(command("strip", ["-o"]).args([&stripped, &agent]))?;
    fs::read(&stripped).context("Cannot read the agent")
}

/// Writes a file in one step, so that a build that was cut short leaves no half of it.
fn replace(target: &Path, content: &[u8]) -> Result<()> {
    let partial = target.with_extension("partial");
    fs::write(&partial, content)
        .and_then(|()| fs::rename(&partial, target))
        .with_context(|| format!("Cannot write {}", target.display()))
}
