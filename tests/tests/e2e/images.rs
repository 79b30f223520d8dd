//! Images: listing, a corrupt layer, a hostile archive.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use tests::Host;

use crate::HostTest;

pub(crate) const TESTS: &[(&str, HostTest)] = &[
    ("an_imported_image_is_listed_by_its_reference", listed),
    ("a_corrupt_layer_is_refused_and_leaves_nothing", corrupt),
    ("an_image_in_use_stays", in_use),
];

fn references(host: &Host) -> Vec<String> {
    let images = host.hostctl(&["image", "list", "--json"]).json();
    let images = images.as_array().expect("a list of images");
    images
        .iter()
        .filter_map(|image| image["reference"].as_str().map(str::to_owned))
        .collect()
}

fn listed(host: &Host) {
    assert!(
        references(host)
            .iter()
            .any(|name| name.ends_with("busybox:latest"))
    );
}

/// A copy of the image that the tests run on.
fn layout(dir: &Path) -> PathBuf {
    let source = std::env::var("HOSTD_E2E_IMAGE").unwrap_or_else(|_| {
        let installed = Path::new("/usr/share/hostd/images/busybox");
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/images/busybox-1");
        let source = if installed.exists() {
            installed
        } else {
            &built
        };
        source.display().to_string()
    });
    let copy = dir.join("layout");
    let status = std::process::Command::new("cp")
        .arg("-a")
        .arg(source)
        .arg(&copy)
        .status();
    assert!(status.expect("cp runs").success());
    copy
}

fn blob(layout: &Path, digest: &Value) -> PathBuf {
    let digest = digest.as_str().expect("a descriptor has a digest");
    layout.join("blobs").join(digest.replace(':', "/"))
}

fn json(path: &Path) -> Value {
    let text = fs::read(path).expect("the layout holds it");
    serde_json::from_slice(&text).expect("it is JSON")
}

/// Adds a blob under its own digest, and returns what describes it.
fn add_blob(host: &Host, layout: &Path, content: &[u8]) -> (Value, Value) {
    let new = layout.join("new-blob");
    fs::write(&new, content).expect("the copy can be changed");
    let sum = host.run("sha256sum", &[&new.display().to_string()]).ok();
    let hex = sum.split_whitespace().next().expect("a sum comes first");
    fs::rename(&new, layout.join("blobs/sha256").join(hex)).expect("the copy can be changed");
    (format!("sha256:{hex}").into(), content.len().into())
}

/// The store may hold the good layer already, and then it never reads this one; so the image is
/// made to be of another layer, one that its store has not seen, with bytes that are not its own.
fn corrupt(host: &Host) {
    let dir = TempDir::new().expect("a directory can be made");
    let layout = layout(dir.path());
    let index_path = layout.join("index.json");
    let mut index = json(&index_path);
    let mut manifest = json(&blob(&layout, &index["manifests"][0]["digest"]));
    let mut layer = fs::read(blob(&layout, &manifest["layers"][0]["digest"])).expect("it is there");
    layer.extend_from_slice(b"another layer");
    let (digest, size) = add_blob(host, &layout, &layer);
    let damaged = blob(&layout, &digest);
    let middle = layer.len() / 2;
    layer[middle] ^= 1;
    fs::write(damaged, layer).expect("the copy can be changed");
    manifest["layers"][0]["digest"] = digest;
    manifest["layers"][0]["size"] = size;
    let (digest, size) = add_blob(host, &layout, manifest.to_string().as_bytes());
    index["manifests"][0]["digest"] = digest;
    index["manifests"][0]["size"] = size;
    fs::write(index_path, index.to_string()).expect("the copy can be changed");

    let path = layout.display().to_string();
    let refused = host
        .hostctl(&["image", "import", "--name", "corrupt:latest", &path])
        .exits(125);
    assert!(refused.stderr.contains("digest"), "{}", refused.stderr);
    assert!(!references(host).iter().any(|name| name.contains("corrupt")));
}

fn in_use(host: &Host) {
    host.hostctl(&["create", "--name", "holder", "busybox", "true"])
        .ok();
    let refused = host.hostctl(&["image", "rm", "busybox"]).exits(125);
    assert!(
        refused.stderr.contains("holder"),
        "the error names the user: {}",
        refused.stderr
    );
    host.hostctl(&["rm", "holder"]).ok();
    assert!(
        references(host)
            .iter()
            .any(|name| name.ends_with("busybox:latest"))
    );
}
