//! Running a process and speaking to it: output, status, environment, user, exec, streams.

use std::io::Write;
use std::process::Stdio;

use tests::{Host, Kind};

use crate::KindTest;

pub(crate) const TESTS: &[(&str, KindTest)] = &[
    (
        "a_run_gives_output_and_exit_status_of_its_command",
        run_gives_output_and_status,
    ),
    (
        "a_program_that_cannot_run_is_told_as_a_shell_would",
        cannot_run,
    ),
    ("only_a_vm_has_a_kernel_of_its_own", kernels),
    ("exec_runs_a_second_process_in_the_same_instance", exec),
    (
        "environment_user_directory_and_hostname_are_as_asked",
        as_asked,
    ),
];

fn run_gives_output_and_status(host: &Host, kind: Kind) {
    let script = "echo out; echo err >&2; cat; exit 3";
    let mut command = host.hostctl_command(&[
        "run",
        "--rm",
        "-i",
        "--isolation",
        kind.name(),
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("hostctl runs");
    let mut input = child.stdin.take().expect("the stream is piped");
    input.write_all(b"in\n").expect("hostctl reads its input");
    drop(input);
    let output = child.wait_with_output().expect("hostctl ends");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "out\nin\n",
        "{output:?}"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "err\n",
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(3));
}

fn cannot_run(host: &Host, kind: Kind) {
    for (program, code) in [("no-such-program", 127), ("/etc/passwd", 126)] {
        let run = ["run", "--rm", "--isolation", kind.name(), "busybox"];
        let output = host.hostctl(&[&run[..], &[program]].concat()).exits(code);
        assert!(output.stderr.contains(program), "{}", output.stderr);
    }
}

fn kernels(host: &Host, kind: Kind) {
    let inside = host.hostctl(&[
        "run",
        "--rm",
        "--isolation",
        kind.name(),
        "busybox",
        "cat",
        "/proc/version",
    ]);
    let inside = inside.ok();
    let outside = std::fs::read_to_string("/proc/version").expect("procfs is mounted");
    let boot_inside = host
        .hostctl(&[
            "run",
            "--rm",
            "--isolation",
            kind.name(),
            "busybox",
            "cat",
            "/proc/sys/kernel/random/boot_id",
        ])
        .ok();
    let boot_outside =
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("procfs is mounted");
    match kind {
        Kind::Container => {
            assert_eq!(inside, outside);
            assert_eq!(boot_inside, boot_outside);
        }
        Kind::Vm => assert_ne!(boot_inside, boot_outside),
    }
}

fn exec(host: &Host, kind: Kind) {
    let name = format!("exec-{}", kind.name());
    start_script(host, kind, &name, &[], "while :; do sleep 1000000; done");
    executes(host, kind, &name);
    host.hostctl(&["rm", "--force", &name]).ok();
}

/// One whose workload is a shell script that does not end.
pub(crate) fn executes(host: &Host, _kind: Kind, name: &str) {
    let exec = |arguments: &[&str]| host.hostctl(&[&["exec", name], arguments].concat());

    assert_eq!(exec(&["echo", "hello"]).ok(), "hello\n");
    exec(&["sh", "-c", "exit 9"]).exits(9);
    exec(&["sh", "-c", "kill -9 $$"]).exits(137);
    let missing = exec(&["no-such-program"]).exits(127);
    assert!(
        missing.stderr.matches("no-such-program").count() == 1,
        "{}",
        missing.stderr
    );

    // What one process writes, another one reads.
    exec(&["sh", "-c", "echo kept >/tmp/file"]).ok();
    assert_eq!(exec(&["cat", "/tmp/file"]).ok(), "kept\n");

    // The workload is process 1, or a child of the VM's init; either way exec sees it.
    assert!(
        exec(&["ps"]).ok().contains("while :;"),
        "the workload is not visible from exec"
    );

    let mut command = host.hostctl_command(&["exec", "-i", name, "wc", "-c"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("hostctl runs");
    let input = child.stdin.take().expect("the stream is piped");
    let length = 3 << 20;
    let writer = std::thread::spawn(move || {
        let mut input = input;
        input
            .write_all(&vec![b'x'; length])
            .expect("hostctl reads its input");
    });
    let output = child.wait_with_output().expect("hostctl ends");
    writer.join().expect("all of the input was taken");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        length.to_string()
    );
}

fn as_asked(host: &Host, kind: Kind) {
    let script = "echo $WORD; id -u; id -g; pwd; hostname";
    let text = host
        .hostctl(&[
            "run",
            "--rm",
            "--isolation",
            kind.name(),
            "-e",
            "WORD=two words",
            "-u",
            "65534:65534",
            "-w",
            "/home",
            "--hostname",
            "here",
            "busybox",
            "sh",
            "-c",
            script,
        ])
        .ok();
    assert_eq!(text, "two words\n65534\n65534\n/home\nhere\n");
}

/// Starts an instance whose workload waits for ever.
pub(crate) fn start_idle(host: &Host, kind: Kind, name: &str, options: &[&str]) {
    let start = ["run", "-d", "--name", name, "--isolation", kind.name()];
    let command = ["busybox", "sleep", "1000000"];
    host.hostctl(&[&start[..], options, &command[..]].concat())
        .ok();
}

/// Starts an instance whose workload is a shell script.
pub(crate) fn start_script(host: &Host, kind: Kind, name: &str, options: &[&str], script: &str) {
    let start = ["run", "-d", "--name", name, "--isolation", kind.name()];
    let command = ["busybox", "sh", "-c", script];
    host.hostctl(&[&start[..], options, &command[..]].concat())
        .ok();
}
