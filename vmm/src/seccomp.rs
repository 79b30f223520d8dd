//! The system calls that each thread may make once guests run. Another one ends the process, and
//! names itself.
//!
//! UNSAFETY: a signal handler reads the context that the kernel hands it, and may use nothing but
//! bare system calls.
#![expect(
    unsafe_code,
    reason = "the handler of SIGSYS reads its context and may only make bare system calls"
)]

mod program;

use std::cell::Cell;

use libc::c_long;
use seccompiler::BpfProgram;
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use crate::control::ExitStatus;

/// The walls cannot be put up.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("a system call filter cannot be installed")]
    Install(#[source] seccompiler::Error),
    #[error("violations of the system call filter cannot be caught")]
    Handler(#[source] vmm_sys_util::errno::Error),
}

/// A kind of thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Thread {
    /// Serves the host's other descriptors.
    EventLoop,
    /// Runs guest code, and what guests do to registers.
    Vcpu,
    /// Serves one disk or network device.
    Device,
    /// Writes snapshots.
    Snapshot,
    /// Makes devices while the machine runs, and their threads, which then have less.
    Hotplug,
}

impl Thread {
    fn name(self) -> &'static str {
        match self {
            Thread::EventLoop => "the event loop",
            Thread::Vcpu => "a virtual processor",
            Thread::Device => "a device",
            Thread::Snapshot => "the thread of snapshots",
            Thread::Hotplug => "the thread of devices",
        }
    }

    fn rules(self) -> [&'static [Rule]; 3] {
        match self {
            Thread::EventLoop => [SHARED, INTERRUPTS, EVENT_LOOP],
            Thread::Vcpu => [SHARED, INTERRUPTS, VCPU],
            Thread::Device => [SHARED, INTERRUPTS, &[]],
            Thread::Snapshot => [SHARED, INTERRUPTS, SNAPSHOT],
            Thread::Hotplug => [SHARED, INTERRUPTS, HOTPLUG],
        }
    }
}

/// A permission.
struct Rule {
    call: c_long,
    when: When,
    /// For readers: nobody should have to guess what a line is good for.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "it is for people and for a test")
    )]
    reason: &'static str,
}

