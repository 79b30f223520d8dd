//! The guest's memory: where it lies, and in what pages the host keeps it.
//!
//! UNSAFETY: memory is mapped here so that guest and host addresses agree in the bits below a huge
//! page, without which KVM cannot map huge pages for the guest. Such mappings are never undone: they
//! last as long as the process, and so longer than any pointer into them.
#![expect(
    unsafe_code,
    reason = "mappings at addresses of our choice are raw memory"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::slice;
use std::sync::Arc;

use vm_memory::mmap::{FromRangesError, MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::layout;
use crate::spec::HugePages;

/// A huge page, by its smallest size.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Memory that is plugged in later starts at a multiple of this, which is the largest unit in which
/// Linux takes memory in.
const HOTPLUG_ALIGNMENT: u64 = 2 << 30;

/// There is no such memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot map {bytes} bytes of memory for the guest")]
    Map { bytes: u64, source: io::Error },
    #[error(
        "the host has no {bytes} bytes of free pages in hugetlbfs; raise vm.nr_hugepages, or change \
         `/memory/huge_pages`"
    )]
    HugePages { bytes: u64, source: MmapRegionError },
    #[error("cannot advise the kernel about huge pages")]
    Advise(#[source] io::Error),
    #[error("the guest's memory overlaps itself")]
    Regions(#[source] FromRangesError),
}

/// How much memory of what kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemoryPlan {
    /// What there is from the start, in bytes.
    pub boot_bytes: u64,
    /// What can be plugged in later, in bytes.
    pub hotplug_bytes: u64,
    pub huge_pages: HugePages,
}

impl MemoryPlan {
    /// What there is from the start, around the hole.
    pub fn boot(&self) -> Vec<Range<u64>> {
        let low = self.boot_bytes.min(layout::HOLE);
        let high = layout::HOLE_END..layout::HOLE_END + (self.boot_bytes - low);
        let pieces = [0..low, high].into_iter();
        pieces.filter(|range| !range.is_empty()).collect()
    }

    /// The end of all of it.
    pub fn end(&self) -> u64 {
        let last = self.hotplug().or_else(|| self.boot().pop());
        last.map_or(0, |range| range.end)
    }

    /// Where memory can be plugged in, if anywhere.
    pub fn hotplug(&self) -> Option<Range<u64>> {
        let end = self.boot().last().map_or(0, |last| last.end);
        let start = end
            .max(layout::HOLE_END)
            .next_multiple_of(HOTPLUG_ALIGNMENT);
        Some(start..start + self.hotplug_bytes).filter(|range| !range.is_empty())
    }
}

/// A file that the guest sees as memory.
#[derive(Debug)]
pub struct Image {
    pub file: File,
    /// The length of the file.
    pub bytes: u64,
    /// Guest addresses, in whole huge pages.
    pub range: Range<u64>,
}

/// Guest memory.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Everything, images included, in the order of addresses.
    pub all: GuestMemoryMmap,
    /// What there is from the start, which is what a kernel is told about.
    pub boot: GuestMemoryMmap,
    /// What each region of `all` holds where nobody has written.
    pub origins: Vec<RegionOrigin>,
}

/// What a region of memory holds where nobody has written.
#[derive(Clone, Debug)]
pub enum RegionOrigin {
    /// Zeroes.
    Nothing,
    /// What is in the memory file of a snapshot from `offset` on, but for pages that are `over` it:
    /// those are mapped from later snapshots.
    Snapshot {
        file: Arc<File>,
        offset: u64,
        over: Vec<Range<u64>>,
    },
    /// An image, which is a file of this length.
    Image { bytes: u64 },
}

impl Memory {
    /// Memory that holds nothing yet, and costs nothing until it is used, and `images` behind it.
    pub fn new(plan: &MemoryPlan, images: &[Image]) -> Result<Memory, MemoryError> {
        let mut boot = Vec::new();
        for range in plan.boot() {
            boot.push(region(&range, plan.huge_pages)?);
        }
        let mut all = boot.clone();
        if let Some(range) = plan.hotplug() {
            all.push(region(&range, plan.huge_pages)?);
        }
        let mut origins = vec![RegionOrigin::Nothing; all.len()];
        for image in images {
            all.push(image_region(image)?);
            origins.push(RegionOrigin::Image { bytes: image.bytes });
        }
        let collect = |regions| {
            GuestMemoryMmap::from_arc_regions(regions)
                .map_err(|error| MemoryError::Regions(error.into()))
        };
        Ok(Memory {
            all: collect(all)?,
            boot: collect(boot)?,
            origins,
        })
    }
}

