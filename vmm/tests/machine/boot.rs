//! What guests start from: kernels of each kind, initramfs files, memory and processors.

use std::fs;
use std::io::Write;

use serde_json::json;
use vmm::guest_status;

use super::guest;
use crate::guest::{Guest, Protocol};
use crate::runner::Machine;
use crate::snapshot::wait_ready;

const GIB: u64 = 1 << 30;

#[test]
fn each_kind_of_kernel_starts_and_is_told_about_the_machine() {
    let signature = *b"HdrS";
    let start_info = 0x336e_c578_u32.to_le_bytes();
    let told = |protocol, offset| guest().print_parameter(protocol, offset).exit(5);
    for (kernel, want) in [
        (told(Protocol::Linux, 0x202).elf(), signature),
        (told(Protocol::Linux, 0x202).bzimage(), signature),
        (told(Protocol::Pvh, 0).pvh(), start_info),
    ] {
        let ended = Machine::with_kernel(&kernel).run();
        assert_eq!(ended.code, Some(5), "{ended:?}");
        assert_eq!(ended.console, want);
    }
}

#[test]
fn initramfs_files_are_found_end_to_end() {
    // `ramdisk_image` and `ramdisk_size` of the boot parameters.
    let told = guest()
        .print_parameter(Protocol::Linux, 0x218)
        .print_parameter(Protocol::Linux, 0x21c)
        .print_long(0xff_f000)
        .print_long(0xff_f004)
        .exit(0);
    let mut machine = Machine::new(told);
    let files = [("a", &b"one"[..]), ("b", b"two")].map(|(name, content)| {
        let path = machine.path(name);
        fs::write(&path, content).unwrap();
        path
    });
    machine.spec["boot"]["initramfs"] = json!(files);
    let ended = machine.run();
    let place = [0xff_f000_u32, 8].map(u32::to_le_bytes);
    let want = [place.as_flattened(), b"one\0two\0"].concat();
    assert_eq!(ended.console, want, "{ended:?}");
}

#[test]
fn memory_goes_on_behind_the_hole() {
    let (first, last, beyond) = (4 * GIB, 6 * GIB - 4, 6 * GIB);
    let program = guest()
        .map(first)
        .map(last)
        .map(beyond)
        .store_far(first, u32::from_le_bytes(*b"4GiB"))
        .store_far(last, u32::from_le_bytes(*b"last"))
        .store_far(beyond, u32::from_le_bytes(*b"none"))
        .print_far(first)
        .print_far(last)
        .print_far(beyond)
        .exit(0);
    let mut machine = Machine::new(program);
    machine.spec["memory"] = json!({"size_mib": 5 * 1024});
    let ended = machine.run();
    assert_eq!(ended.console, b"4GiBlast\xff\xff\xff\xff", "{ended:?}");
}

/// Another size than anything else that a machine maps.
const MIB: u64 = 94;

/// What the kernel was told of the process's mapping of the guest's memory.
fn flags_of_memory(process: i32) -> String {
    let maps = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let mut lines = maps.lines();
    let size = format!("{} kB", MIB << 10);
    let found = lines.any(|line| {
        let size_of = line.strip_prefix("Size:");
        size_of.is_some_and(|of| of.trim() == size)
    });
    assert!(found, "{maps}");
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
    flags.unwrap().to_owned()
}

#[test]
fn memory_may_be_in_pages_of_any_size() {
    let advice = [
        (None, (true, false)),
        (Some("transparent"), (true, false)),
        (Some("none"), (false, true)),
    ];
    for (pages, advised) in advice {
        let ready = guest().out_long(guest_status::PORT, guest_status::READY);
        let mut machine = Machine::new(ready.read_serial().exit(3));
        machine.spec["memory"] = json!({"size_mib": MIB});
        if let Some(pages) = pages {
            machine.spec["memory"]["huge_pages"] = json!(pages);
        }
        let mut terminal = machine.put_at_a_terminal();
        let running = machine.start();
        wait_ready(&running);
        let flags = flags_of_memory(running.pid());
        let has = |flag: &str| flags.split_whitespace().any(|one| one == flag);
        assert_eq!((has("hg"), has("nh")), advised, "{pages:?}: {flags}");
        terminal.write_all(b"x").unwrap();
        assert_eq!(running.wait().code, Some(3), "{pages:?}");
    }
    // More than any host has set aside.
    let mut machine = Machine::new(guest().exit(3));
    machine.spec["memory"] = json!({"size_mib": 1 << 20, "huge_pages": "hugetlbfs"});
    let ended = machine.run();
    assert_eq!(ended.code, Some(125));
    assert!(ended.stderr.contains("raise vm.nr_hugepages"), "{ended:?}");
}

#[test]
fn every_processor_can_be_started() {
    for count in [2_u8, 32] {
        let program: Guest = guest().start_others(0xf000, count - 1).exit(count);
        let mut machine = Machine::new(program);
        machine.spec["cpus"] = json!({"count": count});
        let ended = machine.run();
        assert_eq!(ended.code, Some(count.into()), "{ended:?}");
    }
}

#[test]
fn a_guest_sees_the_processor_that_was_asked_for() {
    let with = |template: &str| {
        // How far the basic leaves go.
        let mut machine = Machine::new(guest().print_cpuid_eax(0).exit(0));
        machine.spec["cpus"] = json!({"count": 2, "template": template});
        machine.run()
    };
    for template in ["x86-64-v2", "x86-64-v3"] {
        let ended = with(template);
        // What this host lacks, if anything, is only a warning.
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!(ended.console, [0xd, 0, 0, 0]);
    }
    assert_eq!(with("host").stderr, "");
    let ended = with("pentium");
    assert_eq!(ended.code, Some(125));
    assert!(ended.stderr.contains("x86-64-v2"), "{ended:?}");
}
