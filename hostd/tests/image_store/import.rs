//! Imports from every form that other tools write, and export back to them.

use std::fs::{self, File};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use hostd::image::ImageError;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;

use crate::fixture::{
    Image, Layer, Packing, REF_NAME, Store, demo_layers, skopeo, unheard, write_index,
};

fn tar_of(directory: &Path, file: &Path) {
    let mut archive = tar::Builder::new(File::create(file).unwrap());
    archive.append_dir_all(".", directory).unwrap();
    archive.finish().unwrap();
}

#[tokio::test]
async fn every_form_of_an_archive_gives_the_same_image() {
    let image = Image::demo(Packing::Plain);
    let work = TempDir::new().unwrap();
    let layout = work.path().join("layout");
    image.write_layout(&layout, "demo/app:1");
    let tar = work.path().join("layout.tar");
    tar_of(&layout, &tar);
    let gzip = work.path().join("layout.tar.gz");
    let mut encoder = GzEncoder::new(File::create(&gzip).unwrap(), Compression::fast());
    std::io::copy(&mut File::open(&tar).unwrap(), &mut encoder).unwrap();
    encoder.finish().unwrap();
    let docker = work.path().join("docker.tar");
    let from = format!("oci:{}:demo/app:1", layout.display());
    skopeo(&[
        "copy",
        "--quiet",
        &from,
        &format!("docker-archive:{}:demo/app:1", docker.display()),
    ]);
    let oci = work.path().join("oci.tar");
    skopeo(&[
        "copy",
        "--quiet",
        &from,
        &format!("oci-archive:{}:demo/app:1", oci.display()),
    ]);

    for path in [layout, tar, gzip, oci, docker] {
        let store = Store::new();
        let imported = store.store.import(&path, None, unheard()).await.unwrap();
        assert!(
            imported.reference.ends_with("demo/app:1"),
            "{}",
            imported.reference
        );
        let layers = store.store.unpacked(&imported.digest).unwrap().layers;
        assert_eq!(fs::read(layers[1].join("etc/hostname")).unwrap(), b"demo\n");
        assert_eq!(store.names("tmp"), [""; 0], "{}", path.display());
    }
}

#[tokio::test]
async fn an_import_gets_the_name_that_was_asked_for_and_is_found_by_it() {
    let work = TempDir::new().unwrap();
    Image::demo(Packing::Gzip).write_layout(work.path(), "inside");
    let store = Store::new();
    let imported = store
        .store
        .import(work.path(), Some("busybox"), unheard())
        .await
        .unwrap();
    assert_eq!(imported.reference, "busybox:latest");
    for name in ["busybox", "busybox:latest", &imported.digest] {
        assert_eq!(store.store.get(name).unwrap(), imported, "{name}");
    }
    match store.store.get("busybox:2") {
        Err(error @ ImageError::NotFound { .. }) => {
            assert!(
                error
                    .hint()
                    .unwrap()
                    .contains("hostctl image pull busybox:2")
            );
        }
        other => panic!("{other:?}"),
    }
    store
        .store
        .import(work.path(), Some("other:7"), unheard())
        .await
        .unwrap();
    assert_eq!(
        store.store.get("other").unwrap().reference,
        "other:7",
        "the only tag there is"
    );
}

#[tokio::test]
async fn an_import_of_what_is_no_image_is_refused_and_leaves_nothing() {
    let store = Store::new();
    let work = TempDir::new().unwrap();
    let directory = work.path().join("empty");
    fs::create_dir(&directory).unwrap();
    let text = work.path().join("text");
    fs::write(
        &text,
        "this is no archive, but it is long enough to look at. ".repeat(50),
    )
    .unwrap();
    let evil = work.path().join("evil");
    let layer = Layer::default().link("shadow", "/etc/shadow");
    Image::new(&[layer], Packing::Plain, "amd64").write_layout(&evil, "evil:1");
    let foreign = work.path().join("foreign");
    Image::new(&[], Packing::Plain, "arm64").write_layout(&foreign, "foreign:1");
    let incomplete = work.path().join("incomplete");
    let image = Image::demo(Packing::Gzip);
    image.write_layout(&incomplete, "incomplete:1");
    fs::remove_file(incomplete.join("blobs/sha256").join(&image.layers[1][7..])).unwrap();

    let pipe = work.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();

    for path in [
        &pipe,
        &directory,
        &text,
        &evil,
        &foreign,
        &incomplete,
        &work.path().join("missing"),
    ] {
        let error = store.store.import(path, None, unheard()).await.unwrap_err();
        match path.file_name().unwrap().to_str().unwrap() {
            "evil" => assert!(matches!(error, ImageError::Refused { .. }), "{error:?}"),
            "foreign" => assert!(matches!(error, ImageError::NoPlatform { .. }), "{error:?}"),
            "missing" | "pipe" => assert!(matches!(error, ImageError::Io { .. }), "{error:?}"),
            _ => assert!(matches!(error, ImageError::Malformed { .. }), "{error:?}"),
        }
    }
    store.assert_empty();
}

#[tokio::test]
async fn of_several_images_one_must_be_named() {
    let work = TempDir::new().unwrap();
    let layers = demo_layers();
    let (one, two) = (
        Image::demo(Packing::Gzip),
        Image::new(&layers[..1], Packing::Gzip, "amd64"),
    );
    let mut entries = Vec::new();
    for (image, name) in [(&one, "demo:1"), (&two, "demo:2")] {
        image.write_blobs(work.path());
        let mut entry = image.entry("amd64");
        entry["annotations"] = serde_json::json!({ REF_NAME: name });
        entries.push(entry);
    }
    write_index(work.path(), &entries);
    let store = Store::new();
    let error = store
        .store
        .import(work.path(), None, unheard())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("demo:1, demo:2"), "{error}");
    let imported = store
        .store
        .import(work.path(), Some("demo:2"), unheard())
        .await
        .unwrap();
    assert_eq!(imported.digest, two.digest());
}

#[tokio::test]
async fn an_export_is_what_another_store_and_skopeo_import() {
    let work = TempDir::new().unwrap();
    let image = Image::demo(Packing::Zstd);
    image.write_layout(&work.path().join("layout"), "demo:1");
    let store = Store::new();
    let imported = store
        .store
        .import(&work.path().join("layout"), None, unheard())
        .await
        .unwrap();
    let file = work.path().join("exported.tar");
    store.store.export(&imported.digest, &file).await.unwrap();

    let other = Store::new();
    assert_eq!(
        other.store.import(&file, None, unheard()).await.unwrap(),
        imported
    );
    let raw = skopeo(&[
        "inspect",
        "--raw",
        &format!("oci-archive:{}:demo:1", file.display()),
    ]);
    assert_eq!(raw.stdout, image.manifest);
    let missing = format!("sha256:{}", "0".repeat(64));
    let result = store
        .store
        .export(&missing, &work.path().join("none.tar"))
        .await;
    assert!(matches!(result, Err(ImageError::NotFound { .. })));
    assert!(!work.path().join("none.tar").exists());
}
