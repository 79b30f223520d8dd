//! Imports an image from a file or directory of the host: an OCI image layout, a tar of one, or
//! what `docker save` writes.

use std::path::{Path, PathBuf};

use oci_spec::image::{Arch, Descriptor, ImageIndex, Os};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::archive_file;
use super::error::ImageError;
use super::layout::{INDEX_BYTES_MAX, name_of, read_bounded};
use super::transfer::{Source, Transfer};
use super::{ImageStore, blocking, manifest, name};
use crate::api::types::{Image, TransferEvent};

/// Where containerd and Docker put the whole name; they use the layout's own for the tag alone.
const CONTAINERD_NAME_ANNOTATION: &str = "io.containerd.image.name";

/// A layout, perhaps made for this import, and the image of it that is meant.
struct Chosen {
    root: PathBuf,
    /// Removes `root` in the end, if it was made.
    _temporary: Option<TempDir>,
    entry: Descriptor,
    name: String,
}

impl ImageStore {
    /// Brings the image at `path` into the store: a directory with an OCI image layout, a tar of
    /// one (perhaps compressed), or an archive of `docker save`.
    ///
    /// `reference` is the name that it gets, and which image is meant if there are several. If it
    /// is absent, the image has the name that it has there. Progress is as in [`Self::pull`].
    ///
    /// # Errors
    /// As [`Self::pull`], and [`ImageError::Ambiguous`], [`ImageError::NoName`].
    pub async fn import(
        &self,
        path: &Path,
        reference: Option<&str>,
        progress: mpsc::Sender<TransferEvent>,
    ) -> Result<Image, ImageError> {
        // Refused before anything is read.
        let wanted = reference
            .map(|text| Ok((text.to_owned(), name::local(text)?)))
            .transpose()?;
        let (store, path) = (self.clone(), path.to_owned());
        let stop = CancellationToken::new();
        let _stop_when_dropped = stop.clone().drop_guard();
        let chosen = blocking(move || choose(&store, &path, wanted, &stop)).await?;
        let source = Source::Directory(chosen.root.clone());
        let name = chosen.name.clone();
        let transfer = Transfer {
            store: self.clone(),
            source,
            name,
            progress,
        };
        let content = manifest::content(&chosen.entry)?;
        let found = transfer
            .find(transfer.source.document(&content).await?)
            .await?;
        transfer.install(found).await
    }
}

/// `wanted` is what the user wrote and the name that it stands for.
fn choose(
    store: &ImageStore,
    path: &Path,
    wanted: Option<(String, String)>,
    stop: &CancellationToken,
) -> Result<Chosen, ImageError> {
    let metadata = path.metadata().map_err(ImageError::io("open", path))?;
    let (root, temporary) = if metadata.is_dir() {
        (path.to_owned(), None)
    } else {
        let temporary = store.layout.temporary_directory()?;
        archive_file::unpack(path, temporary.path(), stop)?;
        (temporary.path().to_owned(), Some(temporary))
    };
    let what = path.display().to_string();
    let bytes = read_bounded(&root.join("index.json"), INDEX_BYTES_MAX)?.ok_or_else(|| {
        ImageError::malformed(
            &what,
            "it is neither an OCI image layout nor a Docker archive",
        )
    })?;
    let index: ImageIndex =
        serde_json::from_slice(&bytes).map_err(|error| ImageError::malformed(&what, error))?;
    let entry = pick(path, &index, wanted.as_ref().map(|(text, _)| &**text))?;
    let name = match wanted {
        Some((_, name)) => name,
        None => {
            let own = names(entry).into_iter().next();
            name::local(&own.ok_or_else(|| ImageError::NoName {
                path: path.to_owned(),
            })?)?
        }
    };
    Ok(Chosen {
        root,
        _temporary: temporary,
        entry: entry.clone(),
        name,
    })
}

