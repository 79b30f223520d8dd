//! What lies over the memory of the first snapshot: the pages that differences have.
//!
//! They are mapped from their files like the first one's, and read when they are used. A mapping costs
//! the host about as much as reading a few pages, and it allows a process so many (65530, unless
//! `vm.max_map_count` says otherwise), so short runs of pages are read.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MemoryRegionAddress};

use super::memory::{MemoryFileError, Run, pages};
use crate::dirty::PAGE_BYTES;
use crate::memory::{RegionOrigin, map_over};

/// The shortest run that is mapped, in pages: 16 KiB. A mapping takes 5 µs, and each page that is read 2,
/// where the host is itself a virtual machine.
const MAPPED_PAGES_MIN: u64 = 4;

/// The most runs that are mapped. Each may split a mapping in three.
const MAPPED_RUNS_MAX: usize = 8192;

/// How long a run must be to be mapped, in pages, for the longest of `runs` to be and not too many.
pub fn mapped_from<'a>(runs: impl Iterator<Item = &'a Run>) -> u64 {
    let lengths = runs.map(|(_, count)| *count);
    let mut long: Vec<u64> = lengths.filter(|count| *count >= MAPPED_PAGES_MIN).collect();
    let Some(excess) = long.len().checked_sub(MAPPED_RUNS_MAX + 1) else {
        return MAPPED_PAGES_MIN;
    };
    // All that are as long as the longest one too many are read.
    let (_, longest, _) = long.select_nth_unstable(excess);
    longest.saturating_add(1)
}

/// Puts those pages of a snapshot's `file` over `memory`: runs of `least` pages and more as mappings,
/// of which `origins` are told.
///
/// # Errors
///
/// If the runs name pages that are not there, or not in their order, and for what the host refuses.
pub fn put_over(
    memory: &GuestMemoryMmap,
    origins: &mut [RegionOrigin],
    file: &File,
    runs: &[Run],
    least: u64,
) -> Result<(), MemoryFileError> {
    let mut file = file.try_clone().map_err(MemoryFileError::Read)?;
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
        for (region, origin) in memory.iter().zip(&mut *origins) {
            let region_end = start + pages(region);
            if page < end && page < region_end {
                let part = page - start..end.min(region_end) - start;
                if part.end - part.start >= least {
                    map(region, origin, &file, &part, start)?;
                } else {
                    read(region, &mut file, &part, start)?;
                }
                page = end.min(region_end);
            }
            start = region_end;
        }
        if page < end {
            return Err(missing);
        }
    }
    Ok(())
}

/// Maps pages of a region, whose first page is number `start` of the file.
fn map(
    region: &GuestRegionMmap,
    origin: &mut RegionOrigin,
    file: &File,
    part: &Range<u64>,
    start: u64,
) -> Result<(), MemoryFileError> {
    let bytes = |pages: u64| pages * PAGE_BYTES as u64;
    let place = bytes(part.start)..bytes(part.end);
    map_over(region, &place, file, bytes(start + part.start)).map_err(MemoryFileError::MapOver)?;
    if let RegionOrigin::Snapshot { over, .. } = origin {
        over.push(part.clone());
    }
    Ok(())
}

