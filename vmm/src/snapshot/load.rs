//! Reads snapshots: one, or differences on top of each other.

use std::fs::File;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::file::{self, FileError, Id, Kind};
use super::layers;
use super::memory::{self, MemoryFileError, Region, Run};
use super::restore::LAYERS_MAX;
use super::state::State;
use crate::memory::{Image, RegionOrigin};
use crate::spec::HugePages;

/// The most runs of pages in all snapshots together, which take 128 MiB.
const RUNS_MAX: usize = 8 << 20;

/// Why snapshots are of no use.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("no snapshot is named")]
    None,
    #[error("{0} snapshots are named; at most {LAYERS_MAX} can lie on top of each other")]
    Many(usize),
    #[error("snapshot {index} (from 0)")]
    File { index: usize, source: FileError },
    #[error("snapshot {index} (from 0)")]
    Memory {
        index: usize,
        source: MemoryFileError,
    },
    #[error("the first snapshot is a difference; name the full one that it lies over before it")]
    NoBase,
    #[error("snapshot {index} (from 0) is a full one; it cannot lie over another")]
    SecondBase { index: usize },
    #[error("snapshot {index} (from 0) does not lie over the one before it")]
    Order { index: usize },
    #[error(
        "the snapshots have {runs} runs of pages; at most {RUNS_MAX} can be held; take a full one"
    )]
    Runs { runs: usize },
}

/// The open files of one snapshot.
#[derive(Debug)]
pub struct OpenFiles {
    pub state: File,
    pub memory: File,
}

/// Snapshots whose state files were read, and whose memory files are theirs.
#[derive(Debug)]
pub struct Loaded {
    /// Of the last.
    pub id: Id,
    /// Of the last.
    pub state: Box<State>,
    base: Arc<File>,
    /// What lies over it: pages of a memory file, which may be that of the base, by their numbers.
    layers: Vec<(Arc<File>, Vec<Run>)>,
}

/// Reads them, the oldest first.
pub fn load(files: Vec<OpenFiles>) -> Result<Loaded, LoadError> {
    if files.len() > LAYERS_MAX {
        return Err(LoadError::Many(files.len()));
    }
    let mut loaded: Option<Loaded> = None;
    for (index, OpenFiles { state, memory }) in files.into_iter().enumerate() {
        let (header, state) =
            file::read(&state).map_err(|source| LoadError::File { index, source })?;
        memory::check(&memory, &header.id, &state.memory.regions)
            .map_err(|source| LoadError::Memory { index, source })?;
        let memory = Arc::new(memory);
        let written = state.memory.written.clone().unwrap_or_default();
        let layer = (memory.clone(), written);
        let now = match (loaded, header.kind) {
            (None, Kind::Full) => Loaded {
                id: header.id,
                state: Box::new(state),
                base: memory,
                layers: vec![layer],
            },
            (None, Kind::Diff) => return Err(LoadError::NoBase),
            (Some(_), Kind::Full) => return Err(LoadError::SecondBase { index }),
            (Some(mut below), Kind::Diff) => {
                if header.parent.as_ref() != Some(&below.id)
                    || state.memory.regions != below.state.memory.regions
                    || state.memory.images != below.state.memory.images
                {
                    return Err(LoadError::Order { index });
                }
                below.layers.push(layer);
                Loaded {
                    id: header.id,
                    state: Box::new(state),
                    ..below
                }
            }
        };
        let runs = now.layers.iter().map(|(_, runs)| runs.len()).sum();
        if runs > RUNS_MAX {
            return Err(LoadError::Runs { runs });
        }
        loaded = Some(now);
    }
    loaded.ok_or(LoadError::None)
}

impl Loaded {
    /// The memory of a machine that has it in these regions, with these `images` behind all else.
    /// It is read when it is first used, but for short runs of pages in differences. Returns where what is in each
    /// region comes from, too.
    pub fn map_memory(
        &self,
        regions: &[Region],
        pages: HugePages,
        images: &[Image],
    ) -> Result<(GuestMemoryMmap, Vec<RegionOrigin>), MemoryFileError> {
        let saved = &self.state.memory.regions;
        if saved != regions {
            return Err(MemoryFileError::Regions {
                found: format!("{saved:x?}"),
                wanted: format!("{regions:x?}"),
            });
        }
        let images = self.own_files(images)?;
        let (memory, mut origins) = memory::map(&self.base, regions, pages, images)?;
        let least = layers::mapped_from(self.written());
        for (file, runs) in &self.layers {
            layers::put_over(&memory, &mut origins, file, runs, least)?;
        }
        Ok((memory, origins))
    }

    /// Those of `images` whose content is not in the memory file: all or, before format 4, none.
    /// That it is the content which the guest has seen, nobody can tell in the time of a restore; its
    /// length is checked.
    fn own_files<'a>(&self, images: &'a [Image]) -> Result<&'a [Image], MemoryFileError> {
        let saved = &self.state.memory.images;
        if saved.is_empty() {
            return Ok(&[]);
        }
        for (index, image) in images.iter().enumerate() {
            let wanted = saved.get(index).copied();
            if wanted != Some(image.bytes) {
                return Err(MemoryFileError::Image {
                    index,
                    found: image.bytes,
                    wanted,
                });
            }
        }
        Ok(images)
    }

    /// The pages that lie over what is in the memory file of the first snapshot and in images.
    pub(crate) fn written(&self) -> impl Iterator<Item = &Run> {
        self.layers.iter().flat_map(|(_, runs)| runs)
    }
}
