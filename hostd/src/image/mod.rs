//! Images: pulled or imported once, then shared by every container and virtual machine.
//!
//! ```text
//! registry ──┐             ┌── checked and stored ──▶ blobs/   (an OCI image layout)
//!            ├─ one stream ┤
//! layout ────┘             └── unpacked ──▶ layers/ ──overlayfs──▶ containers
//!                                              └──── mkfs.erofs ──▶ disks/ ──▶ virtual machines
//! ```
//!
//! What a registry or an archive says is believed only where its digest proves it, and a layer can
//! do no more than fill a directory of its own (`unpack`). An image is there once its name is in
//! the index; until then nothing of it is seen, and what an interrupted operation leaves is removed
//! by the next opening.

mod archive_file;
mod blob;
mod claims;
mod credentials;
mod disk;
mod error;
mod export;
mod garbage;
mod import;
mod layout;
mod manifest;
mod name;
mod registry;
mod transfer;
mod unpack;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use oci_spec::image::ImageConfiguration;
use tokio::sync::{Semaphore, mpsc};

use self::claims::{Holds, Makers};
use self::layout::{Digest, Layout};
use self::manifest::{CONFIG_BYTES_MAX, Document, Layer, MANIFEST_BYTES_MAX, Manifest};
use self::registry::Session;
use self::transfer::{Source, Transfer};
use crate::api::types::{Image, TransferEvent};

pub use self::credentials::Credentials;
pub use self::error::ImageError;
pub use self::garbage::Collected;

/// Layers that are unpacked at a time by all transfers together. Each has a thread, and at most
/// some MiB of chunks on the way to it.
const UNPACKS_AT_A_TIME: usize = 16;

/// The images of this host. Clones are the same store.
#[derive(Clone, Debug)]
pub struct ImageStore {
    layout: Arc<Layout>,
    holds: Holds,
    makers: Arc<Makers>,
    unpacks: Arc<Semaphore>,
}

/// How to pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Speak plain HTTP. Loopback registries are spoken to in plain HTTP without it.
    pub insecure: bool,
    /// If absent, those that `docker login` left for the user that hostd runs as.
    pub credentials: Option<Credentials>,
}

/// What an instance starts from.
#[derive(Clone, Debug)]
pub struct Unpacked {
    pub config: ImageConfiguration,
    /// For overlayfs, the lowest first.
    pub layers: Vec<PathBuf>,
}

/// An image as a read-only file system in a file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Disk {
    pub path: PathBuf,
    /// The file system's name, as `mount -t` has it.
    pub fs: &'static str,
}

