//! The store on disk: an OCI image layout that other tools can read, and what hostd keeps beside it.
//!
//! `oci-layout`, `index.json` and `blobs/sha256/` are the image layout (image-spec, image-layout.md).
//! `layers/` holds unpacked layers, `disks/` file systems for virtual machines, `tmp/` what is being
//! made. Things appear by rename from `tmp/`, complete and synced, or not at all.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::image::{Descriptor, ImageIndex, MediaType};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use tempfile::{NamedTempFile, TempDir};

use super::error::ImageError;

/// The annotation that names an image in an index (image-spec, annotations.md).
pub(super) const NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// The most that an `index.json` may hold: tens of thousands of images.
pub(super) const INDEX_BYTES_MAX: u64 = 16 * 1024 * 1024;

pub(super) const LAYOUT_FILE: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// A checked `sha256:` digest.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Digest {
    hex: String,
}

impl Digest {
    /// `None` unless `text` is `sha256:` and 64 lower-case hexadecimal digits.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let valid = hex.len() == 64
            && hex
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        valid.then(|| Self {
            hex: hex.to_owned(),
        })
    }

    pub(super) fn of(bytes: &[u8]) -> Self {
        Self::finish(Sha256::new_with_prefix(bytes))
    }

    pub(super) fn finish(hasher: Sha256) -> Self {
        let hash = hasher.finalize();
        Self {
            hex: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    pub(super) fn hex(&self) -> &str {
        &self.hex
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex)
    }
}

/// The directory, and the only writer of its index.
#[derive(Debug)]
pub(super) struct Layout {
    root: PathBuf,
    index: Mutex<ImageIndex>,
    /// Locked for as long as the store is open.
    _lock: File,
}

