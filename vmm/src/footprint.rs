//! Memory that the process needed to start and does not need to run.
//!
//! UNSAFETY: the kernel is told to forget about mappings of this program's own file. They are read
//! only, so it finds the same in the file when they are used again.
#![expect(
    unsafe_code,
    reason = "the linker's symbols say where the program lies, and the kernel is told about it"
)]

use std::ptr;

unsafe extern "C" {
    /// Where the program's file is mapped from.
    static __executable_start: u8;
    /// The end of its code.
    static etext: u8;
}

/// Unmaps the program's code and constants, page by page, until they are used again.
///
/// Most of a VMM's code is for its start, and the kernel maps whole neighbourhoods of what is used:
/// all of it in the end. An idle machine gets by with a fifth.
pub fn forget_start() {
    let start = &raw const __executable_start;
    let end = &raw const etext;
    let page = usize::try_from(crate::layout::PAGE_BYTES).expect("usize is 64 bits");
    let bytes = end.addr().saturating_sub(start.addr()) / page * page;
    // SAFETY: from the first byte of the file's mapping to the end of its code, less a part of a
    // page, there are only mappings of the file that nobody can write to. If the kernel refuses,
    // nothing has changed.
    let _ = unsafe {
        libc::madvise(
            ptr::without_provenance_mut(start.addr()),
            bytes,
            libc::MADV_DONTNEED,
        )
    };
}
