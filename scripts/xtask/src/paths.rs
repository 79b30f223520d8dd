//! Where things are in the tree and where what is made goes.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The triple that `.cargo/config.toml` builds for.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        manifest
            .ancestors()
            .nth(2)
            .expect("this crate is two levels below the root")
            .to_owned()
    })
}

/// What the commands make and keep: packages, kernels, images, logs. Safe to remove at any time.
pub(crate) fn build() -> PathBuf {
    root().join("build")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The directory of the release binaries.
pub(crate) fn binaries() -> PathBuf {
    target().join(TARGET).join("release")
}
