//! The compiler against an evaluator of the programs, and against the meaning said again in plain
//! words.

use std::collections::HashSet;

use oci_spec::runtime::{Capabilities, Capability, LinuxSeccomp, LinuxSeccompOperator};

use super::{
    architecture::{Architecture, X32_BIT},
    program::{AND, JUMP, JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_OR_EQUAL, LOAD, RETURN},
    *,
};

const ALLOW: u32 = 0x7fff_0000;
const KILL_THREAD: u32 = 0;
const X86_64: u32 = 0xc000_003e;
const X86: u32 = 0x4000_0003;

fn errno(errno: i32) -> u32 {
    0x0005_0000 | errno.cast_unsigned()
}

/// What the kernel would do with a call; panics on what the kernel's verifier would refuse.
pub(super) fn evaluate(filter: &Filter, audit: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = [0u32; 16];
    data[0] = number;
    data[1] = audit;
    for (index, argument) in arguments.into_iter().enumerate() {
        let bytes = argument.to_le_bytes();
        data[4 + 2 * index] = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        data[5 + 2 * index] = u32::from_le_bytes(bytes[4..].try_into().unwrap());
    }
    let (mut next, mut accumulator) = (0usize, 0u32);
    loop {
        let at = filter.instructions[next];
        next += 1;
        let branch = |condition| usize::from(if condition { at.yes } else { at.no });
        match at.code {
            LOAD => {
                assert_eq!(at.value % 4, 0);
                accumulator = data[at.value as usize / 4];
            }
            AND => accumulator &= at.value,
            JUMP => next += at.value as usize,
            JUMP_EQUAL => next += branch(accumulator == at.value),
            JUMP_GREATER => next += branch(accumulator > at.value),
            JUMP_GREATER_OR_EQUAL => next += branch(accumulator >= at.value),
            RETURN => return at.value,
            code => panic!("{code:#x} is no instruction of ours"),
        }
    }
}

fn profile(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).unwrap()
}

fn compiled(json: &str) -> Filter {
    compile(&profile(json)).unwrap()
}

fn native(name: &str) -> u32 {
    Architecture::X86_64.number(name).unwrap()
}

#[test]
fn every_action_becomes_what_the_kernel_calls_it() {
    for (action, errno_ret, expected) in [
        ("SCMP_ACT_KILL", "", 0),
        ("SCMP_ACT_KILL_THREAD", "", 0),
        ("SCMP_ACT_KILL_PROCESS", "", 0x8000_0000),
        ("SCMP_ACT_TRAP", "", 0x0003_0000),
        ("SCMP_ACT_ERRNO", "", errno(1)),
        ("SCMP_ACT_ERRNO", r#","errnoRet":38"#, errno(38)),
        ("SCMP_ACT_TRACE", r#","errnoRet":7"#, 0x7ff0_0007),
        ("SCMP_ACT_LOG", "", 0x7ffc_0000),
        ("SCMP_ACT_NOTIFY", "", 0x7fc0_0000),
    ] {
        let filter = compiled(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                {{"names":["getpid","no_such_call"],"action":"{action}"{errno_ret}}}]}}"#
        ));
        assert_eq!(
            evaluate(&filter, X86_64, native("getpid"), [0; 6]),
            expected,
            "{action}"
        );
        assert_eq!(
            evaluate(&filter, X86_64, native("getppid"), [0; 6]),
            ALLOW,
            "{action}"
        );
        assert_eq!(filter.notifies(), action == "SCMP_ACT_NOTIFY");
    }
}

#[test]
fn what_cannot_work_is_refused_with_the_path_to_it() {
    let rule = |rule: &str| format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{rule}]}}"#);
    for (json, field) in [
        (
            r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#.to_owned(),
            "defaultAction",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#.to_owned(),
            "defaultErrnoRet",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5000}"#.to_owned(),
            "defaultErrnoRet",
        ),
        (
            rule(r#"{"names":["read"],"action":"SCMP_ACT_KILL","errnoRet":1}"#),
            "syscalls[0].errnoRet",
        ),
        (
            rule(r#"{"names":["write"],"action":"SCMP_ACT_NOTIFY"}"#),
            "syscalls[0].names",
        ),
        (
            rule(
                r#"{"names":["read"],"action":"SCMP_ACT_ALLOW",
               "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}"#,
            ),
            "syscalls[0].args[0].index",
        ),
    ] {
        let text = compile(&profile(&json)).unwrap_err().to_string();
        assert!(
            text.starts_with(&format!("linux.seccomp.{field} ")),
            "{text}"
        );
    }
}

