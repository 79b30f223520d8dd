//! The packet filter's rules, as the text that `nft -f` reads. Pure: nothing here acts.
//!
//! Text and not JSON, because the JSON reader of nft 1.0.6 (Debian 12) cannot declare a map whose
//! values are an address and a port; and because rules are best reviewed as rules.
//!
//! There are two tables of our own, `ip hostd` and `bridge hostd`. Other tables are never touched.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};

use crate::api::types::PortSpec;

use super::error::protocol_name;
use super::names::PREFIX;
use super::{NetworkConfig, format_mac};

/// What the filter knows of one instance.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Guest {
    /// The host's interface that leads to it.
    pub(super) interface: String,
    pub(super) mac: [u8; 6],
    pub(super) address: Ipv4Addr,
    pub(super) ports: Vec<PortSpec>,
}

/// Everything: what to load to be in a known state, whatever was there of ours before.
///
/// One transaction: packets meet the old rules or the new ones, never none.
pub(super) fn whole(
    config: &NetworkConfig,
    resolvers: &[IpAddr],
    guests: &BTreeMap<String, Guest>,
) -> String {
    let mut text = REMOVE.to_string();
    text.push_str(&ip_table(config, resolvers));
    text.push_str(&bridge_table());
    for (name, guest) in guests {
        text.push_str(&elements("add", name, guest));
    }
    text
}

/// Takes both tables away; no error if they are not there.
pub(super) const REMOVE: &str = "\
add table ip hostd
delete table ip hostd
add table bridge hostd
delete table bridge hostd
";

/// The commands that add (`verb` is `add`) or remove (`delete`) one instance.
pub(super) fn elements(verb: &str, name: &str, guest: &Guest) -> String {
    let Guest {
        interface,
        mac,
        address,
        ports,
    } = guest;
    let mut text = String::new();
    let mac = format_mac(*mac);
    let source = format!("\"{interface}\" . {mac} . {address} comment \"{name}\"");
    line(
        &mut text,
        &format!("{verb} element bridge hostd sources {{ {source} }}"),
    );
    for port in ports {
        let protocol = protocol_name(port.protocol);
        let (map, key) = match port.host_ip {
            None => ("published", format!("{protocol} . {}", port.host)),
            Some(ip) => ("published_on", format!("{ip} . {protocol} . {}", port.host)),
        };
        let target = format!("comment \"{name}\" : {address} . {}", port.instance);
        line(
            &mut text,
            &format!("{verb} element ip hostd {map} {{ {key} {target} }}"),
        );
    }
    text
}

fn line(text: &mut String, command: &str) {
    writeln!(text, "{command}").expect("a String takes all");
}

/// NAT, published ports, and what may be forwarded.
///
/// - `guard` runs before connection tracking, where a packet still has the destination that its
///   sender wrote. The bridge accepts packets to and from 127.0.0.0/8 (`route_localnet`), as
///   publishing on 127.0.0.1 needs; this keeps instances away from the host's loopback services.
///   It also keeps them away from link-local addresses, where clouds serve credentials, except for
///   DNS where the host's own resolver is there.
/// - `forward` lets nothing in from outside but answers and published ports, also when a neighbour
///   adds a route to the subnet.
/// - Masquerading on the way out; of the host's loopback, so that answers find back; and of
///   instances that reach instances through a published port, or the answer would be sent directly.
fn ip_table(config: &NetworkConfig, resolvers: &[IpAddr]) -> String {
    let bridge = &config.bridge;
    let subnet = config.subnet.trunc();
    let dns = link_local_dns(bridge, resolvers);
    let peers = if config.isolate_instances {
        ""
    } else {
        PEERS_MAY_TALK
    };
    let input = if config.instances_reach_host {
        String::new()
    } else {
        input_chain(bridge)
    };
    format!(
        r#"
table ip hostd {{
    map published {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
    map published_on {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
    chain guard {{
        type filter hook prerouting priority raw; policy accept;
{dns}        iifname "{bridge}" ip daddr {{ 127.0.0.0/8, 169.254.0.0/16 }} drop
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        jump publish
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        jump publish
    }}
    chain publish {{
        fib daddr type != local return
        dnat ip to ip daddr . meta l4proto . th dport map @published_on
        dnat ip to meta l4proto . th dport map @published
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 127.0.0.0/8 oifname "{bridge}" masquerade
        ip saddr {subnet} oifname "{bridge}" ct status dnat masquerade
        ip saddr {subnet} oifname != "{bridge}" masquerade
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        oifname != "{bridge}" accept
        ct state established,related accept
        ct status dnat accept
{peers}        drop
    }}
{input}}}
"#,
        peers = peers.replace("BRIDGE", bridge),
    )
}

/// Bridged packets come by here only where br_netfilter is loaded.
const PEERS_MAY_TALK: &str = "        iifname \"BRIDGE\" accept\n";

fn input_chain(bridge: &str) -> String {
    format!(
        r#"    chain input {{
        type filter hook input priority filter; policy accept;
        iifname != "{bridge}" accept
        ct state established,related accept
        icmp type echo-request accept
        drop
    }}
"#
    )
}

