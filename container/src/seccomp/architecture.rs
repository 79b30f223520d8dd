//! The three ways into an x86-64 kernel, and what a system call is called on each.

use super::table::{NONE, Row, SYSCALLS};

/// What marks the number of an x32 call (`__X32_SYSCALL_BIT`).
pub(super) const X32_BIT: u32 = 0x4000_0000;

const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_X86: u32 = 0x4000_0003;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Architecture {
    X86_64,
    X86,
    /// 64-bit calls with 32-bit pointers; the kernel tells it from `X86_64` by the number only.
    X32,
}

impl Architecture {
    /// The kernel's name for it in a filter.
    pub(super) fn audit(self) -> u32 {
        match self {
            Architecture::X86_64 | Architecture::X32 => AUDIT_X86_64,
            Architecture::X86 => AUDIT_X86,
        }
    }

    /// Whether arguments have 64 bits. Of the 32-bit ones the upper half is not looked at.
    pub(super) fn is_wide(self) -> bool {
        self == Architecture::X86_64
    }

    pub(super) fn number(self, name: &str) -> Option<u32> {
        let index = SYSCALLS
            .binary_search_by_key(&name, |row: &Row| row.0)
            .ok()?;
        let (_, x86_64, x86, x32) = SYSCALLS[index];
        let number = match self {
            Architecture::X86_64 => x86_64,
            Architecture::X86 => x86,
            Architecture::X32 => x32,
        };
        let mark = if self == Architecture::X32 {
            X32_BIT
        } else {
            0
        };
        (number != NONE).then(|| u32::from(number) | mark)
    }

    /// The second way to a call that x86 once had only as a part of `socketcall` or `ipc`: the
    /// number of these, and what their first argument is.
    pub(super) fn multiplexed(self, name: &str) -> Option<(u32, u32)> {
        if self != Architecture::X86 {
            return None;
        }
        let part =
            |parts: &[(&str, u32)]| parts.iter().find(|part| part.0 == name).map(|part| part.1);
        if let Some(part) = part(SOCKETCALL) {
            return Some((self.number("socketcall")?, part));
        }
        Some((self.number("ipc")?, part(IPC)?))
    }
}

/// `include/uapi/linux/net.h`
const SOCKETCALL: &[(&str, u32)] = &[
    ("socket", 1),
    ("bind", 2),
    ("connect", 3),
    ("listen", 4),
    ("accept", 5),
    ("getsockname", 6),
    ("getpeername", 7),
    ("socketpair", 8),
    ("send", 9),
    ("recv", 10),
    ("sendto", 11),
    ("recvfrom", 12),
    ("shutdown", 13),
    ("setsockopt", 14),
    ("getsockopt", 15),
    ("sendmsg", 16),
    ("recvmsg", 17),
    ("accept4", 18),
    ("recvmmsg", 19),
    ("sendmmsg", 20),
];

/// `include/uapi/linux/ipc.h`
const IPC: &[(&str, u32)] = &[
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_agrees_with_the_c_library() {
        assert!(SYSCALLS.is_sorted_by(|a, b| a.0 < b.0));
        for (name, number) in [
            ("read", libc::SYS_read),
            ("execve", libc::SYS_execve),
            ("clone3", libc::SYS_clone3),
            ("seccomp", libc::SYS_seccomp),
            ("openat2", libc::SYS_openat2),
            ("mount_setattr", libc::SYS_mount_setattr),
            ("landlock_create_ruleset", libc::SYS_landlock_create_ruleset),
        ] {
            let known = Architecture::X86_64.number(name).unwrap();
            assert_eq!(i64::from(known), number, "{name}");
        }
        assert_eq!(Architecture::X86.number("execve"), Some(11));
        assert_eq!(Architecture::X32.number("execve"), Some(X32_BIT + 520));
        assert_eq!(Architecture::X86_64.number("socketcall"), None);
        assert_eq!(Architecture::X86.number("no_such_call"), None);
    }

    #[test]
    fn only_x86_has_calls_within_calls() {
        assert_eq!(Architecture::X86.multiplexed("bind"), Some((102, 2)));
        assert_eq!(Architecture::X86.multiplexed("shmat"), Some((117, 21)));
        assert_eq!(Architecture::X86.multiplexed("read"), None);
        assert_eq!(Architecture::X86_64.multiplexed("bind"), None);
    }
}
