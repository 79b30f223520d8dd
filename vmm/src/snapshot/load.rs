//! Reads snapshots: one, or differences on top of each other.

use std::fs::File;

use vm_memory::GuestMemoryMmap;

use super::file::{self, FileError, Id, Kind};
use super::memory::{self, MemoryFileError, Region, Run};
use super::restore::LAYERS_MAX;
use super::state::State;
use crate::spec::HugePages;

/// The most runs of pages in all differences together, which take 128 MiB.
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
        "the differences have {runs} runs of pages; at most {RUNS_MAX} can be held; take a full one"
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
    base: File,
    differences: Vec<(File, Vec<Run>)>,
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
        loaded = Some(match (loaded, header.kind) {
            (None, Kind::Full) => Loaded {
                id: header.id,
                state: Box::new(state),
                base: memory,
                differences: Vec::new(),
            },
            (None, Kind::Diff) => return Err(LoadError::NoBase),
            (Some(_), Kind::Full) => return Err(LoadError::SecondBase { index }),
            (Some(mut below), Kind::Diff) => {
                if header.parent.as_ref() != Some(&below.id)
                    || state.memory.regions != below.state.memory.regions
                {
                    return Err(LoadError::Order { index });
                }
                let written = state.memory.written.clone().unwrap_or_default();
                below.differences.push((memory, written));
                let runs = below.differences.iter().map(|(_, runs)| runs.len()).sum();
                if runs > RUNS_MAX {
                    return Err(LoadError::Runs { runs });
                }
                Loaded {
                    id: header.id,
                    state: Box::new(state),
                    ..below
                }
            }
        });
    }
    loaded.ok_or(LoadError::None)
}

impl Loaded {
    /// The memory of a machine that has it in these regions. What is not in a difference is read
    /// when it is first used.
    pub fn map_memory(
        &self,
        regions: &[Region],
        pages: HugePages,
    ) -> Result<GuestMemoryMmap, MemoryFileError> {
        let saved = &self.state.memory.regions;
        if saved != regions {
            return Err(MemoryFileError::Regions {
                found: format!("{saved:x?}"),
                wanted: format!("{regions:x?}"),
            });
        }
        let memory = memory::map(&self.base, regions, pages)?;
        for (file, runs) in &self.differences {
            memory::overlay(&memory, file, runs)?;
        }
        Ok(memory)
    }
}
