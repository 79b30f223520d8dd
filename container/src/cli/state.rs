//! `state`.

use anyhow::Result;
use clap::Args;
use container::verbs::state::state;

use super::{Global, print};

#[derive(Args, Debug)]
pub(super) struct Show {
    /// Name of the container
    id: String,
}

impl Show {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let state = state(&global.root, &self.id)?;
        print(&format!("{}\n", serde_json::to_string_pretty(&state)?))?;
        Ok(0)
    }
}
