//! Writes memory files.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use super::file::Id;
use super::memory::{Run, mark, next_data, pages, regions, total};
use super::touched::touched;
use crate::dirty::PAGE_BYTES;
use crate::memory::RegionOrigin;

/// The most that is written in one go, in pages: 4 MiB.
const RUN_PAGES_MAX: u64 = 1024;

/// How much of a page is looked at before all of it is.
const GLANCE_BYTES: usize = 64;

/// Writes all of `memory` that is not zero, but for images. Returns how many bytes are written by now.
/// The `origins` are those of the regions.
pub(super) fn write_all(
    memory: &GuestMemoryMmap,
    writer: &mut Writer<'_>,
    origins: &[RegionOrigin],
) -> io::Result<u64> {
    let mut start = 0;
    for (region, origin) in memory.iter().zip(origins) {
        if !matches!(origin, RegionOrigin::Image { .. }) {
            write_region(region, start, writer, origin)?;
        }
        start += pages(region);
    }
    Ok(writer.written)
}

/// Writes what is not zero of `region`, whose first page is number `start` of the file.
fn write_region(
    region: &GuestRegionMmap,
    start: u64,
    writer: &mut Writer<'_>,
    origin: &RegionOrigin,
) -> io::Result<()> {
    let filled = filled(region, origin);
    let mut run: Option<Run> = None;
    for page in 0..pages(region) {
        if page % RUN_PAGES_MAX == 0 {
            writer.check()?;
        }
        let index = usize::try_from(page).map_err(io::Error::other)?;
        let known = filled.as_ref().and_then(|filled| filled.get(index));
        if known == Some(&false) || is_zero(region, page)? {
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
    writer.write(region, start, run)
}

/// For each page of `region`, whether it may hold anything but zeroes; nothing if the host cannot tell.
///
/// A page that nobody has touched holds what it came from, and in the file of a snapshot that is
/// nothing where there is a hole.
fn filled(region: &GuestRegionMmap, origin: &RegionOrigin) -> Option<Vec<bool>> {
    let mut filled = touched(region)?;
    if let RegionOrigin::Snapshot { file, offset, over } = origin {
        let index = |page: u64| usize::try_from(page).ok();
        for pages in over {
            filled
                .get_mut(index(pages.start)?..index(pages.end)?)?
                .fill(true);
        }
        let end = offset + region.len();
        let mut at = *offset;
        while let Some(data) = next_data(file, at..end) {
            let first = index((data.start - offset) / PAGE_BYTES as u64)?;
            let last = index((data.end - offset).div_ceil(PAGE_BYTES as u64))?;
            filled.get_mut(first..last)?.fill(true);
            at = data.end;
        }
    }
    Some(filled)
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
