//! Programs of Debian that the tests of hostd-oci use in a simulated host, and what they need, as an archive
//! to unpack there: systemd, which they start in namespaces of its own, CRIU, podman, and AppArmor's parser.
//!
//! Not a part of the host image: hostd needs none of them, and the image is held in memory.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::sim_host::Machine;
use crate::step::{command, run, step};
use crate::{debian, paths};

const PACKAGES: &[&str] = &[
    "apparmor",   // Its parser.
    "criu",       // Checkpoints.
    "iptables",   // With which CRIU holds packets back.
    "mount",      // umount --recursive.
    "podman",     // Checkpoints as an engine makes them.
    "systemd",    // It and systemctl.
    "tar",        // CRIU's, for the files of a tmpfs: busybox's has not its options.
    "util-linux", // unshare and nsenter: busybox's know no control groups.
];

/// What the tests run, as the packages have it. No unit of systemd's is wanted: the tests have their own.
const PROGRAMS: &[&str] = &[
    "bin/mount",
    "bin/systemctl",
    "bin/tar",
    "bin/umount",
    "lib/systemd/systemd",
    "sbin/apparmor_parser",
    "usr/bin/conmon",
    "usr/bin/nsenter",
    "usr/bin/podman",
    "usr/bin/unshare",
    "usr/sbin/criu",
    "usr/sbin/xtables-nft-multi",
];

/// What programs load by themselves.
const PLUGINS: &[&str] = &[
    "usr/lib/x86_64-linux-gnu/xtables/libxt_mark.so",
    "usr/lib/x86_64-linux-gnu/xtables/libxt_standard.so",
];

/// Names that a package would give a program when it is configured.
const NAMES: &[(&str, &str)] = &[
    ("/usr/sbin/iptables-restore", "xtables-nft-multi"),
    ("/usr/sbin/iptables-save", "xtables-nft-multi"),
    ("/usr/sbin/ip6tables-restore", "xtables-nft-multi"),
    ("/usr/sbin/ip6tables-save", "xtables-nft-multi"),
];

/// Where the packages have libraries, for their own loader.
const LIBRARIES: [&str; 3] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/systemd",
];

const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// A compressed tar of programs and libraries, from packages that are fetched once.
pub(super) fn archive() -> Result<PathBuf> {
    let dir = paths::build().join("tools");
    let packages = debian::unpacked(&dir, "packages", PACKAGES)?;
    let archive = dir.join("tools.tar.gz");
    step("Archive programs for the tests", || {
        let work = tempfile::tempdir_in(&dir)?;
        let root = work.path().join("root");
        debian::extract(&packages, &root)?;
        let files = files(&root)?;
        let partial = work.path().join("tools.tar.gz");
        // In a Debian that is installed, /lib is /usr/lib.
        let arguments = ["--dereference", "--transform=s,^lib/,usr/&,", "-czf"];
        run(command("tar", arguments)
            .arg(&partial)
            .arg("-C")
            .arg(&root)
            .args(files))?;
        fs::rename(&partial, &archive).context("Cannot move the archive in place")
    })?;
    Ok(archive)
}

/// Unpacks the archive in a host.
pub(super) fn install(host: &Machine, archive: &Path) -> Result<()> {
    const PLACE: &str = "/tmp/tools.tar.gz";
    step("Unpack programs for the tests", || {
        host.push(archive, PLACE)?;
        let names = NAMES
            .iter()
            .map(|(name, program)| format!(" && ln -sf {program} {name}"));
        let names: String = names.collect();
        let script = format!("tar -xzf {PLACE} -C / && rm {PLACE}{names}");
        run(&mut host.command(&["sh".to_owned(), "-c".to_owned(), script], false)).map(|_| ())
    })
}

/// The programs and the libraries that they are loaded with, by their names below the root.
fn files(root: &Path) -> Result<BTreeSet<String>> {
    let mut files: BTreeSet<String> = PROGRAMS
        .iter()
        .chain(PLUGINS)
        .map(|name| (*name).to_owned())
        .collect();
    let loader = root.join(LOADER);
    let path = LIBRARIES.map(|library| root.join(library).display().to_string());
    for program in PROGRAMS {
        let listing = run(command(
            &loader.display().to_string(),
            ["--library-path", &path.join(":"), "--list"],
        )
        .arg(root.join(program)))?;
        // As `libc.so.6 => /ROOT/lib/x86_64-linux-gnu/libc.so.6 (0x…)`.
        for line in listing.lines() {
            let Some((name, found)) = line.split_once(" => ") else {
                continue;
            };
            let found = found.split(" (").next().unwrap_or_default();
            let Ok(library) = Path::new(found).strip_prefix(root) else {
                bail!("{program} needs {}, which no package has", name.trim());
            };
            files.insert(library.display().to_string());
        }
    }
    Ok(files)
}
