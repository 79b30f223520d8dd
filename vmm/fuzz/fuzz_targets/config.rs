//! Machines as JSON: what is read can be written and read again, and is planned or refused. No file
//! that the input names is touched.
#![no_main]

use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use vmm::plan::Plan;
use vmm::spec::{Console, ConsoleTarget, OneOrMany, Spec};

/// Stands for every file: `fd:N` would close descriptors of the fuzzer, and a path is anybody's.
const FILE: &str = "/dev/null";

fn disarm(path: &mut PathBuf) {
    *path = Path::new(FILE).to_owned();
}

fn disarm_all(spec: &mut Spec) {
    disarm(spec.kvm.get_or_insert_default());
    disarm(&mut spec.boot.kernel);
    match &mut spec.boot.initramfs {
        Some(OneOrMany::One(path)) => disarm(path),
        Some(OneOrMany::Many(paths)) => paths.iter_mut().for_each(disarm),
        None => {}
    }
    for disk in &mut spec.disks {
        disarm(&mut disk.path);
        for backing in &mut disk.backing {
            disarm(&mut backing.path);
        }
    }
    for net in &mut spec.nets {
        net.tap = net.tap.replace("fd:", "tap");
    }
    if let Some(vsock) = &mut spec.vsock {
        disarm(&mut vsock.path);
        for stream in &mut vsock.streams {
            disarm(&mut stream.path);
        }
    }
    if let Some(Console::Target(ConsoleTarget::Path(path))) = &mut spec.console {
        disarm(path);
    }
    for pmem in &mut spec.pmem {
        disarm(&mut pmem.path);
    }
    spec.control.iter_mut().for_each(disarm);
    spec.exit_status.iter_mut().for_each(disarm);
}

fuzz_target!(|text: &[u8]| {
    let Ok(mut spec) = serde_json::from_slice::<Spec>(text) else {
        return;
    };
    let written = serde_json::to_vec(&spec).expect("plain data");
    let again: Spec = serde_json::from_slice(&written).expect("its own words");
    assert_eq!(spec, again);
    disarm_all(&mut spec);
    // Both outcomes are fine.
    let _ = Plan::new(&spec);
});
