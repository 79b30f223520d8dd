//! Unpacks one layer into a directory of its own, in the form that overlayfs stacks.
//!
//! The layer's author is hostile: nothing in it can touch what is outside of the directory, and
//! what it costs is bounded by the constants here and in the modules below. A layer that breaks a
//! rule is refused as a whole, with the name of the entry and the rule.
//!
//! Whiteouts become what overlayfs wants (image-spec, layer.md, "Whiteouts"; the kernel's
//! overlayfs.rst). Device nodes are left out: a container has a `/dev` of its own, and a node on the
//! host's file system would be a way to the host's devices.

mod archive;
mod attributes;
mod compression;
mod pax;
mod settle;
mod tree;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use archive::Entry;
use attributes::Owner;
use tree::{Directory, Tree};

pub(super) use archive::{Archive, Kind};
pub(super) use compression::decompress;
pub(super) use settle::settle;

use super::error::ImageError;
use super::layout::Digest;

/// What one layer may unpack to, counting holes in sparse files. The largest real layers, of
/// machine learning images, are a third of it.
const LAYER_BYTES_MAX: u64 = 32 * 1024 * 1024 * 1024;

/// Files, directories and links in one layer. Real layers have up to some hundred thousand.
const LAYER_ENTRIES_MAX: u64 = 4_000_000;

/// The kernel's `PATH_MAX`.
const PATH_BYTES_MAX: usize = 4096;

const BUFFER_BYTES: usize = 128 * 1024;

const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Hides what the layers below have in a directory.
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// Marks of aufs, which mean nothing outside of it.
const WHITEOUT_AUFS_PREFIX: &[u8] = b".wh..wh.";

/// Why an entry could not be unpacked.
#[derive(Debug)]
enum Failure {
    /// It asks for what no layer may ask for.
    Refused(String),
    /// The stream is broken.
    Stream(io::Error),
    /// The host could not do it: what, and why.
    Host(&'static str, io::Error),
}

impl Failure {
    fn host(action: &'static str) -> impl FnOnce(Errno) -> Self {
        move |error| match error {
            Errno::NAMETOOLONG => Self::Refused("a name in it is too long".to_owned()),
            error => Self::Host(action, error.into()),
        }
    }
}

/// Unpacks `layer`, compressed or not, into the empty `directory`, and checks that its
/// uncompressed form has the digest `diff_id`.
///
/// Returns the directories that the layer does not describe, for [`settle`].
pub(super) fn unpack(
    layer: impl Read,
    directory: &Path,
    diff_id: &Digest,
) -> Result<Vec<PathBuf>, ImageError> {
    let name = diff_id.to_string();
    let broken = |source| ImageError::BadLayer {
        layer: name.clone(),
        source,
    };
    let layer = BufReader::with_capacity(BUFFER_BYTES, layer);
    let mut stream = Checked {
        stream: decompress(layer).map_err(broken)?,
        hasher: Sha256::new(),
        bytes: 0,
    };
    let implicit = unpack_stream(&mut stream, directory, &name)?;
    // What comes after the end of the archive belongs to the digest all the same.
    io::copy(&mut stream, &mut io::sink()).map_err(broken)?;
    let actual = Digest::finish(stream.hasher);
    if actual == *diff_id {
        Ok(implicit)
    } else {
        Err(ImageError::DigestMismatch {
            expected: name,
            actual: actual.to_string(),
        })
    }
}

fn unpack_stream(
    stream: impl Read,
    directory: &Path,
    layer: &str,
) -> Result<Vec<PathBuf>, ImageError> {
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER_BYTES, stream));
    let tree = Tree::open(directory).map_err(ImageError::io("open", directory))?;
    let mut unpacker = Unpacker {
        tree,
        entries: 0,
        bytes: 0,
        buffer: vec![0; BUFFER_BYTES],
    };
    let broken = |source| ImageError::BadLayer {
        layer: layer.to_owned(),
        source,
    };
    let explain = |failure, path: &[u8]| {
        let entry = String::from_utf8_lossy(path).into_owned();
        match failure {
            Failure::Refused(reason) => ImageError::Refused {
                layer: layer.to_owned(),
                entry,
                reason,
            },
            Failure::Stream(source) => broken(source),
            Failure::Host(action, source) => ImageError::io(action, directory.join(entry))(source),
        }
    };
    while let Some(entry) = archive.next_entry().map_err(broken)? {
        unpacker
            .add(&entry, &mut archive)
            .map_err(|failure| explain(failure, &entry.path))?;
    }
    unpacker
        .tree
        .finish()
        .map_err(|failure| explain(failure, b""))
}

