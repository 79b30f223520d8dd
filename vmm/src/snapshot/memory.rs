//! The memory file: what goes in, and how it becomes a guest's memory again without being read.
//!
//! Regions lie one after the other, lowest address first, as long as they are. Behind them is one
//! line that names the snapshot, so that a file cannot be taken for another's.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom as SeekTo, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_memory::{
    Address, Bytes, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use super::file::Id;
use super::touched::touched;
use crate::dirty::PAGE_BYTES;
use crate::memory::{self, FileRegion, HUGE_PAGE_BYTES, MemoryError};
use crate::spec::HugePages;

/// The most that is written in one go, in pages: 4 MiB.
const RUN_PAGES_MAX: u64 = 1024;

/// The most parts of a region that are mapped from the file by themselves.
const EXTENTS_MAX: usize = 256;

/// How much of a page is looked at before all of it is.
const GLANCE_BYTES: usize = 64;

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
    #[error("the memory file cannot be mapped")]
    Map(#[source] MemoryError),
    #[error("the regions of memory cannot be put together")]
    Together(#[source] vm_memory::GuestRegionCollectionError),
    #[error("a difference names page {page}, which is not there, or not its turn")]
    Page { page: u64 },
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

fn total(regions: &[Region]) -> u64 {
    let bytes = regions.iter().map(|region| region.bytes);
    bytes.fold(0, u64::saturating_add)
}

/// Writes all of `memory` that is not zero. Returns how many bytes. The regions that start at
/// `anonymous` addresses are no file's.
pub(super) fn write_all(
    memory: &GuestMemoryMmap,
    writer: &mut Writer<'_>,
    anonymous: &[u64],
) -> io::Result<u64> {
    let mut start = 0;
    for region in memory.iter() {
        let known = anonymous.contains(&region.start_addr().raw_value());
        let touched = if known { touched(region) } else { None };
        let untouched = |page: u64| {
            let page = usize::try_from(page).ok();
            let told = touched.as_ref().zip(page);
            told.and_then(|(touched, page)| touched.get(page)) == Some(&false)
        };
        let mut run: Option<Run> = None;
        for page in 0..pages(region) {
            if page % RUN_PAGES_MAX == 0 {
                writer.check()?;
            }
            if untouched(page) || is_zero(region, page)? {
                continue;
            }
            run = match run {
                Some((first, count)) if first + count == page && count < RUN_PAGES_MAX => {
                    Some((first, count + 1))
                }
                other => {
                    writer.write(region, start, other)?;
                    Some((page, 1))
                }
            };
        }
        writer.write(region, start, run)?;
        start += pages(region);
    }
    Ok(writer.written)
}

/// Writes those pages of `memory`. Returns how many bytes.
pub(super) fn write_runs(
    memory: &GuestMemoryMmap,
    writer: &mut Writer<'_>,
    runs: &[Run],
) -> io::Result<u64> {
    let mut start = 0;
    for region in memory.iter() {
        let end = start + pages(region);
        for (first, count) in runs {
            let (from, to) = ((*first).max(start), (first + count).min(end));
            if from < to {
                writer.write(region, start, Some((from - start, to - from)))?;
            }
        }
        start = end;
    }
    Ok(writer.written)
}

/// Writes a memory file.
pub(super) struct Writer<'a> {
    file: &'a mut File,
    written: u64,
    goes_on: &'a dyn Fn() -> bool,
}

impl<'a> Writer<'a> {
    /// Makes `file` as long as it will be. Writing fails once it is not `goes_on` any more.
    pub(super) fn new(
        file: &'a mut File,
        memory: &GuestMemoryMmap,
        id: &Id,
        goes_on: &'a dyn Fn() -> bool,
    ) -> io::Result<Self> {
        let bytes = total(&regions(memory));
        file.set_len(0)?;
        file.set_len(bytes)?;
        file.seek(SeekFrom::Start(bytes))?;
        file.write_all(mark(id).as_bytes())?;
        Ok(Self {
            file,
            written: 0,
            goes_on,
        })
    }

    fn check(&self) -> io::Result<()> {
        if (self.goes_on)() {
            Ok(())
        } else {
            Err(io::Error::other("the machine has ended"))
        }
    }

    /// Writes pages of `region`, whose first page is number `start` of the file.
    fn write(&mut self, region: &GuestRegionMmap, start: u64, run: Option<Run>) -> io::Result<()> {
        let Some((first, count)) = run else {
            return Ok(());
        };
        self.check()?;
        let page_bytes = PAGE_BYTES as u64;
        self.file
            .seek(SeekFrom::Start((start + first) * page_bytes))?;
        let bytes = count * page_bytes;
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let from = MemoryRegionAddress(first * page_bytes);
        region
            .write_all_volatile_to(from, self.file, length)
            .map_err(unwrap)?;
        self.written += bytes;
        Ok(())
    }
}

fn pages(region: &GuestRegionMmap) -> u64 {
    region.len() / PAGE_BYTES as u64
}

fn is_zero(region: &GuestRegionMmap, page: u64) -> io::Result<bool> {
    let start = page * PAGE_BYTES as u64;
    let mut bytes = [0; PAGE_BYTES];
    let glance = &mut bytes[..GLANCE_BYTES];
    region
        .read_slice(glance, MemoryRegionAddress(start))
        .map_err(unwrap)?;
    if glance.iter().any(|byte| *byte != 0) {
        return Ok(false);
    }
    region
        .read_slice(&mut bytes, MemoryRegionAddress(start))
        .map_err(unwrap)?;
    // Without an early end it is done in vectors.
    Ok(bytes.iter().fold(0, |all, byte| all | byte) == 0)
}

/// What the file system said, from what memory says of it.
fn unwrap(error: GuestMemoryError) -> io::Error {
    if let GuestMemoryError::IOError(error) = error {
        return error;
    }
    io::Error::other(error)
}

/// What stands behind the memory.
fn mark(id: &Id) -> String {
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
pub fn map(
    file: &File,
    regions: &[Region],
    pages: HugePages,
) -> Result<GuestMemoryMmap, MemoryFileError> {
    let mut offset: u64 = 0;
    let mut mapped = Vec::new();
    for region in regions {
        let addresses = region.address..region.address.saturating_add(region.bytes);
        let end = offset.saturating_add(region.bytes);
        let origin = FileRegion {
            file,
            offset,
            extents: &extents(file, offset..end),
        };
        mapped.push(memory::file_region(&addresses, pages, &origin).map_err(MemoryFileError::Map)?);
        offset = end;
    }
    GuestMemoryMmap::from_arc_regions(mapped).map_err(MemoryFileError::Together)
}

/// Where `range` of `file` holds anything, from the start of the range, in units of huge pages. A few
/// at most: each costs a mapping.
fn extents(file: &File, range: Range<u64>) -> Vec<Range<u64>> {
    let bytes = range.end - range.start;
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < bytes {
        let data = match seek(file, SeekTo::Data(range.start + at)) {
            Ok(data) => data - range.start,
            Err(Errno::NXIO) => break, // There is no more.
            Err(_) => at,              // The file system cannot tell.
        };
        let hole = seek(file, SeekTo::Hole(range.start + data)).unwrap_or(range.end);
        let start = data / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        at = (hole - range.start).next_multiple_of(HUGE_PAGE_BYTES);
        if start >= bytes {
            break;
        }
        let end = at.min(bytes);
        let full = extents.len() >= EXTENTS_MAX;
        match extents.last_mut() {
            Some(last) if full || last.end >= start => last.end = end,
            _ => extents.push(start..end),
        }
    }
    extents
}

/// Puts those pages of a difference's `file` over `memory`.
pub fn overlay(memory: &GuestMemoryMmap, file: &File, runs: &[Run]) -> Result<(), MemoryFileError> {
    let mut file = file.try_clone().map_err(MemoryFileError::Read)?;
    let page_bytes = PAGE_BYTES as u64;
    let mut behind = 0;
    for (first, count) in runs {
        let missing = MemoryFileError::Page { page: *first };
        // In order, so that no page is read twice.
        let Some(end) = first.checked_add(*count).filter(|_| *first >= behind) else {
            return Err(missing);
        };
        behind = end;
        let mut page = *first;
        let mut start = 0;
        for region in memory.iter() {
            let region_end = start + pages(region);
            if page < end && page < region_end {
                let part = end.min(region_end) - page;
                file.seek(SeekFrom::Start(page * page_bytes))
                    .map_err(MemoryFileError::Read)?;
                let length = usize::try_from(part * page_bytes).expect("within a region");
                let place = MemoryRegionAddress((page - start) * page_bytes);
                region
                    .read_exact_volatile_from(place, &mut file, length)
                    .map_err(MemoryFileError::Write)?;
                page += part;
            }
            start = region_end;
        }
        if page < end {
            return Err(missing);
        }
    }
    Ok(())
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
    use vm_memory::GuestAddress;

    use super::*;

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

    fn write(memory: &GuestMemoryMmap, file: &mut File, id: &Id, anonymous: &[u64]) -> u64 {
        let mut writer = Writer::new(file, memory, id, &|| true).unwrap();
        write_all(memory, &mut writer, anonymous).unwrap()
    }

    #[test]
    fn nothing_more_is_written_once_the_machine_has_ended() {
        let (memory, id, mut file) = (memory(), Id::random().unwrap(), tempfile().unwrap());
        put(&memory, 0, 1);
        let mut writer = Writer::new(&mut file, &memory, &id, &|| false).unwrap();
        let error = write_all(&memory, &mut writer, &[0]).unwrap_err();
        assert!(error.to_string().contains("has ended"), "{error}");
        write_runs(&memory, &mut writer, &[(0, 1)]).unwrap_err();
    }

    #[test]
    fn memory_comes_back_as_it_was_and_zeroes_take_no_space() {
        let (memory, id, mut file) = (memory(), Id::random().unwrap(), tempfile().unwrap());
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
        let written = write(&memory, &mut file, &id, &[0]);
        assert_eq!(written, 7 * PAGE_BYTES as u64);
        assert!(file.metadata().unwrap().blocks() * 512 < 16 * PAGE_BYTES as u64);

        let regions = regions(&memory);
        check(&file, &id, &regions).unwrap();
        let copy = map(&file, &regions, HugePages::Transparent).unwrap();
        for (byte, place) in (1..).zip(places) {
            assert_eq!(get(&copy, place), byte, "{place:#x}");
        }
        assert_eq!(get(&copy, 0x1000 - 1), 0);
        // What one machine writes, no other sees.
        put(&copy, 0, 99);
        assert_eq!(
            get(&map(&file, &regions, HugePages::Transparent).unwrap(), 0),
            1
        );
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
    fn a_difference_lies_over_what_was_before_and_may_be_zero() {
        let (memory, id) = (memory(), Id::random().unwrap());
        let (mut base, mut difference) = (tempfile().unwrap(), tempfile().unwrap());
        for place in [0, 0x1000, LOW - 1] {
            put(&memory, place, 1);
        }
        write(&memory, &mut base, &id, &[0, HIGH]);
        for (place, byte) in [(0x1000, 0), (LOW - 1, 2), (HIGH, 3)] {
            put(&memory, place, byte);
        }
        let last = LOW / 4096 - 1;
        let runs = [(1, 1), (last, 2)];
        let mut writer = Writer::new(&mut difference, &memory, &id, &|| true).unwrap();
        let written = write_runs(&memory, &mut writer, &runs).unwrap();
        assert_eq!(written, 3 * 4096);

        let copy = map(&base, &regions(&memory), HugePages::None).unwrap();
        overlay(&copy, &difference, &runs).unwrap();
        for (place, byte) in [(0, 1), (0x1000, 0), (LOW - 1, 2), (HIGH, 3)] {
            assert_eq!(get(&copy, place), byte, "{place:#x}");
        }
    }

    #[test]
    fn another_snapshots_file_and_one_that_was_cut_are_refused() {
        let (memory, id, mut file) = (memory(), Id::random().unwrap(), tempfile().unwrap());
        write(&memory, &mut file, &id, &[]);
        let regions = regions(&memory);
        check(&file, &Id::random().unwrap(), &regions).unwrap_err();
        check(&file, &id, &regions[..1]).unwrap_err();
        file.set_len(total(&regions)).unwrap();
        check(&file, &id, &regions).unwrap_err();
    }

    #[test]
    fn pages_that_are_not_there_are_refused() {
        let (memory, file) = (memory(), tempfile().unwrap());
        file.set_len(12 << 20).unwrap();
        for run in [(3072, 1), (3071, 2), (u64::MAX, 2), (0, u64::MAX)] {
            overlay(&memory, &file, &[run]).unwrap_err();
        }
        overlay(&memory, &file, &[(5, 2), (6, 1)]).unwrap_err();
        overlay(&memory, &file, &[(3071, 1)]).unwrap();
    }

    #[test]
    fn bits_become_runs_across_words_and_regions() {
        let low = (vec![0b1011, 1 << 63], 128);
        let high = (vec![0b1, u64::MAX], 65);
        assert_eq!(runs(&[low, high]), [(0, 2), (3, 1), (127, 2), (192, 1)]);
        assert_eq!(runs(&[(Vec::new(), 10)]), []);
    }
}
