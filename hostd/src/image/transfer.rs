//! Brings an image into the store: configuration, layers (fetched, checked and unpacked in one
//! stream each), and last of all the name.
//!
//! A registry and a layout on disk differ only in where content comes from.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use oci_spec::image::{Arch, Descriptor, MediaType, Os, PlatformBuilder};
use tempfile::{NamedTempFile, TempDir};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use super::blob::{ChunkReader, Intake};
use super::claims::{self, Hold};
use super::error::ImageError;
use super::layout::{Digest, open_regular, read_bounded};
use super::manifest::{
    self, CONFIG_BYTES_MAX, Content, Document, INDEX_DEPTH_MAX, Layer, MANIFEST_BYTES_MAX,
    MANIFEST_MEDIA_TYPES, Manifest,
};
use super::registry::{CHUNKS_MAX, Session};
use super::{ImageStore, blocking, unpack};
use crate::api::types::{Image, TransferEvent};

/// Layers of one image that are worked on at a time.
const LAYERS_AT_A_TIME: usize = 4;

/// Where content comes from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Registry(Arc<Session>),
    /// An image layout.
    Directory(PathBuf),
}

/// A manifest that is for this machine, as it was found.
#[derive(Debug)]
pub(super) struct Found {
    digest: Digest,
    bytes: Vec<u8>,
    manifest: Manifest,
}

/// One image on its way.
pub(super) struct Transfer {
    pub(super) store: ImageStore,
    pub(super) source: Source,
    /// The name that it gets, also for errors.
    pub(super) name: String,
    pub(super) progress: mpsc::Sender<TransferEvent>,
}

/// A layer that is ready to be put into its place.
enum Ready {
    Already,
    New {
        directory: TempDir,
        /// For [`unpack::settle`].
        implicit: Vec<PathBuf>,
        /// Absent if the blob was stored before.
        blob: Option<NamedTempFile>,
    },
}

impl Source {
    /// A manifest or an index.
    pub(super) async fn document(&self, content: &Content) -> Result<Vec<u8>, ImageError> {
        match self {
            Self::Registry(session) => session.manifest(&content.digest.to_string()).await,
            Self::Directory(_) => self.small_blob(content, MANIFEST_BYTES_MAX).await,
        }
    }

    async fn small_blob(&self, content: &Content, bytes_max: u64) -> Result<Vec<u8>, ImageError> {
        match self {
            Self::Registry(session) => session.blob(content, bytes_max).await,
            Self::Directory(root) => {
                let (path, digest) = (blob_path(root, &content.digest), content.digest.clone());
                blocking(move || {
                    let bytes = read_bounded(&path, bytes_max)?.ok_or_else(|| missing(&path))?;
                    let (expected, actual) = (digest.to_string(), Digest::of(&bytes).to_string());
                    if expected == actual {
                        Ok(bytes)
                    } else {
                        Err(ImageError::DigestMismatch { expected, actual })
                    }
                })
                .await
            }
        }
    }
}

impl Transfer {
    /// Follows `bytes`, a manifest or an index, to the manifest for this machine.
    pub(super) async fn find(&self, bytes: Vec<u8>) -> Result<Found, ImageError> {
        let mut bytes = bytes;
        for _ in 0..INDEX_DEPTH_MAX {
            let digest = Digest::of(&bytes);
            match Document::parse(&format!("manifest {digest}"), &bytes)? {
                Document::Image(manifest) => {
                    return Ok(Found {
                        digest,
                        bytes,
                        manifest,
                    });
                }
                Document::Index(index) => {
                    let chosen = manifest::content(&manifest::choose(&self.name, &index)?)?;
                    bytes = self.source.document(&chosen).await?;
                }
            }
        }
        Err(ImageError::malformed(
            &self.name,
            "its indexes are nested too deep",
        ))
    }

    /// Brings `found` into the store under the transfer's name.
    pub(super) async fn install(&self, found: Found) -> Result<Image, ImageError> {
        // Held before it is looked whether they are there, so that they stay if they are.
        let mut hold = self.store.holds.hold();
        hold.add(claims::blob(&found.digest));
        hold.add(claims::blob(&found.manifest.config.digest));
        let config_bytes = self.config(&found.manifest.config).await?;
        let config =
            manifest::parse_config(&self.name, &found.manifest.config.digest, &config_bytes)?;
        let layers = found.manifest.stack(&config)?;
        for layer in &layers {
            hold.add(claims::blob(&layer.blob.digest));
            hold.add(claims::layer(layer));
        }
        // From the bottom up, so that two images with common layers cannot wait for each other.
        let mut makers = Vec::new();
        for layer in &layers {
            makers.push(self.store.makers.lock(&claims::layer(layer)).await);
        }
        let stop = CancellationToken::new();
        let _stop_when_dropped = stop.clone().drop_guard();
        let ready: Vec<Ready> = stream::iter(layers.clone())
            .map(|layer| self.prepare(layer, stop.clone()))
            .buffered(LAYERS_AT_A_TIME)
            .try_collect()
            .await?;
        self.publish(
            found,
            config_bytes,
            layers.into_iter().zip(ready).collect(),
            makers,
            hold,
        )
        .await
    }

