//! The walls around a VM's VMM, as the host sees them from outside while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tests::{Host, Kind};

use crate::HostTest;
use crate::process::start_idle;

pub(crate) const TESTS: &[(&str, HostTest)] = &[
    (
        "a_vmm_has_nothing_but_what_its_machine_needs",
        has_only_what_it_needs,
    ),
    (
        "the_vmm_and_the_daemon_can_lie_anywhere_in_memory",
        are_position_independent,
    ),
];

/// What an ELF file says that may be put anywhere (`e_type`, `ET_DYN`), and where it says so.
const ANYWHERE: [u8; 2] = [3, 0];
const TYPE: Range<usize> = 16..18;

/// What is said of each thread: no rights, no way to any, and filters for its system calls.
const STATUS: &[(&str, &str)] = &[
    ("Groups", ""),
    ("CapInh", "0000000000000000"),
    ("CapPrm", "0000000000000000"),
    ("CapEff", "0000000000000000"),
    ("CapBnd", "0000000000000000"),
    ("CapAmb", "0000000000000000"),
    ("NoNewPrivs", "1"),
    ("Seccomp", "2"),
];

/// Namespaces that it shares with no process of the host.
const NAMESPACES: &[&str] = &["cgroup", "ipc", "mnt", "net", "pid", "uts"];

/// What the kernel calls the descriptors by which threads wait for each other, and those of the machine.
const ANONYMOUS: &[&str] = &[
    "[eventfd]",
    "[eventpoll]",
    "[io_uring]",
    "[signalfd]",
    "[timerfd]",
    "kvm-vcpu:0",
    "kvm-vm",
];

fn has_only_what_it_needs(host: &Host) {
    let name = "confined";
    start_idle(host, Kind::Vm, name, &[]);
    let pid = host.hostctl(&["inspect", "--json", name]).json()["pid"].clone();
    let process = PathBuf::from(format!("/proc/{pid}"));
    let comm = read(&process.join("comm"));
    assert_eq!(comm.trim_end(), "hostd-vmm");
    let uid = rights(&process);
    is_nobody_else(&process, &uid);
    sees_nothing(host, &process);
    holds_only(&process, &host.run_of(name));
    host.hostctl(&["rm", "--force", name]).ok();
}

fn are_position_independent(_host: &Host) {
    for program in ["hostd", "hostctl", "hostd-vmm"] {
        let content = fs::read(Path::new("/usr/bin").join(program)).expect("it is installed");
        assert_eq!(content.get(TYPE), Some(&ANYWHERE[..]), "{program}");
    }
}

#[track_caller]
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
fn link(path: &Path) -> String {
    let target = fs::read_link(path);
    let target = target.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    target.display().to_string()
}

#[track_caller]
fn entries(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    entries.flatten().map(|entry| entry.path()).collect()
}

fn fields(status: &str) -> BTreeMap<&str, &str> {
    let fields = status.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name, value.trim())).collect()
}

/// Each thread is the same user and group, in all ways in which it could be one, and has no rights.
/// Returns the user.
fn rights(process: &Path) -> String {
    let mut users = BTreeSet::new();
    let threads = entries(&process.join("task"));
    assert!(threads.len() > 1, "{threads:?}");
    for thread in threads {
        // One that io_uring has made may end at any time.
        let Ok(text) = fs::read_to_string(thread.join("status")) else {
            continue;
        };
        let status = fields(&text);
        for (field, wanted) in STATUS {
            assert_eq!(status[field], *wanted, "{field}: {text}");
        }
        for field in ["Uid", "Gid"] {
            users.extend(status[field].split_whitespace().map(str::to_owned));
        }
    }
    let users: Vec<_> = users.into_iter().collect();
    let [user] = &users[..] else {
        panic!("it is several: {users:?}");
    };
    user.clone()
}