/// Arguments of a call that is permitted.
enum When {
    Always,
    /// The argument at this position is one of these.
    OneOf(u8, &'static [u64]),
    /// The argument at this position has none of these bits.
    Without(u8, u64),
}

use When::{Always, OneOf, Without};

const fn rule(call: c_long, when: When, reason: &'static str) -> Rule {
    Rule { call, when, reason }
}

/// Memory that can be executed.
const EXECUTABLE: u64 = 4;
/// `ioctl` numbers of KVM, which no crate names.
const KVM_RUN: u64 = 0xae80;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_SIGNAL_MSI: u64 = 0x4020_aea5;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_GET_CPUID2: u64 = 0xc008_ae91;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_GET_XSAVE2: u64 = 0x9000_aecf;
/// What a tap may leave to its user.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
/// `ioctl` numbers of /dev/vhost-net (linux/vhost.h).
const VHOST_SET_FEATURES: u64 = 0x4008_af00;
const VHOST_SET_MEM_TABLE: u64 = 0x4008_af03;
const VHOST_SET_VRING_NUM: u64 = 0x4008_af10;
const VHOST_SET_VRING_ADDR: u64 = 0x4028_af11;
const VHOST_SET_VRING_BASE: u64 = 0x4008_af12;
const VHOST_GET_VRING_BASE: u64 = 0xc008_af12;
const VHOST_SET_VRING_KICK: u64 = 0x4008_af20;
const VHOST_SET_VRING_CALL: u64 = 0x4008_af21;
const VHOST_SET_VRING_ERR: u64 = 0x4008_af22;
const VHOST_NET_SET_BACKEND: u64 = 0x4008_af30;
/// What a thread may ask for itself.
const PR_SET_NAME: u64 = 15;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
/// `tcsetattr` at once, which looks afterwards at what has come of it.
const TCSETS: u64 = 0x5402;
const TCGETS: u64 = 0x5401;
/// Makes a socket non-blocking.
const FIONBIO: u64 = 0x5421;
/// A socket of this machine.
const AF_UNIX: u64 = 1;
/// Signals that one thread sends to another: the first real-time one, and what `abort` sends.
const SIGNALS: &[u64] = &[32 + 2, 6];

/// What devices, memory allocation and the end of a thread need, whoever's turn it is.
const SHARED: &[Rule] = &[
    rule(libc::SYS_read, Always, "eventfds, timers, taps, streams"),
    rule(
        libc::SYS_write,
        Always,
        "eventfds, console, streams, errors",
    ),
    rule(libc::SYS_readv, Always, "frames from the tap, streams"),
    rule(libc::SYS_writev, Always, "frames to the tap, streams"),
    rule(libc::SYS_preadv, Always, "disks"),
    rule(libc::SYS_preadv2, Always, "disks"),
    rule(libc::SYS_pwritev, Always, "disks"),
    rule(libc::SYS_pwritev2, Always, "disks, written through"),
    rule(libc::SYS_pread64, Always, "disks"),
    rule(libc::SYS_pwrite64, Always, "disks"),
    rule(libc::SYS_fsync, Always, "flushes of disks"),
    rule(libc::SYS_fdatasync, Always, "flushes of disks"),
    rule(libc::SYS_fallocate, Always, "discards of disks"),
    rule(libc::SYS_ftruncate, Always, "images of disks that grow"),
    rule(libc::SYS_io_uring_enter, Always, "requests to disks"),
    rule(libc::SYS_timerfd_settime, Always, "disk limits"),
    rule(
        libc::SYS_clock_gettime,
        Always,
        "disk limits where there is no vDSO",
    ),
    rule(libc::SYS_getrandom, Always, "the rng device, hash tables"),
    rule(libc::SYS_sendto, Always, "vsock connections"),
    rule(libc::SYS_sendmsg, Always, "vsock connections"),
    rule(libc::SYS_recvfrom, Always, "vsock connections"),
    rule(libc::SYS_recvmsg, Always, "vsock connections"),
    rule(
        libc::SYS_socket,
        OneOf(0, &[AF_UNIX]),
        "a guest's connection to a socket of the host",
    ),
    rule(
        libc::SYS_connect,
        Always,
        "the same; all sockets are unix ones",
    ),
    rule(libc::SYS_shutdown, Always, "half-closed vsock connections"),
    rule(libc::SYS_poll, Always, "readers that may not read"),
    rule(libc::SYS_ppoll, Always, "readers that may not read"),
    rule(libc::SYS_epoll_ctl, Always, "descriptors come and go"),
    rule(libc::SYS_epoll_wait, Always, "waiting; vsock's own set"),
    rule(libc::SYS_epoll_pwait, Always, "waiting; vsock's own set"),
    rule(libc::SYS_eventfd2, Always, "kicks, when a driver starts"),
    rule(
        libc::SYS_fcntl,
        Always,
        "flags of streams and copies of descriptors",
    ),
    rule(
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                VHOST_SET_FEATURES,
                VHOST_SET_MEM_TABLE,
                VHOST_SET_VRING_NUM,
                VHOST_SET_VRING_ADDR,
                VHOST_SET_VRING_BASE,
                VHOST_GET_VRING_BASE,
                VHOST_SET_VRING_KICK,
                VHOST_SET_VRING_CALL,
                VHOST_SET_VRING_ERR,
                VHOST_NET_SET_BACKEND,
            ],
        ),
        "queues that the kernel serves, as drivers start and around snapshots",
    ),
    rule(libc::SYS_close, Always, "descriptors that are done with"),
    rule(libc::SYS_futex, Always, "locks"),
    rule(libc::SYS_sched_yield, Always, "locks"),
    rule(libc::SYS_brk, Always, "memory allocation"),
    rule(libc::SYS_mmap, Without(2, EXECUTABLE), "memory allocation"),
    rule(
        libc::SYS_mprotect,
        Without(2, EXECUTABLE),
        "memory allocation",
    ),
    rule(libc::SYS_mremap, Always, "memory allocation"),
    rule(libc::SYS_munmap, Always, "memory allocation"),
    rule(
        libc::SYS_madvise,
        Always,
        "memory allocation, stacks of ended threads",
    ),
    rule(libc::SYS_rt_sigprocmask, Always, "the end of a thread"),
    rule(
        libc::SYS_rt_sigreturn,
        Always,
        "the end of a signal handler",
    ),
    rule(libc::SYS_sigaltstack, Always, "the end of a thread"),
    rule(
        libc::SYS_restart_syscall,
        Always,
        "waiting that was interrupted",
    ),
    rule(libc::SYS_getpid, Always, "signals between threads"),
    rule(libc::SYS_gettid, Always, "signals between threads, panics"),
    rule(
        libc::SYS_tgkill,
        OneOf(2, SIGNALS),
        "stopping processors, abort",
    ),
    rule(
        libc::SYS_rt_sigaction,
        Always,
        "abort restores the signal's default",
    ),
    rule(libc::SYS_exit, Always, "the end of a thread"),
    rule(libc::SYS_exit_group, Always, "the end"),
];

