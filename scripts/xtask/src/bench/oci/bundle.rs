//! The bundles that all runtimes run: one root with busybox, and three configurations.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::seccomp;
use crate::paths;
use crate::step::{command, run};

/// The capabilities that podman leaves a container.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Directories with a configuration each.
#[derive(Debug)]
pub(super) struct Bundles {
    /// What `runc spec` writes, without a terminal: no seccomp profile, no limits.
    pub(super) bare: PathBuf,
    /// What podman writes for `podman run --memory 64m --pids-limit 100`.
    pub(super) podman: PathBuf,
    /// As `bare`, with a program that does not end.
    pub(super) lasting: PathBuf,
}

impl Bundles {
    pub(super) fn make(work: &Path) -> Result<Self> {
        let root = work.join("root");
        make_root(&root)?;
        let bundles = Self {
            bare: work.join("bare"),
            podman: work.join("podman"),
            lasting: work.join("lasting"),
        };
        let mut bare = default_configuration(&bundles.bare)?;
        // The newest that all runtimes take.
        bare["ociVersion"] = json!("1.0.2");
        bare["root"]["path"] = json!(root);
        bare["process"]["terminal"] = json!(false);
        bare["process"]["args"] = json!(["/bin/true"]);
        write(&bundles.bare, &bare)?;
        write(&bundles.podman, &as_podman(&bare)?)?;
        bare["process"]["args"] = json!(["/bin/sleep", "86400"]);
        write(&bundles.lasting, &bare)?;
        Ok(bundles)
    }
}

fn make_root(root: &Path) -> Result<()> {
    for dir in ["bin", "dev", "etc", "proc", "sys"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .context("busybox-static is not installed")?;
    for applet in ["true", "sleep"] {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}

fn default_configuration(bundle: &Path) -> Result<Value> {
    fs::create_dir(bundle)?;
    let program = paths::binaries().join("hostd-oci");
    run(command(&program.to_string_lossy(), ["spec", "--bundle"]).arg(bundle))?;
    let text = fs::read(bundle.join("config.json")).context("There is no configuration")?;
    Ok(serde_json::from_slice(&text)?)
}

fn write(bundle: &Path, configuration: &Value) -> Result<()> {
    fs::create_dir_all(bundle)?;
    let text = serde_json::to_vec_pretty(configuration)?;
    fs::write(bundle.join("config.json"), text).context("Cannot write a configuration")
}

fn as_podman(bare: &Value) -> Result<Value> {
    let mut podman = bare.clone();
    podman["root"]["readonly"] = json!(false);
    let capabilities = json!(CAPABILITIES);
    podman["process"]["capabilities"] = json!({
        "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
    });
    podman["process"]["noNewPrivileges"] = json!(false);
    podman["process"]["rlimits"] = json!([]);
    podman["mounts"] = mounts();
    let linux = &mut podman["linux"];
    linux["seccomp"] = seccomp::profile(CAPABILITIES)?;
    linux["resources"] = json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "memory": { "limit": 64 << 20, "swap": 128 << 20 },
        "pids": { "limit": 100 },
    });
    linux["maskedPaths"] = json!([
        "/proc/acpi",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/sys/firmware",
        "/sys/fs/selinux",
        "/sys/dev/block",
    ]);
    linux["readonlyPaths"] = json!([
        "/proc/asound",
        "/proc/bus",
        "/proc/fs",
        "/proc/irq",
        "/proc/sys",
        "/proc/sysrq-trigger",
    ]);
    Ok(podman)
}

fn mounts() -> Value {
    let mount = |kind: &str, at: &str, options: &[&str]| {
        json!({
            "type": kind, "source": kind, "destination": at, "options": options,
        })
    };
    json!([
        mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "tmpfs",
            "/dev",
            &["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"]
        ),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "devpts",
            "/dev/pts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5"
            ],
        ),
        mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mount(
            "cgroup",
            "/sys/fs/cgroup",
            &["rprivate", "nosuid", "noexec", "nodev", "relatime", "ro"]
        ),
    ])
}