/// It is a user that no other process of the host is, root least of all.
fn is_nobody_else(process: &Path, uid: &str) {
    assert_ne!(uid, "0");
    let numbered = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.bytes().all(|byte| byte.is_ascii_digit())
    };
    for other in entries(Path::new("/proc"))
        .iter()
        .filter(|path| numbered(path))
    {
        // Others come and go meanwhile.
        let text = fs::read_to_string(other.join("status")).unwrap_or_default();
        let theirs = fields(&text).get("Uid").copied().unwrap_or_default();
        let is_same = theirs.split_whitespace().any(|theirs| theirs == uid);
        assert!(!is_same || other == process, "{}: {text}", other.display());
    }
}

/// No file, no other process, no network.
fn sees_nothing(host: &Host, process: &Path) {
    let root = entries(&process.join("root"));
    assert!(root.is_empty(), "{root:?}");
    let mounts = read(&process.join("mountinfo"));
    let mounts: Vec<Vec<&str>> = mounts
        .lines()
        .map(|line| line.split(' ').collect())
        .collect();
    let [mount] = &mounts[..] else {
        panic!("it has several mounts: {mounts:?}");
    };
    let options: Vec<&str> = mount[5].split(',').collect();
    assert_eq!(mount[4], "/", "{mount:?}");
    assert!(options.contains(&"ro"), "{mount:?}");

    for namespace in NAMESPACES {
        let of = |process: &Path| link(&process.join("ns").join(namespace));
        for other in ["/proc/self", "/proc/1"] {
            assert_ne!(of(process), of(Path::new(other)), "{namespace}");
        }
    }
    let net = format!("--net={}", process.join("ns/net").display());
    let links = host.run("nsenter", &[&net, "ip", "-o", "link"]).ok();
    let links: Vec<&str> = links.lines().collect();
    let [loopback] = links[..] else {
        panic!("it has interfaces: {links:?}");
    };
    assert!(loopback.contains(": lo: <LOOPBACK> "), "{loopback}");
}

/// The machine's files and sockets, what leads to the monitor, and what is of no file at all.
fn holds_only(process: &Path, run: &Path) {
    let sockets = sockets(run);
    let mut files = BTreeSet::new();
    for descriptor in entries(&process.join("fd")) {
        let target = link(&descriptor);
        match target.split_once(':') {
            Some(("anon_inode", name)) => assert!(ANONYMOUS.contains(&name), "{target}"),
            // The workload's output.
            Some(("pipe", _)) => {}
            Some(("socket", _)) => assert!(sockets.contains(&target), "{target}: {sockets:?}"),
            _ => {
                files.insert(target);
            }
        }
    }
    let shown = format!("{files:#?}");
    let name = run.file_name().unwrap_or_default().to_string_lossy();
    let disk = format!("/instances/{name}/disk");
    let wanted: [&dyn Fn(&str) -> bool; 6] = [
        &|file| file == "/dev/null",
        &|file| file == "/dev/net/tun",
        &|file| Path::new(file) == run.join("console.log"),
        &|file| Path::new(file) == run.join("vmm-exit.json"),
        &|file| file.contains("/images/disks/"),
        &|file| file.ends_with(&disk),
    ];
    for wanted in wanted {
        let found: Vec<_> = files.iter().filter(|file| wanted(file)).cloned().collect();
        assert_eq!(found.len(), 1, "{found:?} of {shown}");
        files.remove(&found[0]);
    }
    assert!(files.is_empty(), "beside what it needs: {files:?}");
}

/// Those of the unix sockets on this host that are the machine's own, as links to them show.
fn sockets(run: &Path) -> BTreeSet<String> {
    let table = read(Path::new("/proc/net/unix"));
    let rows = table.lines().filter_map(|line| {
        let row: Vec<&str> = line.split_whitespace().collect();
        let [.., inode, path] = row[..] else {
            return None;
        };
        let path = Path::new(path);
        let own = [run.join("vmm.sock"), run.join("vsock.sock")];
        own.iter()
            .any(|own| own == path)
            .then(|| format!("socket:[{inode}]"))
    });
    rows.collect()
}