fn link_local_dns(bridge: &str, resolvers: &[IpAddr]) -> String {
    let servers: BTreeSet<String> = resolvers
        .iter()
        .filter(|server| matches!(server, IpAddr::V4(address) if address.is_link_local()))
        .map(IpAddr::to_string)
        .collect();
    if servers.is_empty() {
        return String::new();
    }
    let servers = servers.into_iter().collect::<Vec<_>>().join(", ");
    format!(
        "        iifname \"{bridge}\" ip daddr {{ {servers} }} meta l4proto {{ tcp, udp }} \
         th dport 53 accept\n"
    )
}

/// Against spoofing: a frame passes only with the MAC *and* the IPv4 address that its interface was
/// given, ARP included; everything that is neither IPv4 nor ARP is dropped, IPv6 too. What is dropped
/// here teaches the bridge nothing, so an instance cannot draw another's traffic to itself.
fn bridge_table() -> String {
    format!(
        r#"
table bridge hostd {{
    set sources {{ type ifname . ether_addr . ipv4_addr; }}
    chain prerouting {{
        type filter hook prerouting priority filter; policy accept;
        iifname != "{PREFIX}*" accept
        iifname . ether saddr . ip saddr @sources accept
        iifname . ether saddr . arp saddr ip @sources iifname . arp saddr ether . arp saddr ip @sources accept
        drop
    }}
}}
"#
    )
}

#[cfg(test)]
mod tests {
    use crate::api::types::Protocol;

    use super::*;

    #[test]
    fn an_instance_is_one_source_and_an_element_for_each_port() {
        let port = |host_ip, protocol| PortSpec {
            host_ip,
            host: 8080,
            instance: 80,
            protocol,
        };
        let guest = Guest {
            interface: "hostd-vabcdefgh".into(),
            mac: [2, 0, 10, 209, 0, 2],
            address: Ipv4Addr::new(10, 209, 0, 2),
            ports: vec![
                port(None, Protocol::Tcp),
                port(Some(Ipv4Addr::LOCALHOST), Protocol::Udp),
            ],
        };
        assert_eq!(
            elements("add", "web", &guest),
            "add element bridge hostd sources { \"hostd-vabcdefgh\" . 02:00:0a:d1:00:02 . \
             10.209.0.2 comment \"web\" }\n\
             add element ip hostd published { tcp . 8080 comment \"web\" : 10.209.0.2 . 80 }\n\
             add element ip hostd published_on { 127.0.0.1 . udp . 8080 comment \"web\" : \
             10.209.0.2 . 80 }\n"
        );
    }

    #[test]
    fn a_resolver_at_a_link_local_address_stays_reachable_for_dns_alone() {
        let resolvers = ["169.254.169.254", "10.0.0.1"].map(|text| text.parse().unwrap());
        assert_eq!(
            link_local_dns("hostd0", &resolvers),
            "        iifname \"hostd0\" ip daddr { 169.254.169.254 } meta l4proto { tcp, udp } \
             th dport 53 accept\n"
        );
        assert_eq!(link_local_dns("hostd0", &resolvers[1..]), "");
    }
}
