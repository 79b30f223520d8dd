//! The agent as the host sees it: a workload's streams and end, requests, and exec.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use agent::protocol::{Frame, LINE_BYTES_MAX, Process, Request, Response};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use support::{Agent, ExecOutcome, Outcome, exit, killed, process, shell};

/// A workload that does nothing until it is killed.
fn idle() -> Process {
    process(&["sleep", "1000"])
}

#[test]
fn the_workloads_output_and_exit_code_reach_the_host() {
    let agent = Agent::start(shell("echo out; echo err >&2; exit 7"));
    let want = Outcome {
        code: Some(7),
        stdout: "out\n".into(),
        stderr: "err\n".into(),
    };
    assert_eq!(agent.finish(), want);
}

#[test]
fn the_workloads_last_bytes_arrive_however_many_they_are() {
    let agent = Agent::start(shell("head -c 3000000 /dev/zero | tr '\\0' x; echo end"));
    let outcome = agent.finish();
    assert_eq!(outcome.stdout.len(), 3_000_000 + 4);
    assert!(outcome.stdout.ends_with("xend\n"));
}

#[test]
fn the_workloads_input_ends_where_the_hosts_does() {
    let mut agent = Agent::start(Process {
        stdin: true,
        ..process(&["cat"])
    });
    let mut stdin = agent.stdin.take().unwrap();
    stdin.write_all(b"to the workload").unwrap();
    stdin.shutdown(Shutdown::Write).unwrap();
    let outcome = agent.finish();
    assert_eq!(
        (outcome.stdout.as_str(), outcome.code),
        ("to the workload", Some(0))
    );
}

#[test]
fn a_workload_with_a_terminal_has_one_and_hears_of_its_size() {
    let script = "test -t 0 && test -t 2 && until stty size | grep '31 101'; do :; done";
    let agent = Agent::start(Process {
        tty: true,
        ..shell(script)
    });
    let size = Request::Resize {
        rows: 31,
        cols: 101,
    };
    assert_eq!(agent.ask(&size), Response::Done {});
    let outcome = agent.finish();
    let lines: Vec<_> = outcome.stdout.lines().collect();
    assert_eq!(lines.last(), Some(&"31 101"), "{lines:?}");
    assert_eq!(outcome.code, Some(0));
}

#[test]
fn a_workload_that_cannot_start_says_why_and_with_which_code() {
    let outcome = Agent::start(process(&["no-such-program"])).finish();
    assert_eq!(outcome.code, Some(127));
    assert_eq!(outcome.stderr, "`no-such-program` was not found\n");
    assert_eq!(
        Agent::start(process(&["/etc/passwd"])).finish().code,
        Some(126)
    );
    let nobody = Process {
        user: Some("no such user".into()),
        ..process(&["true"])
    };
    assert_eq!(Agent::start(nobody).finish().code, Some(125));
}

#[test]
fn the_workload_is_the_first_process_it_can_see() {
    let agent = Agent::start(shell("echo $$; ls -d /proc/[0-9]* | head -1"));
    assert_eq!(agent.finish().stdout, "1\n/proc/1\n");
}

#[test]
fn a_signal_reaches_the_workload() {
    let agent = Agent::start(shell(
        "trap 'exit 9' TERM; echo; while :; do sleep 0.1; done",
    ));
    let signal = |signal| Request::Signal { signal };
    assert_eq!(agent.ask(&Request::Ping {}), Response::Done {});
    let refused = agent.ask(&signal(65));
    assert!(matches!(refused, Response::Error { .. }), "{refused:?}");
    // The trap may not be set yet, and the first process of a namespace ignores what it does not
    // handle.
    let done = agent.exec(shell(
        "until grep -q 'SigCgt:.*4' /proc/1/status; do :; done",
    ));
    assert_eq!(done.finish().last, exit(0));
    while agent.ask(&signal(libc::SIGTERM)) != (Response::Done {}) {}
    assert_eq!(agent.finish().code, Some(9));
}

#[test]
fn a_workload_that_is_held_does_nothing_until_it_is_released() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    let shown = file.display();
    let agent = Agent::start(shell(&format!("while :; do echo x >>{shown}; done")));
    let length = || fs::metadata(&file).map_or(0, |found| found.len());
    while length() == 0 {}
    assert_eq!(agent.ask(&Request::Hold { sync: true }), Response::Done {});
    let held = length();
    // As long as an exchange takes, it would have written many times.
    for _ in 0..10 {
        assert_eq!(agent.ask(&Request::Ping {}), Response::Done {});
    }
    assert_eq!(length(), held);
    let release = Request::Release {
        renewal: None,
        clock_ns: None,
    };
    for _ in 0..2 {
        assert_eq!(agent.ask(&release), Response::Done {});
    }
    while length() == held {}
    agent.ask(&Request::Signal { signal: 9 });
}

