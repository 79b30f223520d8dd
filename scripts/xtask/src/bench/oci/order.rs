//! `scripts/bench oci --order`: what hostd-oci is to be fast at, for the order of its functions.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::bundle::Bundles;
use super::runtime::Runtime;
use crate::bench::order::{List, Scene};

const LIST: List = List {
    program: "hostd-oci",
    file: "container/functions.order",
    bench: "oci",
    hindered: &["forget_code"],
};

/// Has hostd-oci do what is measured, and writes the list.
pub(super) fn write(runtime: &Runtime, bundles: &Bundles, work: &Path) -> Result<()> {
    LIST.write(&scenes(runtime, bundles, work)?)
}

/// What is done, in the order of what it is to be fast for.
fn scenes(runtime: &Runtime, bundles: &Bundles, work: &Path) -> Result<Vec<Scene>> {
    const ID: &str = "order";
    let make = |verb: &str, bundle: &Path| {
        let mut call = runtime.call([verb, "--bundle"]);
        call.arg(bundle).arg(ID);
        call
    };
    let life = vec![
        make("create", &bundles.lasting),
        runtime.call(["start", ID]),
        runtime.call(["exec", ID, "/bin/true"]),
        runtime.call(["delete", "--force", ID]),
    ];
    let directory = work.join("monitor");
    fs::create_dir(&directory)?;
    let log = json!({"path": directory.join("log"), "bytes_max": 1 << 20});
    let spec = json!({"id": ID, "root": work.join("states"), "bundle": bundles.bare, "log": log});
    fs::write(directory.join("monitor.json"), spec.to_string())?;
    let mut monitor = runtime.call(["monitor", "--dir"]);
    monitor.arg(&directory);
    Ok(vec![
        ("run", vec![make("run", &bundles.bare)]),
        ("run, as podman has it", vec![make("run", &bundles.podman)]),
        ("create, start, exec, delete", life),
        ("monitor", vec![monitor]),
    ])
}