    async fn config(&self, content: &Content) -> Result<Vec<u8>, ImageError> {
        if content.size > CONFIG_BYTES_MAX {
            let reason = format!("it is longer than {CONFIG_BYTES_MAX} bytes");
            let what = format!("configuration {}", content.digest);
            return Err(ImageError::malformed(what, reason));
        }
        // One in the store is as good, unless it is damaged.
        match self
            .store
            .layout
            .read_blob(&content.digest, CONFIG_BYTES_MAX)
        {
            Ok(bytes) => Ok(bytes),
            Err(_) => self.source.small_blob(content, CONFIG_BYTES_MAX).await,
        }
    }

    /// Sees to it that a layer's blob is in the store and its tree unpacked.
    async fn prepare(&self, layer: Layer, stop: CancellationToken) -> Result<Ready, ImageError> {
        let layout = &self.store.layout;
        let (blob, tree) = (
            layout.blob(&layer.blob.digest),
            layout.layers().join(layer.directory()),
        );
        if blob.exists() {
            if tree.exists() {
                self.report(TransferEvent::Progress {
                    digest: layer.blob.digest.to_string(),
                    done_bytes: layer.blob.size,
                    total_bytes: layer.blob.size,
                });
                return Ok(Ready::Already);
            }
            match self.unpack_stored(&layer, &blob, stop.clone()).await {
                // The disk has damaged it: fetch it again.
                Err(ImageError::DigestMismatch { .. } | ImageError::SizeMismatch { .. }) => {}
                result => return result,
            }
        }
        self.fetch(layer, stop).await
    }

    async fn unpack_stored(
        &self,
        layer: &Layer,
        blob: &Path,
        stop: CancellationToken,
    ) -> Result<Ready, ImageError> {
        let job = self.job(layer.clone(), stop, false)?;
        let permit = self.permit().await?;
        let blob = blob.to_owned();
        blocking(move || {
            let _permit = permit;
            let file = open_blob(&blob)?;
            job.run(file)
        })
        .await
    }

    async fn fetch(&self, layer: Layer, stop: CancellationToken) -> Result<Ready, ImageError> {
        let job = self.job(layer.clone(), stop, true)?;
        let permit = self.permit().await?;
        let (reader, pump): (Box<dyn Read + Send>, _) = match &self.source {
            Source::Registry(session) => {
                let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
                let pump = session.stream_blob(&layer.blob, sender);
                (Box::new(ChunkReader::new(receiver)), Some(pump))
            }
            Source::Directory(root) => {
                let path = blob_path(root, &layer.blob.digest);
                (Box::new(blocking(move || open_blob(&path)).await?), None)
            }
        };
        let unpacked = blocking(move || {
            // Held here, since the thread goes on for a moment if the future is dropped.
            let _permit = permit;
            job.run(reader)
        });
        let Some(pump) = pump else {
            return unpacked.await;
        };
        tokio::pin!(pump, unpacked);
        tokio::select! {
            // What ends with an error waits for no more of the network.
            result = &mut unpacked => result,
            () = &mut pump => unpacked.await,
        }
    }

