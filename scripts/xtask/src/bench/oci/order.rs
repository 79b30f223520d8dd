//! `scripts/bench oci --order`: in which order the functions of hostd-oci are to lie in its file.
//!
//! A runtime is executed for a few milliseconds, and its memory is mostly its own code, in pages that
//! the kernel maps around each place that is used. So what every run uses lies together, in the order
//! in which it is used: less memory, and a tenth less of processor time. The linker is told so by a list
//! of names (`container/build.rs`). Names of Rust's functions have a digest in them that changes with the
//! compiler and with their types; those that have gone do no harm, and the list is made anew now and then.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::bundle::Bundles;
use super::runtime::Runtime;
use super::trace::Trace;
use crate::paths;
use crate::step::{command, run, step};

/// Where the list is, below the root of the tree.
const FILE: &str = "container/functions.order";

const HEADER: &str = "# What hostd-oci executes, in the order of the first time; made by `scripts/bench oci --order`.\n";

/// Has hostd-oci do what is measured, and writes the list.
pub(super) fn write(runtime: &Runtime, bundles: &Bundles, work: &Path) -> Result<()> {
    let program = paths::binaries().join("hostd-oci");
    let functions = functions(&program)?;
    let mut trace = Trace::of(&program, functions.keys().copied(), forgetting(&functions)?)?;
    for (title, calls) in scenes(runtime, bundles, work)? {
        step(title, || calls.iter().try_for_each(|call| trace.run(call)))?;
    }
    let names = trace
        .executed
        .iter()
        .filter_map(|address| functions.get(address));
    let names: Vec<&str> = names.flatten().map(String::as_str).collect();
    let text = names
        .iter()
        .fold(HEADER.to_owned(), |text, name| text + name + "\n");
    let what = format!("Write the names of {} functions to {FILE}", names.len());
    step(&what, || {
        fs::write(paths::root().join(FILE), text).context("Cannot write the list")
    })
}

/// The function that lets go of the program's code, and so would of all that a trace has put there.
fn forgetting(functions: &BTreeMap<u64, Vec<String>>) -> Result<Vec<u64>> {
    let names = |names: &[String]| names.iter().any(|name| name.contains("forget_code"));
    let found: Vec<u64> = functions
        .iter()
        .filter_map(|(address, all)| names(all).then_some(*address))
        .collect();
    ensure!(!found.is_empty(), "hostd-oci has no function `forget_code`");
    Ok(found)
}

/// What is done, in the order of what it is to be fast for.
fn scenes(
    runtime: &Runtime,
    bundles: &Bundles,
    work: &Path,
) -> Result<Vec<(&'static str, Vec<Command>)>> {
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

/// Where the functions are, and their names. Functions that are the same lie in one place under several.
fn functions(program: &Path) -> Result<BTreeMap<u64, Vec<String>>> {
    let table = run(command("nm", ["--defined-only"]).arg(program))?;
    let mut functions: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for line in table.lines() {
        let mut words = line.split_whitespace();
        if let (Some(address), Some("t" | "T" | "w" | "W" | "i"), Some(name)) =
            (words.next(), words.next(), words.next())
        {
            let address = u64::from_str_radix(address, 16).context("nm names no address")?;
            functions.entry(address).or_default().push(name.to_owned());
        }
    }
    Ok(functions)
}