impl Layout {
    /// Opens the layout, makes what is missing and removes what an earlier process left half-made.
    pub(super) fn open(root: &Path) -> Result<Self, ImageError> {
        for name in ["", "blobs/sha256", "layers", "disks", "tmp"] {
            let path = root.join(name);
            // Unpacked layers hold setuid programs and foreign owners: nobody else may look in.
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder
                .create(&path)
                .map_err(ImageError::io("create", &path))?;
        }
        let lock = lock(root)?;
        clear(&root.join("tmp"))?;
        let index_path = root.join("index.json");
        let index = match read_bounded(&index_path, INDEX_BYTES_MAX)? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| ImageError::malformed(index_path.display().to_string(), error))?,
            None => empty_index(),
        };
        let layout = Self {
            root: root.to_owned(),
            index: Mutex::new(index),
            _lock: lock,
        };
        if !root.join("oci-layout").exists() {
            layout.write_file(&root.join("oci-layout"), LAYOUT_FILE.as_bytes())?;
            layout.update_index(|_| ())?;
        }
        Ok(layout)
    }

    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(super) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(super) fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }

    /// A file that vanishes unless it is kept under a name.
    pub(super) fn temporary_file(&self) -> Result<NamedTempFile, ImageError> {
        let path = self.root.join("tmp");
        NamedTempFile::new_in(&path).map_err(ImageError::io("create a file in", path))
    }

    /// A directory that vanishes unless [`Self::keep_all`] gives it a name.
    pub(super) fn temporary_directory(&self) -> Result<TempDir, ImageError> {
        let path = self.root.join("tmp");
        TempDir::new_in(&path).map_err(ImageError::io("create a directory in", path))
    }

    /// Makes `file` durable and visible as `path`.
    pub(super) fn keep_file(&self, file: NamedTempFile, path: &Path) -> Result<(), ImageError> {
        file.as_file()
            .sync_all()
            .map_err(ImageError::io("write", path))?;
        file.persist(path)
            .map_err(|error| ImageError::io("create", path)(error.error))?;
        sync_directory(path.parent().unwrap_or(&self.root))
    }

    /// Makes trees and files durable and then visible: each at the path beside it. A tree that is
    /// there already stays.
    pub(super) fn keep_all(
        &self,
        trees: Vec<(TempDir, PathBuf)>,
        files: Vec<(NamedTempFile, PathBuf)>,
    ) -> Result<(), ImageError> {
        // One call for everything, since the trees have thousands of files.
        File::open(&self.root)
            .and_then(|root| Ok(rustix::fs::syncfs(root)?))
            .map_err(ImageError::io("write", &self.root))?;
        for (tree, path) in trees {
            match fs::rename(tree.path(), &path) {
                Ok(()) => drop(tree.keep()),
                Err(error)
                    if matches!(
                        Errno::from_io_error(&error),
                        Some(Errno::EXIST | Errno::NOTEMPTY)
                    ) => {}
                Err(error) => return Err(ImageError::io("create", path)(error)),
            }
        }
        for (file, path) in files {
            file.persist(&path)
                .map_err(|error| ImageError::io("create", path)(error.error))?;
        }
        sync_directory(&self.layers())?;
        sync_directory(&self.blobs())
    }

    /// Replaces or creates the file at `path` in one step.
    pub(super) fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
        let mut file = self.temporary_file()?;
        file.write_all(bytes)
            .map_err(ImageError::io("write", path))?;
        self.keep_file(file, path)
    }

    /// A small blob on its way to [`Self::keep_all`]; `None` if the store has it.
    pub(super) fn small_blob(
        &self,
        digest: &Digest,
        bytes: &[u8],
    ) -> Result<Option<(NamedTempFile, PathBuf)>, ImageError> {
        let path = self.blob(digest);
        // It may be missing, and it may have been damaged by the disk.
        if self.read_blob(digest, bytes.len() as u64).is_ok() {
            return Ok(None);
        }
        let mut file = self.temporary_file()?;
        file.write_all(bytes)
            .map_err(ImageError::io("write", &path))?;
        Ok(Some((file, path)))
    }

    /// Reads a small blob, and checks it: a disk can rot.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] if the store does not have it.
    pub(super) fn read_blob(&self, digest: &Digest, bytes_max: u64) -> Result<Vec<u8>, ImageError> {
        let bytes =
            read_bounded(&self.blob(digest), bytes_max)?.ok_or_else(|| ImageError::NotFound {
                reference: digest.to_string(),
            })?;
        let actual = Digest::of(&bytes);
        if actual == *digest {
            Ok(bytes)
        } else {
            Err(ImageError::DigestMismatch {
                expected: digest.to_string(),
                actual: actual.to_string(),
            })
        }
    }

    /// The images that have a name, with it.
    pub(super) fn named(&self) -> Vec<(String, Descriptor)> {
        let index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let named = index.manifests().iter();
        named
            .filter_map(|entry| Some((name_of(entry)?, entry.clone())))
            .collect()
    }

    /// Lets `name` stand for `manifest`, instead of what it stood for.
    pub(super) fn set_name(&self, name: &str, manifest: Descriptor) -> Result<(), ImageError> {
        let mut manifest = manifest;
        let mut annotations = manifest.annotations().clone().unwrap_or_default();
        annotations.insert(NAME_ANNOTATION.to_owned(), name.to_owned());
        manifest.set_annotations(Some(annotations));
        self.update_index(|entries| {
            entries.retain(|entry| name_of(entry).as_deref() != Some(name));
            entries.push(manifest);
        })
    }

    /// Takes `name` away from whatever it stands for.
    pub(super) fn remove_name(&self, name: &str) -> Result<(), ImageError> {
        self.update_index(|entries| entries.retain(|entry| name_of(entry).as_deref() != Some(name)))
    }

    fn update_index(&self, change: impl FnOnce(&mut Vec<Descriptor>)) -> Result<(), ImageError> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = index.manifests().clone();
        change(&mut entries);
        let mut next = index.clone();
        next.set_manifests(entries);
        let path = self.root.join("index.json");
        let bytes = serde_json::to_vec(&next)
            .map_err(|error| ImageError::malformed(path.display().to_string(), error))?;
        self.write_file(&path, &bytes)?;
        *index = next;
        Ok(())
    }
}

/// The name that an index gives one of its entries.
pub(super) fn name_of(entry: &Descriptor) -> Option<String> {
    entry.annotations().as_ref()?.get(NAME_ANNOTATION).cloned()
}

/// Opens a regular file, and nothing that could keep a reader waiting for ever.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // Opening a pipe would wait for its writer.
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ))
    }
}