fn region(range: &Range<u64>, pages: HugePages) -> Result<Arc<GuestRegionMmap>, MemoryError> {
    let bytes = range.end - range.start;
    let size = usize::try_from(bytes).expect("usize is 64 bits");
    let mapping = match pages {
        HugePages::Transparent => map_aligned(size, libc::MADV_HUGEPAGE)?,
        HugePages::None => map_aligned(size, libc::MADV_NOHUGEPAGE)?,
        HugePages::Hugetlbfs => {
            // Reserved at once: a page that is not there when it is touched ends the process.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            MmapRegionBuilder::new(size)
                .with_mmap_flags(flags | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_hugetlbfs(true)
                .build()
                .map_err(|source| MemoryError::HugePages { bytes, source })?
        }
    };
    let region = GuestRegionMmap::new(mapping, GuestAddress(range.start));
    Ok(Arc::new(region.expect("ranges end below 2^64")))
}

/// The file, and nothing behind it. It is mapped privately, so that writes by the guest, and by its
/// devices on its behalf, go to pages of the machine's own.
pub(crate) fn image_region(image: &Image) -> Result<Arc<GuestRegionMmap>, MemoryError> {
    let whole = 0..image.bytes;
    let origin = FileRegion {
        file: &image.file,
        offset: 0,
        extents: slice::from_ref(&whole),
    };
    file_region(&image.range, HugePages::None, &origin)
}

/// The file that a region's content is in.
#[derive(Debug)]
pub(crate) struct FileRegion<'a> {
    pub(crate) file: &'a File,
    /// Where in the file the region starts, in whole pages.
    pub(crate) offset: u64,
    /// The parts of the region that the file has, from the region's start, in whole pages. The
    /// others hold nothing.
    pub(crate) extents: &'a [Range<u64>],
}

/// Memory at guest addresses `range` that has the content of a file, and keeps changes to itself.
/// What the file does not have is kept in such `pages`; in hugetlbfs there are none for it.
pub(crate) fn file_region(
    range: &Range<u64>,
    pages: HugePages,
    origin: &FileRegion<'_>,
) -> Result<Arc<GuestRegionMmap>, MemoryError> {
    let length = |bytes: u64| usize::try_from(bytes).expect("usize is 64 bits");
    let advice = match pages {
        HugePages::Transparent | HugePages::Hugetlbfs => libc::MADV_HUGEPAGE,
        HugePages::None => libc::MADV_NOHUGEPAGE,
    };
    let size = length(range.end - range.start);
    let mapping = map_aligned(size, advice)?;
    for extent in origin.extents {
        let place = origin.offset.checked_add(extent.start);
        map_part(&mapping, extent, origin.file, place)?;
    }
    let region = GuestRegionMmap::new(mapping, GuestAddress(range.start));
    Ok(Arc::new(region.expect("ranges end below 2^64")))
}

/// Puts what is in `file` from `offset` on, in whole pages, over `part` of a region, as if it had been
/// read: changes are the region's own. Nothing is read yet.
pub(crate) fn map_over(
    region: &GuestRegionMmap,
    part: &Range<u64>,
    file: &File,
    offset: u64,
) -> Result<(), MemoryError> {
    map_part(region, part, file, Some(offset))
}

