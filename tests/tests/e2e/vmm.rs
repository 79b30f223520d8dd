//! The VMM by itself, with a stock kernel: what hostd does not ask for.

mod balloon;
mod button;
mod difference;
mod pmem;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::Host;

use crate::HostTest;

pub(crate) const TESTS: &[(&str, HostTest)] = &[
    (
        "a_stock_kernel_finds_its_devices_on_pci_and_goes_on_when_it_is_restored",
        pci,
    ),
    (
        "a_stock_kernel_sees_devices_come_and_lets_them_go_also_when_it_is_restored",
        hotplug,
    ),
    (
        "a_stock_kernel_is_on_the_network_while_the_hosts_kernel_serves_it",
        vhost,
    ),
    (
        "a_stock_kernel_hears_the_power_button_also_when_it_is_restored",
        button::heard,
    ),
    (
        "a_stock_kernel_takes_memory_out_of_the_balloon_before_it_kills_for_it",
        balloon::deflated,
    ),
    (
        "a_stock_kernel_goes_on_from_a_snapshot_and_a_difference",
        difference::layered,
    ),
    (
        "stock_kernels_share_one_copy_of_an_image_also_when_they_are_restored",
        pmem::shared,
    ),
];

/// The kernel and the modules of hostd's own guests.
const GUEST: &str = "/usr/lib/hostd/guest";

/// The longest that a guest may take for a step in the simulated host.
const PATIENCE: Duration = Duration::from_secs(120);

/// Clones that are made of one snapshot.
const CLONES: usize = 3;

/// What each first process begins with.
const SET_UP: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
for module in $($b cat /hostd/modules); do $b insmod $module; done
"#;

