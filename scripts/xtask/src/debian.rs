//! Debian packages as a tar of their files, without the rest of Debian.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::step::{command, run, step};

/// `NAME.tar` in `dir`: the files of the packages and of what they depend on, unpacked and not configured;
/// made again when the list of packages changes.
pub(crate) fn unpacked(dir: &Path, name: &str, packages: &[&str]) -> Result<PathBuf> {
    fs::create_dir_all(dir)?;
    // Nobody makes it twice.
    let lock = File::create(dir.join(format!("{name}.lock")))?;
    lock.lock().context("Cannot wait for another build")?;
    let archive = dir.join(format!("{name}.tar"));
    let recipe = dir.join(format!("{name}.recipe"));
    let wanted = packages.join("\n");
    if archive.exists() && fs::read_to_string(&recipe).is_ok_and(|made| made == wanted) {
        return Ok(archive);
    }
    step(&format!("Unpack Debian packages ({name})"), || {
        let partial = dir.join(format!("{name}.partial.tar"));
        let include = format!("--include={}", packages.join(","));
        let arguments = ["--variant=extract", "--quiet", &include, "bookworm"];
        run(command("mmdebstrap", arguments).arg(&partial))?;
        fs::rename(&partial, &archive)?;
        fs::write(&recipe, wanted).context("Cannot write the recipe")
    })?;
    Ok(archive)
}

/// Unpacks such a tar. The kernel makes device nodes; leaving them out is what lets anyone do it.
pub(crate) fn extract(archive: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    run(command("tar", ["--exclude=./dev/*", "-xf"])
        .arg(archive)
        .arg("-C")
        .arg(root))
    .map(|_| ())
}
