//! What time a guest believes it is once it goes on.

use serde_json::json;
use vmm::guest_status;

use crate::damaged::Copy;
use crate::runner::{Machine, Snapshot};
use crate::snapshot::{COUNTER, guest, snapshot_beyond, wait_ready};

/// Where the guest keeps its time-stamp counter.
const STAMP: u32 = 0x20_8000;
/// Where the host keeps what makes a time of that, and the register that says so (Linux,
/// Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
const TIME_INFO: u32 = 0x20_9000;
const SYSTEM_TIME: u32 = 0x4b56_4d01;

const SECOND_NS: u64 = 1_000_000_000;
const HOUR_NS: u64 = 3600 * SECOND_NS;
const DAY_NS: u64 = 24 * HOUR_NS;

/// Looks at its clocks all the time.
fn watching() -> Machine {
    let look = guest().store_time_stamp(STAMP).increment(COUNTER);
    let ready = guest()
        .write_msr(SYSTEM_TIME, TIME_INFO | 1)
        .out_long(guest_status::PORT, guest_status::READY);
    Machine::new(ready.forever(&look))
}

/// What a guest has seen last.
struct Clocks {
    time_stamp: u64,
    /// KVM's clock.
    nanoseconds: u64,
}

impl Clocks {
    fn of(snapshot: &Snapshot) -> Clocks {
        let time_stamp = u64::from_le_bytes(snapshot.memory(STAMP.into()));
        let info: [u8; 32] = snapshot.memory(TIME_INFO.into());
        let word = |at: usize| u32::from_le_bytes(info[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(info[at..at + 8].try_into().unwrap());
        let (since, then) = (long(8), long(16));
        let (multiplier, shift) = (word(24), info[28].cast_signed());
        assert_ne!(multiplier, 0, "the host keeps no clock for its guests");
        // The host may have written it after the guest has looked at its counter.
        let ticks = i128::from(time_stamp.wrapping_sub(since).cast_signed());
        let ticks = if shift < 0 {
            ticks >> -shift
        } else {
            ticks << shift
        };
        let passed = (ticks * i128::from(multiplier)) >> 32;
        Clocks {
            time_stamp,
            nanoseconds: u64::try_from(i128::from(then) + passed).unwrap(),
        }
    }
}

#[test]
fn the_time_that_has_passed_since_a_snapshot_is_seen_or_not_as_was_asked() {
    let original = watching().start();
    wait_ready(&original);
    let snapshot = snapshot_beyond(&original, "first", 0);
    let before = Clocks::of(&snapshot);
    // It becomes one that was taken a day ago.
    let old = Copy::of(&snapshot);
    let state = old.line(2);
    let khz = state["processors"][0]["tsc_khz"].as_u64().unwrap();
    let taken = state["clock"]["host_ns"].as_u64().unwrap();
    let ns = |ticks: u64| ticks / khz * 1_000_000;
    old.set(2, "/clock/host_ns", &json!(taken - DAY_NS));
    for (policy, least) in [("advance", DAY_NS), ("freeze", 0)] {
        let mut machine = Machine::restored(&[old.folder()]);
        machine.spec["clock"] = json!(policy);
        let running = machine.start();
        let later = snapshot_beyond(&running, "later", snapshot.long(COUNTER));
        let after = Clocks::of(&later);
        let possible = least..least + HOUR_NS;
        let passed = after.nanoseconds - before.nanoseconds;
        assert!(possible.contains(&passed), "{policy}: {passed} ns");
        // On a host that does not let it be set, the counter is the host's.
        if before.nanoseconds.abs_diff(ns(before.time_stamp)) < SECOND_NS {
            let passed = ns(after.time_stamp - before.time_stamp);
            assert!(possible.contains(&passed), "{policy}: {passed} ns by ticks");
        }
    }
}
