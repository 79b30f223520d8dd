//! `pause` and `resume`.

use anyhow::Result;
use clap::Args;
use container::verbs::pause::{pause, resume};

use super::Global;

#[derive(Args, Debug)]
pub(super) struct Pause {
    /// Name of the container
    id: String,
}

#[derive(Args, Debug)]
pub(super) struct Resume {
    /// Name of the container
    id: String,
}

impl Pause {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        pause(&global.root, &self.id)?;
        Ok(0)
    }
}

impl Resume {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        resume(&global.root, &self.id)?;
        Ok(0)
    }
}
