//! Files that guests see as memory, in snapshots.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use serde_json::json;
use vmm::guest_status;
use vmm::snapshot::file::Kind;

use crate::guest::Guest;
use crate::runner::{Machine, Running, Snapshot};
use crate::snapshot::{guest, wait_ready};

const IMAGE_BYTES: usize = 64 << 20;
/// Behind all memory, of which there are 16 MiB.
const IMAGE: u32 = 16 << 20;
/// In the middle of it, what the guest changes.
const CHANGED: u32 = IMAGE + 0x12_3000;
const BYTE: u8 = 0xa7;

fn make_image(path: &Path) {
    let bytes = vec![BYTE; IMAGE_BYTES];
    File::create(path).unwrap().write_all(&bytes).unwrap();
}

/// A guest that is ready, changes an image once it has read a byte, and tells what is there after another.
fn looking() -> Guest {
    guest()
        .out_long(guest_status::PORT, guest_status::READY)
        .read_serial()
        .store_long(CHANGED, u32::from_le_bytes(*b"mine"))
        .print(".")
        .read_serial()
        .print_long(CHANGED)
        .print_long(CHANGED + 4)
        .print_long(IMAGE + 0x100_0000)
        .exit(3)
}

/// What the guest finds after that.
const SEEN: [u8; 12] = *b"mine\xa7\xa7\xa7\xa7\xa7\xa7\xa7\xa7";

/// A machine with that guest at a terminal.
fn machine(image: &Path) -> (Machine, File) {
    let mut machine = Machine::new(looking());
    machine.spec["pmem"] = json!([{"path": image}]);
    let terminal = machine.put_at_a_terminal();
    (machine, terminal)
}

fn restored(folders: &[&Path]) -> (Machine, File) {
    let mut machine = Machine::restored(folders);
    let terminal = machine.put_at_a_terminal();
    (machine, terminal)
}

/// Has the guest change the image.
fn change(mut terminal: &File) {
    terminal.write_all(b"x").unwrap();
    let mut said = [0];
    terminal.read_exact(&mut said).unwrap();
    assert_eq!(&said, b".");
}

/// How often `image` is mapped by the machine.
fn mappings(running: &Running, image: &Path) -> usize {
    let maps = fs::read_to_string(format!("/proc/{}/maps", running.pid())).unwrap();
    let name = image.to_str().unwrap();
    maps.lines().filter(|line| line.ends_with(name)).count()
}

fn assert_sees(running: Running, mut terminal: &File) {
    terminal.write_all(b"x").unwrap();
    let mut seen = [0; SEEN.len()];
    terminal.read_exact(&mut seen).unwrap();
    assert_eq!(seen, SEEN);
    assert_eq!(running.wait().code, Some(3));
}

/// The memory file has the page that was changed, and no other of the image.
fn assert_without_image(snapshot: &Snapshot) {
    let memory = fs::read(snapshot.folder.join("memory")).unwrap();
    let found = memory.iter().filter(|byte| **byte == BYTE).count();
    assert!(found < 2 * 4096, "{found} bytes of the image");
    assert!(memory.windows(4).any(|bytes| bytes == b"mine"));
    assert!(snapshot.report.memory_bytes < 1 << 20, "{snapshot:?}");
}

#[test]
fn an_image_is_not_in_snapshots_and_clones_share_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let (image, copy) = (folder.path().join("image"), folder.path().join("copy"));
    make_image(&image);
    make_image(&copy);
    let (original, terminal) = machine(&image);
    let original = original.start();
    wait_ready(&original);
    change(&terminal);
    let first = original.snapshot("first", Kind::Full).unwrap();
    assert_without_image(&first);

    let (clone, terminal) = restored(&[&first.folder]);
    let clone = clone.start();
    wait_ready(&clone);
    assert_eq!(mappings(&clone, &image), 1);
    // What was changed before the first snapshot is not forgotten in the second.
    let second = clone.snapshot("second", Kind::Full).unwrap();
    assert_without_image(&second);

    let (mut other, other_terminal) = restored(&[&second.folder]);
    other.spec["pmem"] = json!({"pmem0": {"path": copy}});
    let other = other.start();
    wait_ready(&other);
    assert_eq!((mappings(&other, &image), mappings(&other, &copy)), (0, 1));
    assert_sees(clone, &terminal);
    assert_sees(other, &other_terminal);
}

#[test]
fn what_is_changed_of_an_image_is_in_differences() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    make_image(&image);
    let (mut original, terminal) = machine(&image);
    original.spec["memory"]["track_dirty"] = json!(true);
    let original = original.start();
    wait_ready(&original);
    let full = original.snapshot("full", Kind::Full).unwrap();
    change(&terminal);
    let difference = original.snapshot("difference", Kind::Diff).unwrap();
    let (clone, terminal) = restored(&[&full.folder, &difference.folder]);
    let clone = clone.start();
    wait_ready(&clone);
    assert_without_image(&clone.snapshot("third", Kind::Full).unwrap());
    assert_sees(clone, &terminal);
}

#[test]
fn another_image_is_refused_by_its_length() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    make_image(&image);
    let (original, _terminal) = machine(&image);
    let original = original.start();
    wait_ready(&original);
    let snapshot = original.snapshot("full", Kind::Full).unwrap();
    // In the same number of huge pages.
    let other = folder.path().join("other");
    let longer = File::create(&other).unwrap();
    longer.set_len(IMAGE_BYTES as u64 - 1).unwrap();
    let mut clone = Machine::restored(&[&snapshot.folder]);
    clone.spec["pmem"] = json!({"pmem0": {"path": other}});
    let ended = clone.run();
    assert_eq!(ended.code, Some(125));
    let want = "`/pmem/pmem0` is 67108863 bytes long";
    assert!(ended.stderr.contains(want), "{}", ended.stderr);
}

/// How often the machine has touched memory that was not there for it.
fn faults(running: &Running) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", running.pid())).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().nth(7).unwrap().parse().unwrap()
}

#[test]
fn memory_that_was_never_used_is_not_touched_to_save_it() {
    let mut machine = Machine::new(guest().out_long(guest_status::PORT, guest_status::READY));
    machine.spec["memory"] = json!({"size_mib": 1024, "huge_pages": "none"});
    let original = machine.start();
    wait_ready(&original);
    let mut before = faults(&original);
    let first = original.snapshot("first", Kind::Full).unwrap();
    let of_first = faults(&original) - before;
    let clone = Machine::restored(&[&first.folder]).start();
    wait_ready(&clone);
    before = faults(&clone);
    clone.snapshot("second", Kind::Full).unwrap();
    let of_second = faults(&clone) - before;
    // A host with swap cannot tell, and has to look at all 262144 pages.
    if of_first < 10_000 {
        assert!(of_second < 10_000, "{of_second}");
    }
}
