//! What users of io_uring have in common.
//!
//! UNSAFETY: a test hands operations to a ring of its own.

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::types::Fd;
use io_uring::{Builder, IoUring, opcode};

/// How often the kernel may refuse what is submitted together, for want of resources.
const BUSY_RETRIES_MAX: u32 = 1000;

/// What may be asked of a ring. Operations are no system calls, so that a thread's filter does not see
/// them: without this, who has taken over a thread could open files and make connections by its ring.
const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// A ring for `depth` operations, that runs completions when we enter the kernel anyway, where Linux
/// knows how (5.19), and takes only [`OPERATIONS`], where it can be told to (5.10).
///
/// # Errors
///
/// If the host has io_uring disabled, or is older than Linux 5.5: what an operation points to must be
/// the kernel's own once it was submitted.
pub(crate) fn build(depth: u16) -> io::Result<IoUring> {
    let depth = depth.into();
    let mut cooperative = IoUring::builder();
    cooperative.setup_submit_all().setup_coop_taskrun();
    let ring = restricted(cooperative, depth)
        .or_else(|_| restricted(IoUring::builder(), depth))
        .or_else(|_| IoUring::new(depth))?;
    if !ring.params().is_feature_submit_stable() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(ring)
}

/// A ring that takes only [`OPERATIONS`], and can be told nothing else.
fn restricted(mut builder: Builder, depth: u32) -> io::Result<IoUring> {
    let ring = builder.setup_r_disabled().build(depth)?;
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut OPERATIONS.map(Restriction::sqe_op))?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// Whether a submission was refused for want of resources.
pub(crate) fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

/// Submits what is to be submitted, as much as the kernel takes, and waits for `wanted` completions, or
/// less. `refusals` counts how often it took nothing, from zero.
///
/// # Errors
///
/// If the kernel refuses for another reason, or too often.
pub(crate) fn submit(ring: &IoUring, wanted: usize, refusals: &mut u32) -> io::Result<()> {
    match ring.submit_and_wait(wanted) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(error) if is_busy(&error) && *refusals < BUSY_RETRIES_MAX => {
            *refusals += 1;
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// A write of `ranges` with RWF flags. Several ranges are put into `place`, which is to stay as it is until
/// the write was submitted.
pub(crate) fn write(
    file: Fd,
    ranges: &[libc::iovec],
    place: &mut Vec<libc::iovec>,
    position: u64,
    flags: i32,
) -> Entry {
    if let [one] = ranges {
        let (start, bytes) = (one.iov_base.cast_const().cast(), byte_count(one.iov_len));
        return opcode::Write::new(file, start, bytes)
            .offset(position)
            .rw_flags(flags)
            .build();
    }
    place.clear();
    place.extend_from_slice(ranges);
    opcode::Writev::new(file, place.as_ptr(), byte_count(place.len()))
        .offset(position)
        .rw_flags(flags)
        .build()
}

/// A length as operations have it. What is cut off here is done in a second step: the kernel stops at
/// 2 GiB anyway.
pub(crate) fn byte_count(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// What an operation returned, as a system call would have.
pub(crate) fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// What one operation returns.
    #[expect(unsafe_code, reason = "operations may name memory")]
    fn ask(ring: &mut IoUring, entry: &Entry) -> io::Result<usize> {
        // SAFETY: the one that names memory names a constant.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        outcome(ring.completion().next().unwrap().result())
    }

    #[test]
    fn a_ring_does_what_devices_need_and_nothing_else() {
        let mut ring = build(4).unwrap();
        let file = tempfile::tempfile().unwrap();
        let fd = Fd(file.as_raw_fd());
        let sync = opcode::Fsync::new(fd).build();
        assert_eq!(ask(&mut ring, &sync).unwrap(), 0);
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build();
        let connection = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        for other in [open, connection, opcode::Nop::new().build()] {
            let refused = ask(&mut ring, &other).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EACCES), "{other:?}");
        }
    }
}