#[test]
fn every_comparison_agrees_with_arithmetic_on_all_edges() {
    let values = [
        0u64,
        1,
        2,
        0xffff_fffe,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0001,
        0x2_0000_0000,
        0xffff_ffff_0000_0000,
        u64::MAX - 1,
        u64::MAX,
    ];
    use LinuxSeccompOperator as Op;
    let holds = |op, argument: u64, value: u64, two: u64| match op {
        Op::ScmpCmpNe => argument != value,
        Op::ScmpCmpLt => argument < value,
        Op::ScmpCmpLe => argument <= value,
        Op::ScmpCmpEq => argument == value,
        Op::ScmpCmpGe => argument >= value,
        Op::ScmpCmpGt => argument > value,
        Op::ScmpCmpMaskedEq => argument & value == two,
    };
    for op in [
        Op::ScmpCmpNe,
        Op::ScmpCmpLt,
        Op::ScmpCmpLe,
        Op::ScmpCmpEq,
        Op::ScmpCmpGe,
        Op::ScmpCmpGt,
        Op::ScmpCmpMaskedEq,
    ] {
        for value in values {
            let filter = compiled(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],
                    "syscalls":[{{"names":["lseek"],"action":"SCMP_ACT_ALLOW",
                    "args":[{{"index":1,"value":{value},"valueTwo":3,"op":"{op}"}}]}}]}}"#
            ));
            for argument in values {
                let wide = evaluate(&filter, X86_64, native("lseek"), [7, argument, 7, 7, 7, 7]);
                let expected = if holds(op, argument, value, 3) {
                    ALLOW
                } else {
                    errno(1)
                };
                assert_eq!(wide, expected, "{argument:#x} {op} {value:#x}");
                // A 32-bit call has 32-bit arguments.
                let argument = argument & 0xffff_ffff;
                let number = Architecture::X86.number("lseek").unwrap();
                let narrow = evaluate(&filter, X86, number, [7, argument, 7, 7, 7, 7]);
                let low = value & 0xffff_ffff;
                let expected = if holds(op, argument, low, 3) {
                    ALLOW
                } else {
                    errno(1)
                };
                assert_eq!(narrow, expected, "{argument:#x} {op} {low:#x}, narrow");
            }
        }
    }
}

#[test]
fn rules_for_one_call_come_together_as_documented() {
    let filter = compiled(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
        {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":22,"args":[
            {"index":0,"value":16,"op":"SCMP_CMP_EQ"},{"index":2,"value":9,"op":"SCMP_CMP_EQ"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
            {"index":2,"value":9,"op":"SCMP_CMP_NE"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
            {"index":0,"value":16,"op":"SCMP_CMP_NE"}]},
        {"names":["dup"],"action":"SCMP_ACT_KILL","args":[
            {"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
        {"names":["dup"],"action":"SCMP_ACT_ALLOW"},
        {"names":["dup"],"action":"SCMP_ACT_TRAP"},
        {"names":["kill"],"action":"SCMP_ACT_ALLOW","args":[
            {"index":1,"value":0,"op":"SCMP_CMP_EQ"},{"index":1,"value":15,"op":"SCMP_CMP_EQ"}]},
        {"names":["read"],"action":"SCMP_ACT_ERRNO"}]}"#,
    );
    let run = |name, arguments| evaluate(&filter, X86_64, native(name), arguments);
    assert_eq!(run("socket", [16, 3, 9, 0, 0, 0]), errno(22));
    assert_eq!(run("socket", [16, 3, 0, 0, 0, 0]), ALLOW);
    assert_eq!(run("socket", [2, 1, 9, 0, 0, 0]), ALLOW);
    assert_eq!(
        run("dup", [1, 0, 0, 0, 0, 0]),
        ALLOW,
        "the rule without conditions holds"
    );
    for (signal, expected) in [(0, ALLOW), (15, ALLOW), (9, errno(1))] {
        assert_eq!(
            run("kill", [1, signal, 0, 0, 0, 0]),
            expected,
            "either condition"
        );
    }
    assert_eq!(run("read", [0; 6]), errno(1));
}

#[test]
fn a_call_newer_than_the_profile_does_not_exist_and_an_older_one_is_denied() {
    let text = r#"{"defaultAction":"SCMP_ACT_KILL","syscalls":[
        {"names":["statx","close_range"],"action":"SCMP_ACT_ALLOW"}]}"#;
    let filter = compiled(text);
    let run = |filter: &Filter, number| evaluate(filter, X86_64, number, [0; 6]);
    assert_eq!(run(&filter, native("close_range")), ALLOW);
    assert_eq!(run(&filter, native("close_range") - 1), KILL_THREAD);
    assert_eq!(run(&filter, native("close_range") + 1), errno(libc::ENOSYS));
    assert_eq!(run(&filter, 100_000), errno(libc::ENOSYS));
    assert_eq!(run(&filter, u32::MAX), KILL_THREAD, "skipped by a tracer");
    let permissive = compiled(&text.replace("ACT_KILL", "ACT_LOG"));
    assert_eq!(run(&permissive, 100_000), 0x7ffc_0000);
}