/// Counts and digests the uncompressed stream.
struct Checked<R> {
    stream: R,
    hasher: Sha256,
    bytes: u64,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.bytes += read as u64;
        if self.bytes > LAYER_BYTES_MAX {
            return Err(io::Error::other(format!(
                "it unpacks to over {LAYER_BYTES_MAX} bytes"
            )));
        }
        Ok(read)
    }
}

struct Unpacker {
    tree: Tree,
    entries: u64,
    bytes: u64,
    buffer: Vec<u8>,
}

impl Unpacker {
    fn add(&mut self, entry: &Entry, data: &mut Archive<impl Read>) -> Result<(), Failure> {
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(entry.size);
        if self.entries > LAYER_ENTRIES_MAX {
            return Err(refused(format!(
                "the layer has over {LAYER_ENTRIES_MAX} entries"
            )));
        }
        if self.bytes > LAYER_BYTES_MAX {
            return Err(refused(format!(
                "the layer unpacks to over {LAYER_BYTES_MAX} bytes"
            )));
        }
        let components = components(&entry.path)?;
        let Some((&name, parents)) = components.split_last() else {
            return self.add_root(entry);
        };
        let parent = self.tree.directory(parents)?;
        if name.as_bytes().starts_with(WHITEOUT_PREFIX) {
            return self.add_whiteout(&parent, name);
        }
        let owner = Owner::of(entry)?;
        match entry.kind {
            Kind::Regular => self.add_file(&parent, name, entry, owner, data),
            Kind::Directory => {
                let directory = self.tree.make_directory(&parent, name)?;
                attributes::set(&directory, entry, owner)?;
                self.tree
                    .set_time_at_end(Some((&parent, name)), entry.modified)
            }
            Kind::Symlink => self.add_symlink(&parent, name, entry, owner),
            Kind::HardLink => self.add_hard_link(&parent, name, entry),
            Kind::Fifo => {
                let mode = Mode::from_raw_mode(entry.mode);
                self.tree.create(&parent, name, || {
                    rustix::fs::mknodat(&parent.fd, name, FileType::Fifo, mode, 0)
                })?;
                attributes::set_by_name(&parent, name, entry, owner)?;
                // Creation is subject to the umask.
                rustix::fs::chmodat(&parent.fd, name, mode, AtFlags::empty())
                    .map_err(Failure::host("set the mode of"))
            }
            Kind::Device => {
                tracing::debug!(path = %name.display(), "left out a device node of a layer");
                Ok(())
            }
        }
    }

    fn add_root(&mut self, entry: &Entry) -> Result<(), Failure> {
        if entry.kind != Kind::Directory {
            return Err(refused("it is the root of the layer, and not a directory"));
        }
        let root = self.tree.root()?;
        attributes::set(&root, entry, Owner::of(entry)?)?;
        self.tree.set_time_at_end(None, entry.modified)
    }

    fn add_whiteout(&mut self, parent: &Directory, name: &OsStr) -> Result<(), Failure> {
        match name.as_bytes() {
            WHITEOUT_OPAQUE => self.tree.hide_below(parent),
            marker if marker.starts_with(WHITEOUT_AUFS_PREFIX) => Ok(()),
            marker => match &marker[WHITEOUT_PREFIX.len()..] {
                b"" | b"." | b".." => Err(refused("it is a whiteout of no name")),
                hidden => self.tree.whiteout(parent, OsStr::from_bytes(hidden)),
            },
        }
    }

