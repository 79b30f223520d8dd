//! `cargo xtask peers`: the tests of hostd-oci with another runtime in its place, so that the tests are
//! tested. What fails there is known, each with its reason, in docs/oci-peers.md; whatever else fails, or
//! does not fail any more, is an error.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::step::{command, step};
use crate::{packages, paths, test};

/// Relative to the root of the tree.
const TABLE: &str = "docs/oci-peers.md";

/// How a reason starts that does not hold every time.
const SOMETIMES: &str = "sometimes";

/// crun does not start where a v2 hierarchy is beside those of v1.
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// Runs the tests of hostd-oci against runc and crun (needs root)
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// `runc` or `crun`; both without it
    peers: Vec<String>,
}

/// The columns of the table, from the second on.
const PEERS: [&str; 2] = ["runc", "crun"];

pub(crate) fn peers(arguments: &Arguments) -> Result<()> {
    packages::ensure(&PEERS)?;
    let table = fs::read_to_string(paths::root().join(TABLE))?;
    let programs = step("Build the tests of hostd-oci", || {
        test::programs(&BTreeSet::new(), &BTreeSet::from(["oci"]))
    })?;
    let [(_, program)] = programs.as_slice() else {
        bail!("Cargo built other tests than those of hostd-oci");
    };
    for (column, peer) in PEERS.iter().enumerate() {
        if !arguments.peers.is_empty() && !arguments.peers.iter().any(|asked| asked == peer) {
            continue;
        }
        step(&format!("Test the tests with {peer}"), || {
            compare(&failures(program, peer)?, &reasons(&table, column + 1))
        })?;
    }
    Ok(())
}

/// The tests that fail with `peer`.
fn failures(program: &Path, peer: &str) -> Result<BTreeSet<String>> {
    let mut tests = if peer == "crun" && Path::new(UNIFIED).exists() {
        let mut apart = command("unshare", ["--mount", "--propagation", "private"]);
        let script = format!("umount {UNIFIED} && exec \"$0\"");
        apart.args(["sh", "-c", &script]).arg(program);
        apart
    } else {
        Command::new(program)
    };
    tests.env("HOSTD_OCI_UNDER_TEST", peer).stdin(Stdio::null());
    let output = tests.output().context("cannot run the tests")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        text.contains("test result: "),
        "the tests did not come to their end: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let list = text
        .rsplit_once("\nfailures:\n")
        .map_or("", |(_, list)| list);
    Ok(list
        .lines()
        .map_while(|line| line.strip_prefix("    "))
        .map(str::to_owned)
        .collect())
}

/// The rows of the table that have a reason in `column`: the test, and the reason.
fn reasons(table: &str, column: usize) -> Vec<(&str, &str)> {
    let cells = |line| str::split(line, '|').skip(1).map(str::trim);
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    rows.filter_map(|line| {
        let name = cells(line).next()?.trim_matches('`');
        let reason = cells(line).nth(column)?;
        (!reason.is_empty()).then_some((name, reason))
    })
    .collect()
}

fn compare(failed: &BTreeSet<String>, reasons: &[(&str, &str)]) -> Result<()> {
    let mut surprises = Vec::new();
    for name in failed {
        if !reasons.iter().any(|(known, _)| known == name) {
            surprises.push(format!("{name} fails"));
        }
    }
    for (name, reason) in reasons {
        if !failed.contains(*name) && !reason.starts_with(SOMETIMES) {
            surprises.push(format!("{name} does not fail: {reason}"));
        }
    }
    if !surprises.is_empty() {
        bail!("{TABLE} says otherwise:\n{}", surprises.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_table_knows_may_fail() {
        let table = "| test | runc | crun |\n|---|---|---|\n\
                     | `a::b` | too old | |\n| `c::d` | sometimes late | no |\n";
        let (runc, crun) = (reasons(table, 1), reasons(table, 2));
        assert_eq!(runc, [("a::b", "too old"), ("c::d", "sometimes late")]);
        assert_eq!(crun, [("c::d", "no")]);
        let failed = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        compare(&failed(&["a::b"]), &runc).unwrap();
        compare(&failed(&["a::b", "c::d"]), &runc).unwrap();
        compare(&failed(&[]), &crun).unwrap_err();
        compare(&failed(&["a::b", "c::d"]), &crun).unwrap_err();
    }
}
