//! The users of containers: each container has its own, and what is on the disk knows nothing of that.

use tests::Host;

use crate::HostTest;

pub(crate) const TESTS: &[(&str, HostTest)] = &[
    ("each_container_has_users_that_nobody_else_is", apart),
    (
        "files_keep_their_owners_whichever_container_has_them",
        owners,
    ),
    ("what_is_the_hosts_is_nobodys", strangers),
    ("a_user_that_there_is_not_is_refused", refused),
    ("a_container_can_have_the_hosts_users", shared),
];

/// The first of the host's users that are a container's, and how many there are.
fn range(host: &Host, name: &str) -> (u32, u32) {
    let map = host.hostctl(&["exec", name, "cat", "/proc/self/uid_map"]);
    let map = map.ok();
    let numbers: Vec<u32> = map
        .split_whitespace()
        .map(|number| number.parse().expect("a mapping has numbers only"))
        .collect();
    assert!(matches!(numbers[..], [0, _, _]), "{map}");
    (numbers[1], numbers[2])
}

fn apart(host: &Host) {
    let ranges = ["users-a", "users-b"].map(|name| {
        let run = ["run", "-d", "--name", name, "busybox", "sleep", "1000000"];
        host.hostctl(&run).ok();
        range(host, name)
    });
    let [(first, count), (other, _)] = ranges;
    assert_eq!(count, 65536);
    assert!(first > u32::from(u16::MAX), "{ranges:?}");
    assert!(first.abs_diff(other) >= count, "{ranges:?}");
    let pid = host.hostctl(&["inspect", "--json", "users-a"]).json()["pid"].clone();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .expect("the process runs on this host");
    assert!(
        status.contains(&format!("Uid:\t{first}\t{first}\t")),
        "{status}"
    );
    host.hostctl(&["rm", "--force", "users-a", "users-b"]).ok();
}

fn owners(host: &Host) {
    let script =
        "echo one > /data/file && chown 5:6 /data/file && chown 7:8 /etc/passwd && sleep 1000000";
    let run = [
        "run",
        "-d",
        "--name",
        "owner",
        "-v",
        "owned:/data",
        "busybox",
    ];
    host.hostctl(&[&run[..], &["sh", "-c", script]].concat())
        .ok();
    let look = ["stat", "-c", "%u:%g", "/data/file", "/etc/passwd"];
    // Its writable layer, its clone's, and the volume in the hands of one with the host's users.
    host.hostctl(&["restart", "--time", "0", "owner"]).ok();
    host.hostctl(&["snapshot", "create", "owner", "one"]).ok();
    host.hostctl(&["copy", "--start", "owner/one", "owner-2"])
        .ok();
    assert_ne!(range(host, "owner"), range(host, "owner-2"));
    for name in ["owner", "owner-2"] {
        let seen = host.hostctl(&[&["exec", name][..], &look].concat()).ok();
        assert_eq!(seen, "5:6\n7:8\n", "{name}");
    }
    let run = [
        "run",
        "--rm",
        "--user-namespace",
        "host",
        "-v",
        "owned:/data",
        "busybox",
    ];
    let seen = host.hostctl(&[&run[..], &look].concat()).ok();
    assert_eq!(seen, "5:6\n0:0\n");
    host.hostctl(&["rm", "--force", "owner", "owner-2"]).ok();
}

/// Root in a container has its rights over what is the container's, and over nothing else.
fn strangers(host: &Host) {
    let script = "echo 1.2.3.4 other >> /etc/hosts && echo out > /dev/stdout && touch /new \
                  && ! chown 5 /dev/null && ! chmod 777 /dev/zero && stat -c %u /new /etc/hosts /dev/null";
    let run = ["run", "--rm", "busybox", "sh", "-c", script];
    let output = host.hostctl(&run).exits(0);
    assert_eq!(output.stdout, "out\n0\n0\n65534\n");
    assert_eq!(
        output.stderr.matches("not permitted").count(),
        2,
        "{}",
        output.stderr
    );
}

fn refused(host: &Host) {
    let create = |user: &str| host.hostctl(&["run", "--rm", "--user", user, "busybox", "id", "-u"]);
    assert_eq!(create("65535").ok(), "65535\n");
    let output = create("65536").exits(125);
    assert!(
        output.stderr.contains("up to 65535, not 65536"),
        "{}",
        output.stderr
    );
    let flags = ["--isolation", "vm", "--user-namespace", "host"];
    let output = host.hostctl(&[&["create"][..], &flags, &["busybox"]].concat());
    let output = output.exits(125);
    assert!(
        output.stderr.contains("/user_namespace"),
        "{}",
        output.stderr
    );
    let listed = host.hostctl(&["list", "--all", "--json"]).json();
    let mut all = listed.as_array().expect("a list").iter();
    assert!(all.all(|one| one["spec"]["user"] != "65536"), "{listed}");
}

fn shared(host: &Host) {
    let run = ["run", "--rm", "--user-namespace", "host", "busybox"];
    let script = "cat /proc/self/uid_map; stat -c %u /dev/null";
    let seen = host
        .hostctl(&[&run[..], &["sh", "-c", script]].concat())
        .ok();
    let seen: Vec<&str> = seen.split_whitespace().collect();
    assert_eq!(seen, ["0", "0", "4294967295", "0"]);
}
