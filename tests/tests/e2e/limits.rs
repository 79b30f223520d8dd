//! Every limit binds when it is exceeded, and can be changed on a running instance.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tests::{Host, Kind};

use crate::KindTest;
use crate::lifecycle::stats;
use crate::process::start_idle;

pub(crate) const TESTS: &[(&str, KindTest)] = &[
    ("a_memory_hog_is_stopped_and_the_exit_says_so", memory),
    ("memory_that_is_freed_comes_back", freed),
    ("memory_grows_and_shrinks_while_it_runs", resize),
    ("a_fork_bomb_is_held", pids),
    ("processor_time_is_capped_and_the_cap_moves", cpu),
    (
        "a_plan_tells_what_a_change_does_and_a_bad_one_changes_nothing",
        update,
    ),
];

fn memory(host: &Host, kind: Kind) {
    let name = format!("hog-{}", kind.name());
    let script = "head -c 400m /dev/zero | tail -c 399m >/dev/null";
    let run = ["run", "--name", &name, "--isolation", kind.name()];
    let hog = ["--memory", "128M", "busybox", "sh", "-c", script];
    let output = host.hostctl(&[&run[..], &hog[..]].concat()).exits(137);
    assert!(output.stderr.contains("memory limit"), "{}", output.stderr);
    let instance = host.hostctl(&["inspect", "--json", &name]).json();
    assert_eq!(instance["exit"]["oom"], true, "{instance:#}");
    host.hostctl(&["rm", &name]).ok();
}

fn freed(host: &Host, kind: Kind) {
    let name = format!("freed-{}", kind.name());
    start_idle(host, kind, &name, &["--memory", "256M"]);
    frees(host, kind, &name);
    host.hostctl(&["rm", "--force", &name]).ok();
}

/// What a container's process frees is the host's at once; a guest's kernel tells its VMM after some
/// seconds.
pub(crate) fn frees(host: &Host, _kind: Kind, name: &str) {
    const FREED: u64 = 80 << 20;
    const SECONDS_MAX: u32 = 120;
    host.hostctl(&["update", "--memory", "256M", name]).ok();
    // `tail` keeps as much until its input ends.
    let hog = "head -c 120m /dev/zero | tail -c 119m >/dev/null";
    host.hostctl(&["exec", name, "sh", "-c", hog]).ok();
    let back = (0..SECONDS_MAX).any(|_| {
        let stats = stats(host, name);
        let bytes = |field: &str| stats[field].as_u64().expect("stats show memory");
        let back = bytes("memory_bytes") + FREED <= bytes("memory_peak_bytes");
        if !back {
            host.hostctl(&["exec", name, "sleep", "1"]).ok();
        }
        back
    });
    assert!(back, "the host has not got back what was freed");
}

fn resize(host: &Host, kind: Kind) {
    let name = format!("resize-{}", kind.name());
    start_idle(host, kind, &name, &["--memory", "128M"]);
    resizes(host, kind, &name);
    host.hostctl(&["rm", "--force", &name]).ok();
}

/// One that was started with 128 MiB.
pub(crate) fn resizes(host: &Host, _kind: Kind, name: &str) {
    let hog = "head -c 160m /dev/zero | tail -c 159m >/dev/null";
    let hog = || host.hostctl(&["exec", name, "sh", "-c", hog]);
    hog().exits(137);
    host.hostctl(&["update", "--memory", "384M", name]).ok();
    hog().exits(0);
    host.hostctl(&["update", "--memory", "128M", name]).ok();
    hog().exits(137);
    host.hostctl(&["update", "--memory", "96M", name]).ok();
    let said = host.hostctl(&["exec", name, "echo", "alive"]).ok();
    assert_eq!(said, "alive\n");
}

fn pids(host: &Host, kind: Kind) {
    let name = format!("forks-{}", kind.name());
    start_idle(host, kind, &name, &["--pids", "20"]);
    let bomb = "for i in $(seq 1 60); do sleep 1000 & done; wait";
    let output = host.hostctl(&["exec", &name, "sh", "-c", bomb]);
    assert_ne!(
        output.code, 0,
        "60 processes ran under a limit of 20: {output:?}"
    );
    host.hostctl(&["rm", "--force", &name]).ok();
}

