//! What the store keeps and what it lets go.

use std::collections::HashSet;
use std::fs;

use hostd::api::types;
use hostd::image::{ImageError, ImageStore};
use tempfile::TempDir;

use crate::fixture::{Image, Packing, Store, demo_layers, unheard};

async fn import(store: &Store, image: &Image, name: &str) -> types::Image {
    let work = TempDir::new().unwrap();
    image.write_layout(work.path(), name);
    store
        .store
        .import(work.path(), None, unheard())
        .await
        .unwrap()
}

#[tokio::test]
async fn garbage_is_what_no_name_and_no_instance_needs() {
    let store = Store::new();
    let layers = demo_layers();
    let (base, whole) = (
        Image::new(&layers[..1], Packing::Gzip, "amd64"),
        Image::demo(Packing::Gzip),
    );
    let base_image = import(&store, &base, "base:1").await;
    let whole_image = import(&store, &whole, "whole:1").await;
    store.store.disk(&whole_image.digest).await.unwrap();
    assert_eq!(
        store.names("blobs/sha256").len(),
        6,
        "the base layer is stored once"
    );
    assert_eq!(store.names("layers").len(), 2);

    let none = HashSet::new();
    let nothing = store.store.collect_garbage(&none).await.unwrap();
    assert_eq!((nothing.files, nothing.bytes), (0, 0));

    store.store.remove("whole:1").await.unwrap();
    assert!(matches!(
        store.store.get("whole:1"),
        Err(ImageError::NotFound { .. })
    ));
    let in_use = HashSet::from([whole_image.digest.clone()]);
    assert_eq!(store.store.collect_garbage(&in_use).await.unwrap().files, 0);
    store.store.unpacked(&whole_image.digest).unwrap();

    let collected = store.store.collect_garbage(&none).await.unwrap();
    // Manifest, configuration, one layer's blob and tree, and the disk.
    assert_eq!(collected.files, 5);
    assert_eq!(store.names("layers").len(), 1);
    assert_eq!(store.names("disks"), [""; 0]);
    assert_eq!(store.names("tmp"), [""; 0]);
    let gone = store.store.unpacked(&whole_image.digest);
    assert!(matches!(gone, Err(ImageError::NotFound { .. })));
    store.store.unpacked(&base_image.digest).unwrap();

    store.store.remove(&base_image.digest).await.unwrap();
    store.store.collect_garbage(&none).await.unwrap();
    store.assert_empty();
}

#[tokio::test]
async fn a_store_is_the_same_after_it_was_closed() {
    let store = Store::new();
    let image = import(&store, &Image::demo(Packing::Zstd), "demo:1").await;
    let Store { store: open, dir } = store;
    assert!(matches!(
        ImageStore::open(dir.path()),
        Err(ImageError::InUse { .. })
    ));
    drop(open);
    let again = ImageStore::open(dir.path()).unwrap();
    assert_eq!(again.list().unwrap(), [image]);
}

#[tokio::test]
async fn a_blob_that_rotted_is_replaced_by_the_next_import() {
    let store = Store::new();
    let demo = Image::demo(Packing::Gzip);
    let image = import(&store, &demo, "demo:1").await;
    let blob = store.blob(&demo.layers[0]);
    let mut bytes = fs::read(&blob).unwrap();
    bytes[1000] ^= 1;
    fs::write(&blob, bytes).unwrap();
    // Its tree is gone, so the blob is read again.
    for path in store.store.unpacked(&image.digest).unwrap().layers {
        fs::remove_dir_all(path).unwrap();
    }
    import(&store, &demo, "demo:1").await;
    assert_eq!(fs::read(&blob).unwrap(), demo.blobs[&demo.layers[0]]);
}
