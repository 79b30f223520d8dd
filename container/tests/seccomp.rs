//! Filters in force: children install them and meet them.
//!
//! UNSAFETY: the hook between fork and exec of a child sets a flag of the process and installs a
//! filter that was compiled before; neither allocates.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![expect(unsafe_code, reason = "a filter is installed between fork and exec")]

use std::{
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Command, Output},
};

use container::seccomp::{Filter, compile, default_profile};
use nix::sys::prctl;
use oci_spec::runtime::{Capabilities, LinuxSeccomp};

/// Runs a script of a shell under the filter.
fn run(filter: Filter, script: &str) -> Output {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    let install = move || {
        prctl::set_no_new_privs()?;
        // The message is built in the parent, by the status of the child.
        filter
            .install()
            .map(drop)
            .map_err(|_| std::io::ErrorKind::InvalidInput.into())
    };
    // SAFETY: `install` makes two system calls.
    unsafe { command.pre_exec(install) }.output().unwrap()
}

fn filter(rule: &str) -> Filter {
    let json = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#);
    compile(&serde_json::from_str::<LinuxSeccomp>(&json).unwrap()).unwrap()
}

#[test]
fn a_denied_call_fails_with_its_errno() {
    let deny = r#"{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28}"#;
    let output = run(filter(deny), "mkdir /tmp/never; echo after");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("No space left"),
        "{output:?}"
    );
    assert_eq!(output.stdout, b"after\n");
}

#[test]
fn a_killing_rule_kills_with_sigsys() {
    let kill = r#"{"names":["chdir"],"action":"SCMP_ACT_KILL_PROCESS"}"#;
    let output = run(filter(kill), "echo before; cd /; echo after");
    assert_eq!(output.stdout, b"before\n");
    assert_eq!(output.status.signal(), Some(libc::SIGSYS));
}

#[test]
fn a_condition_on_an_argument_holds_in_the_kernel() {
    let deny = r#"{"names":["kill"],"action":"SCMP_ACT_ERRNO",
                   "args":[{"index":1,"value":10,"op":"SCMP_CMP_EQ"}]}"#;
    let script = "trap 'echo usr2' USR2; kill -USR1 $$ || echo refused; kill -USR2 $$";
    let output = run(filter(deny), script);
    assert_eq!(output.stdout, b"refused\nusr2\n");
}

#[test]
fn programs_run_under_the_default_profile_and_cannot_leave_it() {
    let profile = default_profile(&Capabilities::new());
    let script = "echo hello | cat; unshare -U true || echo no; mount -t proc p /proc || echo no";
    let output = run(compile(&profile).unwrap(), script);
    assert_eq!(output.stdout, b"hello\nno\nno\n");
}

#[test]
fn a_listener_is_asked_and_without_one_the_call_fails() {
    let notify = filter(r#"{"names":["getpgrp"],"action":"SCMP_ACT_NOTIFY"}"#);
    assert!(notify.notifies());
    let (sender, receiver) = std::sync::mpsc::channel();
    // The filter is the thread's alone, and the descriptor is everybody's.
    let asking = std::thread::spawn(move || {
        prctl::set_no_new_privs().unwrap();
        sender.send(notify.install().unwrap().unwrap()).unwrap();
        // SAFETY: getpgrp(2) takes nothing and touches nothing.
        let result = unsafe { libc::syscall(libc::SYS_getpgrp) };
        (result, nix::errno::Errno::last())
    });
    let listener = receiver.recv().unwrap();
    let events = nix::poll::PollFlags::POLLIN;
    let mut polled = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(&listener),
        events,
    )];
    assert_eq!(
        nix::poll::poll(&mut polled, 10_000u16),
        Ok(1),
        "the call waits for an answer"
    );
    drop(listener);
    assert_eq!(asking.join().unwrap(), (-1, nix::errno::Errno::ENOSYS));
}