#[test]
fn exec_returns_both_outputs_and_the_exit_code() {
    let agent = Agent::start(idle());
    let outcome = agent.exec(shell("echo out; echo err >&2; exit 3")).finish();
    assert_eq!(outcome, ExecOutcome::new("out\n", "err\n", exit(3)));
    let outcome = agent.exec(shell("kill -9 $$")).finish();
    assert_eq!(outcome.last, killed(libc::SIGKILL));
    assert!(agent.exec_groups().len() <= 1, "groups are taken away");
}

#[test]
fn exec_takes_input_to_its_end() {
    let agent = Agent::start(idle());
    let mut exec = agent.exec(Process {
        stdin: true,
        ..process(&["cat"])
    });
    exec.send_input(b"one ");
    exec.send_input(b"two");
    exec.send_input(b"");
    assert_eq!(exec.finish(), ExecOutcome::new("one two", "", exit(0)));
    // Without input the process reads the end of it at once.
    assert_eq!(agent.exec(process(&["cat"])).finish().last, exit(0));
}

#[test]
fn exec_carries_much_data_both_ways_at_once() {
    let agent = Agent::start(idle());
    let exec = agent.exec(Process {
        stdin: true,
        ..process(&["cat"])
    });
    let data: Vec<u8> = (0..4_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut writer = exec.writer();
    let sent = data.clone();
    let thread = thread::spawn(move || {
        for chunk in sent.chunks(60_000) {
            writer.send_input(chunk);
        }
        writer.send_input(b"");
    });
    let outcome = exec.finish();
    thread.join().unwrap();
    assert!(
        outcome.stdout == data,
        "{} bytes came",
        outcome.stdout.len()
    );
    assert_eq!(outcome.last, exit(0));
}

#[test]
fn exec_with_a_terminal_behaves_like_one() {
    let agent = Agent::start(idle());
    let mut exec = agent.exec(Process {
        tty: true,
        stdin: true,
        env: vec!["PS1=> ".into()],
        ..process(&["sh"])
    });
    exec.expect("> ");
    exec.send(&Frame::Resize { rows: 40, cols: 90 });
    exec.send_input(b"stty size; echo $TERM\n");
    let output = exec.expect("> ");
    assert!(output.ends_with("40 90\r\nxterm\r\n> "), "{output:?}");
    exec.send_input(b"sh -c 'trap \"exit 7\" INT; echo st\"\"art; while :; do sleep 0.1; done'\n");
    exec.expect("\nstart\r\n");
    // Control-C, which the terminal turns into a signal for its foreground.
    exec.send_input(b"\x03");
    exec.expect("> ");
    exec.send_input(b"");
    assert_eq!(exec.finish().last, exit(7));
}

#[test]
fn exec_forwards_signals() {
    let agent = Agent::start(idle());
    let mut exec = agent.exec(shell("echo ready; exec sleep 1000"));
    exec.expect("ready\n");
    exec.send(&Frame::Signal(libc::SIGTERM));
    assert_eq!(exec.finish().last, killed(libc::SIGTERM));
}

#[test]
fn exec_runs_as_the_user_and_where_it_is_told() {
    let agent = Agent::start(idle());
    let folder = agent.path("made/for/it");
    let script = "id -u; id -g; id -G; pwd; echo $HOME $A $$; echo again > /dev/stdout";
    let outcome = agent.exec(Process {
        user: Some("4321:1234".into()),
        working_dir: Some(folder.to_string_lossy().into_owned()),
        env: vec!["A=b c".into()],
        ..shell(script)
    });
    let outcome = outcome.finish();
    let stdout = String::from_utf8(outcome.stdout).unwrap();
    let lines: Vec<_> = stdout.lines().collect();
    // The temporary folder is closed to others, but the working directory is entered before.
    assert_eq!(lines[..3], ["4321", "1234", "1234"]);
    assert_eq!(lines[3], folder.to_string_lossy());
    assert!(lines[4].starts_with("/ b c "), "{lines:?}");
    assert_eq!(lines[5], "again");
    assert_eq!(outcome.last, exit(0));
}

#[test]
fn exec_has_what_the_workload_has_unless_told_otherwise() {
    let agent = Agent::start(Process {
        user: Some("4321:1234".into()),
        working_dir: Some("/usr".into()),
        env: vec!["A=1".into(), "B=1".into()],
        ..idle()
    });
    let script = "echo $(id -u) $(pwd) $A $B $C";
    let told = Process {
        user: Some("0".into()),
        working_dir: Some("/etc".into()),
        env: vec!["B=2".into(), "C=2".into()],
        ..shell(script)
    };
    for (process, want) in [(shell(script), "4321 /usr 1 1\n"), (told, "0 /etc 1 2 2\n")] {
        let outcome = agent.exec(process).finish();
        assert_eq!(outcome, ExecOutcome::new(want, "", exit(0)));
    }
}

#[test]
fn what_exec_cannot_run_is_an_error_with_a_shells_code() {
    let agent = Agent::start(idle());
    let table = [
        (process(&["no-such-program"]), 127),
        (process(&["/no/such/program"]), 127),
        (process(&["/etc/passwd"]), 126),
        (process(&["/etc"]), 126),
        (process(&[]), 125),
        (process(&["a\0b"]), 127),
    ];
    for (process, want) in table {
        let last = agent.exec(process.clone()).finish().last;
        assert!(
            matches!(&last, Frame::Error { code, .. } if *code == want),
            "{process:?}: {last:?}"
        );
    }
    assert!(agent.exec_groups().is_empty());
}

#[test]
fn many_execs_run_at_once() {
    let agent = Agent::start(idle());
    let execs: Vec<_> = (0..24)
        .map(|number| {
            let mut exec = agent.exec(Process {
                stdin: true,
                ..shell(&format!("echo ready; cat; exit {number}"))
            });
            exec.expect("ready\n");
            exec
        })
        .collect();
    for (number, mut exec) in execs.into_iter().enumerate() {
        let text = format!("number {number}");
        exec.send_input(text.as_bytes());
        exec.send_input(b"");
        let code = i32::try_from(number).unwrap();
        assert_eq!(exec.finish(), ExecOutcome::new(&text, "", exit(code)));
    }
}

#[test]
fn a_child_that_exec_leaves_behind_neither_delays_the_end_nor_is_killed() {
    let agent = Agent::start(idle());
    let fifo = agent.path("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let script = format!(
        "sh -c 'read line < {}; echo $line > {}' & echo done",
        fifo.display(),
        agent.path("answer").display()
    );
    let outcome = agent.exec(shell(&script)).finish();
    assert_eq!(outcome, ExecOutcome::new("done\n", "", exit(0)));
    fs::write(&fifo, "alive\n").unwrap();
    let check = format!(
        "until grep alive {}; do :; done",
        agent.path("answer").display()
    );
    assert_eq!(agent.exec(shell(&check)).finish().last, exit(0));
}

#[test]
fn a_client_that_goes_takes_its_process_and_all_its_children_along() {
    let agent = Agent::start(idle());
    let fifo = agent.path("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let script = format!(
        "exec 9>{}; trap '' HUP; setsid sleep 1000 & echo ready; sleep 1000; sleep 1000",
        fifo.display()
    );
    let mut exec = agent.exec(shell(&script));
    let mut held = File::open(&fifo).unwrap();
    exec.expect("ready\n");
    exec.disconnect();
    // Ends when the last process that holds it has.
    let mut rest = Vec::new();
    held.read_to_end(&mut rest).unwrap();
    assert_eq!(agent.ask(&Request::Ping {}), Response::Done {});
}

#[test]
fn a_client_that_does_not_read_can_still_go() {
    let agent = Agent::start(idle());
    let fifo = agent.path("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let exec = agent.exec(shell(&format!("exec 9>{}; cat /dev/zero", fifo.display())));
    let mut held = File::open(&fifo).unwrap();
    exec.disconnect();
    held.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn the_end_of_the_workload_is_the_end_of_every_exec() {
    let agent = Agent::start(idle());
    let mut exec = agent.exec(shell("echo ready; exec sleep 1000"));
    exec.expect("ready\n");
    let kill = Request::Signal {
        signal: libc::SIGKILL,
    };
    assert_eq!(agent.ask(&kill), Response::Done {});
    assert_eq!(exec.finish().last, killed(libc::SIGKILL));
    assert_eq!(agent.finish().code, Some(137));
}

#[test]
fn nonsense_is_answered_with_an_error_and_harms_nobody() {
    let agent = Agent::start(idle());
    let long = vec![b'x'; 2 * LINE_BYTES_MAX];
    let table: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"{\"ping\":{},\"stats\":{}}\n",
        b"{\"exec\":{\"args\":\"sh\"}}\n",
        b"\0\0\0\0\n",
        &long,
    ];
    for bytes in table {
        let answer = agent.ask_raw(bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
        assert!(answer.starts_with("{\"error\":"), "{shown}: {answer:?}");
    }
    let mut exec = agent.exec(shell("echo ready; exec sleep 1000"));
    exec.expect("ready\n");
    exec.send(&Frame::Stdin("not base64".into()));
    let last = exec.finish().last;
    assert!(matches!(last, Frame::Error { code: 125, .. }), "{last:?}");
    let mut exec = agent.exec(idle());
    exec.send(&exit(0));
    let last = exec.finish().last;
    assert!(matches!(last, Frame::Error { code: 125, .. }), "{last:?}");
    assert_eq!(agent.ask(&Request::Ping {}), Response::Done {});
}
