//! An image as one read-only file system in a file, for virtual machines.
//!
//! Every machine of an image maps the same file, uncompressed, so the host's page cache holds it
//! once. It is made on first demand by `mkfs.erofs` from the layers under overlayfs, which is
//! mounted in a mount namespace of the thread that waits for the program: whatever ends hostd ends
//! the mount. The same layers give the same bytes.

use std::io::{ErrorKind, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::claims;
use super::error::ImageError;
use super::layout::Digest;
use super::{Disk, ImageStore, blocking};

/// The file system's name, as `mount -t` has it. Debian's cloud kernels have it since version 12.
const FILE_SYSTEM: &str = "erofs";

const PROGRAM: &str = "mkfs.erofs";

/// The last second of the year 9999.
const LATEST_TIME: &str = "253402300799";

/// What `mkfs.erofs` says in an error is passed on up to this.
const OUTPUT_BYTES_MAX: u64 = 2048;

impl ImageStore {
    /// The disk of the image with the manifest `digest`; made now if it was not yet.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::ToolMissing`], [`ImageError::ToolFailed`],
    /// [`ImageError::NoSpace`] and [`ImageError::Io`].
    pub async fn disk(&self, digest: &str) -> Result<Disk, ImageError> {
        let not_found = || ImageError::NotFound {
            reference: digest.to_owned(),
        };
        let digest = Digest::parse(digest).ok_or_else(not_found)?;
        let path = self
            .layout
            .disks()
            .join(format!("{}.{FILE_SYSTEM}", digest.hex()));
        let maker = self.makers.lock(&claims::disk(&digest)).await;
        let disk = Disk {
            path,
            fs: FILE_SYSTEM,
        };
        if disk.path.exists() {
            return Ok(disk);
        }
        let store = self.clone();
        blocking(move || {
            // Held by the thread, which goes on if the future is dropped: the work is not lost.
            let _maker = maker;
            store.make_disk(&digest, &disk.path)?;
            Ok(disk)
        })
        .await
    }

    fn make_disk(&self, digest: &Digest, path: &Path) -> Result<(), ImageError> {
        let mut hold = self.holds.hold();
        hold.add(claims::blob(digest));
        let layers = self.stack(digest)?.1;
        for layer in &layers {
            hold.add(claims::layer(layer));
        }
        let layers = layers
            .iter()
            .map(|layer| self.layout.layers().join(layer.directory()))
            .collect();
        let file = self.layout.temporary_file()?;
        // Removed after the thread and its mount are gone.
        let scratch = self.layout.temporary_directory()?;
        let build = Build {
            layers,
            scratch: scratch.path().to_owned(),
            disk: file.path().to_owned(),
            uuid: uuid(digest),
        };
        // A thread of its own, since a mount namespace is a thread's and not given back.
        let built = thread::Builder::new()
            .name("image-disk".to_owned())
            .spawn(move || build.run());
        let built = built.map_err(ImageError::io("start a thread for", path))?;
        built.join().map_err(|_| ImageError::Cancelled)??;
        self.layout.keep_file(file, path)
    }
}

struct Build {
    /// The lowest first.
    layers: Vec<PathBuf>,
    /// An empty directory to work in.
    scratch: PathBuf,
    disk: PathBuf,
    uuid: String,
}

impl Build {
    fn run(self) -> Result<(), ImageError> {
        let root = self.scratch.join("root");
        std::fs::create_dir(&root).map_err(ImageError::io("create", &root))?;
        let options = self.overlay_options()?;
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |error: nix::Error| ImageError::io(action, path)(error.into())
        };
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
            .map_err(failed("make a mount namespace for", &root))?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .map_err(failed("make private", Path::new("/")))?;
        nix::unistd::chdir(&self.scratch).map_err(failed("enter", &self.scratch))?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        mount(
            Some("overlay"),
            &root,
            Some("overlay"),
            flags,
            Some(options.as_str()),
        )
        .map_err(failed("mount the layers at", &root))?;
        self.make_file_system(&root)
    }

    /// Names are relative and short, since the options of a mount are one page.
    fn overlay_options(&self) -> Result<String, ImageError> {
        let mut lower = Vec::new();
        for (index, layer) in self.layers.iter().rev().enumerate() {
            let link = self.scratch.join(index.to_string());
            symlink(layer, &link).map_err(ImageError::io("create", &link))?;
            lower.push(index.to_string());
        }
        // Overlayfs without an upper layer wants two lower ones, however few the image has.
        for name in ["empty", "empty2"] {
            let path = self.scratch.join(name);
            std::fs::create_dir(&path).map_err(ImageError::io("create", &path))?;
            lower.push(name.to_owned());
        }
        Ok(format!("lowerdir={}", lower.join(":")))
    }

    fn make_file_system(&self, root: &Path) -> Result<(), ImageError> {
        let mut command = Command::new(PROGRAM);
        command.args(["--quiet", "-U", &self.uuid]);
        // Files keep their times up to this one, and the clock is not asked.
        command.env("SOURCE_DATE_EPOCH", LATEST_TIME);
        command.arg(&self.disk).arg(root);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            if error.kind() == ErrorKind::NotFound {
                ImageError::ToolMissing {
                    program: PROGRAM,
                    package: "erofs-utils",
                }
            } else {
                ImageError::io("run", PROGRAM)(error)
            }
        })?;
        let mut output = Vec::new();
        if let Some(mut stderr) = child.stderr.take() {
            let mut head = stderr.by_ref().take(OUTPUT_BYTES_MAX);
            head.read_to_end(&mut output)
                .map_err(ImageError::io("read from", PROGRAM))?;
            std::io::copy(&mut stderr, &mut std::io::sink())
                .map_err(ImageError::io("read from", PROGRAM))?;
        }
        let status = child.wait().map_err(ImageError::io("wait for", PROGRAM))?;
        if status.success() {
            return Ok(());
        }
        let output = String::from_utf8_lossy(&output).trim().to_owned();
        if output.contains("No space left on device") {
            return Err(ImageError::NoSpace {
                path: self.disk.clone(),
            });
        }
        Err(ImageError::ToolFailed {
            program: PROGRAM,
            status: status.to_string(),
            output,
        })
    }
}

/// A name for the file system that depends on the image alone (RFC 9562, version 8).
fn uuid(digest: &Digest) -> String {
    let hex = digest.hex();
    format!(
        "{}-{}-8{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[13..16],
        &hex[17..20],
        &hex[20..32]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_file_system_is_a_uuid_of_the_image() {
        let name = uuid(&Digest::of(b""));
        assert_eq!(name, "e3b0c442-98fc-8c14-8afb-f4c8996fb924");
    }
}
