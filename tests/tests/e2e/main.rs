//! What a user does with hostd, for both kinds of isolation from one table.
//!
//! A test gets the host and a kind, and knows no more of the kind than a user would.

mod api;
mod confinement;
mod crash;
mod daemon;
mod images;
mod lifecycle;
mod limits;
mod memory;
mod network;
mod origins;
mod power_button;
mod process;
mod snapshots;
mod users;
mod vmm;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use tests::{Host, Kind, kinds};

/// A test of one kind of instance.
type KindTest = fn(&Host, Kind);

/// A test of the host, or of what has only one kind.
type HostTest = fn(&Host);

/// A test and its name.
type Named<T> = (&'static str, T);

const KIND_TESTS: &[(&str, &[Named<KindTest>])] = &[
    ("process", process::TESTS),
    ("lifecycle", lifecycle::TESTS),
    ("limits", limits::TESTS),
    ("network", network::TESTS),
    ("snapshots", snapshots::TESTS),
    ("origins", origins::TESTS),
];

/// Those that take the daemon away from under everybody else, and so have it to themselves.
const LONE_TESTS: &[(&str, &[Named<KindTest>])] = &[("daemon", daemon::TESTS)];

/// Each is run where the instances that it takes are tested.
const HOST_TESTS: &[(Kind, &str, &[Named<HostTest>])] = &[
    (Kind::Container, "api", api::TESTS),
    (Kind::Container, "images", images::TESTS),
    (Kind::Container, "users", users::TESTS),
    (Kind::Vm, "confinement", confinement::TESTS),
    (Kind::Vm, "crash", crash::TESTS),
    (Kind::Vm, "memory", memory::TESTS),
    (Kind::Vm, "power_button", power_button::TESTS),
    (Kind::Vm, "vmm", vmm::TESTS),
];

/// What is run of the two tables, so that several hosts can share the work.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Part {
    All,
    /// What each kind must do alike.
    OfEachKind,
    /// Tests of the host, and of what has only one kind.
    OfOneKind,
}

impl Part {
    fn chosen() -> Self {
        match std::env::var("HOSTD_E2E_PART").as_deref() {
            Err(_) => Self::All,
            Ok("each-kind") => Self::OfEachKind,
            Ok("one-kind") => Self::OfOneKind,
            Ok(other) => {
                panic!("HOSTD_E2E_PART is `{other}`; it can be `each-kind` or `one-kind`")
            }
        }
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, Vec::new()).exit_code();
    }
    let host = Arc::new(Host::from_environment());
    let mut trials = Vec::new();
    let (kinds, part) = (kinds(), Part::chosen());
    let host_tests = HOST_TESTS
        .iter()
        .filter(|(kind, ..)| part != Part::OfEachKind && kinds.contains(kind));
    for (_, group, tests) in host_tests {
        for (name, test) in *tests {
            let host = Arc::clone(&host);
            trials.push(Trial::test(format!("{group}::{name}"), move || {
                attempt(|| test(&host))
            }));
        }
    }
    let kinds = if part == Part::OfOneKind {
        &[]
    } else {
        kinds.as_slice()
    };
    trials.extend(kind_trials(&host, kinds, KIND_TESTS));
    let together = libtest_mimic::run(&arguments, trials);
    arguments.test_threads = Some(1);
    let alone = libtest_mimic::run(&arguments, kind_trials(&host, kinds, LONE_TESTS));
    // The last owner takes the daemon and all instances down.
    drop(host);
    if together.has_failed() || alone.has_failed() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn kind_trials(
    host: &Arc<Host>,
    kinds: &[Kind],
    groups: &[(&str, &'static [Named<KindTest>])],
) -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in kinds.iter().copied() {
        for (group, tests) in groups {
            for (name, test) in *tests {
                let host = Arc::clone(host);
                let name = format!("{}::{group}::{name}", kind.name());
                trials.push(Trial::test(name, move || attempt(|| test(&host, kind))));
            }
        }
    }
    trials
}

/// A failed assertion fails this test and no other.
fn attempt(test: impl FnOnce()) -> Result<(), Failed> {
    catch_unwind(AssertUnwindSafe(test)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Failed::from(text.unwrap_or_else(|| "it panicked".to_owned()))
    })
}
