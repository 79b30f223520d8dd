//! Manifests, indexes and configurations: parsed and checked once, before anything is fetched.

use std::collections::BTreeSet;

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::error::ImageError;
use super::layout::Digest;

/// What registries, containerd and Docker accept for a manifest or an index.
pub(super) const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Real configurations are tens of KiB.
pub(super) const CONFIG_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// What Docker and containerd stack at most.
pub(super) const LAYERS_MAX: usize = 127;

/// An index inside an index inside an index is nobody's image.
pub(super) const INDEX_DEPTH_MAX: usize = 3;

/// What may be asked of a registry, most wanted first.
pub(super) const MANIFEST_MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

const CONFIG_MEDIA_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// How a layer is compressed is read from its first bytes, so these differ in name only.
const LAYER_MEDIA_TYPES: [&str; 10] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// A blob as its descriptor gives it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Content {
    pub(super) digest: Digest,
    pub(super) size: u64,
}

/// A layer: the blob, and what it unpacks to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Layer {
    pub(super) blob: Content,
    /// Of the uncompressed tar stream.
    pub(super) diff_id: Digest,
    /// Of this layer with all the layers below it (image-spec, config.md, "Layer ChainID").
    pub(super) chain_id: Digest,
}

impl Layer {
    /// The name of the layer's directory in `layers/`.
    ///
    /// It is the chain's and not the layer's own, since a directory that a layer does not mention
    /// has the attributes of the layer below.
    pub(super) fn directory(&self) -> &str {
        self.chain_id.hex()
    }
}

/// A manifest or an index.
#[derive(Clone, Debug)]
pub(super) enum Document {
    Image(Manifest),
    Index(Box<ImageIndex>),
}

/// A manifest of an image that hostd can run, as far as the manifest tells.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) config: Content,
    pub(super) layers: Vec<Content>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
}

impl Document {
    /// Parses the bytes of a manifest or an index; `what` names it in errors.
    pub(super) fn parse(what: &str, bytes: &[u8]) -> Result<Self, ImageError> {
        let probe: Probe = parse_json(what, bytes)?;
        if let Some(media_type) = &probe.media_type
            && !MANIFEST_MEDIA_TYPES.contains(&media_type.as_str())
        {
            return Err(unsupported(what, media_type));
        }
        match (probe.layers, probe.manifests, probe.fs_layers) {
            (Some(_), None, None) => Ok(Self::Image(Manifest::parse(what, bytes)?)),
            (None, Some(_), None) => Ok(Self::Index(Box::new(parse_json(what, bytes)?))),
            (None, None, Some(_)) => Err(unsupported(
                what,
                "application/vnd.docker.distribution.manifest.v1+json",
            )),
            // Read one way here and another way there, it would be two images under one digest.
            _ => Err(ImageError::malformed(
                what,
                "it is neither a manifest nor an index",
            )),
        }
    }
}

impl Manifest {
    fn parse(what: &str, bytes: &[u8]) -> Result<Self, ImageError> {
        let manifest: ImageManifest = parse_json(what, bytes)?;
        let config_type = manifest.config().media_type().to_string();
        if !CONFIG_MEDIA_TYPES.contains(&config_type.as_str()) {
            return Err(unsupported(what, &config_type));
        }
        if manifest.layers().len() > LAYERS_MAX {
            let count = manifest.layers().len();
            let reason = format!("it has {count} layers, more than {LAYERS_MAX}");
            return Err(ImageError::malformed(what, reason));
        }
        let mut layers = Vec::with_capacity(manifest.layers().len());
        for layer in manifest.layers() {
            let media_type = layer.media_type().to_string();
            if !LAYER_MEDIA_TYPES.contains(&media_type.as_str()) {
                return Err(unsupported(
                    &format!("layer {}", layer.digest()),
                    &media_type,
                ));
            }
            layers.push(content(layer)?);
        }
        Ok(Self {
            config: content(manifest.config())?,
            layers,
        })
    }

    /// Bytes of the layers as they are stored and transferred.
    pub(super) fn size(&self) -> u64 {
        self.layers
            .iter()
            .fold(0, |sum, layer| sum.saturating_add(layer.size))
    }

    /// Joins the layers with what the configuration says they unpack to.
    pub(super) fn stack(&self, config: &ImageConfiguration) -> Result<Vec<Layer>, ImageError> {
        let what = format!("configuration {}", self.config.digest);
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != self.layers.len() {
            let (named, there) = (diff_ids.len(), self.layers.len());
            let reason = format!("it names {named} layers where the manifest has {there}");
            return Err(ImageError::malformed(what, reason));
        }
        let mut stack: Vec<Layer> = Vec::with_capacity(diff_ids.len());
        for (blob, diff_id) in self.layers.iter().zip(diff_ids) {
            let diff_id = Digest::parse(diff_id).ok_or_else(|| {
                ImageError::malformed(&what, format!("`{diff_id}` is not a sha256 digest"))
            })?;
            let chain_id = match stack.last() {
                None => diff_id.clone(),
                Some(below) => Digest::of(format!("{} {diff_id}", below.chain_id).as_bytes()),
            };
            stack.push(Layer {
                blob: blob.clone(),
                diff_id,
                chain_id,
            });
        }
        Ok(stack)
    }
}

