//! Memory that this program needed for a while and does not need any more: its own code.
//!
//! UNSAFETY: the kernel is told to forget about mappings of this program's own file. They are read
//! only, so it finds the same in the file when they are used again.
#![expect(
    unsafe_code,
    reason = "the linker's symbols say where the program lies, and the kernel is told about it"
)]

use std::ptr;

/// `PAGE_SIZE` of x86-64.
const PAGE_BYTES: usize = 4096;

unsafe extern "C" {
    /// Where the program's file is mapped from.
    static __executable_start: u8;
    /// The end of its code.
    static etext: u8;
}

/// Unmaps the program's code and constants until they are used again, each with its neighbourhood of
/// 64 KiB. To read and check a configuration takes half of the program, which is not needed then; and a
/// process that only waits for a container uses next to nothing.
#[inline(never)] // So that a trace of the program's functions can leave it out.
pub fn forget_code() {
    let start = &raw const __executable_start;
    let end = &raw const etext;
    let bytes = end.addr().saturating_sub(start.addr()) / PAGE_BYTES * PAGE_BYTES;
    let start = ptr::without_provenance_mut(start.addr());
    // SAFETY: from the first byte of the file's mapping to the end of its code, less a part of a page,
    // there are only mappings of the file that nobody can write to. If the kernel refuses, nothing has
    // changed.
    let _ = unsafe { libc::madvise(start, bytes, libc::MADV_DONTNEED) };
}
