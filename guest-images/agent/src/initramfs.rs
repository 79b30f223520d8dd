//! Writes initramfs archives: cpio in the "newc" form that the kernel unpacks
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The kernel lays several archives over each other, so a VM's archive is the guest image's, made
//! once, followed by a segment of a few hundred bytes that holds the VM's [`Config`]. The same input
//! gives the same bytes: nothing of the machine that writes an archive gets into it.

use std::io::{self, Write};

use crate::protocol::{CONFIG_PATH, Config};

/// The longest path that the kernel accepts, without the final zero (PATH_MAX - 1).
const PATH_BYTES_MAX: usize = 4095;

/// Headers, names and contents start at multiples of this.
const ALIGNMENT: usize = 4;

const DIRECTORY: u32 = 0o040_000;
const REGULAR_FILE: u32 = 0o100_000;
const SYMBOLIC_LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    #[error("The path `{path}` is empty, too long or holds a zero byte")]
    Path { path: String },
    #[error("`{path}` has {size} bytes, and an archive holds files below 4 GiB")]
    TooLarge { path: String, size: usize },
    #[error("Failed to write an archive")]
    Write(#[source] io::Error),
    #[error("Failed to encode the agent's configuration")]
    Encode(#[source] serde_json::Error),
}

/// An archive that is being written. Parents must be added before their children.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    /// Entries so far; the inode number of the last one, so that none looks like a hard link.
    entries: u32,
}

/// What a header says beyond the name.
#[derive(Default)]
struct Attributes {
    mode: u32,
    device: (u32, u32),
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    /// Adds a directory. `mode` is the permission bits, here and below; the owner is root.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), InitramfsError> {
        let attributes = Attributes {
            mode: DIRECTORY | mode,
            ..Attributes::default()
        };
        self.entry(path, &attributes, &[])
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<(), InitramfsError> {
        let attributes = Attributes {
            mode: REGULAR_FILE | mode,
            ..Attributes::default()
        };
        self.entry(path, &attributes, content)
    }

    pub fn symbolic_link(&mut self, path: &str, target: &str) -> Result<(), InitramfsError> {
        let attributes = Attributes {
            mode: SYMBOLIC_LINK | 0o777,
            ..Attributes::default()
        };
        self.entry(path, &attributes, target.as_bytes())
    }

    pub fn character_device(
        &mut self,
        path: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<(), InitramfsError> {
        let attributes = Attributes {
            mode: CHARACTER_DEVICE | mode,
            device: (major, minor),
        };
        self.entry(path, &attributes, &[])
    }

    /// Ends the archive and gives the writer back.
    pub fn finish(mut self) -> Result<W, InitramfsError> {
        self.entry(TRAILER, &Attributes::default(), &[])?;
        self.out.flush().map_err(InitramfsError::Write)?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        attributes: &Attributes,
        content: &[u8],
    ) -> Result<(), InitramfsError> {
        let name = path.strip_prefix('/').unwrap_or(path);
        if name.is_empty() || name.len() > PATH_BYTES_MAX || name.contains('\0') {
            return Err(InitramfsError::Path { path: path.into() });
        }
        let size = u32::try_from(content.len()).map_err(|_| InitramfsError::TooLarge {
            path: path.into(),
            size: content.len(),
        })?;
        self.entries += 1;
        let header = header(self.entries, attributes, size, name.len() + 1);
        self.put(&[header.as_bytes(), name.as_bytes(), &[0]])?;
        self.put(&[content])
    }

    /// Writes `parts` end to end and zeroes up to the next multiple of [`ALIGNMENT`].
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), InitramfsError> {
        let mut length = 0;
        for part in parts {
            self.out.write_all(part).map_err(InitramfsError::Write)?;
            length += part.len();
        }
        let padding = length.next_multiple_of(ALIGNMENT) - length;
        self.out
            .write_all(&[0; ALIGNMENT][..padding])
            .map_err(InitramfsError::Write)
    }
}

/// The 110 bytes before a name: the magic number and 13 fields of 8 hexadecimal digits.
fn header(inode: u32, attributes: &Attributes, size: u32, name_size: usize) -> String {
    let (major, minor) = attributes.device;
    let (owner, group, links, time, check) = (0, 0, 1, 0, 0);
    let (disk_major, disk_minor) = (0, 0);
    format!(
        "070701{inode:08x}{mode:08x}{owner:08x}{group:08x}{links:08x}{time:08x}{size:08x}\
         {disk_major:08x}{disk_minor:08x}{major:08x}{minor:08x}{name_size:08x}{check:08x}",
        mode = attributes.mode,
    )
}

/// Writes the archive that follows the guest image's and tells the agent what to run.
pub fn write_config_segment<W: Write>(config: &Config, out: W) -> Result<W, InitramfsError> {
    let text = serde_json::to_vec(config).map_err(InitramfsError::Encode)?;
    let mut archive = Archive::new(out);
    // The environment may hold secrets, and the workload may run as another user than root.
    archive.file(CONFIG_PATH, 0o600, &text)?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    use std::path::Path;
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev", 0o755).unwrap();
        archive.character_device("dev/null", 0o666, 1, 3).unwrap();
        archive.file("/init", 0o755, b"#!/bin/true\n").unwrap();
        archive.file("odd", 0o640, b"12345").unwrap();
        archive.symbolic_link("link", "init").unwrap();
        archive.finish().unwrap()
    }

    fn unpack(bytes: &[u8], into: &Path) {
        let mut cpio = Command::new("cpio")
            .args(["--extract", "--quiet", "--make-directories"])
            .current_dir(into)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(bytes).unwrap();
        assert!(cpio.wait().unwrap().success());
    }

    #[test]
    fn cpio_unpacks_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        unpack(&sample(), folder.path());
        let at = |name: &str| folder.path().join(name);
        assert_eq!(fs::read(at("init")).unwrap(), b"#!/bin/true\n");
        assert_eq!(fs::read(at("odd")).unwrap(), b"12345");
        assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("init"));
        let mode = |name: &str| fs::metadata(at(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("init"), 0o755);
        assert_eq!(mode("odd"), 0o640);
        let null = fs::metadata(at("dev/null")).unwrap().file_type();
        assert!(null.is_char_device());
    }

    #[test]
    fn the_same_input_gives_the_same_aligned_bytes() {
        assert_eq!(sample(), sample());
        assert_eq!(sample().len() % ALIGNMENT, 0);
    }

    #[test]
    fn the_segment_holds_the_configuration_for_root_alone() {
        let config = Config {
            hostname: "web".into(),
            ..Config::default()
        };
        let segment = write_config_segment(&config, Vec::new()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        unpack(&segment, folder.path());
        let path = folder.path().join(CONFIG_PATH.trim_start_matches('/'));
        let found: Config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(found, config);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_path_that_no_archive_can_hold_is_refused() {
        let mut archive = Archive::new(Vec::new());
        for path in ["", "/", "a\0b", &"x".repeat(PATH_BYTES_MAX + 1)] {
            let outcome = archive.file(path, 0o644, &[]);
            assert!(
                matches!(outcome, Err(InitramfsError::Path { .. })),
                "{path:?}"
            );
        }
    }
}