/// What threads need that interrupt processors.
const INTERRUPTS: &[Rule] = &[rule(
    libc::SYS_ioctl,
    OneOf(1, &[KVM_SIGNAL_MSI]),
    "interrupts by PCI functions",
)];

const VCPU: &[Rule] = &[rule(
    libc::SYS_ioctl,
    OneOf(
        1,
        &[
            KVM_RUN,
            KVM_KVMCLOCK_CTRL,
            KVM_SET_GSI_ROUTING,
            KVM_IRQFD,
            KVM_IOEVENTFD,
            TUNSETOFFLOAD,
        ],
    ),
    "guest code; interrupt lines, kicks and offloads, as drivers start",
)];

const EVENT_LOOP: &[Rule] = &[
    rule(
        libc::SYS_ioctl,
        OneOf(1, &[FIONBIO, TCSETS, TCGETS]),
        "clients that do not block; the terminal at the end",
    ),
    rule(
        libc::SYS_accept4,
        Always,
        "clients of the control socket and of vsock",
    ),
    rule(
        libc::SYS_unlink,
        Always,
        "sockets that were made, at the end",
    ),
    rule(libc::SYS_lseek, Always, "the exit status"),
];

const SNAPSHOT: &[Rule] = &[
    rule(
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                KVM_GET_REGS,
                KVM_GET_SREGS,
                KVM_GET_MSRS,
                KVM_GET_LAPIC,
                KVM_GET_CPUID2,
                KVM_GET_MP_STATE,
                KVM_GET_VCPU_EVENTS,
                KVM_GET_DEBUGREGS,
                KVM_GET_TSC_KHZ,
                KVM_GET_XSAVE,
                KVM_GET_XSAVE2,
                KVM_GET_XCRS,
            ],
        ),
        "processors in a snapshot, which does not change them",
    ),
    rule(
        libc::SYS_ioctl,
        OneOf(1, &[KVM_GET_CLOCK, KVM_GET_DIRTY_LOG]),
        "clock and memory in a snapshot",
    ),
    rule(
        libc::SYS_mincore,
        Always,
        "memory in a snapshot that was never touched",
    ),
    rule(
        libc::SYS_sysinfo,
        Always,
        "whether a snapshot's memory may have been swapped out",
    ),
    rule(
        libc::SYS_ftruncate,
        Always,
        "the length of a snapshot's files",
    ),
    rule(libc::SYS_lseek, Always, "holes in memory"),
];

const HOTPLUG: &[Rule] = &[
    rule(
        libc::SYS_ioctl,
        OneOf(
            1,
            &[KVM_IOEVENTFD, TUNGETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD],
        ),
        "kicks of a device that is gone; taps that are handed over",
    ),
    rule(libc::SYS_flock, Always, "disks are one machine's"),
    rule(libc::SYS_fstat, Always, "the kind and size of a disk"),
    rule(libc::SYS_newfstatat, Always, "the kind and size of a disk"),
    rule(libc::SYS_statx, Always, "the kind and size of a disk"),
    rule(libc::SYS_fstatfs, Always, "what an image's file can do"),
    rule(libc::SYS_lseek, Always, "the size of a disk"),
    rule(libc::SYS_timerfd_create, Always, "limits of a disk"),
    rule(libc::SYS_io_uring_setup, Always, "requests to a disk"),
    rule(libc::SYS_io_uring_register, Always, "requests to a disk"),
    rule(libc::SYS_epoll_create1, Always, "a device's event loop"),
    rule(libc::SYS_clone3, Always, "a device's thread"),
    rule(
        libc::SYS_clone,
        Always,
        "a device's thread, in older libraries",
    ),
    rule(libc::SYS_set_robust_list, Always, "the start of a thread"),
    rule(libc::SYS_rseq, Always, "the start of a thread"),
    rule(
        libc::SYS_sched_getaffinity,
        Always,
        "the stack of a thread that starts",
    ),
    rule(
        libc::SYS_prctl,
        OneOf(0, &[PR_SET_NAME, PR_SET_NO_NEW_PRIVS]),
        "the name of a thread, and its filter",
    ),
    rule(libc::SYS_seccomp, Always, "the filter of a device's thread"),
];

