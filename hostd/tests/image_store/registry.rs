//! Pulls from Debian's docker-registry, which skopeo has filled.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::slice::from_ref;

use hostd::api::types::TransferEvent;
use hostd::image::{ImageError, PullOptions};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::fixture::{
    Image, Packing, Store, demo_layers, names, sha256, skopeo, unheard, write_index,
};

/// A registry on a free port of loopback, which ends with the test.
struct Registry {
    process: Child,
    address: String,
    dir: TempDir,
}

impl Registry {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let config = dir.path().join("config.yml");
        let data = dir.path().join("data");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: info, formatter: json}}\n\
                 storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:0}}\n",
                data.display()
            ),
        )
        .unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry: apt-get install docker-registry");
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let address = loop {
            let line = log.next().expect("the registry ended").unwrap();
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split('"').next().unwrap().to_owned();
            }
        };
        // A full pipe would stop it.
        std::thread::spawn(move || log.for_each(drop));
        Self {
            process,
            address,
            dir,
        }
    }

    /// Pushes the demo image and returns its reference.
    fn push(&self, image: &Image, name: &str, format: &str) -> String {
        let layout = TempDir::new().unwrap();
        image.write_layout(layout.path(), "demo");
        let reference = format!("{}/{name}", self.address);
        let from = format!("oci:{}:demo", layout.path().display());
        let to = format!("docker://{reference}");
        let arguments = [
            "copy",
            "--quiet",
            "--format",
            format,
            "--dest-tls-verify=false",
        ];
        skopeo(&[&arguments[..], &[&from, &to]].concat());
        reference
    }

    fn blob(&self, digest: &str) -> PathBuf {
        let hex = &digest[7..];
        let blobs = self.dir.path().join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[tokio::test]
async fn an_image_that_skopeo_pushed_is_pulled_and_skopeo_can_read_the_store() {
    let registry = Registry::start();
    let image = Image::demo(Packing::Gzip);
    let reference = registry.push(&image, "demo/app:1", "oci");
    let store = Store::new();
    let (sender, mut events) = mpsc::channel(1000);
    let pulled = store
        .store
        .pull(&reference, PullOptions::default(), sender)
        .await
        .unwrap();

    assert_eq!(pulled.reference, reference);
    assert_eq!(pulled.digest, image.digest());
    assert_eq!(pulled.architecture, "amd64");
    assert_eq!(pulled.created_at.to_string(), "2026-01-02T03:04:05Z");
    let sizes: usize = image
        .layers
        .iter()
        .map(|digest| image.blobs[digest].len())
        .sum();
    assert_eq!(pulled.size, sizes as u64);
    assert_eq!(store.store.list().unwrap(), from_ref(&pulled));
    assert_eq!(store.store.get(&reference).unwrap(), pulled);
    assert_eq!(store.store.get(&pulled.digest).unwrap(), pulled);

    let mut unpacking = Vec::new();
    while let Some(event) = events.recv().await {
        match event {
            TransferEvent::Progress {
                done_bytes,
                total_bytes,
                ..
            } => {
                assert!(done_bytes < total_bytes);
            }
            TransferEvent::Unpacking { digest } => unpacking.push(digest),
            TransferEvent::Done(_) | TransferEvent::Failed(_) => panic!("not the store's to say"),
        }
    }
    unpacking.sort();
    let mut layers = image.layers.clone();
    layers.sort();
    assert_eq!(unpacking, layers);

    let unpacked = store.store.unpacked(&pulled.digest).unwrap();
    assert_eq!(unpacked.layers.len(), 2);
    assert_eq!(
        fs::read(unpacked.layers[1].join("etc/hostname")).unwrap(),
        b"demo\n"
    );
    assert_eq!(store.names("tmp"), [""; 0]);

    let from = format!("oci:{}:{reference}", store.dir.path().display());
    let copy = TempDir::new().unwrap();
    skopeo(&[
        "copy",
        "--quiet",
        &from,
        &format!("dir:{}", copy.path().display()),
    ]);
    assert!(names(copy.path()).len() > 3);
}

#[tokio::test]
async fn every_form_of_an_image_gives_the_same_layers() {
    let registry = Registry::start();
    let mut trees = Vec::new();
    for (packing, format) in [
        (Packing::Plain, "oci"),
        (Packing::Gzip, "oci"),
        (Packing::Zstd, "oci"),
        (Packing::Gzip, "v2s2"),
    ] {
        let image = Image::demo(packing);
        let reference = registry.push(&image, &format!("demo:{packing:?}-{format}"), format);
        let store = Store::new();
        let pulled = store
            .store
            .pull(&reference, PullOptions::default(), unheard())
            .await
            .unwrap();
        let layers = store.store.unpacked(&pulled.digest).unwrap().layers;
        let names = layers
            .iter()
            .map(|path| path.file_name().unwrap().to_owned());
        trees.push(names.collect::<Vec<_>>());
    }
    assert!(trees.iter().all(|tree| *tree == trees[0]), "{trees:?}");
}

#[tokio::test]
async fn an_index_is_followed_to_the_image_for_this_machine() {
    let registry = Registry::start();
    let (ours, theirs) = (
        Image::demo(Packing::Gzip),
        Image::new(&[], Packing::Gzip, "arm64"),
    );
    let layout = TempDir::new().unwrap();
    for (name, entries) in [
        ("both", vec![theirs.entry("arm64"), ours.entry("amd64")]),
        ("other", vec![theirs.entry("arm64")]),
    ] {
        ours.write_blobs(layout.path());
        theirs.write_blobs(layout.path());
        write_index(layout.path(), &entries);
        let index = fs::read(layout.path().join("index.json")).unwrap();
        let digest = sha256(&index);
        fs::write(
            layout.path().join("blobs/sha256").join(&digest[7..]),
            &index,
        )
        .unwrap();
        write_index(
            layout.path(),
            &[serde_json::json!({
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "digest": digest,
                "size": index.len(),
            })],
        );
        let to = format!("docker://{}/{name}:1", registry.address);
        let from = format!("oci:{}", layout.path().display());
        skopeo(&[
            "copy",
            "--quiet",
            "--all",
            "--dest-tls-verify=false",
            &from,
            &to,
        ]);
    }
    let store = Store::new();
    let both = format!("{}/both:1", registry.address);
    let pulled = store
        .store
        .pull(&both, PullOptions::default(), unheard())
        .await
        .unwrap();
    assert_eq!(pulled.digest, ours.digest());

    let other = format!("{}/other:1", registry.address);
    match store
        .store
        .pull(&other, PullOptions::default(), unheard())
        .await
    {
        Err(ImageError::NoPlatform {
            wanted, offered, ..
        }) => {
            assert_eq!((&*wanted, &*offered), ("linux/amd64", "linux/arm64"));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_blob_that_is_damaged_on_the_registrys_disk_is_refused_and_nothing_is_left() {
    let registry = Registry::start();
    for packing in [Packing::Gzip, Packing::Zstd] {
        let image = Image::demo(packing);
        let reference = registry.push(&image, &format!("damaged:{packing:?}"), "oci");
        let damaged = registry.blob(&image.layers[0]);
        let mut bytes = fs::read(&damaged).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x55;
        fs::write(&damaged, &bytes).unwrap();
        let store = Store::new();
        match store
            .store
            .pull(&reference, PullOptions::default(), unheard())
            .await
        {
            Err(ImageError::DigestMismatch { expected, actual }) => {
                assert_eq!(expected, image.layers[0]);
                assert_eq!(actual, sha256(&bytes));
            }
            other => panic!("{packing:?}: {other:?}"),
        }
        store.assert_empty();

        fs::write(&damaged, &image.blobs[&image.layers[0]]).unwrap();
        store
            .store
            .pull(&reference, PullOptions::default(), unheard())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn what_the_registry_does_not_have_is_said_in_its_words() {
    let registry = Registry::start();
    let store = Store::new();
    let reference = format!("{}/nothing:1", registry.address);
    match store
        .store
        .pull(&reference, PullOptions::default(), unheard())
        .await
    {
        Err(ImageError::Registry {
            status: 404,
            url,
            message,
        }) => {
            assert!(url.ends_with("/v2/nothing/manifests/1"), "{url}");
            assert!(message.contains("manifest unknown"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    store.assert_empty();
}

#[tokio::test]
async fn a_second_pull_fetches_nothing_and_a_tag_that_moved_is_followed() {
    let registry = Registry::start();
    let first = Image::demo(Packing::Gzip);
    let reference = registry.push(&first, "moving:1", "oci");
    let store = Store::new();
    let options = PullOptions::default();
    let pulled = store
        .store
        .pull(&reference, options.clone(), unheard())
        .await
        .unwrap();
    fs::remove_file(registry.blob(&first.layers[0])).unwrap();
    let again = store
        .store
        .pull(&reference, options.clone(), unheard())
        .await
        .unwrap();
    assert_eq!(pulled, again);

    let layers = demo_layers();
    let second = Image::new(&layers[..1], Packing::Zstd, "amd64");
    registry.push(&second, "moving:1", "oci");
    let moved = store
        .store
        .pull(&reference, options, unheard())
        .await
        .unwrap();
    assert_eq!(moved.digest, second.digest());
    assert_eq!(store.store.list().unwrap(), [moved]);
    // Instances of the old image go on.
    store.store.unpacked(&pulled.digest).unwrap();
}
