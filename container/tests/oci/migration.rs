//! Checkpoints that meet the world around them: connections, memory that is fetched late, an engine, and
//! runtimes that are killed.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::json;

use crate::bundle::{Bundle, PATIENCE};
use crate::checkpoint::{
    COUNTING, Talk, assert_checkpointed, checkpoint, exec, images, is_possible, restoring,
};
use crate::systemd::{self, beside_systemd};

#[test]
fn connections_are_kept_where_that_is_asked_for_and_else_the_container_goes_on() {
    if !is_possible() {
        return;
    }
    let script = "ip link set lo up
        sleep 1000 | busybox nc -l -p 2000 >/dev/shm/heard &
        while ! busybox netstat -ltn | grep -q :2000; do busybox usleep 1000; done
        while read line; do echo $line; echo said $line >&2; done | busybox nc 127.0.0.1 2000";
    let bundle = Bundle::new(script).with(|config| {
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_NET_ADMIN"]);
        }
    });
    let mut talk = Talk::run(&bundle);
    let heard = |count: usize| {
        let start = Instant::now();
        loop {
            let heard = exec(&bundle, "cat /dev/shm/heard 2>/dev/null || true");
            if heard.lines().count() >= count || start.elapsed() > PATIENCE {
                return heard;
            }
        }
    };
    writeln!(talk.input, "one").unwrap();
    assert_eq!(heard(1), "one\n");
    let place = images(&bundle, "images");
    let ended = checkpoint(&bundle, &place, &[]);
    assert!(
        ended.status != 0 && ended.stderr.contains("--tcp-established"),
        "{ended:?}"
    );
    writeln!(talk.input, "two").unwrap();
    assert_eq!(heard(2), "one\ntwo\n");
    assert_checkpointed(&bundle, &place, &["--tcp-established"]);
    let mut talk = Talk::restore(&bundle, &place, &["--tcp-established"]);
    writeln!(talk.input, "three").unwrap();
    assert_eq!(heard(3), "one\ntwo\nthree\n");
}

#[test]
fn memory_can_stay_where_it_is_until_it_is_used() {
    if !is_possible() {
        return;
    }
    let (first, second) = (Bundle::new(COUNTING), Bundle::new(COUNTING));
    let mut talk = Talk::run(&first);
    assert_eq!(talk.say("one"), "0 one");
    // Free a moment ago.
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port().to_string()
    };
    let (place, status, work) = (
        images(&first, "images"),
        images(&first, "status"),
        images(&second, "work"),
    );
    fs::create_dir(&work).unwrap();
    mkfifo(&status, Mode::S_IRWXU).unwrap();
    let address = format!("127.0.0.1:{port}");
    let options = [
        "--lazy-pages",
        "--status-fd",
        "9",
        "--page-server",
        &address,
    ];
    let verb = ["checkpoint", "--image-path", place.to_str().unwrap()];
    let mut command = first.command(&[&verb[..], &options].concat());
    command.arg(&first.id);
    let mut shell = Command::new("sh");
    let script = format!("exec 9>{}; exec \"$@\"", status.display());
    shell.args(["-c", &script, "sh"]).arg(command.get_program());
    let mut dump = shell.args(command.get_args()).spawn().unwrap();
    let mut byte = [1];
    let mut ready = fs::File::open(&status).unwrap();
    ready.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0]);

    let mut daemon = Command::new("criu");
    daemon.args([
        "lazy-pages",
        "--page-server",
        "--address",
        "127.0.0.1",
        "--port",
        &port,
    ]);
    daemon.arg("-D").arg(&place).arg("-W").arg(&work);
    let mut daemon = daemon.stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !work.join("lazy-pages.socket").exists() {
        assert!(start.elapsed() < PATIENCE, "nobody listens for faults");
        std::thread::yield_now();
    }
    let options = ["--lazy-pages", "--work-path", work.to_str().unwrap()];
    let mut other = Talk::restore(&second, &place, &options);
    assert_eq!(other.say("two"), "1 two");
    assert!(daemon.wait().unwrap().success());
    assert!(dump.wait().unwrap().success());
    first.assert_nothing_is_left();
}

#[test]
fn a_scope_of_systemd_is_made_anew() {
    if !(is_possible() && systemd::is_possible()) {
        return;
    }
    let bundle = Bundle::new("n=0; while sleep 0.1; do n=$((n+1)); echo $n >/dev/shm/n; done");
    let bundle = bundle.with(|config| {
        config["linux"]["cgroupsPath"] = json!("test.slice:unit:name");
        config["linux"]["resources"]["pids"] = json!({"limit": 30});
    });
    let output = beside_systemd(
        &bundle,
        true,
        r#"reached() {
            for i in $(seq 200); do
                n=$($R exec $ID cat /dev/shm/n 2>/dev/null) && [ ${n:-0} -gt $1 ] && return
            done
            echo "it is at $n" >&2
            false
        }
        R="$R --systemd-cgroup"
        $R run --detach $ID >/dev/null 2>errors </dev/null || { cat errors >&2; exit 1; }
        reached 0
        $R checkpoint --image-path images $ID
        systemctl show unit-name.scope -p LoadState
        $R restore --detach --image-path images $ID >/dev/null 2>errors </dev/null || { cat errors >&2; exit 1; }
        reached $n
        systemctl show unit-name.scope -p ActiveState,TasksMax
        grep -c test.slice/unit-name.scope /proc/$($R ps --format json $ID | tr -d '[]' | cut -d, -f1)/cgroup
        $R delete --force $ID
        systemctl show unit-name.scope -p LoadState"#,
    );
    let expected = "LoadState=not-found\nTasksMax=30\nActiveState=active\n1\nLoadState=not-found\n";
    assert_eq!(output, expected);
}

