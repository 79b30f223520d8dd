//! Which name servers an instance is told to use.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};

/// glibc and musl read no more than three.
const SERVERS_MAX: usize = 3;

/// Where systemd-resolved lists the real servers behind its stub of 127.0.0.53.
const SYSTEMD_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// The host's name servers that an instance can reach, or `fallback` if there is none.
pub(super) fn of_host(fallback: &[IpAddr]) -> Vec<IpAddr> {
    let servers = ["/etc/resolv.conf", SYSTEMD_RESOLVED]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(|text| reachable(&text))
        .find(|servers| !servers.is_empty());
    servers.unwrap_or_else(|| fallback.to_vec())
}

/// The servers of a `resolv.conf` that mean the same inside an instance: a loopback address would
/// be the instance's own, and instances have no IPv6.
fn reachable(resolv_conf: &str) -> Vec<IpAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next())
        .filter_map(|word| word.parse::<Ipv4Addr>().ok())
        .filter(|server| !server.is_loopback() && !server.is_unspecified())
        .map(IpAddr::V4)
        .take(SERVERS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_ipv6_and_nonsense_are_left_out() {
        let table = [
            ("nameserver 10.0.0.53\n", vec!["10.0.0.53"]),
            ("nameserver 127.0.0.53\noptions edns0\n", vec![]),
            (
                "nameserver 127.0.0.1\nnameserver 9.9.9.9 # quad\n",
                vec!["9.9.9.9"],
            ),
            ("nameserver fd00::1\nnameserver\t1.1.1.1\n", vec!["1.1.1.1"]),
            ("# nameserver 8.8.8.8\nnameserver\nnameserver x\n", vec![]),
            (
                "nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\nnameserver 1.0.0.4",
                vec!["1.0.0.1", "1.0.0.2", "1.0.0.3"],
            ),
        ];
        for (text, expected) in table {
            let found: Vec<String> = reachable(text).iter().map(IpAddr::to_string).collect();
            assert_eq!(found, expected, "{text:?}");
        }
    }
}