/// Reads a file of at most `bytes_max`; `None` if there is none.
pub(super) fn read_bounded(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, ImageError> {
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ImageError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, bytes_max + 1), &mut bytes)
        .map_err(ImageError::io("read", path))?;
    if bytes.len() as u64 > bytes_max {
        return Err(ImageError::malformed(
            path.display().to_string(),
            format_args!("it is larger than {bytes_max} bytes"),
        ));
    }
    Ok(Some(bytes))
}

fn empty_index() -> ImageIndex {
    let mut index = ImageIndex::default();
    index.set_schema_version(2);
    index.set_media_type(Some(MediaType::ImageIndex));
    index
}

fn lock(root: &Path) -> Result<File, ImageError> {
    let path = root.join("lock");
    let file = File::create(&path).map_err(ImageError::io("create", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(ImageError::InUse {
            path: root.to_owned(),
        }),
        Err(error) => Err(ImageError::io("lock", path)(error.into())),
    }
}

/// Removes everything in `directory`.
fn clear(directory: &Path) -> Result<(), ImageError> {
    let entries = fs::read_dir(directory).map_err(ImageError::io("read", directory))?;
    for entry in entries {
        let path = entry.map_err(ImageError::io("read", directory))?.path();
        let is_directory = path
            .symlink_metadata()
            .is_ok_and(|metadata| metadata.is_dir());
        let removed = if is_directory {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(ImageError::io("remove", &path))?;
    }
    Ok(())
}

fn sync_directory(path: &Path) -> Result<(), ImageError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(ImageError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(digest: &Digest) -> Descriptor {
        Descriptor::new(
            MediaType::ImageManifest,
            2,
            digest
                .to_string()
                .parse::<oci_spec::image::Digest>()
                .unwrap(),
        )
    }

    #[test]
    fn only_a_whole_lower_case_sha256_is_a_digest() {
        let hex = "0123456789abcdef".repeat(4);
        assert!(Digest::parse(&format!("sha256:{hex}")).is_some());
        for text in [
            hex.clone(),
            format!("sha256:{}", &hex[1..]),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha512:{hex}"),
            format!("sha256:../../{}", &hex[6..]),
        ] {
            assert_eq!(Digest::parse(&text), None, "{text}");
        }
    }

    #[test]
    fn a_name_moves_and_survives_reopening() {
        let dir = TempDir::new().unwrap();
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        let layout = Layout::open(dir.path()).unwrap();
        layout.set_name("a:1", descriptor(&one)).unwrap();
        layout.set_name("b:1", descriptor(&one)).unwrap();
        layout.set_name("a:1", descriptor(&two)).unwrap();
        drop(layout);

        let layout = Layout::open(dir.path()).unwrap();
        let mut names: Vec<_> = layout
            .named()
            .into_iter()
            .map(|(name, entry)| (name, entry.digest().to_string()))
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                ("a:1".to_owned(), two.to_string()),
                ("b:1".to_owned(), one.to_string())
            ]
        );
    }

    #[test]
    fn what_a_crash_left_half_made_is_gone_after_opening() {
        let dir = TempDir::new().unwrap();
        drop(Layout::open(dir.path()).unwrap());
        fs::create_dir_all(dir.path().join("tmp/tree/deep")).unwrap();
        fs::write(dir.path().join("tmp/blob"), "half").unwrap();
        let _layout = Layout::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_store_has_one_owner() {
        let dir = TempDir::new().unwrap();
        let _first = Layout::open(dir.path()).unwrap();
        assert!(matches!(
            Layout::open(dir.path()),
            Err(ImageError::InUse { .. })
        ));
    }

    #[test]
    fn a_blob_that_rotted_is_not_handed_out() {
        let dir = TempDir::new().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let digest = Digest::of(b"content");
        let blob = layout.small_blob(&digest, b"content").unwrap().unwrap();
        layout.keep_all(vec![], vec![blob]).unwrap();
        assert!(layout.small_blob(&digest, b"content").unwrap().is_none());
        fs::write(layout.blob(&digest), "c0ntent").unwrap();
        assert!(matches!(
            layout.read_blob(&digest, 100),
            Err(ImageError::DigestMismatch { .. })
        ));
    }
}
