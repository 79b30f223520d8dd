//! Turns an archive file into an image layout: a tar of one, or what `docker save` writes.
//!
//! Nothing is written under a name that the archive chose: a blob has the digest for a name, and
//! everything else is numbered.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::error::ImageError;
use super::layout::{Digest, INDEX_BYTES_MAX, NAME_ANNOTATION, open_regular, read_bounded};
use super::manifest::{LAYERS_MAX, MANIFEST_MEDIA_TYPES};
use super::unpack::{Archive, Kind, decompress};

/// Members of an archive: blobs, and some small files for each layer.
const MEMBERS_MAX: usize = 16 * 1024;

/// What an archive may unpack to: an image of several of the largest layers.
const ARCHIVE_BYTES_MAX: u64 = 64 * 1024 * 1024 * 1024;

const BUFFER_BYTES: usize = 128 * 1024;

const BLOB_PREFIX: &str = "blobs/sha256/";

/// An image of a Docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// What the archive holds beside `index.json`.
#[derive(Default)]
struct Members {
    /// By name: the file it was written to.
    files: HashMap<String, Member>,
    /// By name: the name that it links to.
    links: HashMap<String, String>,
}

#[derive(Clone, Debug)]
struct Member {
    path: PathBuf,
    digest: Digest,
    size: u64,
}

/// Unpacks the archive at `path` into the empty directory `root`, as an image layout.
pub(super) fn unpack(path: &Path, root: &Path, stop: &CancellationToken) -> Result<(), ImageError> {
    let what = path.display().to_string();
    let file = open_regular(path).map_err(ImageError::io("open", path))?;
    let broken = |error| ImageError::malformed(&what, error);
    let stream = decompress(BufReader::with_capacity(BUFFER_BYTES, file)).map_err(broken)?;
    let blobs = root.join(BLOB_PREFIX);
    let other = root.join("other");
    for directory in [&blobs, &other] {
        fs::create_dir_all(directory).map_err(ImageError::io("create", directory))?;
    }
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER_BYTES, stream));
    let mut members = Members::default();
    let mut bytes = 0_u64;
    while let Some(entry) = archive.next_entry().map_err(broken)? {
        let name = String::from_utf8_lossy(&entry.path)
            .trim_start_matches("./")
            .to_owned();
        bytes = bytes.saturating_add(entry.size);
        let count = members.files.len() + members.links.len();
        if bytes > ARCHIVE_BYTES_MAX || count == MEMBERS_MAX || entry.segments.is_some() {
            return Err(ImageError::malformed(&what, "it is too large for an image"));
        }
        match entry.kind {
            Kind::Regular => {
                let target = match name
                    .strip_prefix(BLOB_PREFIX)
                    .map(|hex| format!("sha256:{hex}"))
                {
                    _ if name == "index.json" => root.join("index.json"),
                    Some(digest) if Digest::parse(&digest).is_some() => root.join(&name),
                    _ => other.join(count.to_string()),
                };
                let member = write(&mut archive, target, stop).map_err(|error| match error {
                    Written::Stream(error) => broken(error),
                    Written::File(error) => error,
                })?;
                members.files.insert(name, member);
            }
            Kind::Symlink | Kind::HardLink => {
                let target = String::from_utf8_lossy(&entry.link);
                let base = if entry.kind == Kind::Symlink {
                    &*name
                } else {
                    ""
                };
                members.links.insert(name.clone(), join(base, &target));
            }
            Kind::Directory | Kind::Fifo | Kind::Device => {}
        }
    }
    if root.join("index.json").exists() {
        Ok(())
    } else {
        convert(&what, root, &members)
    }
}

enum Written {
    Stream(io::Error),
    File(ImageError),
}

fn write(data: &mut impl Read, path: PathBuf, stop: &CancellationToken) -> Result<Member, Written> {
    let failed = |error| Written::File(ImageError::io("write", &path)(error));
    let mut file = File::create(&path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut size = 0;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        if stop.is_cancelled() {
            return Err(Written::File(ImageError::Cancelled));
        }
        let read = data.read(&mut buffer).map_err(Written::Stream)?;
        if read == 0 {
            let digest = Digest::finish(hasher);
            return Ok(Member { path, digest, size });
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
        file.write_all(&buffer[..read]).map_err(failed)?;
    }
}

/// Writes the index and the manifests that a Docker archive lacks.
fn convert(what: &str, root: &Path, members: &Members) -> Result<(), ImageError> {
    let Some(list) = members.find("manifest.json") else {
        return Ok(());
    };
    let list = read_bounded(&list.path, INDEX_BYTES_MAX)?.unwrap_or_default();
    let images: Vec<DockerImage> =
        serde_json::from_slice(&list).map_err(|error| ImageError::malformed(what, error))?;
    let mut entries = Vec::new();
    for image in images {
        if image.layers.len() > LAYERS_MAX {
            return Err(ImageError::malformed(
                what,
                "an image of it has too many layers",
            ));
        }
        let blob = |name: &str, media_type: &str| {
            let member = members
                .find(name)
                .ok_or_else(|| ImageError::malformed(what, format!("`{name}` is missing")))?;
            let target = root.join(BLOB_PREFIX).join(member.digest.hex());
            if !target.exists() {
                fs::hard_link(&member.path, &target).map_err(ImageError::io("create", &target))?;
            }
            Ok(json!({
                "mediaType": media_type,
                "digest": member.digest.to_string(),
                "size": member.size,
            }))
        };
        let config = blob(&image.config, "application/vnd.oci.image.config.v1+json")?;
        let layers = image.layers.iter();
        let layers = layers.map(|layer| blob(layer, "application/vnd.oci.image.layer.v1.tar"));
        let layers = layers.collect::<Result<Vec<_>, ImageError>>()?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_MEDIA_TYPES[0],
            "config": config,
            "layers": layers,
        });
        let manifest = manifest.to_string();
        let digest = Digest::of(manifest.as_bytes());
        let path = root.join(BLOB_PREFIX).join(digest.hex());
        fs::write(&path, &manifest).map_err(ImageError::io("write", &path))?;
        let names = image.repo_tags.filter(|tags| !tags.is_empty());
        let names = names.map_or_else(|| vec![None], |tags| tags.into_iter().map(Some).collect());
        for name in names {
            let annotations = name.map(|name| json!({ NAME_ANNOTATION: name }));
            entries.push(json!({
                "mediaType": MANIFEST_MEDIA_TYPES[0],
                "digest": digest.to_string(),
                "size": manifest.len(),
                "annotations": annotations,
            }));
        }
    }
    let index = json!({ "schemaVersion": 2, "manifests": entries });
    let path = root.join("index.json");
    fs::write(&path, index.to_string()).map_err(ImageError::io("write", &path))
}

impl Members {
    /// A file by its name or by a link to it; Docker links layers that several images share.
    fn find(&self, name: &str) -> Option<&Member> {
        let target = self.links.get(name).map_or(name, String::as_str);
        self.files.get(target)
    }
}

/// The name that `target` means, relative to the member `link`.
fn join(link: &str, target: &str) -> String {
    let mut names: Vec<&str> = link.split('/').collect();
    names.pop();
    for name in target.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    names.join("/")
}
