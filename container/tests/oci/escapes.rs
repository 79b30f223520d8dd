//! Programs of an image that are links of the kernel's: none leads to a program of the host.

use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{fs, io};

use nix::sys::socket::{Backlog, listen};
use serde_json::json;

use crate::bundle::{Bundle, PATIENCE, copy_program, finish};

/// More descriptors than the runtime ever has.
const NUMBERS: std::ops::Range<u32> = 3..40;

/// A bundle with links `/N/echo` that lead to a program beside the root, if descriptor N is a directory of
/// the host when they are followed (CVE-2024-21626). A script would not do: its interpreter would have to
/// open it again.
fn with_links(script: &str) -> Bundle {
    let bundle = Bundle::new(script);
    copy_program(Path::new("/bin/busybox"), &bundle.path().join("outside"));
    for number in NUMBERS {
        let up = "../".repeat(16);
        let target = format!(
            "/proc/self/fd/{number}/{up}{}/outside",
            bundle.path().display()
        );
        let directory = bundle.rootfs().join(number.to_string());
        fs::create_dir(&directory).unwrap();
        symlink(target, directory.join("echo")).unwrap();
    }
    bundle
}

/// A shell of the host that has `/` open as descriptor 9 when it becomes the command.
fn with_open_root(command: &Command) -> Command {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_str().unwrap()).collect();
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", &format!("exec 9</; exec {}", words.join(" "))])
        .current_dir(command.get_current_dir().unwrap())
        .stdin(Stdio::null());
    shell
}

#[test]
fn a_program_of_exec_is_never_one_of_the_host() {
    let bundle = with_links("exec sleep 100");
    bundle.start();
    for number in NUMBERS {
        let program = format!("/{number}/echo");
        let mut command = bundle.command(&["exec"]);
        command.args([&bundle.id, &program, "escaped"]);
        for command in [with_open_root(&command), command] {
            let ended = finish(command);
            assert_eq!((ended.status, ended.stdout.as_str()), (255, ""), "{number}");
        }
    }
}

#[test]
fn the_first_program_is_never_one_of_the_host() {
    for number in NUMBERS {
        let program = format!("/{number}/echo");
        let bundle = with_links("").with(|config| {
            config["process"]["args"] = json!([program, "escaped"]);
        });
        let mut command = bundle.command(&["run"]);
        command.arg(&bundle.id);
        let ended = finish(with_open_root(&command));
        assert_eq!((ended.status, ended.stdout.as_str()), (1, ""), "{number}");
    }
}

#[test]
fn a_hook_in_the_container_is_never_one_of_the_host() {
    let bundle = with_links("echo ran").with(|config| {
        config["hooks"] = json!({"startContainer": [{"path": "/9/echo"}]});
    });
    let mut command = bundle.command(&["run"]);
    command.arg(&bundle.id);
    let ended = finish(with_open_root(&command));
    assert_eq!((ended.status, ended.stdout.as_str()), (1, ""), "{ended:?}");
}

#[test]
fn a_created_container_has_nothing_of_the_host_open() {
    // Beside a mount of the cgroup, which the default configuration has.
    let mount = json!({"destination": "/source", "source": "source", "options": ["bind"]});
    let bundle = Bundle::new("true").with(|config| {
        config["mounts"].as_array_mut().unwrap().push(mount);
        // Who may trace the first process may follow its descriptors.
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_SYS_PTRACE"]);
        }
    });
    fs::create_dir(bundle.path().join("source")).unwrap();
    fs::write(bundle.path().join("secret"), "secret\n").unwrap();
    let mut create = bundle.command(&["create"]);
    create.arg(&bundle.id);
    let mut create = with_open_root(&create);
    // The container keeps the streams.
    let said = bundle.path().join("said");
    create.stdout(Stdio::null());
    create.stderr(fs::File::create(&said).unwrap());
    let ended = create.status().unwrap();
    assert!(ended.success(), "{}", fs::read_to_string(&said).unwrap());

    let mut sockets = 0;
    for (number, target) in open_files(bundle.state()["pid"].as_i64().unwrap()) {
        let is_socket = target.starts_with("socket:");
        assert!(number < 3 || is_socket, "{number} is {target}");
        sockets += u32::from(is_socket);
    }
    // `start` is awaited at one.
    assert!(sockets > 0);
    let script = format!(
        "for fd in /proc/1/fd/*; do cat $fd/{}{}/secret; done; test -r /proc/1/environ && echo traced",
        "../".repeat(16),
        bundle.path().display()
    );
    let ended = bundle.verb(&["exec"], &["/bin/sh", "-c", &script]);
    assert_eq!(ended.stdout, "traced\n", "{ended:?}");
}

#[test]
fn a_further_process_is_seen_in_the_container_only_once_it_is_inside() {
    let bundle = Bundle::new("exec sleep 1000");
    bundle.start();
    let init = bundle.state()["pid"].as_i64().unwrap();

    // Nobody has room for the pidfd that `exec` sends: it waits for that, and its process for it.
    let path = bundle.path().join("pidfds");
    let socket = UnixListener::bind(&path).unwrap();
    listen(&socket, Backlog::new(0).unwrap()).unwrap();
    let _in_the_way = UnixStream::connect(&path).unwrap();
    let mut exec = bundle.command(&["exec", "--pidfd-socket"]);
    exec.arg(&path).args([&bundle.id, "sleep", "1000"]);
    let mut exec = with_open_root(&exec).stdout(Stdio::null()).spawn().unwrap();
    let seen = wait_for_another(init);

    let inside = |what: &str| fs::metadata(format!("/proc/{seen}/{what}")).unwrap();
    let rootfs = fs::metadata(bundle.rootfs()).unwrap();
    assert_eq!(
        (inside("root").dev(), inside("root").ino()),
        (rootfs.dev(), rootfs.ino())
    );
    assert_eq!(
        (inside("cwd").dev(), inside("cwd").ino()),
        (rootfs.dev(), rootfs.ino())
    );
    assert_ne!(open_files(seen), []);
    for (number, target) in open_files(seen) {
        assert!(
            number < 3 || target.starts_with("socket:"),
            "{number} is {target}"
        );
    }
    exec.kill().unwrap();
    exec.wait().unwrap();
}

/// Another process in the pid namespace of `init`, when there is one.
fn wait_for_another(init: i64) -> i64 {
    let namespace = |pid: i64| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = namespace(init);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let pids = fs::read_dir("/proc").unwrap();
        let pids = pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        if let Some(pid) = pids
            .filter(|pid| *pid != init)
            .find(|pid| namespace(*pid) == own)
        {
            return pid;
        }
        assert!(Instant::now() < deadline, "there is no other process");
    }
}

/// The descriptors of a process, and what they are.
fn open_files(pid: i64) -> Vec<(u32, String)> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let file = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        let number = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap();
        (number, target.to_str().unwrap().to_owned())
    };
    files.map(file).collect()
}