/// Maps a part of a file, in whole pages, over `part` of `mapping`.
fn map_part(
    mapping: &MmapRegion,
    part: &Range<u64>,
    file: &File,
    offset: Option<u64>,
) -> Result<(), MemoryError> {
    let bytes = part.end.saturating_sub(part.start);
    let refused = |source| MemoryError::Map { bytes, source };
    let (at, room) = (
        usize::try_from(part.start).expect("usize is 64 bits"),
        usize::try_from(bytes).expect("usize is 64 bits"),
    );
    let offset = offset.and_then(|offset| libc::off_t::try_from(offset).ok());
    let inside = at
        .checked_add(room)
        .is_some_and(|end| end <= mapping.size());
    let Some(offset) = offset.filter(|_| inside) else {
        return Err(refused(io::ErrorKind::InvalidInput.into()));
    };
    let start = mapping.as_ptr().wrapping_add(at).cast();
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let (read_write, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
    // SAFETY: it replaces a part of a mapping of guest memory, which stays readable and writable. Whoever
    // has a pointer into it knows that its content may change at any time.
    let mapped = unsafe { libc::mmap(start, room, read_write, flags, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(refused(io::Error::last_os_error()));
    }
    Ok(())
}

/// Private memory that starts where a huge page does, with this advice about it.
fn map_aligned(size: usize, advice: i32) -> Result<MmapRegion, MemoryError> {
    const HUGE: usize = 2 << 20;
    let refused = |source| MemoryError::Map {
        bytes: size as u64,
        source,
    };
    let (read_write, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    let total = size
        .checked_add(HUGE)
        .ok_or_else(|| refused(io::ErrorKind::OutOfMemory.into()))?;
    // SAFETY: a mapping of its own, at a place of the kernel's choice.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), total, read_write, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(refused(io::Error::last_os_error()));
    }
    let mapped: *mut u8 = mapped.cast();
    let skip = mapped.align_offset(HUGE);
    let start = mapped.wrapping_add(skip);
    let after = start.wrapping_add(size);
    for (rest, length) in [(mapped, skip), (after, HUGE - skip)] {
        // SAFETY: a part of the mapping that was just made, and that nothing points to.
        if length > 0 && unsafe { libc::munmap(rest.cast(), length) } != 0 {
            return Err(refused(io::Error::last_os_error()));
        }
    }
    if advice == libc::MADV_HUGEPAGE && size > 0 {
        // The first page is touched before, so that the kernel keeps those around it small. Of the
        // guest's first 2 MiB, a dozen are used until its kernel runs, and to clear all 512 would
        // take a tenth of the time until then.
        // SAFETY: the first byte of the mapping that was just made, and that nothing points to.
        unsafe { ptr::write_volatile(start, 0) };
    }
    // SAFETY: the range is what is left of the mapping, of which no kind of page changes the content.
    if unsafe { libc::madvise(start.cast(), size, advice) } != 0 {
        let error = io::Error::last_os_error();
        // EINVAL: a kernel that was built without huge pages.
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(MemoryError::Advise(error));
        }
    }
    // SAFETY: the range is a valid mapping until the process ends.
    unsafe { MmapRegion::build_raw(start, size, read_write, flags) }
        .map_err(|error| refused(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn plan(boot_bytes: u64, hotplug_bytes: u64) -> MemoryPlan {
        MemoryPlan {
            boot_bytes,
            hotplug_bytes,
            huge_pages: HugePages::Transparent,
        }
    }

    #[test]
    fn memory_lies_around_the_hole_and_what_is_plugged_in_behind_all_of_it() {
        for (boot, hotplug, low, high, later) in [
            (1, 0, 0..GIB, None, None),
            (3, 0, 0..layout::HOLE, None, None),
            (5, 0, 0..layout::HOLE, Some(4 * GIB..6 * GIB), None),
            (1, 1, 0..GIB, None, Some(4 * GIB..5 * GIB)),
            (
                4,
                2,
                0..layout::HOLE,
                Some(4 * GIB..5 * GIB),
                Some(6 * GIB..8 * GIB),
            ),
        ] {
            let plan = plan(boot * GIB, hotplug * GIB);
            let ranges: Vec<_> = [low].into_iter().chain(high).collect();
            assert_eq!(plan.boot(), ranges, "{plan:?}");
            assert_eq!(plan.hotplug(), later, "{plan:?}");
        }
    }

    #[test]
    fn all_memory_can_be_used_and_huge_pages_fit() {
        for huge_pages in [HugePages::Transparent, HugePages::None] {
            let plan = MemoryPlan {
                huge_pages,
                ..plan(6 * GIB, GIB)
            };
            let memory = Memory::new(&plan, &[]).unwrap();
            assert_eq!(
                (memory.boot.iter().count(), memory.all.iter().count()),
                (2, 3)
            );
            for region in memory.all.iter() {
                let host = region.get_host_address(MemoryRegionAddress(0)).unwrap();
                let guest = region.start_addr().0;
                assert_eq!((host.addr() as u64 ^ guest) % HUGE_PAGE_BYTES, 0);
                for address in [guest, guest + region.len() - 8] {
                    memory
                        .all
                        .write_obj(!address, GuestAddress(address))
                        .unwrap();
                    let value: u64 = memory.all.read_obj(GuestAddress(address)).unwrap();
                    assert_eq!(value, !address);
                }
            }
            let hole = memory.all.read_obj::<u8>(GuestAddress(layout::HOLE));
            assert!(hole.is_err(), "{hole:?}");
        }
    }

    #[test]
    fn machines_read_an_image_and_write_to_memory_of_their_own() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"image", 0x2000).unwrap();
        let image = |file: &File| Image {
            file: file.try_clone().unwrap(),
            bytes: 0x2005,
            range: GIB..GIB + HUGE_PAGE_BYTES,
        };
        let (plan, at) = (plan(GIB, 0), GuestAddress(GIB + 0x2000));
        let machines =
            [image(&file), image(&file)].map(|image| Memory::new(&plan, &[image]).unwrap());
        machines[0].all.write_slice(b"mine", at).unwrap();
        let read = |memory: &Memory, at: GuestAddress| {
            let mut bytes = [0; 6];
            memory.all.read_slice(&mut bytes, at).unwrap();
            bytes
        };
        assert_eq!(&read(&machines[0], at), b"minee\0");
        assert_eq!(&read(&machines[1], at), b"image\0");
        let end = GuestAddress(GIB + HUGE_PAGE_BYTES - 6);
        assert_eq!(read(&machines[1], end), [0; 6]);
        machines[0].boot.read_obj::<u8>(at).unwrap_err();
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 0x2000).unwrap();
        assert_eq!(&bytes, b"image");
    }
}
