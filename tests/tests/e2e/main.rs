//! What a user does with hostd, for both kinds of isolation from one table.
//!
//! A test gets the host and a kind, and knows no more of the kind than a user would.

mod api;
mod daemon;
mod images;
mod lifecycle;
mod limits;
mod network;
mod process;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use tests::{Host, Kind, kinds};

/// A test of one kind of instance.
type KindTest = fn(&Host, Kind);

/// A test of what is the same whatever the kind.
type HostTest = fn(&Host);

const KIND_TESTS: &[(&str, &[(&str, KindTest)])] = &[
    ("process", process::TESTS),
    ("lifecycle", lifecycle::TESTS),
    ("limits", limits::TESTS),
    ("network", network::TESTS),
    ("daemon", daemon::TESTS),
];

const HOST_TESTS: &[(&str, &[(&str, HostTest)])] =
    &[("api", api::TESTS), ("images", images::TESTS)];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, Vec::new()).exit_code();
    }
    let host = Arc::new(Host::from_environment());
    let mut trials = Vec::new();
    for (group, tests) in HOST_TESTS {
        for (name, test) in *tests {
            let host = Arc::clone(&host);
            trials.push(Trial::test(format!("{group}::{name}"), move || {
                attempt(|| test(&host))
            }));
        }
    }
    for kind in kinds() {
        for (group, tests) in KIND_TESTS {
            for (name, test) in *tests {
                let host = Arc::clone(&host);
                let name = format!("{}::{group}::{name}", kind.name());
                trials.push(Trial::test(name, move || attempt(|| test(&host, kind))));
            }
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // The last owner takes the daemon and all instances down.
    drop(host);
    conclusion.exit_code()
}

/// A failed assertion fails this test and no other.
fn attempt(test: impl FnOnce()) -> Result<(), Failed> {
    catch_unwind(AssertUnwindSafe(test)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Failed::from(text.unwrap_or_else(|| "it panicked".to_owned()))
    })
}
