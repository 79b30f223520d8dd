//! Debian's cloud kernels, fetched as packages and unpacked, and sets of their modules.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::paths;
use crate::step::{command, run, step};

/// A series of kernels of which the newest is wanted. Hosts and guests have different ones: a host
/// keeps to the release's own, a guest takes the newest that the release supports.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Series {
    Host,
    Guest,
}

impl Series {
    /// The metapackage that depends on its newest kernel.
    fn metapackage(self) -> &'static str {
        match self {
            Self::Host => "linux-image-cloud-amd64",
            Self::Guest => "linux-image-6.12-cloud-amd64",
        }
    }
}

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// As `uname -r` prints it.
    pub(crate) release: String,
    /// Where the package is unpacked.
    root: PathBuf,
}

impl Kernel {
    /// Fetches the kernel package into the build directory, once per version.
    pub(crate) fn fetch(series: Series) -> Result<Self> {
        let dir = paths::build().join("kernel").join(series.metapackage());
        if let Some(kernel) = Self::find(&dir)? {
            return Ok(kernel);
        }
        step(&format!("Fetch {}", series.metapackage()), || {
            let package = package_name(series.metapackage())?;
            let partial = dir.join("partial");
            if partial.exists() {
                fs::remove_dir_all(&partial).context("Cannot remove a partial download")?;
            }
            fs::create_dir_all(&partial)?;
            run(command("apt-get", ["download", "-q", &package]).current_dir(&partial))?;
            let deb = only_entry(&partial)?;
            let root = partial.join("root");
            run(command("dpkg-deb", ["-x"]).arg(&deb).arg(&root))?;
            fs::remove_file(&deb)?;
            let release = package.trim_start_matches("linux-image-").to_owned();
            // Whoever loads them in an initramfs need not know about compression.
            let modules = root.join("lib/modules");
            let script = "find \"$1\" -name '*.ko.xz' -print0 | xargs -0 --no-run-if-empty xz -d";
            run(command("sh", ["-euc", script, "sh"]).arg(&modules))?;
            run(command("depmod", ["-b"]).arg(&root).arg(&release))?;
            fs::rename(root, dir.join(&release)).context("Cannot move the kernel in place")?;
            Self::find(&dir)?.context("The kernel package holds no kernel")
        })
    }

    /// The newest kernel that was fetched completely.
    fn find(dir: &Path) -> Result<Option<Self>> {
        let Ok(entries) = fs::read_dir(dir) else {
            return Ok(None);
        };
        let mut found = Vec::new();
        for entry in entries {
            let root = entry?.path();
            let Some(release) = root.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let kernel = Self {
                release: release.to_owned(),
                root: root.clone(),
            };
            if kernel.image().is_file() {
                found.push(kernel);
            }
        }
        found.sort_by(|one, other| one.release.cmp(&other.release));
        Ok(found.pop())
    }

    /// The bzImage.
    pub(crate) fn image(&self) -> PathBuf {
        self.root
            .join("boot")
            .join(format!("vmlinuz-{}", self.release))
    }

    /// The directory that `/lib/modules/RELEASE` stands for.
    pub(crate) fn modules_dir(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// The files of `names` and of all that they depend on, relative to [`Self::modules_dir`], each
    /// after what it needs. A name that is built into the kernel is left out.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let dir = self.modules_dir();
        let dependencies = fs::read_to_string(dir.join("modules.dep"))?;
        let builtin = fs::read_to_string(dir.join("modules.builtin"))?;
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in names {
            let line = dependencies.lines().find(|line| {
                line.split(':')
                    .next()
                    .is_some_and(|path| module_name(path) == *name)
            });
            let Some(line) = line else {
                if builtin.lines().any(|path| module_name(path) == *name) {
                    continue;
                }
                bail!("The kernel {} has no module `{name}`", self.release);
            };
            let (module, needs) = line.split_once(':').context("modules.dep is malformed")?;
            // modules.dep lists what a module needs with the deepest need last.
            for path in needs.split_whitespace().rev().chain([module]) {
                if seen.insert(path.to_owned()) {
                    order.push(PathBuf::from(path));
                }
            }
        }
        Ok(order)
    }
}

/// `kernel/fs/erofs/erofs.ko` is the module `erofs`; `-` and `_` are the same in a module's name.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The versioned package that the metapackage stands for now.
fn package_name(metapackage: &str) -> Result<String> {
    let depends = run(&mut command("apt-cache", ["depends", metapackage]))?;
    depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .with_context(|| {
            format!("apt knows no dependency of {metapackage}; run `apt-get update` and try again")
        })
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let entry = fs::read_dir(dir)?
        .next()
        .context("Nothing was downloaded")??;
    Ok(entry.path())
}

#[cfg(test)]
mod tests {
    use super::module_name;

    #[test]
    fn a_module_is_named_by_its_file_with_underscores() {
        for (path, name) in [
            ("kernel/arch/x86/kvm/kvm-amd.ko", "kvm_amd"),
            ("kernel/fs/erofs/erofs.ko", "erofs"),
            ("kernel/net/veth.ko.xz", "veth"),
        ] {
            assert_eq!(module_name(path), name);
        }
    }
}
