//! The runtime as an engine uses it: the binary, with a root file system of busybox. Needs root.

#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod bundle;
mod command_line;
mod devices;
mod exec;
mod hooks;
mod isolation;
mod lifecycle;
mod limits;
mod mounts;
mod namespaces;
mod network_devices;
mod process;
mod races;
mod rootless;
mod seccomp;

/// The conformance table of docs/oci.md is worth what its tests are.
#[test]
fn every_test_that_the_document_names_is_there() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = std::fs::read_to_string(directory.join("../docs/oci.md")).unwrap();
    let names = document
        .split('`')
        .filter_map(|word| word.split_once("::"))
        .filter(|(module, name)| !module.contains(' ') && !name.contains(' '));
    let mut count = 0;
    for (module, name) in names {
        let path = directory.join(format!("tests/oci/{module}.rs"));
        let tests = std::fs::read_to_string(path).unwrap();
        assert!(tests.contains(&format!("fn {name}()")), "{module}::{name}");
        count += 1;
    }
    assert!(count > 50, "only {count} are named");
}
