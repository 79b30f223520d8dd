//! What users of io_uring have in common.

use std::io;

use io_uring::IoUring;

/// How often in a row the kernel may refuse a submission for want of resources.
pub(crate) const BUSY_RETRIES_MAX: u32 = 1000;

/// A ring for `depth` operations, that runs completions when we enter the kernel anyway, where Linux
/// knows how (5.19).
///
/// # Errors
///
/// If the host has io_uring disabled, or is older than Linux 5.5: what an operation points to must be
/// the kernel's own once it was submitted.
pub(crate) fn build(depth: u16) -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .setup_submit_all()
        .setup_coop_taskrun()
        .build(depth.into())
        .or_else(|_| IoUring::new(depth.into()))?;
    if !ring.params().is_feature_submit_stable() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(ring)
}

/// Whether a submission was refused for want of resources.
pub(crate) fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
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