/// The entry of a layout's index that is meant.
fn pick<'a>(
    path: &Path,
    index: &'a ImageIndex,
    wanted: Option<&str>,
) -> Result<&'a Descriptor, ImageError> {
    let mut entries: Vec<&Descriptor> = index.manifests().iter().collect();
    let is_wanted = |entry: &&Descriptor| {
        let candidates = wanted.map(name::candidates).unwrap_or_default();
        names(entry).iter().any(|name| candidates.contains(name))
    };
    if entries.iter().any(&is_wanted) {
        entries.retain(is_wanted);
    }
    let is_ours = |entry: &&Descriptor| {
        let platform = entry.platform().as_ref();
        platform.is_some_and(|p| *p.os() == Os::Linux && *p.architecture() == Arch::Amd64)
    };
    if entries.len() > 1 && entries.iter().any(&is_ours) {
        entries.retain(is_ours);
    }
    // Two names of one image are no choice, unless the name is what is asked for.
    if wanted.is_some() {
        entries.dedup_by_key(|entry| entry.digest());
    }
    match entries.as_slice() {
        [only] => Ok(only),
        [] => Err(ImageError::malformed(
            path.display().to_string(),
            "it holds no image",
        )),
        several => {
            let label = |entry: &&Descriptor| {
                names(entry)
                    .into_iter()
                    .next()
                    .unwrap_or_else(|| entry.digest().to_string())
            };
            let choices = several.iter().map(label).collect();
            Err(ImageError::Ambiguous {
                path: path.to_owned(),
                choices,
            })
        }
    }
}

/// The names that an entry has, the fullest first.
fn names(entry: &Descriptor) -> Vec<String> {
    let annotations = entry.annotations().as_ref();
    let full = annotations
        .and_then(|all| all.get(CONTAINERD_NAME_ANNOTATION))
        .cloned();
    full.into_iter().chain(name_of(entry)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::layout::Digest;
    use super::*;

    fn index(entries: &[(&str, Option<&str>, Option<&str>)]) -> ImageIndex {
        let entries: Vec<_> = entries
            .iter()
            .map(|(seed, name, architecture)| {
                let mut entry = json!({
                    "mediaType": manifest::MANIFEST_MEDIA_TYPES[0],
                    "digest": Digest::of(seed.as_bytes()).to_string(),
                    "size": 2,
                });
                if let Some(name) = name {
                    entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
                }
                if let Some(architecture) = architecture {
                    entry["platform"] = json!({"os": "linux", "architecture": architecture});
                }
                entry
            })
            .collect();
        serde_json::from_value(json!({"schemaVersion": 2, "manifests": entries})).unwrap()
    }

    #[test]
    fn the_image_that_is_meant_is_picked_or_asked_for() {
        let amd = Some("amd64");
        let arm = Some("arm64");
        for (entries, wanted, expected) in [
            (&[("a", None, None)][..], None, Ok("a")),
            (&[("a", None, None)], Some("new"), Ok("a")),
            (
                &[("a", Some("x:1"), None), ("b", Some("x:2"), None)],
                Some("x:2"),
                Ok("b"),
            ),
            (
                &[("a", Some("x"), arm), ("b", Some("x"), amd)],
                None,
                Ok("b"),
            ),
            (
                &[("a", Some("x:1"), amd), ("a", Some("x:2"), amd)],
                Some("new"),
                Ok("a"),
            ),
            (
                &[("a", Some("x:1"), None), ("b", Some("x:2"), None)],
                None,
                Err("x:1, x:2"),
            ),
            (
                &[("a", Some("x:1"), None), ("b", Some("x:2"), None)],
                Some("y"),
                Err("x:1, x:2"),
            ),
        ] {
            let index = index(entries);
            let picked = pick(Path::new("layout"), &index, wanted);
            match (picked, expected) {
                (Ok(entry), Ok(seed)) => {
                    assert_eq!(
                        entry.digest().to_string(),
                        Digest::of(seed.as_bytes()).to_string()
                    );
                }
                (Err(ImageError::Ambiguous { choices, .. }), Err(expected)) => {
                    assert_eq!(choices.join(", "), expected);
                }
                (other, _) => panic!("{entries:?} {wanted:?}: {other:?}"),
            }
        }
        assert!(matches!(
            pick(Path::new("l"), &index(&[]), None),
            Err(ImageError::Malformed { .. })
        ));
    }
}
