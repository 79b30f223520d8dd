//! Addresses, names to the outside, published ports.

use tests::{Host, Kind};

use crate::KindTest;
use crate::process::start_idle;

pub(crate) const TESTS: &[(&str, KindTest)] = &[
    ("instances_reach_each_other_and_the_host", reach),
    ("a_published_port_leads_into_the_instance", published),
    ("an_instance_without_a_network_has_loopback_only", none),
];

fn address(host: &Host, name: &str) -> String {
    let instance = host.hostctl(&["inspect", "--json", name]).json();
    instance["address"]
        .as_str()
        .expect("a bridged instance has an address")
        .to_owned()
}

fn reach(host: &Host, kind: Kind) {
    let (server, client) = (
        format!("one-{}", kind.name()),
        format!("two-{}", kind.name()),
    );
    start_idle(host, Kind::Container, &server, &[]);
    start_idle(host, kind, &client, &[]);
    let there = address(host, &server);
    let ping = ["ping", "-c", "1", "-W", "10"];
    host.hostctl(&[&["exec", client.as_str()], &ping[..], &[&there]].concat())
        .ok();
    let here = address(host, &client);
    host.hostctl(&[&["exec", server.as_str()], &ping[..], &[&here]].concat())
        .ok();
    for name in [server, client] {
        host.hostctl(&["rm", "--force", &name]).ok();
    }
}

fn published(host: &Host, kind: Kind) {
    let name = format!("web-{}", kind.name());
    let port = match kind {
        Kind::Container => "18080",
        Kind::Vm => "18081",
    };
    let publish = format!("{port}:80");
    start_idle(host, kind, &name, &["-p", &publish]);
    serves(host, kind, &name);
    let taken = host.hostctl(&[&["run", "-d", "-p", &publish], &["busybox", "true"][..]].concat());
    let taken = taken.exits(125);
    assert!(
        taken.stderr.contains(port),
        "the error names the port: {}",
        taken.stderr
    );
    host.hostctl(&["rm", "--force", &name]).ok();
}

/// What it serves on port 80 is at its address, and at the host's port if that is published.
pub(crate) fn serves(host: &Host, _kind: Kind, name: &str) {
    let serve = "mkdir -p /www; echo it works >/www/index.html; httpd -p 80 -h /www";
    host.hostctl(&["exec", name, "sh", "-c", serve]).ok();
    let instance = host.hostctl(&["inspect", "--json", name]).json();
    let port = instance["spec"]["network"]["ports"][0]["host"].as_u64();
    let published = port.map(|port| ("127.0.0.1".to_owned(), port));
    for (address, port) in published.into_iter().chain([(address(host, name), 80)]) {
        // By netcat: the applets of a static busybox that look up service names crash on some hosts.
        let get = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc {address} {port}");
        let page = host.run("sh", &["-c", &get]).ok();
        assert!(
            page.ends_with("\r\n\r\nit works\n"),
            "{address}:{port} answered: {page}"
        );
    }
}

fn none(host: &Host, kind: Kind) {
    let options = [
        "run",
        "--rm",
        "--isolation",
        kind.name(),
        "--network",
        "none",
    ];
    let text = host
        .hostctl(&[&options[..], &["busybox", "ip", "-o", "link"]].concat())
        .ok();
    let links: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains(": lo:"))
        .collect();
    assert!(links.is_empty(), "{links:#?}");
}