/// A compiled filter.
#[derive(Clone, Debug)]
pub struct Filter {
    thread: Thread,
    program: BpfProgram,
}

impl Filter {
    /// The filter of `thread`.
    pub fn new(thread: Thread) -> Self {
        let rules = thread.rules().into_iter().flatten();
        Self {
            thread,
            program: program::compile(rules.map(|rule| (rule.call, &rule.when))),
        }
    }

    /// Confines the calling thread, for ever.
    pub fn install(&self) -> Result<(), SeccompError> {
        register_signal_handler(libc::SIGSYS, on_violation).map_err(SeccompError::Handler)?;
        NAME.set(self.thread.name());
        seccompiler::apply_filter(&self.program).map_err(SeccompError::Install)
    }
}

/// Keeps memory allocation to calls that the filters know. To be called before threads are started.
///
/// When threads meet in the C library's allocator, it makes them an arena each, up to a number for
/// which it reads a file about the host's processors. One arena is enough here, and smaller.
pub fn prepare_allocator() {
    // SAFETY: sets a number of the allocator, which takes its own lock.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

thread_local! {
    /// What a violation calls the thread.
    static NAME: Cell<&'static str> = const { Cell::new("a thread") };
}

/// Says which system call it was and ends the process.
extern "C" fn on_violation(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let context: *const libc::ucontext_t = context.cast();
    // SAFETY: the kernel hands a handler with SA_SIGINFO a ucontext_t.
    let registers = unsafe { (*context).uc_mcontext.gregs };
    let index = usize::try_from(libc::REG_RAX).unwrap_or_default();
    let number = registers[index].unsigned_abs();
    let mut digits = [0; 20];
    say("hostd-vmm: ");
    say(NAME.get());
    say(" made system call ");
    say(name_of(number));
    say(" (");
    say(decimal(number, &mut digits));
    say("), which its filter does not allow; --no-seccomp runs without filters\n");
    // SAFETY: ends the process without running anything else.
    unsafe { libc::_exit(ExitStatus::FAILURE_CODE.into()) };
}

/// Writes to standard error, without a lock or memory allocation.
fn say(text: &str) {
    // SAFETY: the range is `text`.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

/// Out of a table that is part of the program.
fn name_of(number: u64) -> &'static str {
    let known = usize::try_from(number).ok().and_then(Sysno::new);
    known.map_or("of a newer kernel", |call| call.name())
}

fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &str {
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + u8::try_from(number % 10).unwrap_or_default();
        number /= 10;
        if number == 0 {
            break;
        }
    }
    str::from_utf8(&digits[start..]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::process::Command;

    use super::*;

    pub(super) const THREADS: [Thread; 5] = [
        Thread::EventLoop,
        Thread::Vcpu,
        Thread::Device,
        Thread::Snapshot,
        Thread::Hotplug,
    ];

    #[test]
    fn every_rule_has_a_reason_and_every_call_a_name() {
        for thread in THREADS {
            for rule in thread.rules().into_iter().flatten() {
                let name = name_of(rule.call.unsigned_abs());
                assert!(rule.reason.len() > 4, "system call {name}");
                assert_ne!(name, name_of(u64::MAX), "system call {}", rule.call);
            }
        }
        assert_eq!(name_of(u64::MAX), "of a newer kernel");
    }

    /// Set for a process that is to break its rules.
    const VIOLATOR: &str = "HOSTD_VMM_TEST_VIOLATOR";

    #[test]
    fn a_violation_ends_the_process_and_names_the_call_and_the_thread() {
        if env::var_os(VIOLATOR).is_some() {
            Filter::new(Thread::Vcpu).install().unwrap();
            nix::unistd::getppid();
            unreachable!("the filter let it pass");
        }
        let name = "seccomp::tests::a_violation_ends_the_process_and_names_the_call_and_the_thread";
        let violator = Command::new(env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(VIOLATOR, "")
            .output()
            .unwrap();
        assert_eq!(violator.status.code(), Some(125));
        let said = String::from_utf8(violator.stderr).unwrap();
        let want = format!(
            "a virtual processor made system call getppid ({}), ",
            libc::SYS_getppid
        );
        assert!(said.contains(&want), "{said}");
    }

    #[test]
    fn numbers_are_told_in_full() {
        for number in [0, 7, 10, 333, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string());
        }
    }
}
