//! The house rules that no compiler checks. Each failure names the file and the rule.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Above this a file is no longer read in one sitting; its tests do not count.
const CODE_LINES_MAX: usize = 500;

/// A crate of ours, where it lies, and which others of ours it may name.
const ARROWS: &[(&str, &[&str])] = &[
    ("vmm", &[]),
    ("container", &[]),
    ("guest-images/agent", &[]),
    ("guest-images/bench", &[]),
    ("hostd", &["agent", "container", "vmm"]),
    ("tests", &[]),
    ("scripts/xtask", &["agent", "bench-guest"]),
];

/// Names that say nothing of what is inside.
const EMPTY_NAMES: &[&str] = &[
    "base", "common", "helpers", "manager", "misc", "util", "utils",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies below the root")
}

fn files(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![root().to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).expect("the tree can be read") {
            let path = entry.expect("the tree can be read").path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if path.is_dir() {
                if !["target", "build", ".git"].contains(&name) {
                    left.push(path);
                }
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .display()
        .to_string()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let silent: Vec<_> = files("rs")
        .iter()
        .filter(|path| !read(path).starts_with("//!"))
        .map(|path| shown(path))
        .collect();
    assert!(
        silent.is_empty(),
        "these do not open with `//!`: {silent:#?}"
    );
}

#[test]
fn every_source_file_can_be_read_in_one_sitting() {
    let long: Vec<_> = files("rs")
        .iter()
        .filter_map(|path| {
            let text = read(path);
            let lines = text
                .lines()
                .take_while(|line| *line != "#[cfg(test)]")
                .count();
            let is_test = path
                .components()
                .any(|part| part.as_os_str() == "tests" || part.as_os_str() == "tests.rs");
            (lines > CODE_LINES_MAX && !is_test).then(|| format!("{} ({lines})", shown(path)))
        })
        .collect();
    assert!(
        long.is_empty(),
        "more than {CODE_LINES_MAX} lines of code: {long:#?}"
    );
}

#[test]
fn no_module_is_named_after_nothing() {
    let empty: Vec<_> = files("rs")
        .iter()
        .filter(|path| {
            let stem = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or_default();
            EMPTY_NAMES.contains(&stem)
        })
        .map(|path| shown(path))
        .collect();
    assert!(empty.is_empty(), "names that say nothing: {empty:#?}");
}

#[test]
fn dependencies_point_one_way() {
    let ours: BTreeSet<&str> = ["agent", "bench-guest", "container", "hostd", "vmm"].into();
    for (krate, allowed) in ARROWS {
        let manifest = read(&root().join(krate).join("Cargo.toml"));
        let mut in_dependencies = false;
        for line in manifest.lines() {
            if line.starts_with('[') {
                in_dependencies = line == "[dependencies]";
            }
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if in_dependencies && ours.contains(name) {
                assert!(allowed.contains(&name), "{krate} may not depend on {name}");
            }
        }
    }
}

#[test]
fn unsafe_code_is_a_place_with_a_reason() {
    for path in files("rs") {
        let text = read(&path);
        if text.contains("expect(unsafe_code") && !shown(&path).starts_with("tests/") {
            let name = shown(&path);
            assert!(
                text.contains("UNSAFETY:"),
                "{name} is unsafe and has no UNSAFETY paragraph"
            );
        }
    }
}

#[test]
fn no_test_is_switched_off() {
    let marker = concat!("#[", "ignore");
    let ignored: Vec<_> = files("rs")
        .iter()
        .filter(|path| read(path).contains(marker))
        .map(|p| shown(p))
        .collect();
    assert!(ignored.is_empty(), "ignored tests in {ignored:#?}");
}

#[test]
fn links_inside_the_documents_lead_somewhere() {
    for path in files("md") {
        let text = read(&path);
        let links = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        for link in links {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let target = path.parent().expect("a file has a directory").join(file);
            assert!(
                target.exists(),
                "{} links to {link}, which is not there",
                shown(&path)
            );
        }
    }
}

/// The conformance table of the OCI runtime is worth what its tests are.
#[test]
fn every_test_that_the_runtimes_document_names_is_there() {
    let document = read(&root().join("docs/oci.md"));
    let names = document
        .split('`')
        .filter_map(|word| word.split_once("::"))
        .filter(|(module, name)| !module.contains(' ') && !name.contains(' '));
    let mut count = 0;
    for (module, name) in names {
        let tests = read(&root().join(format!("container/tests/oci/{module}.rs")));
        assert!(tests.contains(&format!("fn {name}()")), "{module}::{name}");
        count += 1;
    }
    assert!(count > 50, "only {count} are named");
}