    fn add_file(
        &mut self,
        parent: &Directory,
        name: &OsStr,
        entry: &Entry,
        owner: Owner,
        data: &mut Archive<impl Read>,
    ) -> Result<(), Failure> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mut file = self.tree.create(parent, name, || {
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::openat(&parent.fd, name, flags | OFlags::CLOEXEC, mode).map(File::from)
        })?;
        let write = |error| Failure::Host("write", error);
        if let Some(segments) = &entry.segments {
            for segment in segments {
                file.seek(SeekFrom::Start(segment.offset)).map_err(write)?;
                self.copy(&mut data.by_ref().take(segment.length), &mut file)?;
            }
            file.set_len(entry.size).map_err(write)?;
        } else {
            self.copy(data, &mut file)?;
        }
        attributes::set(&file, entry, owner)?;
        attributes::set_time(&file, entry.modified)
    }

    /// Tells a broken stream from a full disk, which `io::copy` does not.
    fn copy(&mut self, from: &mut impl Read, to: &mut File) -> Result<(), Failure> {
        loop {
            match from.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => to
                    .write_all(&self.buffer[..read])
                    .map_err(|error| Failure::Host("write", error))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Stream(error)),
            }
        }
    }

    fn add_symlink(
        &mut self,
        parent: &Directory,
        name: &OsStr,
        entry: &Entry,
        owner: Owner,
    ) -> Result<(), Failure> {
        if entry.link.is_empty() || entry.link.len() >= PATH_BYTES_MAX {
            return Err(refused("its target is empty or too long"));
        }
        // The target is text: whoever follows it, follows it inside of the instance's own root.
        let target = OsStr::from_bytes(&entry.link);
        self.tree.create(parent, name, || {
            rustix::fs::symlinkat(target, &parent.fd, name)
        })?;
        attributes::set_by_name(parent, name, entry, owner)
    }

    fn add_hard_link(
        &mut self,
        parent: &Directory,
        name: &OsStr,
        entry: &Entry,
    ) -> Result<(), Failure> {
        let shown = String::from_utf8_lossy(&entry.link);
        if entry.link.starts_with(b"/") {
            return Err(refused(format!(
                "its hard link target `{shown}` is absolute"
            )));
        }
        let target = components(&entry.link).map_err(|failure| match failure {
            Failure::Refused(reason) => refused(format!(
                "its hard link target `{shown}` is refused: {reason}"
            )),
            failure @ (Failure::Stream(_) | Failure::Host(..)) => failure,
        })?;
        let missing = || {
            refused(format!(
                "its hard link target `{shown}` is not in the layer"
            ))
        };
        let (&target_name, target_parents) = target.split_last().ok_or_else(missing)?;
        let target_parent = self.tree.existing(target_parents)?.ok_or_else(missing)?;
        let target = tree::lookup(&target_parent, target_name)?.ok_or_else(missing)?;
        if tree::is_directory(&target) {
            return Err(refused(format!(
                "its hard link target `{shown}` is a directory"
            )));
        }
        if let Some(found) = tree::lookup(parent, name)?
            && (found.st_dev, found.st_ino) == (target.st_dev, target.st_ino)
        {
            return Ok(());
        }
        self.tree.create(parent, name, || {
            let flags = AtFlags::empty();
            rustix::fs::linkat(&target_parent.fd, target_name, &parent.fd, name, flags)
        })
    }
}

/// The names in a path of the archive. A leading `/` is ignored, as other tools do.
fn components(path: &[u8]) -> Result<Vec<&OsStr>, Failure> {
    if path.len() >= PATH_BYTES_MAX {
        return Err(refused(format!(
            "its name is over {PATH_BYTES_MAX} bytes long"
        )));
    }
    let mut components = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(refused("it has `..` in its name")),
            name => components.push(OsStr::from_bytes(name)),
        }
    }
    if components.len() > tree::DEPTH_MAX {
        return Err(refused(format!(
            "it is more than {} directories deep",
            tree::DEPTH_MAX
        )));
    }
    Ok(components)
}

fn refused(reason: impl Into<String>) -> Failure {
    Failure::Refused(reason.into())
}

#[cfg(test)]
mod tests;
