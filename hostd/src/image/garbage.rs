//! Removes what no image needs: blobs, unpacked layers and disks.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::claims;
use super::error::ImageError;
use super::layout::Digest;
use super::{ImageStore, blocking};

/// What was removed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Collected {
    /// Blobs, layers and disks.
    pub files: u64,
    /// Bytes of blobs and disks; those of unpacked layers are not counted.
    pub bytes: u64,
}

impl ImageStore {
    /// Removes everything that neither a named image nor one whose manifest digest is `in_use`
    /// needs. What a pull, an import or an export is working with stays.
    ///
    /// # Errors
    /// [`ImageError::Io`] if something could not be read or removed. Nothing is removed if it
    /// cannot be told what is needed.
    pub async fn collect_garbage(&self, in_use: &HashSet<String>) -> Result<Collected, ImageError> {
        let store = self.clone();
        let in_use: Vec<Digest> = in_use
            .iter()
            .filter_map(|text| Digest::parse(text))
            .collect();
        blocking(move || {
            let trash = store.layout.temporary_directory()?;
            let collected = store.move_garbage(&in_use, trash.path())?;
            // Takes long for layers, and is done at the next start if it is interrupted.
            let path = trash.path().to_owned();
            trash.close().map_err(ImageError::io("remove", path))?;
            Ok(collected)
        })
        .await
    }

    fn move_garbage(&self, in_use: &[Digest], trash: &Path) -> Result<Collected, ImageError> {
        // Whoever is about to rely on a file waits until it is known whether that stays.
        let frozen = self.holds.freeze();
        let mut needed: HashSet<String> = frozen.names().into_iter().map(str::to_owned).collect();
        let named = self.layout.named();
        let named = named
            .iter()
            .filter_map(|(_, entry)| Digest::parse(entry.digest().as_ref()));
        for digest in named.chain(in_use.iter().cloned()) {
            self.mark(&digest, &mut needed)?;
        }
        let mut collected = Collected::default();
        for (kind, directory) in [
            ("blobs", self.layout.blobs()),
            ("layers", self.layout.layers()),
            ("disks", self.layout.disks()),
        ] {
            for path in entries(&directory)? {
                let stem = path
                    .file_stem()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                if needed.contains(&format!("{kind}/{stem}")) {
                    continue;
                }
                let metadata = path
                    .symlink_metadata()
                    .map_err(ImageError::io("read", &path))?;
                let target = trash.join(collected.files.to_string());
                fs::rename(&path, target).map_err(ImageError::io("remove", &path))?;
                collected.files += 1;
                collected.bytes += if metadata.is_file() {
                    metadata.len()
                } else {
                    0
                };
            }
        }
        Ok(collected)
    }

    /// Adds the names of all that the image of this manifest consists of.
    fn mark(&self, digest: &Digest, needed: &mut HashSet<String>) -> Result<(), ImageError> {
        let (manifest, layers) = match self.stack(digest) {
            Ok(image) => image,
            // An image that is gone needs nothing. Any other failure may hide what it needs.
            Err(ImageError::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        needed.insert(claims::blob(digest));
        needed.insert(claims::disk(digest));
        needed.insert(claims::blob(&manifest.config.digest));
        for layer in &layers {
            needed.insert(claims::blob(&layer.blob.digest));
            needed.insert(claims::layer(layer));
        }
        Ok(())
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let read = |error| ImageError::io("read", directory)(error);
    let entries = fs::read_dir(directory).map_err(read)?;
    entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(read)
}
