//! The host image: a kernel and an initramfs that boot straight into hostd.
//!
//! Its root is unpacked from Debian packages with mmdebstrap, as root or in a user namespace, and
//! nothing else goes in but the project's own binaries and the scripts of `scripts/host-image`.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernel::{Kernel, Series};
use crate::step::{command, run, step};
use crate::{binaries, debian, fixtures, guest, paths};

/// What is unpacked into the image, and why.
const PACKAGES: &[&str] = &[
    "busybox-static",  // init, shell and the usual tools.
    "ca-certificates", // Pulling from registries.
    "dropbear-bin",    // Shells, if a key is put into the image.
    "e2fsprogs",       // Writable disks of VMs.
    "erofs-utils",     // Image disks of VMs.
    "iproute2",        // tc.
    "nftables",        // NAT and published ports.
];

/// Directories of the packages that a host without people does not read.
const PRUNED: &[&str] = &[
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/bash-completion",
    "usr/share/iproute2",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "usr/bin/perl",
    "usr/bin/perl5.36.0",
    "usr/share/perl5",
    "var/cache",
    "var/lib/apt",
    "var/lib/dpkg",
    "var/log",
];

/// What hostd and its instances use, and the disks and NICs of the machines it runs on.
const MODULES: &[&str] = &[
    "kvm_amd",
    "kvm_intel",
    "vhost_net",
    "vhost_vsock",
    "tun",
    "veth",
    "bridge",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nf_conntrack_netlink",
    "nft_masq",
    "nft_meta_bridge",
    "nft_nat",
    "nft_redir",
    "nft_reject_inet",
    "nft_limit",
    "nft_log",
    "nft_fib",
    "nft_fib_ipv4",
    "sch_tbf",
    "sch_htb",
    "sch_fq_codel",
    "sch_ingress",
    "act_police",
    "act_mirred",
    "cls_u32",
    "cls_matchall",
    "ifb",
    // What CRIU asks about sockets, and the rules of iptables with which it holds packets back, where
    // somebody installs it.
    "af_packet_diag",
    "inet_diag",
    "netlink_diag",
    "raw_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "nft_compat",
    "xt_mark",
    "overlay",
    "erofs",
    "loop",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "nvme",
    "sd_mod",
];

/// Each of `scripts/host-image` and its place in the image.
const FILES: &[(&str, &str)] = &[
    ("init", "init"),
    ("inittab", "etc/inittab"),
    ("start", "etc/init.d/start"),
    ("hostd", "etc/init.d/hostd"),
    ("ready", "etc/init.d/ready"),
    ("stop", "etc/init.d/stop"),
    ("udhcpc.script", "etc/udhcpc.script"),
];

/// The binaries of the workspace that belong on a host.
const BINARIES: &[&str] = &["hostd", "hostctl", "hostd-oci", "hostd-vmm"];

/// A bootable pair of files.
#[derive(Debug)]
pub(crate) struct HostImage {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// Nobody builds it anew meanwhile: it is always made in the same place.
    _lock: File,
}

/// Builds all parts that are missing or older than what they are made from.
pub(crate) fn build() -> Result<HostImage> {
    let kernel = Kernel::fetch(Series::Host)?;
    binaries::build()?;
    let guest = guest::build()?;
    let busybox = fixtures::busybox()?;
    let dir = paths::build().join("host-image");
    fs::create_dir_all(&dir)?;
    let lock = File::create(dir.join("lock"))?;
    lock.lock().context("Cannot wait for another build")?;
    let base = debian::unpacked(&dir, "base", PACKAGES)?;
    let initramfs = dir.join("initramfs.cpio");
    step("Assemble the host image", || {
        let root = dir.join("root");
        if root.exists() {
            fs::remove_dir_all(&root).context("Cannot remove the last root")?;
        }
        unpack_base(&base, &root)?;
        install_modules(&kernel, &root)?;
        install_files(&root)?;
        for binary in BINARIES {
            let target = root.join("usr/bin").join(binary);
            run(command("strip", ["-o"])
                .arg(&target)
                .arg(paths::binaries().join(binary)))?;
        }
        let guest_dir = root.join("usr/lib/hostd/guest");
        fs::create_dir_all(&guest_dir)?;
        fs::copy(&guest.kernel, guest_dir.join("kernel"))?;
        fs::copy(&guest.initramfs, guest_dir.join("initramfs.cpio"))?;
        fs::copy(&guest.pmem, guest_dir.join("pmem.cpio"))?;
        let images = root.join("usr/share/hostd/images");
        fs::create_dir_all(&images)?;
        run(command("cp", ["-a"])
            .arg(&busybox)
            .arg(images.join("busybox")))?;
        archive(&root, &initramfs)
    })?;
    Ok(HostImage {
        kernel: kernel.image(),
        initramfs,
        _lock: lock,
    })
}

fn unpack_base(archive: &Path, root: &Path) -> Result<()> {
    debian::extract(archive, root)?;
    for path in PRUNED {
        let path = root.join(path);
        if path.is_dir() {
            fs::remove_dir_all(&path)?;
        } else if path.exists() {
            fs::remove_file(&path)?;
        }
    }
    for dir in [
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "root",
        "etc/init.d",
        "usr/bin",
        "var/lib",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    // Packages are only unpacked, so what their scripts would have made is made here.
    let certificates = collect_certificates(root)?;
    fs::create_dir_all(root.join("etc/ssl/certs"))?;
    fs::write(root.join("etc/ssl/certs/ca-certificates.crt"), certificates)?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nhostd:x:900:\n")?;
    fs::write(root.join("etc/shells"), "/bin/sh\n")?;
    fs::write(root.join("etc/hostname"), "hostd\n")?;
    fs::write(
        root.join("etc/hosts"),
        "127.0.0.1 localhost\n127.0.1.1 hostd\n",
    )?;
    symlink("busybox", root.join("bin/sh")).context("Cannot link the shell")
}

fn collect_certificates(root: &Path) -> Result<Vec<u8>> {
    let dir = root.join("usr/share/ca-certificates/mozilla");
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(&dir).context("The package ca-certificates holds none")? {
        files.push(entry?.path());
    }
    files.sort();
    let mut bundle = Vec::new();
    for file in files {
        bundle.extend(fs::read(file)?);
    }
    Ok(bundle)
}

fn install_modules(kernel: &Kernel, root: &Path) -> Result<()> {
    let modules = kernel.modules(MODULES)?;
    let target = root.join("lib/modules").join(&kernel.release);
    let mut list = String::new();
    for module in &modules {
        let path = target.join(module);
        fs::create_dir_all(path.parent().context("A module lies in a directory")?)?;
        fs::copy(kernel.modules_dir().join(module), &path)?;
        list.push_str(&format!("{}\n", module.display()));
    }
    fs::write(root.join("etc/modules"), list).context("Cannot write the list of modules")
}

fn install_files(root: &Path) -> Result<()> {
    for (source, target) in FILES {
        let target = root.join(target);
        fs::copy(
            paths::root().join("scripts/host-image").join(source),
            &target,
        )?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Writes the tree as an initramfs, owned by root whoever builds it.
pub(crate) fn archive(root: &Path, target: &Path) -> Result<()> {
    let partial = target.with_extension("partial");
    let script = "find . -mindepth 1 | LC_ALL=C sort | \
                  cpio --quiet --reproducible -R 0:0 -H newc -o >\"$1\"";
    run(command("sh", ["-euc", script, "sh"])
        .arg(&partial)
        .current_dir(root))?;
    fs::rename(&partial, target).context("Cannot move the archive in place")
}