/// Checks a descriptor: only sha256 is a name for content here.
pub(super) fn content(descriptor: &Descriptor) -> Result<Content, ImageError> {
    let text = descriptor.digest().to_string();
    let digest = Digest::parse(&text).ok_or_else(|| {
        ImageError::malformed(
            format!("descriptor {text}"),
            "only sha256 digests are supported",
        )
    })?;
    Ok(Content {
        digest,
        size: descriptor.size(),
    })
}

/// Parses an image configuration and refuses one for another machine.
pub(super) fn parse_config(
    reference: &str,
    digest: &Digest,
    bytes: &[u8],
) -> Result<ImageConfiguration, ImageError> {
    let config: ImageConfiguration = parse_json(&format!("configuration {digest}"), bytes)?;
    if *config.os() == Os::Linux && *config.architecture() == Arch::Amd64 {
        return Ok(config);
    }
    let offered = format!("{}/{}", config.os(), config.architecture());
    Err(no_platform(reference, offered))
}

/// Picks the image of an index that is for this machine.
pub(super) fn choose(reference: &str, index: &ImageIndex) -> Result<Descriptor, ImageError> {
    let mut offered = BTreeSet::new();
    let mut best: Option<(u32, &Descriptor)> = None;
    for entry in index.manifests() {
        let Some(platform) = entry.platform() else {
            continue;
        };
        let variant = platform.variant().as_deref();
        let rank = match (platform.os(), platform.architecture(), variant) {
            (Os::Linux, Arch::Amd64, None | Some("v1")) => 0,
            // Built for newer processors only: better than nothing.
            (Os::Linux, Arch::Amd64, Some(_)) => 1,
            _ => {
                let variant = variant
                    .map(|variant| format!("/{variant}"))
                    .unwrap_or_default();
                offered.insert(format!(
                    "{}/{}{variant}",
                    platform.os(),
                    platform.architecture()
                ));
                continue;
            }
        };
        if best.is_none_or(|(other, _)| rank < other) {
            best = Some((rank, entry));
        }
    }
    match (best, index.manifests().as_slice()) {
        (Some((_, entry)), _) => Ok(entry.clone()),
        // Whom it is for is then said by its configuration.
        (None, [only]) if only.platform().is_none() => Ok(only.clone()),
        (None, _) => {
            let offered: Vec<_> = offered.into_iter().collect();
            let offered = if offered.is_empty() {
                "no platform that it names".to_owned()
            } else {
                offered.join(", ")
            };
            Err(no_platform(reference, offered))
        }
    }
}

fn no_platform(reference: &str, offered: String) -> ImageError {
    ImageError::NoPlatform {
        reference: reference.to_owned(),
        wanted: "linux/amd64".to_owned(),
        offered,
    }
}

fn unsupported(what: &str, media_type: &str) -> ImageError {
    ImageError::UnsupportedMediaType {
        what: what.to_owned(),
        media_type: media_type.to_owned(),
    }
}

