//! The system call that puts a filter in force: seccomp(2).
//!
//! UNSAFETY: seccomp(2) reads the program through two pointers, both to memory that the borrowed
//! filter keeps alive during the call.
#![expect(unsafe_code, reason = "seccomp(2) has no safe wrapper")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::{Filter, program::Instruction};

/// The kernel's `struct sock_fprog`.
#[repr(C)]
struct Program {
    length: u16,
    instructions: *const Instruction,
}

pub(super) fn install(filter: &Filter) -> Result<Option<OwnedFd>, Errno> {
    let program = Program {
        length: u16::try_from(filter.instructions.len()).map_err(|_| Errno::E2BIG)?,
        instructions: filter.instructions.as_ptr(),
    };
    // SAFETY: `Instruction` is laid out as `struct sock_filter` and `Program` as `struct
    // sock_fprog`; `length` is that of the vector, which lives until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            std::ptr::from_ref(&program),
        )
    };
    match RawFd::try_from(result) {
        Ok(-1) => Err(Errno::last()),
        Ok(fd) if filter.notifies => {
            // SAFETY: with a listener asked for, success is a new descriptor that nobody else has.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
        }
        Ok(_) => Ok(None),
        Err(_) => Err(Errno::EIO),
    }
}
