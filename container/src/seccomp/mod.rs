//! Filters of system calls: from `linux.seccomp` to a program in the kernel.
//!
//! The compiler is the project's own. libseccomp takes some 20 ms for the profile that the engines
//! send, several times what all the rest of starting a container takes; this takes less than one,
//! so nothing has to be cached. What a profile means is nevertheless what libseccomp and runc make
//! of it:
//!
//! - Names that no table knows are skipped, since a profile is written for many kernels.
//! - A rule without conditions supersedes rules with conditions for the same call; of several the
//!   first holds. Of rules with conditions the first that matches holds.
//! - Conditions of one rule must all hold, but if two are about the same argument, any one will do.
//! - A rule whose action is the default action is as good as absent.
//! - The native architecture is always filtered, with those listed; calls of others kill.
//! - If the default action denies, a call with a number above all in the profile gets ENOSYS, as
//!   from a kernel that does not have it yet: programs then fall back to older calls.
//!
//! One thing is stricter. `socketcall` and `ipc` of x86 carry many calls, with their arguments in
//! memory where a filter cannot look. Rules for such a call apply to both ways; but of those with
//! conditions, which cannot be checked there, the denying ones deny always and the others never
//! allow. A rule for `socketcall` or `ipc` itself goes before all that.

mod architecture;
mod install;
mod profile;
mod program;
#[cfg(test)]
mod property_tests;
mod rules;
mod table;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag};

pub use self::profile::default_profile;
use self::program::Instruction;

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("linux.seccomp.{field} is {value}, but {reason}")]
    Invalid {
        field: String,
        value: String,
        reason: &'static str,
    },
    #[error("linux.seccomp takes {instructions} instructions, but the kernel takes at most 4096")]
    TooLarge { instructions: usize },
    #[error("the kernel refuses the seccomp filter")]
    Install(#[source] Errno),
}

/// A compiled filter, ready to be installed without allocating.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Filter {
    instructions: Vec<Instruction>,
    flags: u64,
    notifies: bool,
}

impl Filter {
    /// Whether some calls are decided by a listener. [`Filter::install`] then returns the
    /// descriptor that it listens on.
    #[must_use]
    pub fn notifies(&self) -> bool {
        self.notifies
    }

    /// Puts the calling thread, and what it executes, under the filter for good. Makes one system
    /// call and allocates nothing, so it may come last before exec.
    ///
    /// The thread must have no_new_privs set or CAP_SYS_ADMIN. The profile must allow what is still
    /// to come, as execve.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the filter or a flag of it.
    pub fn install(&self) -> Result<Option<OwnedFd>, SeccompError> {
        install::install(self).map_err(SeccompError::Install)
    }
}

/// Compiles `seccomp`.
///
/// # Errors
///
/// If a rule cannot be what its author meant: an errno for an action that returns none, or out of
/// range; an argument that no call has; a notification for `write` or as the default, which could
/// never be answered. Or if the program is larger than the kernel takes.
pub fn compile(seccomp: &LinuxSeccomp) -> Result<Filter, SeccompError> {
    let rules = rules::Rules::new(seccomp)?;
    let instructions = program::program(&rules);
    if instructions.len() > INSTRUCTIONS_MAX {
        return Err(SeccompError::TooLarge {
            instructions: instructions.len(),
        });
    }
    let notifies = seccomp
        .syscalls()
        .iter()
        .flatten()
        .any(|syscall| syscall.action() == LinuxSeccompAction::ScmpActNotify);
    Ok(Filter {
        instructions,
        flags: flags(seccomp.flags().as_deref(), notifies),
        notifies,
    })
}

/// `BPF_MAXINSNS`
const INSTRUCTIONS_MAX: usize = 4096;

fn flags(configured: Option<&[LinuxSeccompFilterFlag]>, notifies: bool) -> u64 {
    let flag = |flag: &LinuxSeccompFilterFlag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync if notifies => {
            // With both the return value would be ambiguous without the third.
            libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH
        }
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // Without a listener nobody waits, and the kernel refuses the flag.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if !notifies => 0,
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
            libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
        }
    };
    let flags = match configured {
        // As runc: the mitigation that it switches off is of no use since Linux 5.16.
        None => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        Some(flags) => flags.iter().map(flag).fold(0, |all, flag| all | flag),
    };
    let listener = if notifies {
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
    } else {
        0
    };
    flags | listener
}
