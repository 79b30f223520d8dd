//! Which pages of memory guest and devices have written, as far as snapshots want to know.
//!
//! A difference has the pages that were written since the last snapshot. A full snapshot has of an image
//! only what was ever written; all other pages are the image's own. The logs of the kernel and of
//! devices forget what they have told, so that is kept here.

use std::sync::Mutex;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::file::Kind;
use super::memory::{Run, pages, runs};
use super::state::State;
use crate::dirty::{self, PAGE_BYTES};
use crate::kvm::{KvmError, Vm};
use crate::layout;
use crate::memory::{Memory, RegionOrigin};

/// A bit for each page of a region, or none if it is not tracked; and how many pages it has.
type Bits = (Vec<u64>, u64);

/// What was written, and of what that is told.
#[derive(Debug)]
pub struct Written {
    /// Of which regions of memory the kernel and devices are to remember what is written.
    pub tracked: Vec<bool>,
    /// What was ever written of images, region by region.
    images: Mutex<Vec<Bits>>,
}

impl Written {
    /// For `memory`, over which the pages of `restored` were put. Images are tracked in any case: that
    /// costs nothing, since the first write to such a page makes it the guest's own anyway.
    pub fn new<'a>(
        memory: &Memory,
        track_all: bool,
        restored: impl Iterator<Item = &'a Run>,
    ) -> Written {
        let regions = memory.all.iter().zip(&memory.origins);
        let is_image = |origin: &RegionOrigin| matches!(origin, RegionOrigin::Image { .. });
        let empty = regions.map(|(region, origin)| {
            let count = pages(region);
            let words = if is_image(origin) {
                count.div_ceil(64)
            } else {
                0
            };
            let words = usize::try_from(words).expect("it is mapped");
            (vec![0; words], count)
        });
        let mut images: Vec<Bits> = empty.collect();
        for run in restored {
            mark(&mut images, *run);
        }
        let origins = memory.origins.iter();
        Written {
            tracked: origins
                .map(|origin| track_all || is_image(origin))
                .collect(),
            images: Mutex::new(images),
        }
    }

    /// The pages of `vm`, by their numbers in a memory file, that a snapshot has whether they are zero
    /// or not: of a difference, all that were written since this was last asked for; of a full
    /// one, those of images that were ever. `state` is that of the snapshot.
    pub(super) fn take(&self, kind: Kind, vm: &Vm, state: &State) -> Result<Vec<Run>, KvmError> {
        let mut images = self.images.lock().expect("nothing panics in here");
        let mut since = Vec::new();
        let regions = vm.memory().iter().zip(&self.tracked).zip(&mut *images);
        for (index, ((region, tracked), (ever, count))) in regions.enumerate() {
            let mut words = Vec::new();
            if *tracked {
                let bytes = usize::try_from(region.len()).expect("it is mapped");
                words = vm.take_dirty(index, bytes)?;
                unite(&mut words, &dirty::take(region.as_ptr().addr()));
                mark_always_written(&mut words, region.start_addr().raw_value(), state);
                unite(ever, &words);
            }
            since.push((words, *count));
        }
        Ok(match kind {
            Kind::Full => runs(&images),
            Kind::Diff => runs(&since),
        })
    }
}

fn mark(regions: &mut [Bits], (first, count): Run) {
    let mut start = 0;
    for (words, pages) in regions {
        let end = start + *pages;
        if !words.is_empty() {
            for page in first.max(start)..first.saturating_add(count).min(end) {
                let word = usize::try_from((page - start) / 64).expect("it is mapped");
                words[word] |= 1 << ((page - start) % 64);
            }
        }
        start = end;
    }
}

fn unite(words: &mut [u64], others: &[u64]) {
    for (word, other) in words.iter_mut().zip(others) {
        *word |= other;
    }
}

/// Marks in a region that begins at `begin` what is written without being marked: the used rings of
/// queues (virtio 1.2, section 2.7.8), and the number of the machine's generation.
fn mark_always_written(words: &mut [u64], begin: u64, state: &State) {
    let page_bytes = PAGE_BYTES as u64;
    let queues = state.devices.virtio.iter();
    let queues = queues.flat_map(|device| &device.transport.queues);
    let rings = queues
        .filter(|queue| queue.ready)
        .map(|queue| (queue.used, 6 + 8 * u64::from(queue.size)));
    for (address, length) in rings.chain([(layout::GENERATION, 0)]) {
        for page in address / page_bytes..=(address + length) / page_bytes {
            let page = page.checked_sub(begin / page_bytes);
            let page = page.and_then(|page| usize::try_from(page).ok());
            if let Some(page) = page
                && let Some(word) = words.get_mut(page / 64)
            {
                *word |= 1 << (page % 64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    #[test]
    fn what_a_restore_has_put_over_an_image_counts_as_written_and_nothing_else_does() {
        let low = (GuestAddress(0), 0x10_0000);
        let all = GuestMemoryMmap::from_ranges(&[low, (GuestAddress(1 << 32), 0x8_0000)]).unwrap();
        let memory = Memory {
            boot: all.clone(),
            all,
            origins: vec![RegionOrigin::Nothing, RegionOrigin::Image { bytes: 1 }],
        };
        // Memory has 256 pages, the image 128.
        let before = [(0, 3), (255, 2), (319, 2), (383, u64::MAX)];
        let written = Written::new(&memory, false, before.iter());
        assert_eq!(written.tracked, [false, true]);
        let images = written.images.into_inner().unwrap();
        assert_eq!(runs(&images), [(256, 1), (319, 2), (383, 1)]);
        assert_eq!(Written::new(&memory, true, [].iter()).tracked, [true; 2]);
    }
}
