//! `spec` and `features`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use container::cgroup::Cgroup;
use container::verbs::features::features;
use container::verbs::spec::spec;

use super::{Global, print};

#[derive(Args, Debug)]
pub(super) struct Spec {
    /// Directory to write config.json to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// For a user without rights
    #[arg(long)]
    rootless: bool,
}

#[derive(Args, Debug)]
pub(super) struct Features {}

impl Spec {
    pub(super) fn run(self, _global: &Global) -> Result<i32> {
        let ids = (
            nix::unistd::getuid().as_raw(),
            nix::unistd::getgid().as_raw(),
        );
        let mut spec = spec(self.rootless.then_some(ids));
        // On v1 it would hide which groups the container is in, and those who look there want to know.
        if !Cgroup::is_unified()
            && let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut()
        {
            namespaces.retain(|namespace| namespace["type"] != "cgroup");
        }
        let text = serde_json::to_string_pretty(&spec)?;
        let path = self.bundle.join("config.json");
        // What is there is somebody's work.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .and_then(|mut file| writeln!(file, "{text}"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(0)
    }
}

impl Features {
    #[expect(clippy::unused_self, reason = "every verb is called in the same way")]
    pub(super) fn run(self, _global: &Global) -> Result<i32> {
        print(&format!("{}\n", serde_json::to_string_pretty(&features())?))?;
        Ok(0)
    }
}
