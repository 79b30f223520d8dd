//! Gives guest memory back to the host.
//!
//! The pages are dropped at once (MADV_DONTNEED), so that the host's accounting shows what became of
//! them. MADV_FREE would leave them charged to the machine until the host is short of memory, and then
//! make it look for them; what it saves, a guest that takes the page again at once, is what guests
//! that give pages back do not do. The guest finds zeroes in them, or, after a restore, what the
//! snapshot had there.
//!
//! UNSAFETY: the kernel replaces pages that Rust knows by address. Such memory is only ever accessed by
//! volatile copies, to which this is one more change from outside.
#![expect(
    unsafe_code,
    reason = "the kernel is told by address which pages to take"
)]

use std::io;

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

/// The unit in which the kernel takes memory back.
const PAGE_BYTES: usize = 4096;

/// Drops the pages that lie in `range` as a whole; returns how many bytes that were.
///
/// Memory of a kind that cannot be given back in such pieces (a part of a page of hugetlbfs) stays.
pub(super) fn discard(range: &VolatileSlice<'_>) -> io::Result<usize> {
    let start = range.ptr_guard_mut().as_ptr();
    let skip = start.align_offset(PAGE_BYTES);
    let bytes = range.len().saturating_sub(skip) & !(PAGE_BYTES - 1);
    if bytes == 0 {
        return Ok(0);
    }
    let first = start.wrapping_add(skip);
    // SAFETY: the pages lie in memory that the slice gives access to, and their content is nobody's
    // that holds a reference to it: volatile memory has none.
    let refused = unsafe { libc::madvise(first.cast(), bytes, libc::MADV_DONTNEED) } != 0;
    if !refused {
        return Ok(bytes);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL) => Ok(0),
        _ => Err(error),
    }
}

/// Drops the pages of guest memory from `start` on, for `bytes` bytes; returns how many bytes there
/// were. What is not memory is left alone.
pub(super) fn discard_range(
    memory: &GuestMemoryMmap,
    start: GuestAddress,
    bytes: u64,
) -> io::Result<u64> {
    let mut done = 0;
    let end = start.raw_value().saturating_add(bytes);
    for region in memory.iter() {
        let base = region.start_addr().raw_value();
        let from = start.raw_value().max(base);
        let to = end.min(base.saturating_add(region.len()));
        let length = to.saturating_sub(from);
        let Ok(length) = usize::try_from(length) else {
            continue;
        };
        if length == 0 {
            continue;
        }
        let offset = vm_memory::MemoryRegionAddress(from - base);
        let slice = region.get_slice(offset, length).map_err(io::Error::other)?;
        done += discard(&slice)? as u64;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::testing::{Driver, HOLE, HOLE_END, MEMORY_END, REGION_BORDER, resident};

    #[test]
    fn whole_pages_go_and_their_neighbours_stay() {
        let memory = Driver::new(&[16]).memory;
        let start = REGION_BORDER - 0x4000;
        for (offset, len, want) in [
            (0, 0x4000, 0x4000),
            (1, 0x4000, 0x3000),
            (0x3000, 0x2000, 0x2000), // In two regions.
            (0, 0xfff, 0),
            (0x10, 0xfe0, 0),
            (0, 0, 0),
        ] {
            memory
                .write_slice(&[7; 0x8000], GuestAddress(start))
                .unwrap();
            let done = discard_range(&memory, GuestAddress(start + offset), len).unwrap();
            assert_eq!(done, want, "{offset:#x} {len:#x}");
            let mut bytes = [0; 0x8000];
            memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
            let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
            assert_eq!(zeroes as u64, want, "{offset:#x} {len:#x}");
        }
    }

    #[test]
    fn what_is_given_back_is_not_resident_any_more() {
        let memory = Driver::new(&[16]).memory;
        memory
            .write_slice(&[7; 0x10_0000], GuestAddress(0))
            .unwrap();
        assert_eq!(resident(&memory, 0, 0x10_0000), 0x10_0000);
        discard_range(&memory, GuestAddress(0x4_0000), 0x4_0000).unwrap();
        assert_eq!(resident(&memory, 0x4_0000, 0x4_0000), 0);
        assert_eq!(resident(&memory, 0, 0x4_0000), 0x4_0000);
    }

    #[test]
    fn what_is_no_memory_is_left_alone() {
        let memory = Driver::new(&[16]).memory;
        for (start, bytes, want) in [
            (HOLE, HOLE_END - HOLE, 0),
            (MEMORY_END, 0x1000, 0),
            (u64::MAX - 0xfff, 0x1000, 0),
            (MEMORY_END - 0x1000, u64::MAX, 0x1000),
            (HOLE - 0x1000, HOLE_END - HOLE + 0x2000, 0x2000),
        ] {
            let done = discard_range(&memory, GuestAddress(start), bytes).unwrap();
            assert_eq!(done, want, "{start:#x}");
        }
    }
}