#[test]
fn only_listed_architectures_are_let_in_and_each_by_its_own_numbers() {
    let text = r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":[ARCHES],"syscalls":[
        {"names":["execve","getpid","waitpid"],"action":"SCMP_ACT_ALLOW"}]}"#;
    let x86 = |name| Architecture::X86.number(name).unwrap();
    let x32 = |name| Architecture::X32.number(name).unwrap();
    let only = compiled(&text.replace("ARCHES", r#""SCMP_ARCH_AARCH64""#));
    assert_eq!(evaluate(&only, X86_64, native("execve"), [0; 6]), ALLOW);
    assert_eq!(evaluate(&only, X86, x86("getpid"), [0; 6]), KILL_THREAD);
    assert_eq!(evaluate(&only, X86_64, x32("getpid"), [0; 6]), KILL_THREAD);
    assert_eq!(evaluate(&only, 0xc000_00b7, 0, [0; 6]), KILL_THREAD);
    let all = compiled(&text.replace("ARCHES", r#""SCMP_ARCH_X86","SCMP_ARCH_X32""#));
    assert_eq!(evaluate(&all, X86, x86("waitpid"), [0; 6]), ALLOW);
    assert_eq!(evaluate(&all, X86, x86("creat"), [0; 6]), errno(1));
    assert_eq!(evaluate(&all, X86_64, x32("execve"), [0; 6]), ALLOW);
    assert_eq!(
        evaluate(&all, X86_64, native("execve") | X32_BIT, [0; 6]),
        errno(1)
    );
}

#[test]
fn calls_within_calls_are_filtered_and_hidden_conditions_never_allow() {
    let deny = compiled(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[
        {"names":["connect"],"action":"SCMP_ACT_ERRNO"},
        {"names":["socket"],"action":"SCMP_ACT_ERRNO","args":[
            {"index":0,"value":40,"op":"SCMP_CMP_EQ"}]},
        {"names":["shmat"],"action":"SCMP_ACT_KILL"}]}"#,
    );
    let run = |filter: &Filter, number, part| evaluate(filter, X86, number, [part, 0, 0, 0, 0, 0]);
    assert_eq!(run(&deny, 102, 3), errno(1), "connect");
    assert_eq!(run(&deny, 102, 1), errno(1), "socket of any family");
    assert_eq!(run(&deny, 102, 2), ALLOW, "bind");
    assert_eq!(run(&deny, 117, 21), KILL_THREAD, "shmat");
    assert_eq!(run(&deny, 117, 1), ALLOW, "semop");
    let allow = compiled(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],"syscalls":[
        {"names":["bind"],"action":"SCMP_ACT_ALLOW"},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
            {"index":0,"value":40,"op":"SCMP_CMP_NE"}]}]}"#,
    );
    assert_eq!(run(&allow, 102, 2), ALLOW, "bind");
    assert_eq!(run(&allow, 102, 1), errno(1), "socket");
}

