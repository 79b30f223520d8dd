//! A stock kernel that goes on from a snapshot and what was written since.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;
use tempfile::TempDir;
use tests::Host;

use super::{Machine, Network, ask, spec};

/// Writes one file of sixteen after the other, in memory, and checks all of them each time.
const INIT: &str = r#"
$b mkdir -p /files /sums
number=0
while true; do
    file=$((number % 16))
    $b dd if=/dev/urandom of=/files/$file bs=64k count=1 2>/dev/null
    $b md5sum /files/$file >/sums/$file
    $b cat /sums/* | $b md5sum -c -s && echo "tick $number"
    number=$((number + 1))
done
"#;

fn number(tick: &str) -> u64 {
    let (_, number) = tick.split_once(' ').expect("a tick has a number");
    number.parse().expect("a tick has a number")
}

/// What the memory file of a snapshot takes on the disk.
fn blocks(snapshot: &Path) -> u64 {
    let memory = fs::metadata(snapshot.join("memory"));
    memory.expect("a snapshot has memory").blocks()
}

pub(super) fn layered(_host: &Host) {
    let folder = TempDir::new().expect("a folder can be made");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("disk"), [0; 1 << 16]).expect("there is room");
    let network = Network::new("layers");
    let mut spec = spec(folder.path(), "mmio", INIT);
    spec["memory"]["track_dirty"] = json!(true);
    let mut one = Machine::start(&network, &path("one"), &spec, &[]);
    let mut ticks = 20;
    one.wait_for("tick", ticks);
    let layers = ["full", "difference", "second"].map(path);
    let layers = layers
        .each_ref()
        .map(|layer| layer.to_str().expect("a plain path"));
    ask(&network, &one, &["--snapshot", layers[0]]);
    let mut last = 0;
    for layer in &layers[1..] {
        // So many that each file is another one.
        ticks = one.wait_for("tick", 1).len() + 20;
        let seen = one.wait_for("tick", ticks);
        last = number(seen.last().expect("there are some"));
        ask(&network, &one, &["--snapshot", layer, "--diff"]);
        assert!(blocks(Path::new(layer)) < blocks(&path("full")));
    }
    drop(one);

    // Each further layer is where the guest goes on from.
    let changes = json!({"console": {"path": path("two/console")}});
    let options = [&["--restore"], &layers[..]].concat();
    let mut two = Machine::start(&network, &path("two"), &changes, &options);
    let seen = two.wait_for("tick", 20);
    assert!(number(&seen[0]) > last, "{} after {last}", seen[0]);
    let numbers: Vec<_> = seen.iter().map(|tick| number(tick)).collect();
    let first = numbers[0];
    // Not one is missing: at each, all files were as they had been written.
    assert!(
        numbers
            .iter()
            .copied()
            .eq(first..first + numbers.len() as u64),
        "{numbers:?}"
    );
}
