//! The two engines, each with a state of its own, and how they are called.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::paths;
use crate::step::{command, run};

/// The name of the image in both.
const IMAGE: &str = "busybox";

/// Something that runs containers from images.
pub(super) trait Engine {
    fn name(&self) -> &'static str;
    /// A call of its command line.
    fn call(&self, words: &[&str]) -> Command;
    /// How its `run` names the image.
    fn image(&self) -> &str;
    /// Lists all instances, as a person would.
    fn list(&self) -> Command;
    /// What runs for its instances, without their own processes.
    fn keepers(&self) -> Result<Vec<Pid>>;
}

/// A daemon, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Hostd {
    daemon: Child,
    run_dir: PathBuf,
}

impl Hostd {
    pub(super) fn start(work: &Path, image: &Path) -> Result<Self> {
        let run_dir = work.join("hostd-run");
        let log = fs::File::create(work.join("hostd.log"))?;
        let mut daemon = Command::new(paths::binaries().join("hostd"));
        daemon
            .arg("--state-dir")
            .arg(work.join("hostd"))
            .arg("--run-dir")
            .arg(&run_dir)
            .arg("--cgroup-parent")
            .arg(format!("/hostd-bench-{}", std::process::id()));
        let daemon = daemon
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("Cannot start hostd")?;
        let hostd = Self { daemon, run_dir };
        run(&mut hostd.call(&["--wait", "30s", "image", "list"]))?;
        let mut import = hostd.call(&["image", "import", "--name", IMAGE]);
        run(import.arg(image))?;
        Ok(hostd)
    }
}

impl Engine for Hostd {
    fn name(&self) -> &'static str {
        "hostctl"
    }

    fn call(&self, words: &[&str]) -> Command {
        let mut call = Command::new(paths::binaries().join("hostctl"));
        call.arg("--socket")
            .arg(self.run_dir.join("hostd.sock"))
            .args(words);
        call
    }

    fn image(&self) -> &str {
        IMAGE
    }

    fn list(&self) -> Command {
        self.call(&["list", "--all"])
    }

    fn keepers(&self) -> Result<Vec<Pid>> {
        // A monitor's program is a read-only mount of its own, without a path.
        let ours = self.run_dir.to_string_lossy();
        let mut keepers = processes(|arguments| {
            arguments.contains("hostd-oci\0monitor\0") && arguments.contains(&*ours)
        })?;
        keepers.push(Pid::from_raw(self.daemon.id().try_into()?));
        Ok(keepers)
    }
}

impl Drop for Hostd {
    fn drop(&mut self) {
        let left = run(&mut self.call(&["list", "--all", "--quiet"])).unwrap_or_default();
        for name in left.split_whitespace() {
            // If it does not go there is nothing else to try.
            let _ = run(&mut self.call(&["rm", "--force", name]));
        }
        if let Ok(pid) = self.daemon.id().try_into() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.daemon.wait();
    }
}

/// Podman with images and containers of its own.
#[derive(Debug)]
pub(super) struct Podman {
    work: PathBuf,
    image: String,
}

impl Podman {
    pub(super) fn set_up(work: &Path, image: &Path) -> Result<Self> {
        let work = work.join("podman");
        fs::create_dir(&work)?;
        // Without the right to raise limits root has to be content with low ones.
        let configuration = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             log_driver = \"k8s-file\"\n[engine]\ncgroup_manager = \"cgroupfs\"\n\
             events_logger = \"file\"\nruntime = \"crun\"\ntmp_dir = \"{}/tmp\"\n",
            work.display()
        );
        fs::write(work.join("containers.conf"), configuration)?;
        let mut podman = Self {
            work,
            image: String::new(),
        };
        let source = format!("oci:{}:latest", image.display());
        let id = run(&mut podman.call(&["pull", "--quiet", &source]))?;
        id.trim().clone_into(&mut podman.image);
        Ok(podman)
    }
}

impl Engine for Podman {
    fn name(&self) -> &'static str {
        "podman"
    }

    fn call(&self, words: &[&str]) -> Command {
        let mut call = command::<&str>("podman", []);
        call.env("CONTAINERS_CONF", self.work.join("containers.conf"))
            .arg("--root")
            .arg(self.work.join("root"))
            .arg("--runroot")
            .arg(self.work.join("run"))
            .args(words);
        call
    }

    fn image(&self) -> &str {
        &self.image
    }

    fn list(&self) -> Command {
        self.call(&["ps", "--all"])
    }

    fn keepers(&self) -> Result<Vec<Pid>> {
        let ours = self.work.to_string_lossy().into_owned();
        processes(|arguments| arguments.contains("conmon\0") && arguments.contains(&ours))
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // If it does not work there is nothing else to try.
        let _ = run(&mut self.call(&["rm", "--all", "--force", "--time", "0"]));
    }
}

/// Those whose arguments, each ended by a NUL, are as wanted; others come and go meanwhile.
fn processes(wanted: impl Fn(&str) -> bool) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let arguments = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        if wanted(&arguments) {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}
