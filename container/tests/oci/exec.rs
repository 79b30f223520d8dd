//! One more process in a container that runs.

use std::fs;
use std::process::Command;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;

use crate::bundle::{Bundle, finish, is_own};

fn running() -> Bundle {
    let bundle = Bundle::new("exec sleep 100").with(|config| config["hostname"] = json!("inside"));
    bundle.start();
    bundle
}

#[test]
fn it_is_in_every_namespace_and_cgroup_of_the_container() {
    let bundle = running();
    let script = "for n in cgroup ipc mnt net pid uts; do readlink /proc/1/ns/$n; readlink /proc/self/ns/$n; done; \
        cat /proc/self/cgroup; hostname";
    let ended = bundle.verb(&["exec"], &["sh", "-c", script]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let lines: Vec<&str> = ended.stdout.lines().collect();
    for pair in lines[..12].chunks(2) {
        assert_eq!(pair[0], pair[1]);
    }
    for line in lines.iter().filter(|line| line.contains(":/")) {
        assert!(line.ends_with(":/"), "{ended:?}");
    }
    assert_eq!(*lines.last().unwrap(), "inside");
}

#[test]
fn it_is_who_and_where_it_is_asked_to_be() {
    let bundle = running();
    let options = [
        "exec", "-u", "7:8", "-g", "9", "-e", "A=b", "--cwd", "/bin", "-c", "NET_RAW",
    ];
    let script = "id; pwd; echo $A; grep -E 'CapBnd|NoNew' /proc/self/status; exit 5";
    let ended = bundle.verb(&options, &["sh", "-c", script]);
    assert_eq!(ended.status, 5, "{ended:?}");
    let expected = "uid=7 gid=8 groups=9\n/bin\nb\nCapBnd:\t0000000020002420\nNoNewPrivs:\t1\n";
    assert_eq!(ended.stdout, expected);
}

#[test]
fn a_file_can_say_the_whole_process() {
    let bundle = running();
    let process = json!({
        "user": {"uid": 3, "gid": 4}, "cwd": "/", "args": ["id", "-u"], "env": ["PATH=/bin"]
    });
    let path = bundle.path().join("process.json");
    fs::write(&path, process.to_string()).unwrap();
    let ended = bundle.verb(&["exec", "--process", path.to_str().unwrap()], &[]);
    assert_eq!(
        (ended.status, ended.stdout.as_str()),
        (0, "3\n"),
        "{ended:?}"
    );
}

#[test]
fn it_has_a_terminal_if_asked() {
    let bundle = running();
    let ended = bundle.verb(&["exec", "--tty"], &["sh", "-c", "test -t 0 && tty"]);
    assert_eq!(
        (ended.status, ended.stdout.as_str()),
        (0, "/dev/pts/0\n"),
        "{ended:?}"
    );
}

#[test]
fn detached_it_runs_on() {
    let bundle = running();
    let pid_file = bundle.path().join("pid");
    let mut command =
        bundle.command(&["exec", "--detach", "--pid-file", pid_file.to_str().unwrap()]);
    command.arg(&bundle.id).args(["sleep", "99"]);
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    assert!(command.status().unwrap().success());
    let pid = fs::read_to_string(pid_file).unwrap();
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(line, "sleep\099\0");
    let pids: Vec<i32> =
        serde_json::from_str(&bundle.verb(&["ps", "-f", "json"], &[]).stdout).unwrap();
    assert!(pids.contains(&pid.parse().unwrap()), "{pids:?}");
}

#[test]
fn what_cannot_be_run_is_told() {
    let bundle = running();
    for (program, words) in [
        ("nope", "executable file `nope` not found in $PATH"),
        ("/bin", "cannot exec `/bin`: permission denied"),
    ] {
        let ended = bundle.verb(&["exec"], &[program]);
        assert_eq!(ended.status, 255, "{ended:?}");
        assert!(ended.stderr.contains(words), "{ended:?}");
    }
    // Peers run it, too.
    let ended = bundle.verb(&["exec", "-c", "CAP_FLY"], &["echo", "ran"]);
    assert_eq!(ended.stdout, "ran\n", "{ended:?}");
    assert!(
        !is_own() || ended.stderr.contains("capability `CAP_FLY` is unknown"),
        "{ended:?}"
    );
    bundle.verb(&["kill"], &["KILL"]);
    bundle.wait_for_status("stopped");
    let ended = bundle.verb(&["exec"], &["true"]);
    assert!(ended.stderr.contains("it is stopped"), "{ended:?}");
}

#[test]
fn it_enters_a_user_namespace_too() {
    let bundle = Bundle::new("exec sleep 100").with(|config| {
        let linux = &mut config["linux"];
        linux["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        linux["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        linux["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    });
    std::os::unix::fs::chown(bundle.rootfs(), Some(100_000), Some(100_000)).unwrap();
    bundle.start();
    let script =
        "readlink /proc/1/ns/user; readlink /proc/self/ns/user; id -u; test -d /proc/1/root";
    let ended = bundle.verb(&["exec"], &["sh", "-c", script]);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{ended:?}");
    assert_eq!((lines[0], lines[2]), (lines[1], "0"), "{ended:?}");
}

#[test]
fn a_shared_null_device_keeps_its_owner() {
    let bundle = running();
    let before = std::os::unix::fs::MetadataExt::uid(&fs::metadata("/dev/null").unwrap());
    let ended = bundle.verb(&["exec", "-u", "7"], &["true"]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let after = std::os::unix::fs::MetadataExt::uid(&fs::metadata("/dev/null").unwrap());
    assert_eq!(before, after);
}

/// HOME is looked for there where it is not given.
#[test]
fn a_passwd_that_is_no_file_is_not_waited_for() {
    let bundle = Bundle::new("exec sleep 100");
    let etc = bundle.rootfs().join("etc");
    fs::create_dir(&etc).unwrap();
    let mode = Mode::from_bits_truncate(0o644);
    mkfifo(&etc.join("passwd"), mode).unwrap();
    bundle.start();
    let ended = bundle.verb(&["exec"], &["sh", "-c", "echo $HOME"]);
    assert_eq!(
        (ended.status, ended.stdout.as_str()),
        (0, "/\n"),
        "{ended:?}"
    );
    fs::remove_file(etc.join("passwd")).unwrap();
    // The standard input of the process that looks: this test's.
    std::os::unix::fs::symlink("/proc/self/fd/0", etc.join("passwd")).unwrap();
    let given = bundle.path().join("given");
    fs::write(&given, "root:x:0:0::/given:/bin/sh\n").unwrap();
    let mut command = bundle.command(&["exec"]);
    command.args([bundle.id.as_str(), "sh", "-c", "echo $HOME"]);
    command.stdin(fs::File::open(given).unwrap());
    let ended = finish(command);
    assert_eq!(ended.stdout, "/\n", "{ended:?}");
}

#[test]
fn socket_activation_is_not_for_it() {
    let bundle = running();
    let exec = bundle.command(&["exec"]);
    let mut shell = Command::new("sh");
    let script = "export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$@\" 3</dev/zero";
    shell.args(["-c", script, "sh"]).arg(exec.get_program());
    shell.args(exec.get_args()).arg(&bundle.id);
    shell.args(["sh", "-c", "echo $LISTEN_FDS; readlink /proc/self/fd/3"]);
    shell.current_dir(bundle.path());
    let ended = finish(shell);
    // What readlink itself has open there is no device.
    assert!(!ended.stdout.contains("zero"), "{ended:?}");
    assert!(ended.stdout.starts_with('\n'), "{ended:?}");
}

#[test]
fn it_has_a_session_keyring_of_its_own_unless_the_container_has_none() {
    for (option, own) in [(None, true), (Some("--no-new-keyring"), false)] {
        let bundle = Bundle::new("exec sleep 100");
        let name = format!("_ses.{}", bundle.id);
        let bundle = bundle.with(|config| config["linux"]["maskedPaths"] = json!([]));
        let create: Vec<&str> = std::iter::once("create").chain(option).collect();
        assert_eq!(bundle.quiet(&create).status, 0);
        let ended = bundle.verb(&["exec"], &["cat", "/proc/keys"]);
        assert_eq!(ended.status, 0, "{ended:?}");
        assert_eq!(ended.stdout.contains(&name), own, "{option:?}: {ended:?}");
    }
}
