//! Where the clients work: their configuration, their storage, and the image.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const RUNTIME: &str = env!("CARGO_BIN_EXE_hostd-oci");

/// How long the steps of one test, or a daemon's start, may take.
const PATIENCE: Duration = Duration::from_secs(60);

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n";
const GROUP: &str = "root:x:0:\nuser:x:1000:\n";

/// The directory, and the daemon that works in it.
pub(crate) struct Workshop {
    directory: tempfile::TempDir,
    containerd: Child,
}

/// How a shell ended, and all that it printed.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) output: String,
}

impl Workshop {
    pub(crate) fn open() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        configure_podman(path);
        configure_containerd(path);
        let log = fs::File::create(path.join("containerd.log")).unwrap();
        let containerd = Command::new("containerd")
            .arg("--config")
            .arg(path.join("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        make_root(&path.join("image"));
        let workshop = Self {
            directory,
            containerd,
        };
        workshop.must("tar -C image -cf image.tar . && podman import -q image.tar busybox");
        workshop.must("podman save -q --format docker-archive -o busybox.tar busybox");
        workshop.wait_for_containerd();
        workshop.must("$CTR images import --snapshotter native busybox.tar");
        workshop
    }

    fn wait_for_containerd(&self) {
        let start = Instant::now();
        while self.run("$CTR version").status != 0 {
            let log = || fs::read_to_string(self.directory.path().join("containerd.log"));
            assert!(
                start.elapsed() < PATIENCE,
                "containerd does not start: {:?}",
                log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn must(&self, script: &str) {
        let ended = self.run(script);
        assert_eq!(ended.status, 0, "{script}: {ended:?}");
    }

    /// Runs a script of a shell, in which `$NAME` is a name that no other has.
    pub(crate) fn run(&self, script: &str) -> Ended {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path();
        let output = path.join(format!("output-{next}"));
        let file = fs::File::create(&output).unwrap();
        let mut shell = Command::new("timeout");
        shell
            .args(["--kill-after", "5"])
            .arg(PATIENCE.as_secs().to_string())
            .args(["sh", "-c", script])
            .env("NAME", format!("hostd-test-{}-{next}", std::process::id()))
            .env("RUNTIME", RUNTIME)
            .env("WORK", path)
            .env(
                "CTR",
                format!("ctr --address {}", path.join("containerd.sock").display()),
            )
            .env("CONTAINERS_CONF", path.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", path.join("storage.conf"))
            .current_dir(path)
            .stdin(Stdio::null())
            // A file and no pipe: what is left running would keep a pipe open.
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        let status = shell.status().unwrap().code().unwrap_or(-1);
        Ended {
            status,
            output: String::from_utf8_lossy(&fs::read(output).unwrap()).into_owned(),
        }
    }

    /// Ends whatever tests that failed left running.
    pub(crate) fn close(&self) {
        self.run("podman pod rm --all --force --time 0; podman rm --all --force --time 0");
        self.run("for t in $($CTR tasks list -q); do $CTR tasks delete --force $t; done");
        kill(
            Pid::from_raw(self.containerd.id().cast_signed()),
            Signal::SIGTERM,
        )
        .unwrap();
        // Removes its mounts and its shims.
        let end = format!("/proc/{}/exe", self.containerd.id());
        let start = Instant::now();
        while fs::metadata(&end).is_ok() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = fs::remove_dir_all(self.directory.path());
    }
}

fn write(path: PathBuf, text: &str) {
    fs::write(path, text).unwrap();
}

fn configure_podman(path: &Path) {
    let directory = path.display();
    write(
        path.join("storage.conf"),
        &format!(
            "[storage]\ndriver = \"vfs\"\nrunroot = \"{directory}/podman-run\"\n\
             graphroot = \"{directory}/podman-root\"\n"
        ),
    );
    // The limits are those that root may set without the right to raise them.
    write(
        path.join("containers.conf"),
        &format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             log_driver = \"k8s-file\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"hostd\"\n\
             tmp_dir = \"{directory}/podman-tmp\"\n[engine.runtimes]\nhostd = [\"{RUNTIME}\"]\n"
        ),
    );
    write(
        path.join("policy.json"),
        r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
    );
}

fn configure_containerd(path: &Path) {
    let directory = path.display();
    write(
        path.join("containerd.toml"),
        &format!(
            "version = 2\nroot = \"{directory}/containerd-root\"\nstate = \"{directory}/containerd-run\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = \"{directory}/containerd.sock\"\n"
        ),
    );
}

/// Busybox with all its commands, and two users.
fn make_root(root: &Path) {
    for directory in [
        "bin",
        "etc",
        "root",
        "home/user",
        "tmp",
        "proc",
        "sys",
        "dev",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    // By another process: a child that is forked while this one has the program open for writing would
    // keep it so, and then nobody can execute it.
    let copied = Command::new("cp")
        .arg("/bin/busybox")
        .arg(root.join("bin/busybox"))
        .status();
    assert!(copied.unwrap().success());
    let applets = Command::new("/bin/busybox")
        .arg("--list")
        .output()
        .unwrap()
        .stdout;
    for applet in str::from_utf8(&applets)
        .unwrap()
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), PermissionsExt::from_mode(0o1777)).unwrap();
    write(root.join("etc/passwd"), PASSWD);
    write(root.join("etc/group"), GROUP);
    std::os::unix::fs::chown(root.join("home/user"), Some(1000), Some(1000)).unwrap();
}