impl ImageStore {
    /// Opens the store in `dir`, which is made if it is missing, and removes what an earlier
    /// process left half-made. One process can have it open at a time.
    ///
    /// # Errors
    /// [`ImageError::InUse`], [`ImageError::Io`], and [`ImageError::Malformed`] if the index is.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        Ok(Self {
            layout: Arc::new(Layout::open(dir)?),
            holds: Holds::default(),
            makers: Arc::default(),
            unpacks: Arc::new(Semaphore::new(UNPACKS_AT_A_TIME)),
        })
    }

    /// Fetches the image that `reference` stands for in its registry, for linux/amd64.
    ///
    /// Reports [`TransferEvent::Progress`] and [`TransferEvent::Unpacking`] by layer; events are
    /// lost rather than waited for if `progress` is full. A dropped future leaves nothing behind.
    ///
    /// # Errors
    /// Nearly every [`ImageError`]; the store is then as it was, but for whole layers.
    pub async fn pull(
        &self,
        reference: &str,
        options: PullOptions,
        progress: mpsc::Sender<TransferEvent>,
    ) -> Result<Image, ImageError> {
        let reference = name::parse(reference)?;
        let session = Session::new(&reference, options.insecure, options.credentials)?;
        let session = Arc::new(session);
        let source = Source::Registry(Arc::clone(&session));
        let name = reference.whole();
        let transfer = Transfer {
            store: self.clone(),
            source,
            name,
            progress,
        };
        let version = reference
            .digest()
            .or_else(|| reference.tag())
            .unwrap_or("latest");
        let found = transfer.find(session.manifest(version).await?).await?;
        transfer.install(found).await
    }

    /// The images that have a name, ordered by it, but for those that the disk has damaged. Reads
    /// some small files.
    ///
    /// # Errors
    /// [`ImageError::Malformed`] if the index is.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let mut images = Vec::new();
        for (name, entry) in self.layout.named() {
            let digest = manifest::content(&entry)?.digest;
            match self.describe(&name, &digest) {
                Ok(image) => images.push(image),
                // It can still be removed, and the others are as good as before.
                Err(error) => tracing::warn!(name, %error, "an image is damaged"),
            }
        }
        images.sort_by(|one, other| one.reference.cmp(&other.reference));
        Ok(images)
    }

    /// The image that a user means by `reference`: a name, a name without tag (`:latest`, or the
    /// only tag there is), or a digest.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Io`], and what a damaged store gives.
    pub fn get(&self, reference: &str) -> Result<Image, ImageError> {
        let (name, digest) = self.resolve(reference)?;
        self.describe(&name, &digest)
    }

    /// Takes the name away that `reference` means; [`Self::collect_garbage`] then frees the space.
    /// By a digest, all names of the image are taken away.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Io`].
    pub async fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let (name, digest) = self.resolve(reference)?;
        let names = if Digest::parse(reference).is_some() {
            let named = self.layout.named().into_iter();
            let same = named.filter(|(_, entry)| entry.digest().as_ref() == digest.to_string());
            same.map(|(name, _)| name).collect()
        } else {
            vec![name]
        };
        let store = self.clone();
        blocking(move || {
            names
                .iter()
                .try_for_each(|name| store.layout.remove_name(name))
        })
        .await
    }

    /// What an instance of the image with the manifest `digest` starts from; also for an image
    /// that has no name any more, as long as it is not collected.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Io`], and what a damaged store gives.
    pub fn unpacked(&self, digest: &str) -> Result<Unpacked, ImageError> {
        let not_found = || ImageError::NotFound {
            reference: digest.to_owned(),
        };
        let (manifest, config) = self.read(&Digest::parse(digest).ok_or_else(not_found)?)?;
        let layers = manifest.stack(&config)?;
        let layers = layers
            .iter()
            .map(|layer| self.layout.layers().join(layer.directory()));
        Ok(Unpacked {
            config,
            layers: layers.collect(),
        })
    }

    fn resolve(&self, reference: &str) -> Result<(String, Digest), ImageError> {
        let named: Vec<(String, Digest)> = self
            .layout
            .named()
            .into_iter()
            .filter_map(|(name, entry)| Some((name, Digest::parse(entry.digest().as_ref())?)))
            .collect();
        for candidate in name::candidates(reference) {
            if let Some(found) = named.iter().find(|(name, _)| *name == candidate) {
                return Ok(found.clone());
            }
        }
        let wanted = reference
            .rsplit_once('@')
            .map_or(reference, |(_, digest)| digest);
        if let Some(wanted) = Digest::parse(wanted)
            && let Some(found) = named.iter().find(|(_, digest)| *digest == wanted)
        {
            return Ok(found.clone());
        }
        let mut tags = named
            .iter()
            .filter(|(name, _)| name::is_tag_of(name, reference));
        match (tags.next(), tags.next()) {
            (Some(only), None) => Ok(only.clone()),
            _ => Err(ImageError::NotFound {
                reference: reference.to_owned(),
            }),
        }
    }

    fn describe(&self, name: &str, digest: &Digest) -> Result<Image, ImageError> {
        let (manifest, config) = self.read(digest)?;
        let created = config.created().as_ref().and_then(|text| text.parse().ok());
        Ok(Image {
            reference: name.to_owned(),
            digest: digest.to_string(),
            size: manifest.size(),
            architecture: config.architecture().to_string(),
            created_at: created.unwrap_or(Timestamp::UNIX_EPOCH),
        })
    }

    fn read(&self, digest: &Digest) -> Result<(Manifest, ImageConfiguration), ImageError> {
        let bytes = self.layout.read_blob(digest, MANIFEST_BYTES_MAX)?;
        let name = digest.to_string();
        let Document::Image(manifest) = Document::parse(&format!("manifest {digest}"), &bytes)?
        else {
            return Err(ImageError::NotFound { reference: name });
        };
        let config = self
            .layout
            .read_blob(&manifest.config.digest, CONFIG_BYTES_MAX)?;
        let config = manifest::parse_config(&name, &manifest.config.digest, &config)?;
        Ok((manifest, config))
    }

    fn stack(&self, digest: &Digest) -> Result<(Manifest, Vec<Layer>), ImageError> {
        let (manifest, config) = self.read(digest)?;
        let layers = manifest.stack(&config)?;
        Ok((manifest, layers))
    }
}

/// Runs what waits for the disk on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is shutting down.
        Err(_) => Err(ImageError::Cancelled),
    }
}