/// Reads pages of a region, whose first page is number `start` of the file.
fn read(
    region: &GuestRegionMmap,
    file: &mut File,
    part: &Range<u64>,
    start: u64,
) -> Result<(), MemoryFileError> {
    let bytes = |pages: u64| pages * PAGE_BYTES as u64;
    file.seek(SeekFrom::Start(bytes(start + part.start)))
        .map_err(MemoryFileError::Read)?;
    let length = usize::try_from(bytes(part.end - part.start)).expect("within a region");
    let place = MemoryRegionAddress(bytes(part.start));
    region
        .read_exact_volatile_from(place, file, length)
        .map_err(MemoryFileError::Write)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use tempfile::tempfile;
    use vm_memory::GuestAddress;

    use super::super::memory::{Region, map as map_base};
    use super::super::writer::{Writer, write_all};
    use super::*;
    use crate::snapshot::file::Id;
    use crate::spec::HugePages;

    const PAGE: u64 = PAGE_BYTES as u64;
    /// Two regions of 1024 pages.
    const HIGH_PAGE: u64 = 1024;
    const REGIONS: [Region; 2] = [
        Region {
            address: 0,
            bytes: HIGH_PAGE * PAGE,
        },
        Region {
            address: 1 << 32,
            bytes: HIGH_PAGE * PAGE,
        },
    ];

    /// A memory file whose page `page` holds `byte`, for each of those.
    fn memory_file(pages: impl IntoIterator<Item = (u64, u8)>) -> Arc<File> {
        let file = tempfile().unwrap();
        file.set_len(2 * HIGH_PAGE * PAGE).unwrap();
        for (page, byte) in pages {
            file.write_all_at(&[byte; PAGE_BYTES], page * PAGE).unwrap();
        }
        Arc::new(file)
    }

    fn base(file: &Arc<File>) -> (GuestMemoryMmap, Vec<RegionOrigin>) {
        map_base(file, &REGIONS, HugePages::None, &[]).unwrap()
    }

    /// What the page with that number in the file holds throughout.
    fn page(memory: &GuestMemoryMmap, page: u64) -> u8 {
        let region = &REGIONS[usize::try_from(page / HIGH_PAGE).unwrap()];
        let address = region.address + page % HIGH_PAGE * PAGE;
        let mut bytes = [0; PAGE_BYTES];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
        bytes[0]
    }

    #[test]
    fn differences_lie_over_what_was_before_and_may_be_zero() {
        let below = memory_file((0..100).map(|page| (page, 1)));
        let first = memory_file((2..50).chain([HIGH_PAGE]).map(|page| (page, 2)));
        let second = memory_file([(4, 3), (60, 3)]);
        let runs: [&[Run]; 2] = [
            // Long, and with zeroes; from one region into the next.
            &[(2, 1), (3, 57), (HIGH_PAGE - 1, 2)],
            &[(4, 1), (60, 1)],
        ];
        // Read, mapped as they should be, and mapped whatever they are.
        for least in [u64::MAX, MAPPED_PAGES_MIN, 1] {
            let (memory, mut origins) = base(&below);
            put_over(&memory, &mut origins, &first, runs[0], least).unwrap();
            put_over(&memory, &mut origins, &second, runs[1], least).unwrap();
            for (number, byte) in [
                (0, 1),
                (1, 1),
                (2, 2),
                (3, 2),
                (4, 3),
                (5, 2),
                (49, 2),
                (50, 0),
                (59, 0),
                (60, 3),
                (61, 1),
                (99, 1),
                (100, 0),
                (HIGH_PAGE - 1, 0),
                (HIGH_PAGE, 2),
                (HIGH_PAGE + 1, 0),
            ] {
                assert_eq!(page(&memory, number), byte, "{number} {least}");
            }
        }
    }

    #[test]
    fn what_is_mapped_is_read_when_it_is_used_and_saved_again_if_it_never_was() {
        let (below, over) = (
            memory_file([]),
            memory_file((600..799).map(|page| (page, 7))),
        );
        let (memory, mut origins) = base(&below);
        let runs = [(600, 200)];
        put_over(
            &memory,
            &mut origins,
            &over,
            &runs,
            mapped_from(runs.iter()),
        )
        .unwrap();
        let (id, again) = (Id::random().unwrap(), tempfile().unwrap());
        let mut file = again.try_clone().unwrap();
        let mut writer = Writer::new(&mut file, &memory, &id, &|| true).unwrap();
        over.write_all_at(&[7; PAGE_BYTES], 799 * PAGE).unwrap();
        let written = write_all(&memory, &mut writer, &origins).unwrap();
        assert_eq!(written, 200 * PAGE);
        let (twice, _) = base(&Arc::new(again));
        assert_eq!([599, 600, 799, 800].map(|n| page(&twice, n)), [0, 7, 7, 0]);
        // What the machine changes, no file sees.
        memory.write_obj(9_u8, GuestAddress(600 * PAGE)).unwrap();
        let mut byte = [0];
        over.read_exact_at(&mut byte, 600 * PAGE).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn runs_that_are_not_there_or_not_in_order_are_refused() {
        let file = memory_file([]);
        for runs in [
            &[(2 * HIGH_PAGE, 1)][..],
            &[(2 * HIGH_PAGE - 1, 2)],
            &[(u64::MAX, 2)],
            &[(0, u64::MAX)],
            &[(5, 2), (6, 1)],
        ] {
            for least in [1, u64::MAX] {
                let (memory, mut origins) = base(&file);
                let error = put_over(&memory, &mut origins, &file, runs, least).unwrap_err();
                assert!(
                    matches!(error, MemoryFileError::Page { .. }),
                    "{runs:?}: {error}"
                );
            }
        }
    }

    #[test]
    fn short_runs_are_read_and_of_very_many_all_but_the_longest() {
        let max = MAPPED_RUNS_MAX as u64;
        let runs = |lengths: Vec<u64>| lengths.into_iter().map(|length| (0, length)).collect();
        let table: [(Vec<Run>, u64); 4] = [
            (runs(vec![]), MAPPED_PAGES_MIN),
            (runs((0..max).collect()), MAPPED_PAGES_MIN),
            (
                runs((0..=max + MAPPED_PAGES_MIN).collect()),
                MAPPED_PAGES_MIN + 1,
            ),
            (runs(vec![20; MAPPED_RUNS_MAX + 1]), 21),
        ];
        for (index, (runs, least)) in table.iter().enumerate() {
            assert_eq!(mapped_from(runs.iter()), *least, "{index}");
            let mapped = runs.iter().filter(|(_, count)| count >= least).count();
            assert!(mapped <= MAPPED_RUNS_MAX, "{index}");
        }
    }
}
