//! `monitor`: starts a workload and stays with it; for daemons, not for people.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

/// The directory holds `monitor.json`; what follows is said in `container::monitor::protocol`.
#[derive(Args, Debug)]
pub(crate) struct Monitor {
    /// Directory of the instance, with its specification
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

impl Monitor {
    pub(crate) fn run(&self) -> Result<i32> {
        container::monitor::run(&self.dir)?;
        Ok(0)
    }
}