/// As its users do it: a container goes on where it was, and as another from an archive.
#[test]
fn podman_checkpoints_and_restores() {
    let has_podman = Command::new("podman").arg("--version").output().is_ok();
    if !(is_possible() && has_podman) {
        return;
    }
    let bundle = Bundle::new("true");
    // Commands of podman, of which each takes a second or more where it is emulated.
    let ended = bundle.script_of_steps(
        11,
        r#"podman() {
            command podman --root $PWD/storage --runroot $PWD/run --storage-driver vfs --log-level error \
                --runtime ${R%% *} --cgroup-manager cgroupfs --events-backend none "$@"
        }
        export HOME=$PWD TMPDIR=$PWD
        mkdir -p .config/containers
        echo '{"default": [{"type": "insecureAcceptAnything"}]}' >.config/containers/policy.json
        trap 'podman rm --force --time 0 --all >/dev/null' EXIT
        # Until a container has counted further than that, or for a while.
        reached() {
            for i in $(seq 200); do
                last=$(podman logs $1 | tail -n 1)
                [ "${last##* }" -gt $2 ] && return
            done
            echo "$1 is at $last" >&2
            false
        }
        tar -cf image.tar -C rootfs .
        podman import --quiet image.tar counting >/dev/null
        podman run --detach --name first --network none --memory 64m counting \
            sh -c 'read name </proc/sys/kernel/random/uuid; n=0
                while echo $name $n; do n=$((n+1)); sleep 0.1; done' >/dev/null
        reached first 0
        name=${last%% *}
        podman container checkpoint --export $PWD/archive.tar.gz first >/dev/null
        podman ps --all --format '{{.Names}} {{.ExitCode}}'
        reached first 0
        podman rm first >/dev/null
        podman container restore --import $PWD/archive.tar.gz --name second >/dev/null
        reached second ${last##* }
        podman ps --format '{{.Names}}'
        # What was in its memory still is.
        [ "${last%% *}" = "$name" ]"#,
    );
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(ended.stdout, "first 0\nsecond\n");
}

/// Whoever dies in the middle of a checkpoint or a restore leaves a container that runs or one that is
/// gone, and never half of one.
#[test]
fn a_runtime_that_is_killed_leaves_a_whole_container_or_none() {
    if !is_possible() {
        return;
    }
    let bundle = Bundle::new(COUNTING);
    let mut talk = Some(Talk::run(&bundle));
    let mut said = 0;
    for milliseconds in (0..600).step_by(200) {
        let place = images(&bundle, "images");
        let arguments = ["checkpoint", "--image-path", place.to_str().unwrap()];
        killed_after(bundle.command(&arguments).arg(&bundle.id), milliseconds);
        wait_for_criu(&place);
        let state = bundle.verb(&["state"], &[]);
        let runs = state.stdout.contains("running");
        if let (Some(talk), true) = (&mut talk, runs) {
            assert_eq!(talk.say("on"), format!("{said} on"), "{milliseconds} ms");
            said += 1;
            continue;
        }
        // It was dumped, whether there was still somebody to delete it or not.
        let ended = bundle.verb(&["delete", "--force"], &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
        bundle.assert_nothing_is_left();
        let mut restored = Talk::restore(&bundle, &place, &[]);
        assert_eq!(
            restored.say("on"),
            format!("{said} on"),
            "{milliseconds} ms"
        );
        said += 1;
        talk = Some(restored);
    }
    let place = images(&bundle, "last");
    assert_checkpointed(&bundle, &place, &[]);
    for milliseconds in (0..600).step_by(200) {
        killed_after(
            bundle.command(&restoring(&place)).arg(&bundle.id),
            milliseconds,
        );
        wait_for_criu(&place);
        let state = bundle.verb(&["state"], &[]);
        let group = format!("/sys/fs/cgroup/{}/cgroup.procs", bundle.id);
        let members = fs::read_to_string(group).unwrap_or_default();
        let runs = state.stdout.contains("\"running\"");
        assert_eq!(
            runs,
            !members.is_empty(),
            "{milliseconds} ms: {state:?}, {members}"
        );
        let ended = bundle.verb(&["delete", "--force"], &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
        bundle.assert_nothing_is_left();
    }
}

fn killed_after(command: &mut Command, milliseconds: u64) {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(milliseconds));
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
    child.wait().unwrap();
}

/// Waits until no CRIU has these images open.
fn wait_for_criu(images: &Path) {
    let uses = |process: &Path| {
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        let links = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let mut targets = links.filter_map(|link| fs::read_link(link.path()).ok());
        name.trim_end() == "criu" && targets.any(|target| target.starts_with(images))
    };
    let start = Instant::now();
    loop {
        let processes = fs::read_dir("/proc")
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let users: Vec<PathBuf> = processes.filter(|process| uses(process)).collect();
        if users.is_empty() {
            return;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{users:?} still uses the images"
        );
        std::thread::yield_now();
    }
}
