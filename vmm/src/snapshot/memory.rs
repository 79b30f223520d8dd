//! The memory file: what goes in, and how it becomes a guest's memory again without being read.
//!
//! Regions lie one after the other, lowest address first, as long as they are. Of images, only the
//! pages that the guest has changed are there; the others are the image's. Behind all regions is one
//! line that names the snapshot, so that a file cannot be taken for another's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SeekFrom as SeekTo, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use super::file::Id;
use crate::dirty::PAGE_BYTES;
use crate::memory::{self, FileRegion, HUGE_PAGE_BYTES, Image, MemoryError, RegionOrigin};
use crate::spec::HugePages;

/// The most parts of a region that are mapped from the file by themselves.
const EXTENTS_MAX: usize = 256;

/// Where a region of memory is. Regions follow each other in the file.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    pub address: u64,
    pub bytes: u64,
}

impl From<Range<u64>> for Region {
    fn from(range: Range<u64>) -> Region {
        Region {
            address: range.start,
            bytes: range.end - range.start,
        }
    }
}

/// Pages of the file, of 4 KiB each: number of the first, and how many.
pub type Run = (u64, u64);

/// What a memory file cannot be used for.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFileError {
    #[error("the memory file cannot be read")]
    Read(#[source] io::Error),
    #[error("the memory file is not that of snapshot {wanted}; it may be another's, or cut short")]
    Mark { wanted: String },
    #[error("memory of {found} does not fit a machine whose memory is {wanted}")]
    Regions { found: String, wanted: String },
    #[error(
        "`/pmem/pmem{index}` is {found} bytes long; what the guest has seen was {}; \
         name the same image or a copy of it",
        .wanted.map_or("nothing".to_owned(), |bytes| bytes.to_string())
    )]
    Image {
        index: usize,
        found: u64,
        wanted: Option<u64>,
    },
    #[error("the memory file cannot be mapped")]
    Map(#[source] MemoryError),
    #[error("the regions of memory cannot be put together")]
    Together(#[source] vm_memory::GuestRegionCollectionError),
    #[error("a snapshot names page {page}, which is not there, or not its turn")]
    Page { page: u64 },
    #[error("a part of a snapshot cannot be mapped over the one before")]
    MapOver(#[source] MemoryError),
    #[error("the guest's memory cannot be written")]
    Write(#[source] GuestMemoryError),
}

/// The regions of `memory`.
pub fn regions(memory: &GuestMemoryMmap) -> Vec<Region> {
    let region = |region: &GuestRegionMmap| Region {
        address: region.start_addr().raw_value(),
        bytes: region.len(),
    };
    memory.iter().map(region).collect()
}

pub(super) fn total(regions: &[Region]) -> u64 {
    let bytes = regions.iter().map(|region| region.bytes);
    bytes.fold(0, u64::saturating_add)
}

pub(super) fn pages(region: &GuestRegionMmap) -> u64 {
    region.len() / PAGE_BYTES as u64
}

/// What stands behind the memory.
pub(super) fn mark(id: &Id) -> String {
    format!("hostd-vmm memory {id}\n")
}

/// Checks that `file` holds the memory of snapshot `id`, in these regions.
pub fn check(file: &File, id: &Id, regions: &[Region]) -> Result<(), MemoryFileError> {
    let wanted = mark(id);
    let mut found = vec![0; wanted.len()];
    let same = match file.read_exact_at(&mut found, total(regions)) {
        Ok(()) => found == wanted.as_bytes(),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
        Err(error) => return Err(MemoryFileError::Read(error)),
    };
    if same {
        Ok(())
    } else {
        let wanted = id.to_string();
        Err(MemoryFileError::Mark { wanted })
    }
}

/// The memory in `file`, as a guest's that nobody else sees changes of. Nothing is read yet. What is
/// zero for long enough is no file's, and kept in such `pages` as memory that was never written.
/// Regions of `images` are theirs. Returns where what is in each region comes from, too.
pub fn map(
    file: &Arc<File>,
    regions: &[Region],
    pages: HugePages,
    images: &[Image],
) -> Result<(GuestMemoryMmap, Vec<RegionOrigin>), MemoryFileError> {
    let mut offset: u64 = 0;
    let mut mapped = Vec::new();
    let mut origins = Vec::new();
    for region in regions {
        let addresses = region.address..region.address.saturating_add(region.bytes);
        let end = offset.saturating_add(region.bytes);
        let image = images.iter().find(|image| image.range == addresses);
        let (made, origin) = if let Some(image) = image {
            let bytes = image.bytes;
            (memory::image_region(image), RegionOrigin::Image { bytes })
        } else {
            let source = FileRegion {
                file,
                offset,
                extents: &extents(file, offset..end),
            };
            let file = file.clone();
            let over = Vec::new();
            let origin = RegionOrigin::Snapshot { file, offset, over };
            (memory::file_region(&addresses, pages, &source), origin)
        };
        mapped.push(made.map_err(MemoryFileError::Map)?);
        origins.push(origin);
        offset = end;
    }
    let memory = GuestMemoryMmap::from_arc_regions(mapped).map_err(MemoryFileError::Together)?;
    Ok((memory, origins))
}

/// Where `range` of `file` holds anything, from the start of the range, in units of huge pages. A few
/// at most: each costs a mapping.
fn extents(file: &File, range: Range<u64>) -> Vec<Range<u64>> {
    let bytes = range.end - range.start;
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < bytes
        && let Some(data) = next_data(file, range.start + at..range.end)
    {
        let start = (data.start - range.start) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        at = (data.end - range.start).next_multiple_of(HUGE_PAGE_BYTES);
        let end = at.min(bytes);
        let full = extents.len() >= EXTENTS_MAX;
        match extents.last_mut() {
            Some(last) if full || last.end >= start => last.end = end,
            _ => extents.push(start..end),
        }
    }
    extents
}

/// The first part of `range` of `file` that holds anything: all of it if the file system cannot tell.
pub(super) fn next_data(file: &File, range: Range<u64>) -> Option<Range<u64>> {
    let start = match seek(file, SeekTo::Data(range.start)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return None, // There is no more.
        Err(_) => range.start,
    };
    let end = seek(file, SeekTo::Hole(start)).unwrap_or(range.end);
    (start < range.end).then(|| start..end.min(range.end))
}

/// Runs of pages, from a bit for each page of regions whose pages follow each other. `bitmaps` are
/// each region's, with the number of its pages.
pub fn runs(bitmaps: &[(Vec<u64>, u64)]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    for (words, count) in bitmaps {
        for (index, word) in (0..).zip(words) {
            let mut left = *word;
            while left != 0 {
                let page = start + index * 64 + u64::from(left.trailing_zeros());
                left &= left - 1;
                if page >= start + count {
                    break;
                }
                match runs.last_mut() {
                    Some((first, length)) if *first + *length == page => *length += 1,
                    _ => runs.push((page, 1)),
                }
            }
        }
        start += count;
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use tempfile::tempfile;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::layers::put_over;
    use super::super::touched::touched;
    use super::super::writer::{Writer, write_all, write_runs};
    use super::*;
    use crate::memory::{Memory, MemoryPlan};

    const LOW: u64 = 8 << 20;
    const HIGH: u64 = 1 << 32;

    fn memory() -> GuestMemoryMmap {
        let high = 4 << 20;
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20), (GuestAddress(HIGH), high)])
            .unwrap()
    }

    fn put(memory: &GuestMemoryMmap, address: u64, byte: u8) {
        memory.write_obj(byte, GuestAddress(address)).unwrap();
    }

    fn get(memory: &GuestMemoryMmap, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn new_file() -> Arc<File> {
        Arc::new(tempfile().unwrap())
    }

    fn mapped(file: &Arc<File>, regions: &[Region]) -> GuestMemoryMmap {
        map(file, regions, HugePages::None, &[]).unwrap().0
    }

    const NOTHING: [RegionOrigin; 2] = [RegionOrigin::Nothing, RegionOrigin::Nothing];

    fn write(memory: &GuestMemoryMmap, file: &File, id: &Id) -> u64 {
        let mut file = file.try_clone().unwrap();
        let mut writer = Writer::new(&mut file, memory, id, &|| true).unwrap();
        write_all(memory, &mut writer, &NOTHING).unwrap()
    }

    #[test]
    fn nothing_more_is_written_once_the_machine_has_ended() {
        let (memory, id, mut file) = (memory(), Id::random().unwrap(), tempfile().unwrap());
        put(&memory, 0, 1);
        let mut writer = Writer::new(&mut file, &memory, &id, &|| false).unwrap();
        let error = write_all(&memory, &mut writer, &NOTHING).unwrap_err();
        assert!(error.to_string().contains("has ended"), "{error}");
        write_runs(&memory, &mut writer, &[(0, 1)]).unwrap_err();
    }

    #[test]
    fn memory_comes_back_as_it_was_and_zeroes_take_no_space() {
        let (memory, id, file) = (memory(), Id::random().unwrap(), new_file());
        let places = [
            0,
            5000,
            0x2f_ffff,
            0x30_0000,
            LOW - 1,
            HIGH,
            HIGH + 0x3f_ffff,
        ];
        for (byte, place) in (1..).zip(places) {
            put(&memory, place, byte);
        }
        let written = write(&memory, &file, &id);
        assert_eq!(written, 7 * PAGE_BYTES as u64);
        assert!(file.metadata().unwrap().blocks() * 512 < 16 * PAGE_BYTES as u64);

        let regions = regions(&memory);
        check(&file, &id, &regions).unwrap();
        let copy = mapped(&file, &regions);
        for (byte, place) in (1..).zip(places) {
            assert_eq!(get(&copy, place), byte, "{place:#x}");
        }
        assert_eq!(get(&copy, 0x1000 - 1), 0);
        // What one machine writes, no other sees.
        put(&copy, 0, 99);
        assert_eq!(get(&mapped(&file, &regions), 0), 1);
    }

    #[test]
    fn what_holds_nothing_is_not_mapped_from_the_file() {
        let huge = HUGE_PAGE_BYTES;
        let file = tempfile().unwrap();
        let range = huge..10 * huge + 0x10_0000;
        file.set_len(range.end).unwrap();
        assert_eq!(extents(&file, range.clone()), []);
        for at in [0, 3 * huge, 4 * huge - 1, 6 * huge + 5, range.end - 1] {
            file.write_all_at(&[1], at).unwrap();
        }
        let part = |range: Range<u64>| range.start * huge..range.end * huge;
        let want = [part(2..3), part(5..6), 9 * huge..9 * huge + 0x10_0000];
        assert_eq!(extents(&file, range), want);
        // Many small parts become few large ones.
        let many = tempfile().unwrap();
        for index in 0..2 * EXTENTS_MAX as u64 {
            many.write_all_at(&[1], 2 * index * huge).unwrap();
        }
        let end = (4 * EXTENTS_MAX as u64 - 1) * huge;
        many.set_len(end).unwrap();
        let extents = extents(&many, 0..end);
        assert_eq!(extents.len(), EXTENTS_MAX);
        assert_eq!(extents.last().unwrap().end, end);
    }

    #[test]
    fn a_restored_machine_is_saved_again_without_touching_what_it_has_not() {
        let (memory, id, file) = (memory(), Id::random().unwrap(), new_file());
        // In one huge page with holes, of which another is written after the restore.
        for place in [0x20_0000, 0x20_4000] {
            put(&memory, place, 1);
        }
        write(&memory, &file, &id);
        let regions = regions(&memory);
        let (copy, origins) = map(&file, &regions, HugePages::None, &[]).unwrap();
        put(&copy, 0x20_6000, 2);
        put(&copy, HIGH, 3);
        let again = new_file();
        let mut writer_file = again.try_clone().unwrap();
        let mut writer = Writer::new(&mut writer_file, &copy, &id, &|| true).unwrap();
        let written = write_all(&copy, &mut writer, &origins).unwrap();
        assert_eq!(written, 4 * PAGE_BYTES as u64);
        let region = copy.iter().next().unwrap();
        if let Some(touched) = touched(region) {
            // The first page is, by whoever maps it, and the kernel maps more around what is read.
            for page in [1, 0x1ff, 0x400, 0x7ff] {
                assert!(!touched[page], "{page:#x}");
            }
        }
        let twice = mapped(&again, &regions);
        for (place, byte) in [(0x20_0000, 1), (0x20_4000, 1), (0x20_6000, 2), (HIGH, 3)] {
            assert_eq!(get(&twice, place), byte, "{place:#x}");
        }
    }

    #[test]
    fn an_image_is_not_in_the_file_but_for_what_the_guest_has_changed() {
        let image_file = tempfile().unwrap();
        image_file.write_all_at(&[7; 0x4000], 0).unwrap();
        let plan = MemoryPlan {
            boot_bytes: LOW,
            hotplug_bytes: 0,
            huge_pages: HugePages::None,
        };
        let images = [Image {
            file: image_file,
            bytes: 0x4000,
            range: HIGH..HIGH + HUGE_PAGE_BYTES,
        }];
        let Memory { all, origins, .. } = Memory::new(&plan, &images).unwrap();
        put(&all, 5, 1);
        put(&all, HIGH + 0x2000, 8);
        let (id, file) = (Id::random().unwrap(), new_file());
        let mut writer_file = file.try_clone().unwrap();
        let mut writer = Writer::new(&mut writer_file, &all, &id, &|| true).unwrap();
        write_all(&all, &mut writer, &origins).unwrap();
        let own = [(LOW / PAGE_BYTES as u64 + 2, 1)];
        let written = write_runs(&all, &mut writer, &own).unwrap();
        assert_eq!(written, 2 * PAGE_BYTES as u64);

        let (copy, mut origins) = map(&file, &regions(&all), HugePages::None, &images).unwrap();
        assert!(matches!(origins[1], RegionOrigin::Image { bytes: 0x4000 }));
        put_over(&copy, &mut origins, &file, &own, 1).unwrap();
        for (place, byte) in [
            (5, 1),
            (HIGH, 7),
            (HIGH + 0x1fff, 7),
            (HIGH + 0x2000, 8),
            (HIGH + 0x2001, 7),
            (HIGH + 0x4000, 0),
        ] {
            assert_eq!(get(&copy, place), byte, "{place:#x}");
        }
    }

    #[test]
    fn another_snapshots_file_and_one_that_was_cut_are_refused() {
        let (memory, id, file) = (memory(), Id::random().unwrap(), new_file());
        write(&memory, &file, &id);
        let regions = regions(&memory);
        check(&file, &Id::random().unwrap(), &regions).unwrap_err();
        check(&file, &id, &regions[..1]).unwrap_err();
        file.set_len(total(&regions)).unwrap();
        check(&file, &id, &regions).unwrap_err();
    }

    #[test]
    fn bits_become_runs_across_words_and_regions() {
        let low = (vec![0b1011, 1 << 63], 128);
        let high = (vec![0b1, u64::MAX], 65);
        assert_eq!(runs(&[low, high]), [(0, 2), (3, 1), (127, 2), (192, 1)]);
        assert_eq!(runs(&[(Vec::new(), 10)]), []);
    }
}