/// A process in the instance that sleeps for two seconds once it is told to. It is there before the
/// instance is short of time: one that takes too long to start a process is given up.
fn sleeper(host: &Host, name: &str) -> Child {
    let script = "echo there; read -r go; sleep 2";
    let mut command = host.hostctl_command(&["exec", "-i", name, "sh", "-c", script]);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut sleeper = command.spawn().expect("hostctl runs");
    let output = sleeper.stdout.as_mut().expect("the stream is piped");
    let mut line = String::new();
    let read = BufReader::new(output).read_line(&mut line);
    read.expect("the process speaks");
    assert_eq!(line, "there\n");
    sleeper
}

/// Processors' worth of time that the instance uses, over the time that the work below takes.
fn load(host: &Host, name: &str, mut sleeper: Child) -> f64 {
    let used = || -> f64 {
        stats(host, name)["cpu_usage_us"]
            .as_f64()
            .expect("stats show the time used")
            / 1e6
    };
    let (before, started) = (used(), Instant::now());
    // Two seconds of the instance's own clock is what is measured, however long they take.
    let mut input = sleeper.stdin.take().expect("the stream is piped");
    input.write_all(b"go\n").expect("hostctl reads");
    assert!(sleeper.wait().expect("hostctl ends").success());
    (used() - before) / started.elapsed().as_secs_f64()
}

fn cpu(host: &Host, kind: Kind) {
    let name = format!("busy-{}", kind.name());
    start_idle(host, kind, &name, &["--cpus", "0.3"]);
    is_capped(host, kind, &name);
    host.hostctl(&["rm", "--force", &name]).ok();
}

pub(crate) fn is_capped(host: &Host, _kind: Kind, name: &str) {
    let (one, other) = (sleeper(host, name), sleeper(host, name));
    host.hostctl(&["update", "--cpus", "0.3", name]).ok();
    let burn = "for n in 1 2; do while :; do :; done & echo $! >>/burning; done";
    host.hostctl(&["exec", name, "sh", "-c", burn]).ok();
    let capped = load(host, name, one);
    assert!(
        capped < 0.4,
        "0.3 processors were allowed and {capped:.2} used"
    );
    host.hostctl(&["update", "--cpus", "0.1", name]).ok();
    let lowered = load(host, name, other);
    assert!(
        lowered < 0.17,
        "0.1 processors were allowed and {lowered:.2} used"
    );
    host.hostctl(&["update", "--cpus", "1", name]).ok();
    let cool = "kill $(cat /burning) && rm /burning";
    host.hostctl(&["exec", name, "sh", "-c", cool]).ok();
}

/// What [`writes_slowly`] takes the instance to have been started with.
pub(crate) const SLOW_DISK: &[&str] = &["--disk-write-bps", "2M"];

/// A VM keeps to the rate of its disk. (How a container's is kept is the kernel's affair, and whether,
/// that of the file system.)
pub(crate) fn writes_slowly(host: &Host, kind: Kind, name: &str) {
    if kind == Kind::Container {
        return;
    }
    let begun = Instant::now();
    let write = "dd if=/dev/zero of=/written bs=64k count=64 conv=fsync 2>/dev/null && rm /written";
    host.hostctl(&["exec", name, "sh", "-c", write]).ok();
    // Two seconds' worth, less the tenth of a second's that passes at once.
    let taken = begun.elapsed();
    assert!(taken > Duration::from_millis(1800), "it took {taken:?}");
}

fn update(host: &Host, kind: Kind) {
    let name = format!("update-{}", kind.name());
    start_idle(host, kind, &name, &["--pids", "50"]);
    let path = format!("/v1/instances/{name}");
    let good = host.request("PATCH", &path, Some(r#"{"limits":{"pids":{"max":30}}}"#));
    assert_eq!(good.status, 200, "{}", good.body);
    assert_eq!(
        good.json()["plan"]["/limits/pids/max"],
        "live",
        "{}",
        good.body
    );
    let bad = r#"{"limits":{"pids":{"max":40},"cpu":{"cores":100000}}}"#;
    let bad = host.request("PATCH", &path, Some(bad));
    assert_eq!(bad.status, 400, "{}", bad.body);
    assert_eq!(bad.json()["field"], "/limits/cpu/cores", "{}", bad.body);
    let instance = host.request("GET", &path, None).json();
    assert_eq!(
        instance["spec"]["limits"]["pids"]["max"], 30,
        "a refused change was half made"
    );
    host.hostctl(&["rm", "--force", &name]).ok();
}