#[test]
fn flags_are_passed_on_as_far_as_the_kernel_takes_them() {
    let with = |flags: &str, action: &str| {
        let json = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW"{flags},"syscalls":[
               {{"names":["getpid"],"action":"{action}"}}]}}"#
        );
        compiled(&json).flags
    };
    assert_eq!(with("", "SCMP_ACT_KILL"), 4);
    assert_eq!(with(r#","flags":[]"#, "SCMP_ACT_KILL"), 0);
    let all = r#","flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_TSYNC",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW","SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]"#;
    assert_eq!(with(all, "SCMP_ACT_KILL"), 1 | 2 | 4);
    assert_eq!(with(all, "SCMP_ACT_NOTIFY"), 1 | 2 | 4 | 8 | 16 | 32);
}

fn capabilities(list: &[Capability]) -> Capabilities {
    list.iter().copied().collect::<HashSet<_>>()
}

#[test]
fn the_default_profile_guards_by_capability() {
    let plain = compile(&default_profile(&capabilities(&[]))).unwrap();
    let admin = compile(&default_profile(&capabilities(&[Capability::SysAdmin]))).unwrap();
    let log = compile(&default_profile(&capabilities(&[Capability::Syslog]))).unwrap();
    let run = |filter: &Filter, name, first| {
        evaluate(filter, X86_64, native(name), [first, 0, 0, 0, 0, 0])
    };
    for name in [
        "read",
        "execve",
        "openat2",
        "futex_wait",
        "statmount",
        "ptrace",
        "bind",
    ] {
        assert_eq!(run(&plain, name, 0), ALLOW, "{name}");
    }
    for name in [
        "mount",
        "unshare",
        "setns",
        "keyctl",
        "bpf",
        "reboot",
        "userfaultfd",
        "syslog",
    ] {
        assert_eq!(run(&plain, name, 0), errno(libc::EPERM), "{name}");
    }
    for name in ["mount", "unshare", "bpf", "syslog"] {
        assert_eq!(run(&admin, name, 0), ALLOW, "{name}");
    }
    assert_eq!(run(&admin, "reboot", 0), errno(libc::EPERM));
    assert_eq!(run(&log, "syslog", 0), ALLOW, "one of two guards is enough");
    assert_eq!(run(&plain, "io_uring_setup", 0), errno(libc::ENOSYS));
    assert_eq!(run(&plain, "clone3", 0), errno(libc::ENOSYS));
    assert_eq!(run(&admin, "clone3", 0), ALLOW);
    assert_eq!(run(&plain, "clone", 0x0100_0000), ALLOW);
    assert_eq!(
        run(&plain, "clone", 0x1000_0000),
        errno(libc::ENOSYS),
        "CLONE_NEWUSER"
    );
    assert_eq!(run(&plain, "socket", 2), ALLOW);
    assert_eq!(run(&plain, "socket", 40), errno(libc::ENOSYS), "AF_VSOCK");
    assert_eq!(
        run(&plain, "personality", 0x4_0000),
        errno(libc::ENOSYS),
        "no randomisation"
    );
    assert_eq!(evaluate(&plain, X86_64, 1_000, [0; 6]), errno(libc::ENOSYS));
}

#[test]
fn every_name_in_the_default_profile_is_a_call() {
    let profile = default_profile(&capabilities(&[]));
    for name in profile
        .syscalls()
        .iter()
        .flatten()
        .flat_map(|syscall| syscall.names())
    {
        let known = [Architecture::X86_64, Architecture::X86, Architecture::X32];
        assert!(
            known
                .iter()
                .any(|arch| { arch.number(name).is_some() || arch.multiplexed(name).is_some() }),
            "{name}"
        );
    }
}

#[test]
fn a_search_for_any_call_is_short_and_the_program_small() {
    let filter = compile(&default_profile(&capabilities(&[]))).unwrap();
    assert!(
        filter.instructions.len() < 1000,
        "{}",
        filter.instructions.len()
    );
    // The longest way is to the call with the most cases, personality with five.
    let mut depth = vec![0usize; filter.instructions.len()];
    for index in (0..filter.instructions.len()).rev() {
        let at = filter.instructions[index];
        depth[index] = match at.code {
            RETURN => 1,
            LOAD | AND => 1 + depth[index + 1],
            JUMP => 1 + depth[index + 1 + at.value as usize],
            _ => {
                let way = |skip: u8| depth[index + 1 + usize::from(skip)];
                1 + way(at.yes).max(way(at.no))
            }
        };
    }
    assert!(depth[0] < 50, "{}", depth[0]);
}
