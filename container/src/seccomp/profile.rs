//! The profile of a container that brings none of its own.
//!
//! It allows what programs need and what the kernel's own checks guard well, and denies what only
//! administers the machine, is obsolete, or has been a door out too often (keyrings, userfaultfd,
//! io_uring, vsock, the making of namespaces). What a capability guards is allowed to who has it.
//! The denied calls that programs know how to do without look as if the kernel did not have them.

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall,
};

/// Allowed to everybody.
const ALLOWED: &str = "\
    _llseek _newselect accept accept4 access adjtimex alarm arch_prctl bind brk cachestat \
    capget capset chdir chmod chown chown32 clock_adjtime clock_adjtime64 clock_getres \
    clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 \
    close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 \
    epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd \
    eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 \
    fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl \
    fcntl64 fdatasync fgetxattr file_getattr file_setattr flistxattr flock fork fremovexattr \
    fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex \
    futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat get_robust_list \
    get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 \
    getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid \
    getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage \
    getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat \
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy \
    io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get \
    ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self \
    lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr \
    lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules lstat lstat64 madvise \
    map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat \
    mlock mlock2 mlockall mmap mmap2 modify_ldt mprotect mq_getsetattr mq_notify mq_open \
    mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap \
    mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at \
    nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 \
    pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 \
    prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 pselect6_time64 \
    ptrace pwrite64 pwritev pwritev2 read readahead readdir readlink readlinkat readv recvfrom \
    recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename \
    renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask \
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 \
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity \
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval \
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop \
    semtimedop_time64 sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list \
    set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 \
    setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid \
    setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid \
    setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaction sigaltstack \
    signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend socketpair splice \
    stat stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs \
    sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime \
    timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime \
    timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 \
    ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes \
    vfork wait4 waitid waitpid write writev";

/// Refused to everybody, with EPERM: they exist, but not for containers.
const REFUSED: &str = "add_key keyctl request_key userfaultfd vmsplice migrate_pages move_pages \
    kexec_load kexec_file_load swapon swapoff nfsservctl sysfs _sysctl uselib ustat vm86 vm86old";

/// Allowed with the capability, and refused with EPERM without.
const GUARDED: &[(Capability, &str)] = &[
    (Capability::Bpf, "bpf"),
    (Capability::DacReadSearch, "open_by_handle_at"),
    (Capability::Perfmon, "perf_event_open"),
    (
        Capability::SysAdmin,
        "bpf fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_set_self_attr mount \
         mount_setattr move_mount open_tree open_tree_attr perf_event_open pivot_root quotactl \
         quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (
        Capability::SysModule,
        "delete_module finit_module init_module query_module",
    ),
    (
        Capability::SysNice,
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    (Capability::SysPacct, "acct"),
    (Capability::SysPtrace, "kcmp pidfd_getfd process_madvise"),
    (Capability::SysRawio, "ioperm iopl"),
    (
        Capability::SysTime,
        "clock_settime clock_settime64 settimeofday stime",
    ),
    (Capability::SysTtyConfig, "vhangup"),
    (Capability::Syslog, "syslog"),
];

/// The execution domains that are safe: Linux and Linux with 32 bits, each with and without
/// UNAME26, and the question which one it is.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// All `CLONE_NEW*` that clone(2) takes.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// Sockets to the host's hypervisor side, which no network namespace confines.
const AF_VSOCK: u64 = 40;

/// The profile for a process with `capabilities` in its bounding set.
#[must_use]
pub fn default_profile(capabilities: &Capabilities) -> LinuxSeccomp {
    let administers = capabilities.contains(&Capability::SysAdmin);
    let mut syscalls = vec![allow(ALLOWED), refuse(REFUSED, libc::EPERM)];
    for persona in PERSONALITIES {
        let same = argument(0, LinuxSeccompOperator::ScmpCmpEq, persona, 0);
        syscalls.push(with(allow("personality"), same));
    }
    let elsewhere = argument(0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, 0);
    syscalls.push(with(allow("socket"), elsewhere));
    if administers {
        syscalls.push(allow("clone clone3"));
    } else {
        let masked = LinuxSeccompOperator::ScmpCmpMaskedEq;
        let same_namespaces = argument(0, masked, CLONE_NAMESPACES, 0);
        syscalls.push(with(allow("clone"), same_namespaces));
        // Its flags are in memory, out of sight. Without it programs use clone.
        syscalls.push(refuse("clone3", libc::ENOSYS));
    }
    // A call may have several guards. An allowing rule comes first, and the first one holds.
    let has = |guard: &&(Capability, &'static str)| capabilities.contains(&guard.0);
    syscalls.extend(GUARDED.iter().filter(has).map(|(_, names)| allow(names)));
    let without = GUARDED.iter().filter(|guard| !has(guard));
    syscalls.extend(without.map(|(_, names)| refuse(names, libc::EPERM)));

    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(libc::ENOSYS.cast_unsigned()))
        .set_architectures(Some(vec![
            Arch::ScmpArchX86_64,
            Arch::ScmpArchX86,
            Arch::ScmpArchX32,
        ]))
        .set_syscalls(Some(syscalls));
    profile
}

fn names(names: &str) -> Vec<String> {
    names.split_whitespace().map(str::to_owned).collect()
}

fn allow(calls: &str) -> LinuxSyscall {
    let mut syscall = LinuxSyscall::default();
    syscall
        .set_names(names(calls))
        .set_action(LinuxSeccompAction::ScmpActAllow);
    syscall
}

fn refuse(calls: &str, errno: i32) -> LinuxSyscall {
    let mut syscall = LinuxSyscall::default();
    syscall
        .set_names(names(calls))
        .set_action(LinuxSeccompAction::ScmpActErrno)
        .set_errno_ret(Some(errno.cast_unsigned()));
    syscall
}

fn with(mut syscall: LinuxSyscall, argument: LinuxSeccompArg) -> LinuxSyscall {
    syscall.set_args(Some(vec![argument]));
    syscall
}

fn argument(
    index: usize,
    operator: LinuxSeccompOperator,
    value: u64,
    value_two: u64,
) -> LinuxSeccompArg {
    LinuxSeccompArgBuilder::default()
        .index(index)
        .op(operator)
        .value(value)
        .value_two(value_two)
        .build()
        .expect("every field has a value")
}
