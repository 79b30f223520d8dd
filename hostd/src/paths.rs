//! Where things are. The only place that joins hostd's directories and file names.

use std::path::{Path, PathBuf};

/// hostd's directories.
#[derive(Clone, Debug)]
pub struct Paths {
    /// What survives a reboot, e.g. `/var/lib/hostd`.
    pub state: PathBuf,
    /// What dies with the host, e.g. `/run/hostd`.
    pub run: PathBuf,
    /// Where `hostd-oci` and `hostd-vmm` are.
    pub helpers: PathBuf,
    /// Where the guest kernel and the base initramfs are.
    pub guest: PathBuf,
}

impl Paths {
    pub fn database(&self) -> PathBuf {
        self.state.join("hostd.db")
    }

    /// Held locked by the one daemon of this state directory.
    pub fn lock(&self) -> PathBuf {
        self.state.join("hostd.lock")
    }

    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    pub fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// Empty file systems that a VM's writable disk starts as a copy of.
    pub fn disk_templates(&self) -> PathBuf {
        self.state.join("disk-templates")
    }

    /// What an instance keeps between its runs: the writable layer or disk, and the log.
    pub fn instance_state(&self, name: &str) -> PathBuf {
        self.state.join("instances").join(name)
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.instance_state(name).join("log")
    }

    /// The snapshots of an instance, a directory each.
    pub fn snapshots(&self, name: &str) -> PathBuf {
        self.instance_state(name).join("snapshots")
    }

    /// What one run of an instance needs.
    pub fn instance_run(&self, name: &str) -> PathBuf {
        self.instance_runs().join(name)
    }

    pub fn instance_runs(&self) -> PathBuf {
        self.run.join("instances")
    }

    /// The runtime's own states, as `hostd-oci --root`.
    pub fn runtime_root(&self) -> PathBuf {
        self.run.join("oci")
    }

    pub fn runtime_program(&self) -> PathBuf {
        self.helpers.join("hostd-oci")
    }

    pub fn vmm_program(&self) -> PathBuf {
        self.helpers.join("hostd-vmm")
    }

    pub fn guest_kernel(&self) -> PathBuf {
        self.guest.join("kernel")
    }

    pub fn guest_initramfs(&self) -> PathBuf {
        self.guest.join("initramfs.cpio")
    }
}

/// Whether `path` is absolute and has no `.` or `..` in it.
pub fn is_plain_absolute(path: &str) -> bool {
    path.starts_with('/')
        && !path.contains('\0')
        && Path::new(path)
            .components()
            .skip(1)
            .all(|part| matches!(part, std::path::Component::Normal(_)))
}