fn parse_json<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::malformed(what, error))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn digest(seed: &str) -> String {
        Digest::of(seed.as_bytes()).to_string()
    }

    fn descriptor(media_type: &str, seed: &str) -> serde_json::Value {
        json!({"mediaType": media_type, "digest": digest(seed), "size": 7})
    }

    fn manifest(layer_types: &[&str]) -> serde_json::Value {
        let layers: Vec<_> = layer_types
            .iter()
            .map(|kind| descriptor(kind, kind))
            .collect();
        json!({
            "schemaVersion": 2,
            "config": descriptor("application/vnd.oci.image.config.v1+json", "config"),
            "layers": layers,
        })
    }

    fn parse(value: &serde_json::Value) -> Result<Document, ImageError> {
        Document::parse("manifest m", value.to_string().as_bytes())
    }

    #[test]
    fn every_known_layer_type_is_accepted_and_no_other() {
        let Document::Image(parsed) = parse(&manifest(&LAYER_MEDIA_TYPES)).unwrap() else {
            panic!("not an image");
        };
        assert_eq!(parsed.layers.len(), LAYER_MEDIA_TYPES.len());
        assert_eq!(parsed.size(), 7 * 10);
        let chart = manifest(&["application/vnd.cncf.helm.chart.content.v1.tar+gzip"]);
        assert!(matches!(
            parse(&chart),
            Err(ImageError::UnsupportedMediaType { .. })
        ));
    }

    #[test]
    fn a_document_that_is_two_things_at_once_is_refused() {
        let mut both = manifest(&[]);
        both["manifests"] = json!([]);
        assert!(matches!(parse(&both), Err(ImageError::Malformed { .. })));
        assert!(matches!(
            parse(&json!({"schemaVersion": 2})),
            Err(ImageError::Malformed { .. })
        ));
        let old = json!({"schemaVersion": 1, "fsLayers": []});
        assert!(matches!(
            parse(&old),
            Err(ImageError::UnsupportedMediaType { .. })
        ));
    }

    #[test]
    fn the_layers_of_an_image_are_bounded() {
        let many = manifest(&vec![LAYER_MEDIA_TYPES[0]; LAYERS_MAX + 1]);
        assert!(matches!(parse(&many), Err(ImageError::Malformed { .. })));
    }

    #[test]
    fn an_index_gives_the_image_for_this_machine() {
        let entry = |os: &str, architecture: &str, variant: Option<&str>, seed: &str| {
            let mut entry = descriptor(MANIFEST_MEDIA_TYPES[0], seed);
            entry["platform"] = json!({"os": os, "architecture": architecture});
            if let Some(variant) = variant {
                entry["platform"]["variant"] = json!(variant);
            }
            entry
        };
        let arm = entry("linux", "arm64", Some("v8"), "arm");
        let new = entry("linux", "amd64", Some("v3"), "new");
        let plain = entry("linux", "amd64", None, "plain");
        let attestation = entry("unknown", "unknown", None, "attestation");
        let bare = descriptor(MANIFEST_MEDIA_TYPES[0], "bare");
        for (entries, chosen) in [
            (vec![&arm, &new, &plain, &attestation], Some("plain")),
            (vec![&arm, &new], Some("new")),
            (vec![&bare], Some("bare")),
            (vec![&arm, &attestation], None),
            (vec![&bare, &arm], None),
            (vec![], None),
        ] {
            let index = json!({"schemaVersion": 2, "manifests": entries});
            let Document::Index(index) = parse(&index).unwrap() else {
                panic!("not an index")
            };
            let result = choose("demo", &index).map(|entry| entry.digest().to_string());
            match chosen {
                Some(seed) => assert_eq!(result.unwrap(), digest(seed)),
                None => assert!(matches!(result, Err(ImageError::NoPlatform { .. }))),
            }
        }
    }

    #[test]
    fn a_configuration_that_docker_wrote_is_understood() {
        let value = json!({
            "architecture": "amd64", "os": "linux", "created": "2024-05-14T00:00:00.123456789Z",
            "container": "0123", "docker_version": "20.10", "author": null,
            "config": {
                "Hostname": "", "User": "", "AttachStdin": false, "Tty": false, "OpenStdin": false,
                "ExposedPorts": {"80/tcp": {}}, "Env": ["PATH=/bin"], "Cmd": null,
                "Entrypoint": ["/run"], "Image": "sha256:0", "Volumes": {"/data": {}},
                "WorkingDir": "", "OnBuild": null, "Labels": null, "StopSignal": "SIGQUIT",
                "Healthcheck": {"Test": ["NONE"]}, "ArgsEscaped": true,
            },
            "container_config": {"Cmd": ["x"], "Volumes": null},
            "history": [{"created": "2024-05-14T00:00:00Z", "created_by": "x", "empty_layer": true}],
            "rootfs": {"type": "layers", "diff_ids": []},
        });
        let config = parse_config("demo", &Digest::of(b""), value.to_string().as_bytes()).unwrap();
        let config = config.config().clone().unwrap();
        assert_eq!(*config.entrypoint(), Some(vec!["/run".to_owned()]));
        assert_eq!(*config.cmd(), None);
    }

    #[test]
    fn a_chain_names_a_layer_together_with_what_is_below_it() {
        let config = |diff_ids: &[String]| -> ImageConfiguration {
            let value = json!({"os": "linux", "architecture": "amd64",
                "rootfs": {"type": "layers", "diff_ids": diff_ids}});
            parse_config("demo", &Digest::of(b""), value.to_string().as_bytes()).unwrap()
        };
        let kinds = [LAYER_MEDIA_TYPES[0], LAYER_MEDIA_TYPES[1]];
        let Document::Image(parsed) = parse(&manifest(&kinds)).unwrap() else {
            panic!()
        };
        let (one, two) = (digest("one"), digest("two"));
        let stack = parsed.stack(&config(&[one.clone(), two.clone()])).unwrap();
        assert_eq!(stack[0].chain_id.to_string(), one);
        assert_eq!(
            stack[1].chain_id.to_string(),
            digest(&format!("{one} {two}"))
        );
        assert!(matches!(
            parsed.stack(&config(&[one])),
            Err(ImageError::Malformed { .. })
        ));
    }
}
