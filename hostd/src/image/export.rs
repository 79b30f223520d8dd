//! Writes an image as a tar of an OCI image layout, which other tools and [`super::import`] read.

use std::fs::File;
use std::io::{BufWriter, Read};
use std::path::Path;

use serde_json::json;
use tempfile::NamedTempFile;

use super::claims;
use super::error::ImageError;
use super::layout::{Digest, LAYOUT_FILE};
use super::manifest::MANIFEST_BYTES_MAX;
use super::{ImageStore, blocking};

impl ImageStore {
    /// Writes the image with the manifest `digest` to `path`, in one step: the file is complete or
    /// not there.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Io`], [`ImageError::NoSpace`].
    pub async fn export(&self, digest: &str, path: &Path) -> Result<(), ImageError> {
        let not_found = || ImageError::NotFound {
            reference: digest.to_owned(),
        };
        let digest = Digest::parse(digest).ok_or_else(not_found)?;
        let (store, path) = (self.clone(), path.to_owned());
        blocking(move || store.write_archive(&digest, &path)).await
    }

    fn write_archive(&self, digest: &Digest, path: &Path) -> Result<(), ImageError> {
        let mut hold = self.holds.hold();
        hold.add(claims::blob(digest));
        let (manifest, layers) = self.stack(digest)?;
        let mut blobs = vec![digest.clone(), manifest.config.digest];
        blobs.extend(layers.into_iter().map(|layer| layer.blob.digest));
        blobs.sort();
        blobs.dedup();
        for blob in &blobs {
            hold.add(claims::blob(blob));
        }
        let directory = path.parent().unwrap_or_else(|| Path::new("/"));
        let file = NamedTempFile::new_in(directory).map_err(ImageError::io("create", path))?;
        let mut archive = tar::Builder::new(BufWriter::new(file));
        let index = self.index_of(digest)?;
        append(
            &mut archive,
            "oci-layout",
            LAYOUT_FILE.len(),
            LAYOUT_FILE.as_bytes(),
        )
        .and_then(|()| append(&mut archive, "index.json", index.len(), index.as_bytes()))
        .map_err(ImageError::io("write", path))?;
        for blob in &blobs {
            let source = self.layout.blob(blob);
            let open = File::open(&source).and_then(|file| Ok((file.metadata()?.len(), file)));
            let (size, blob_file) = open.map_err(ImageError::io("open", &source))?;
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            append(
                &mut archive,
                &format!("blobs/sha256/{}", blob.hex()),
                size,
                blob_file,
            )
            .map_err(ImageError::io("write", path))?;
        }
        let file = archive.into_inner().and_then(|file| Ok(file.into_inner()?));
        let file = file.map_err(ImageError::io("write", path))?;
        file.as_file()
            .sync_all()
            .map_err(ImageError::io("write", path))?;
        file.persist(path)
            .map_err(|error| ImageError::io("create", path)(error.error))?;
        Ok(())
    }

    /// An index of this image alone, with the names that it has.
    fn index_of(&self, digest: &Digest) -> Result<String, ImageError> {
        let text = digest.to_string();
        let named = self.layout.named().into_iter();
        let mut entries: Vec<_> = named
            .filter(|(_, entry)| entry.digest().as_ref() == text)
            .map(|(_, entry)| json!(entry))
            .collect();
        if entries.is_empty() {
            let size = self.layout.read_blob(digest, MANIFEST_BYTES_MAX)?.len();
            let media_type = super::manifest::MANIFEST_MEDIA_TYPES[0];
            entries.push(json!({"mediaType": media_type, "digest": text, "size": size}));
        }
        Ok(json!({"schemaVersion": 2, "manifests": entries}).to_string())
    }
}

fn append(
    archive: &mut tar::Builder<BufWriter<NamedTempFile>>,
    name: &str,
    size: usize,
    data: impl Read,
) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(size as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    archive.append_data(&mut header, name, data.take(size as u64))
}
