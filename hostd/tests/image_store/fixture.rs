//! Images built by hand, and what the tests share.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use hostd::api::types::TransferEvent;
use hostd::image::ImageStore;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use tempfile::TempDir;
use tokio::sync::mpsc;

pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

#[derive(Clone, Copy, Debug)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// A layer that is being written; each call adds an entry.
#[derive(Clone, Default)]
pub(crate) struct Layer {
    tar: Vec<u8>,
}

impl Layer {
    pub(crate) fn entry(
        mut self,
        kind: EntryType,
        mode: u32,
        path: &str,
        link: &str,
        data: &[u8],
    ) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_cksum();
        self.tar.extend_from_slice(header.as_bytes());
        self.tar.extend_from_slice(data);
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, path: &str, mode: u32, data: &[u8]) -> Self {
        self.entry(EntryType::Regular, mode, path, "", data)
    }

    pub(crate) fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, mode, path, "", b"")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, 0o777, path, target, b"")
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, 0o644, path, target, b"")
    }

    fn finish(&self) -> Vec<u8> {
        let mut tar = self.tar.clone();
        tar.resize(tar.len() + 1024, 0);
        tar
    }
}

/// An image of two layers in which the second changes what is in the first, in every way there is.
pub(crate) fn demo_layers() -> Vec<Layer> {
    let busybox = fs::read("/bin/busybox").expect("busybox: apt-get install busybox-static");
    // Content that does not compress, so that there is something to damage in the middle.
    let noise: Vec<u8> = (0..100_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes())
        .collect();
    let base = Layer::default()
        .dir("./", 0o755)
        .dir("bin", 0o755)
        .file("bin/busybox", 0o755, &busybox)
        .symlink("bin/sh", "busybox")
        .link("bin/su", "bin/busybox")
        .dir("etc", 0o755)
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n")
        .file("etc/gone", 0o644, b"gone")
        .dir("tmp", 0o1777)
        .dir("var", 0o755)
        .dir("var/cache", 0o750)
        .file("var/cache/old", 0o644, b"old")
        .file("noise", 0o600, &noise)
        .symlink("passwd", "/etc/passwd");
    let change = Layer::default()
        .file("etc/.wh.gone", 0o600, b"")
        .dir("var", 0o755)
        .dir("var/cache", 0o700)
        .file("var/cache/.wh..wh..opq", 0o600, b"")
        .file("var/cache/new", 0o644, b"new")
        .file("tmp/left", 0o644, b"left")
        .file("etc/hostname", 0o444, b"demo\n")
        .file("usr/bin/ping", 0o4755, b"#!/bin/sh\n")
        .entry(EntryType::Fifo, 0o622, "pipe", "", b"");
    vec![base, change]
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    let hash: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hash}")
}

/// An image in memory: its blobs by digest, and its manifest.
pub(crate) struct Image {
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) layers: Vec<String>,
}

impl Image {
    pub(crate) fn new(layers: &[Layer], packing: Packing, architecture: &str) -> Self {
        let mut blobs = BTreeMap::new();
        let mut put = |bytes: Vec<u8>, media_type: &str| {
            let digest = sha256(&bytes);
            let entry = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
            blobs.insert(digest, bytes);
            entry
        };
        let (mut diff_ids, mut entries) = (Vec::new(), Vec::new());
        for layer in layers {
            let tar = layer.finish();
            diff_ids.push(sha256(&tar));
            let (bytes, suffix) = match packing {
                Packing::Plain => (tar, ""),
                Packing::Gzip => {
                    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
                    gzip.write_all(&tar).unwrap();
                    (gzip.finish().unwrap(), "+gzip")
                }
                Packing::Zstd => (zstd::encode_all(&tar[..], 1).unwrap(), "+zstd"),
            };
            entries.push(put(
                bytes,
                &format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
            ));
        }
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "created": "2026-01-02T03:04:05Z",
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string().into_bytes();
        let config = put(config, "application/vnd.oci.image.config.v1+json");
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": entries,
        });
        let digests = entries
            .iter()
            .map(|entry| entry["digest"].as_str().unwrap().to_owned());
        let layers = digests.collect();
        Self {
            blobs,
            manifest: manifest.to_string().into_bytes(),
            layers,
        }
    }

    pub(crate) fn demo(packing: Packing) -> Self {
        Self::new(&demo_layers(), packing, "amd64")
    }

    pub(crate) fn digest(&self) -> String {
        sha256(&self.manifest)
    }

    pub(crate) fn entry(&self, architecture: &str) -> Value {
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.digest(),
            "size": self.manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        })
    }

    /// Writes an image layout with this image under `name`.
    pub(crate) fn write_layout(&self, root: &Path, name: &str) {
        let mut entry = self.entry("amd64");
        entry["annotations"] = json!({ REF_NAME: name });
        self.write_blobs(root);
        write_index(root, &[entry]);
    }

    pub(crate) fn write_blobs(&self, root: &Path) {
        let directory = root.join("blobs/sha256");
        fs::create_dir_all(&directory).unwrap();
        for (digest, bytes) in &self.blobs {
            fs::write(directory.join(&digest[7..]), bytes).unwrap();
        }
        fs::write(directory.join(&self.digest()[7..]), &self.manifest).unwrap();
    }
}

pub(crate) fn write_index(root: &Path, entries: &[Value]) {
    fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let index = json!({"schemaVersion": 2, "manifests": entries});
    fs::write(root.join("index.json"), index.to_string()).unwrap();
}

/// A store in a directory of its own.
pub(crate) struct Store {
    pub(crate) store: ImageStore,
    pub(crate) dir: TempDir,
}

impl Store {
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        Self {
            store: ImageStore::open(dir.path()).unwrap(),
            dir,
        }
    }

    /// Names in a subdirectory of the store.
    pub(crate) fn names(&self, directory: &str) -> Vec<String> {
        names(&self.dir.path().join(directory))
    }

    /// Nothing of any image is there.
    pub(crate) fn assert_empty(&self) {
        assert_eq!(self.store.list().unwrap(), []);
        for directory in ["blobs/sha256", "layers", "disks"] {
            assert_eq!(self.names(directory), [""; 0], "{directory}");
        }
        eventually("temporary files to vanish", || self.names("tmp").is_empty());
    }

    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(&digest[7..])
    }
}

pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// A channel that nobody reads from.
pub(crate) fn unheard() -> mpsc::Sender<TransferEvent> {
    mpsc::channel(1).0
}

/// Waits until `condition` holds; a thread that was left behind needs a moment to clean up.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program that must succeed, from the Debian package `package`.
pub(crate) fn run(package: &str, program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; apt-get install {package}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    output
}

pub(crate) fn skopeo(arguments: &[&str]) -> Output {
    run(
        "skopeo",
        "skopeo",
        &[&["--insecure-policy"], arguments].concat(),
    )
}
