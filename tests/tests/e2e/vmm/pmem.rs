//! Stock kernels that see one image as memory.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;
use tests::Host;

use super::{GUEST, Machine, Network, ask, run, spec};

/// What is in the image, in MiB.
const CONTENT_MIB: u32 = 12;

/// Reads the image, tells what the guest keeps in caches of its own afterwards, and what the image begins
/// with, which is nothing at first.
const INIT: &str = r#"
for module in $($b cat /hostd/modules.pmem); do $b insmod $module; done
$b mkdir -p /image
while [ ! -b /dev/pmem0 ]; do $b sleep 0.1; done
$b mount -t erofs -o ro,dax /dev/pmem0 /image && echo "mounted"
cached() { $b awk '/^Cached/ {print int($2 / 1024)}' /proc/meminfo; }
before=$(cached)
number=0
while true; do
    sum=$($b md5sum </image/content)
    grown=$(($(cached) - before))
    echo 3 >/proc/sys/vm/drop_caches
    first=$($b head -c 9 /dev/pmem0)
    echo "tick $number $sum grown $grown MiB first ${first:-nothing}"
    if [ $number = 3 ]; then
        # The image's first page, which is not content; it is the guest's own from then on.
        echo scribbled | $b dd of=/dev/pmem0 bs=512 conv=sync,fsync 2>/dev/null && echo "scribbled"
    fi
    number=$((number + 1))
    $b sleep 0.2
done
"#;

fn sum(file: &Path) -> String {
    let file = fs::File::open(file).expect("it is there");
    run(Command::new("md5sum").stdin(file))
        .trim_end()
        .to_owned()
}

/// What a process has of a file in memory, and its share of that, in KiB.
fn mapped(machine: &Machine, file: &Path) -> (u64, u64) {
    // `ip netns exec` has become the program that it was given.
    let pid = machine.child.id();
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it is mounted");
    let mut inside = false;
    let (mut resident, mut share) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let number = || line.split_whitespace().nth(1)?.parse::<u64>().ok();
        match first {
            "Rss:" if inside => resident += number().expect("a size"),
            "Pss:" if inside => share += number().expect("a size"),
            _ if !first.ends_with(':') => {
                inside = words.last() == file.to_str();
            }
            _ => {}
        }
    }
    (resident, share)
}

/// The guest reads what is in the image, and keeps no copy.
fn assert_reads(machine: &mut Machine, ticks: usize, content: &str) {
    for tick in machine.wait_for("tick", ticks) {
        assert!(tick.contains(content), "{tick} is not {content}");
        let (_, grown) = tick.split_once("grown ").expect("it tells");
        let grown = grown.split(' ').next().and_then(|mib| mib.parse().ok());
        let grown: i64 = grown.expect("it is a number");
        assert!(grown < i64::from(CONTENT_MIB) / 2, "{tick}");
    }
}

pub(super) fn shared(_host: &Host) {
    let folder = TempDir::new().expect("a folder can be made");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("disk"), [0; 1 << 16]).expect("there is room");
    let (tree, image) = (path("content"), path("image"));
    fs::create_dir(&tree).expect("a folder can be made");
    let random = format!("if=/dev/urandom of=content/content bs=1M count={CONTENT_MIB}");
    run(Command::new("dd")
        .args(random.split(' '))
        .current_dir(folder.path()));
    let content = sum(&tree.join("content"));
    run(Command::new("mkfs.erofs")
        .arg("-Enoinline_data")
        .args([&image, &tree]));
    let whole = sum(&image);

    let network = Network::new("pmem");
    let mut spec = spec(folder.path(), "mmio", INIT);
    let archives = spec["boot"]["initramfs"].as_array_mut();
    let pmem = json!(format!("{GUEST}/pmem.cpio"));
    archives.expect("there are some").insert(1, pmem);
    spec["pmem"] = json!([{"path": image}]);
    let mut one = Machine::start(&network, &path("one"), &spec, &[]);
    one.wait_for("scribbled", 1);
    assert_reads(&mut one, 5, &content);
    let snapshot = path("snapshot");
    let snapshot = snapshot.to_str().expect("it is a plain path");
    ask(&network, &one, &["--snapshot", snapshot]);

    fs::write(path("copy"), [0; 1 << 16]).expect("there is room");
    let changes = json!({
        "disks": {"disk0": {"path": path("copy")}},
        "console": {"path": path("two/console")},
    });
    let options = ["--restore", snapshot];
    let mut two = Machine::start(&network, &path("two"), &changes, &options);
    assert_reads(&mut two, 3, &content);
    for tick in two.wait_for("tick", 3) {
        assert!(tick.ends_with("first scribbled"), "{tick}");
    }
    assert_reads(&mut one, 8, &content);
    // Both have all of it mapped, and count half of it each.
    let content_kib = u64::from(CONTENT_MIB) << 10;
    for machine in [&one, &two] {
        let (resident, share) = mapped(machine, &image);
        assert!(resident >= content_kib, "{resident} KiB");
        assert!(share < content_kib * 2 / 3, "{share} KiB");
    }
    // What the guest has written is nobody else's.
    assert_eq!(sum(&image), whole);
}
