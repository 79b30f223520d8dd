//! `delete`.

use anyhow::Result;
use clap::Args;
use container::log;
use container::verbs::delete::{DeleteOptions, delete};

use super::Global;

#[derive(Args, Debug)]
pub(super) struct Delete {
    /// Kill the container if it runs; be content if there is none
    #[arg(short, long)]
    force: bool,
    /// Name of the container
    id: String,
}

impl Delete {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let options = DeleteOptions {
            root: global.root.clone(),
            id: self.id,
            force: self.force,
        };
        for warning in delete(&options)? {
            log::warn(&warning);
        }
        Ok(0)
    }
}