    fn job(&self, layer: Layer, stop: CancellationToken, keep: bool) -> Result<Job, ImageError> {
        let layout = &self.store.layout;
        Ok(Job {
            copy: if keep {
                Some(layout.temporary_file()?)
            } else {
                None
            },
            directory: layout.temporary_directory()?,
            layer,
            progress: self.progress.clone(),
            stop,
        })
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, ImageError> {
        let permits = Arc::clone(&self.store.unpacks);
        permits
            .acquire_owned()
            .await
            .map_err(|_| ImageError::Cancelled)
    }

    /// Puts everything into its place: layers, configuration, manifest, and then the name.
    async fn publish(
        &self,
        found: Found,
        config: Vec<u8>,
        layers: Vec<(Layer, Ready)>,
        makers: Vec<OwnedMutexGuard<()>>,
        hold: Hold,
    ) -> Result<Image, ImageError> {
        let (store, name) = (self.store.clone(), self.name.clone());
        blocking(move || {
            let _until_done = (makers, hold);
            let layout = &store.layout;
            let (mut trees, mut files) = (Vec::new(), Vec::new());
            // Where the layers are at this moment.
            let mut below: Vec<PathBuf> = Vec::new();
            for (layer, ready) in layers {
                let path = layout.layers().join(layer.directory());
                match ready {
                    Ready::Already => below.push(path),
                    Ready::New {
                        directory,
                        implicit,
                        blob,
                    } => {
                        let under = below.iter().rev().map(|path| &**path);
                        unpack::settle(directory.path(), &implicit, under)
                            .map_err(ImageError::io("finish", &path))?;
                        below.push(directory.path().to_owned());
                        trees.push((directory, path));
                        files.extend(blob.map(|blob| (blob, layout.blob(&layer.blob.digest))));
                    }
                }
            }
            files.extend(layout.small_blob(&found.manifest.config.digest, &config)?);
            files.extend(layout.small_blob(&found.digest, &found.bytes)?);
            layout.keep_all(trees, files)?;
            layout.set_name(&name, entry(&found)?)?;
            store.describe(&name, &found.digest)
        })
        .await
    }

    /// Progress may be lost where nobody keeps up with it.
    fn report(&self, event: TransferEvent) {
        let _full = self.progress.try_send(event);
    }
}

/// The work on one layer that a thread of its own does.
struct Job {
    layer: Layer,
    /// Where the blob is stored, if it is not yet.
    copy: Option<NamedTempFile>,
    directory: TempDir,
    progress: mpsc::Sender<TransferEvent>,
    stop: CancellationToken,
}

impl Job {
    fn run(self, source: impl Read) -> Result<Ready, ImageError> {
        let Self {
            layer,
            copy,
            directory,
            progress,
            stop,
        } = self;
        let digest = layer.blob.digest.to_string();
        let total_bytes = layer.blob.size;
        let report = move |done_bytes| {
            let digest = digest.clone();
            let _full = progress.try_send(if done_bytes < total_bytes {
                TransferEvent::Progress {
                    digest,
                    done_bytes,
                    total_bytes,
                }
            } else {
                TransferEvent::Unpacking { digest }
            });
        };
        let mut intake = Intake::new(source, layer.blob.clone(), copy, Box::new(report), stop);
        let unpacked = unpack::unpack(&mut intake, directory.path(), &layer.diff_id);
        if let Err(error @ (ImageError::Io { .. } | ImageError::NoSpace { .. })) = unpacked {
            return Err(error);
        }
        // That the content is not what it should be explains all else that is wrong with it.
        intake.verify()?;
        let implicit = unpacked?;
        Ok(Ready::New {
            directory,
            implicit,
            blob: intake.into_copy(),
        })
    }
}

fn entry(found: &Found) -> Result<Descriptor, ImageError> {
    let malformed = |error| ImageError::malformed("the index", error);
    // What it calls itself; before OCI it did not have to.
    let declared: Option<MediaType> = serde_json::from_slice::<serde_json::Value>(&found.bytes)
        .ok()
        .and_then(|manifest| Some(MediaType::from(manifest.get("mediaType")?.as_str()?)));
    let media_type = declared.unwrap_or_else(|| MediaType::from(MANIFEST_MEDIA_TYPES[0]));
    let digest: oci_spec::image::Digest = found
        .digest
        .to_string()
        .parse()
        .map_err(|error| ImageError::malformed("the index", format!("{error}")))?;
    let mut entry = Descriptor::new(media_type, found.bytes.len() as u64, digest);
    let platform = PlatformBuilder::default()
        .os(Os::Linux)
        .architecture(Arch::Amd64)
        .build();
    entry.set_platform(Some(platform.map_err(malformed)?));
    Ok(entry)
}

fn blob_path(root: &Path, digest: &Digest) -> PathBuf {
    root.join("blobs/sha256").join(digest.hex())
}

fn open_blob(path: &Path) -> Result<File, ImageError> {
    open_regular(path).map_err(|error| {
        if error.kind() == ErrorKind::NotFound {
            missing(path)
        } else {
            ImageError::io("open", path)(error)
        }
    })
}

fn missing(path: &Path) -> ImageError {
    ImageError::malformed(
        "the image layout",
        format_args!("{} is missing", path.display()),
    )
}