/// The first process: tells what it finds, and then again and again what it reads from the disk, past
/// its caches.
const INIT: &str = r#"
for device in /sys/bus/pci/devices/*; do
    echo "pci $($b cat $device/device) $($b basename $($b readlink $device/driver))"
done
$b ip addr add 192.168.77.2/24 dev eth0
$b ip link set eth0 up
echo "messages $($b grep -c PCI-MSI /proc/interrupts)"
number=0
while true; do
    echo 3 >/proc/sys/vm/drop_caches
    echo "tick $number $($b dd if=/dev/vda bs=4k count=16 2>/dev/null | $b md5sum)"
    number=$((number + 1))
    $b sleep 0.2
done
"#;

/// Tells again and again which disks and links there are; writes to the second disk, and takes up the
/// second link, when they come.
const WATCHING_INIT: &str = r#"
while true; do
    echo blocks $($b ls /sys/block).
    echo links $($b ls /sys/class/net).
    if [ -b /dev/vdb ] && [ ! -e /written ]; then
        echo attached | $b dd of=/dev/vdb bs=512 conv=sync,fsync 2>/dev/null && >/written
    fi
    if [ -d /sys/class/net/eth0 ] && [ ! -e /up ]; then
        $b ip addr add 192.168.77.2/24 dev eth0
        $b ip link set eth0 up && >/up
    fi
    $b sleep 0.2
done
"#;

/// Runs `command` to its end, which is to be a good one, and returns what it said.
fn run(command: &mut Command) -> String {
    let output = command.output().expect("it can be started");
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A network of its own, with a tap in it.
struct Network(String);

impl Network {
    /// One for each test.
    fn new(test: &str) -> Network {
        let network = Network(format!("{test}-{}", std::process::id()));
        let name = network.0.clone();
        let inside = |arguments: &str| {
            run(Command::new("ip")
                .args(["-n", &name])
                .args(arguments.split(' ')));
        };
        run(Command::new("ip").args(["netns", "add", &name]));
        for tap in ["tap0", "tap1"] {
            inside(&format!("tuntap add {tap} mode tap"));
        }
        network
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }

    /// The host's end is this tap, and no other.
    fn address(&self, tap: &str) {
        run(self
            .command("ip")
            .args(["addr", "add", "192.168.77.1/24", "dev", tap]));
        run(self.command("ip").args(["link", "set", tap, "up"]));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // It goes with its last process.
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// A machine that runs.
struct Machine {
    child: Child,
    folder: PathBuf,
}

impl Machine {
    fn start(network: &Network, folder: &Path, spec: &Value, options: &[&str]) -> Machine {
        fs::create_dir_all(folder).expect("a folder can be made");
        fs::write(folder.join("vm.json"), spec.to_string()).expect("there is room");
        // Consoles are added to.
        let _ = fs::remove_file(folder.join("console"));
        let log = fs::File::create(folder.join("log")).expect("there is room");
        let child = network
            .command("hostd-vmm")
            .arg("--config")
            .arg(folder.join("vm.json"))
            .args(options)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the VMM can be started");
        Machine {
            child,
            folder: folder.to_owned(),
        }
    }

    fn said(&self) -> String {
        let read = |name| fs::read(self.folder.join(name)).unwrap_or_default();
        let both = [read("log"), read("console")].concat();
        String::from_utf8_lossy(&both).into_owned()
    }

    /// Waits until the guest has said so many lines that begin in this way; returns them.
    fn wait_for(&mut self, start: &str, count: usize) -> Vec<String> {
        let begun = Instant::now();
        loop {
            let said = self.said();
            // The last one may be cut.
            let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let lines = whole.lines().filter(|line| line.starts_with(start));
            let lines: Vec<_> = lines.map(|line| line.trim_end().to_owned()).collect();
            if lines.len() >= count {
                return lines;
            }
            let ended = self.child.try_wait().expect("it is ours");
            assert!(ended.is_none(), "{ended:?}: {said}");
            assert!(begun.elapsed() < PATIENCE, "no `{start}`: {said}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits for its end.
    fn end(&mut self) -> ExitStatus {
        let pid = Pid::from_child(&self.child);
        let process = pidfd_open(pid, PidfdFlags::empty()).expect("it is ours");
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        let patience = PATIENCE.try_into().expect("it is some minutes");
        let count = poll(&mut ended, Some(&patience)).expect("it can be awaited");
        assert_eq!(count, 1, "it goes on: {}", self.said());
        self.child.wait().expect("it is ours")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The initramfs of hostd's guests, with another first process over it.
fn initramfs(folder: &Path, init: &str) -> Value {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("bin")).expect("a folder can be made");
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("the host has busybox");
    let init = [SET_UP, init].concat();
    fs::write(tree.join("init"), init).expect("there is room");
    let pack = "chmod 755 init && find . | cpio -o -H newc >../over.cpio";
    run(Command::new("sh").args(["-c", pack]).current_dir(&tree));
    json!([format!("{GUEST}/initramfs.cpio"), folder.join("over.cpio")])
}

/// A machine with the folder's `disk`, whose console and control socket are below `one`.
fn spec(folder: &Path, transport: &str, init: &str) -> Value {
    json!({
        "transport": transport,
        "boot": {
            "kernel": format!("{GUEST}/kernel"),
            "initramfs": initramfs(folder, init),
            "cmdline": "console=ttyS0 quiet panic=-1",
        },
        "cpus": {"count": 2},
        "memory": {"size_mib": 256},
        "disks": [{"path": folder.join("disk")}],
        "console": {"path": folder.join("one/console")},
        "control": folder.join("one/control"),
    })
}

fn pci(_host: &Host) {
    let folder = TempDir::new().expect("a folder can be made");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("disk"), [0x5a_u8; 1 << 16]).expect("there is room");
    let sum = run(Command::new("md5sum").stdin(fs::File::open(path("disk")).expect("it is there")));
    let network = Network::new("pci");
    network.address("tap0");
    let mut spec = spec(folder.path(), "pci", INIT);
    spec["nets"] = json!([{"tap": "tap0"}]);
    let mut one = Machine::start(&network, &path("one"), &spec, &[]);
    let ticks = one.wait_for("tick", 3);
    for tick in &ticks {
        assert!(tick.ends_with(sum.trim_end()), "{tick}");
    }
    let found = one.wait_for("pci", 5);
    for (device, driver) in [("0x1042", "virtio-pci"), ("0x1041", "virtio-pci")] {
        let wanted = format!("pci {device} {driver}");
        assert!(found.contains(&wanted), "{wanted}: {found:?}");
    }
    let messages = one.wait_for("messages", 1);
    assert_ne!(messages, ["messages 0"]);
    ping(&network);

    let control = UnixStream::connect(path("one/control"));
    drop(control.expect("somebody listens"));
    run(Command::new("hostd-vmm")
        .arg("--snapshot")
        .arg(path("snapshot"))
        .arg("--control")
        .arg(path("one/control")));
    drop(one);
    run(network.command("ip").args(["addr", "flush", "dev", "tap0"]));
    network.address("tap1");
    let changes = json!({
        "nets": {"net0": {"tap": "tap1"}},
        "console": {"path": path("two/console")},
    });
    let snapshot = path("snapshot");
    let options = ["--restore", snapshot.to_str().expect("it is a plain path")];
    // One clone after the other, since they have one address.
    for _ in 0..CLONES {
        let mut two = Machine::start(&network, &path("two"), &changes, &options);
        for tick in two.wait_for("tick", 3) {
            assert!(tick.ends_with(sum.trim_end()), "{tick}");
        }
        ping(&network);
    }
}

/// Whether the host's kernel works for the machine: it has a thread for that, which it names so.
fn is_served_by_kernel(machine: &Machine) -> bool {
    let name = format!("vhost-{}", machine.child.id());
    let processes = fs::read_dir("/proc").expect("it is mounted").flatten();
    let mut names = processes.map(|process| {
        let tasks = fs::read_dir(process.path().join("task"));
        let names = tasks.into_iter().flatten().flatten();
        let names = names.map(|task| fs::read_to_string(task.path().join("comm")));
        names.flatten().collect::<String>()
    });
    names.any(|names| names.lines().any(|found| found == name))
}

fn vhost(_host: &Host) {
    for transport in ["mmio", "pci"] {
        let folder = TempDir::new().expect("a folder can be made");
        let path = |name: &str| folder.path().join(name);
        fs::write(path("disk"), [0x5a_u8; 1 << 16]).expect("there is room");
        let network = Network::new("vhost");
        network.address("tap0");
        let mut spec = spec(folder.path(), transport, INIT);
        spec["nets"] = json!([{"tap": "tap0", "vhost": "/dev/vhost-net"}]);
        let mut one = Machine::start(&network, &path("one"), &spec, &[]);
        one.wait_for("tick", 1);
        ping(&network);
        assert!(is_served_by_kernel(&one));
        let snapshot = path("snapshot");
        let snapshot = snapshot.to_str().expect("it is a plain path");
        ask(&network, &one, &["--snapshot", snapshot]);
        // It stood still and goes on.
        ping(&network);
        drop(one);

        for served in [true, false] {
            let mut net = json!({"tap": "tap0"});
            if served {
                net["vhost"] = json!("/dev/vhost-net");
            }
            let changes = json!({
                "nets": {"net0": net},
                "console": {"path": path("two/console")},
            });
            let options = ["--restore", snapshot];
            let mut two = Machine::start(&network, &path("two"), &changes, &options);
            two.wait_for("tick", 1);
            ping(&network);
            assert_eq!(is_served_by_kernel(&two), served);
        }
    }
}

/// What the machine's control socket has to say to such a request.
fn ask(network: &Network, machine: &Machine, words: &[&str]) -> String {
    let mut command = network.command("hostd-vmm");
    command.args(words).arg("--control");
    run(command.arg(machine.folder.join("control")))
}

/// What the machine behind a control socket answers to such a request.
#[track_caller]
pub(crate) fn request(control: &Path, request: &Value) -> Value {
    let mut control = UnixStream::connect(control).expect("the machine listens");
    writeln!(control, "{request}").expect("the machine reads");
    let mut answer = String::new();
    let read = BufReader::new(control).read_line(&mut answer);
    read.expect("the machine answers");
    serde_json::from_str(&answer).expect("an answer is JSON")
}

/// Presses the power button of the machine behind a control socket.
#[track_caller]
pub(crate) fn press(control: &Path) {
    let answer = request(control, &json!({"action": "power_button"}));
    assert_eq!(answer["result"], "done", "{answer}");
}

/// Attaches what is in a file of the machine's folder.
fn attach(network: &Network, machine: &Machine, option: &str, device: &Value) -> String {
    let file = machine.folder.join("device.json");
    fs::write(&file, device.to_string()).expect("there is room");
    ask(
        network,
        machine,
        &[option, file.to_str().expect("a plain path")],
    )
}

/// The guest tells of this from now on.
fn await_state(machine: &mut Machine, state: &str) {
    let said = machine.said();
    let before = said.lines().filter(|line| line.starts_with(state)).count();
    machine.wait_for(state, before + 2);
}

fn hotplug(_host: &Host) {
    let folder = TempDir::new().expect("a folder can be made");
    let path = |name: &str| folder.path().join(name);
    for disk in ["disk", "late", "copy"] {
        fs::write(path(disk), [0; 1 << 16]).expect("there is room");
    }
    let network = Network::new("hotplug");
    network.address("tap0");
    let spec = spec(folder.path(), "pci", WATCHING_INIT);
    let mut one = Machine::start(&network, &path("one"), &spec, &[]);
    one.wait_for("blocks vda.", 2);
    one.wait_for("links lo.", 2);
    let disk = json!({"path": path("late"), "serial": "late"});
    assert_eq!(attach(&network, &one, "--attach-disk", &disk), "disk1\n");
    one.wait_for("blocks vda vdb.", 3);
    let written = fs::read(path("late")).expect("it is there");
    assert_eq!(&written[..9], b"attached\n");
    let net = json!({"tap": "tap0"});
    assert_eq!(attach(&network, &one, "--attach-net", &net), "net0\n");
    one.wait_for("links eth0 lo.", 2);
    ping(&network);

    let snapshot = path("snapshot");
    let snapshot = snapshot.to_str().expect("it is a plain path");
    ask(&network, &one, &["--snapshot", snapshot]);
    for (device, state) in [("disk1", "blocks vda."), ("net0", "links lo.")] {
        ask(&network, &one, &["--detach", device]);
        await_state(&mut one, state);
    }
    drop(one);

    // The other has them still, and lets them go as well.
    let changes = json!({
        "disks": {"disk1": {"path": path("copy")}},
        "console": {"path": path("two/console")},
        "control": path("two/control"),
    });
    let mut two = Machine::start(&network, &path("two"), &changes, &["--restore", snapshot]);
    two.wait_for("blocks vda vdb.", 2);
    ping(&network);
    ask(&network, &two, &["--detach", "disk1"]);
    await_state(&mut two, "blocks vda.");
    assert_eq!(attach(&network, &two, "--attach-disk", &disk), "disk1\n");
    await_state(&mut two, "blocks vda vdb.");
    // Taken away, it is gone from the host's side at once, and the guest's kernel finds out.
    for (device, state) in [("disk1", "blocks vda."), ("net0", "links lo.")] {
        ask(&network, &two, &["--detach", device, "--force"]);
        await_state(&mut two, state);
    }
    assert_eq!(attach(&network, &two, "--attach-disk", &disk), "disk1\n");
    await_state(&mut two, "blocks vda vdb.");
}

/// The guest answers.
fn ping(network: &Network) {
    let begun = Instant::now();
    let once = ["-c", "1", "-W", "2", "192.168.77.2"];
    while !network
        .command("ping")
        .args(once)
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
    {
        assert!(begun.elapsed() < PATIENCE, "the guest does not answer");
    }
}
