//! What the network is to be like: names, addresses and what instances may reach.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use ipnet::Ipv4Net;

use super::error::NetworkError;
use super::names::PREFIX;

/// What an interface carries where the host has no default route to learn from.
pub(super) const MTU_DEFAULT: u32 = 1500;

/// Linux takes up to 15 bytes for an interface's name.
const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// How the bridge is set up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetworkConfig {
    /// The bridge's name, at most 15 bytes.
    pub bridge: String,
    /// The instances' addresses. The first one is the bridge's, and their gateway.
    pub subnet: Ipv4Net,
    /// The directory that holds the network namespaces' files. It is made if it is not there, and
    /// must not survive a reboot.
    pub netns_dir: PathBuf,
    /// Instances cannot reach each other but through published ports, and not even so on a host
    /// whose bridges pass packets to the IPv4 filter (`net.bridge.bridge-nf-call-iptables`).
    pub isolate_instances: bool,
    /// Instances can reach services of the host at the bridge's address. Without it they can only
    /// ping it.
    pub instances_reach_host: bool,
    /// Name servers for instances of a host that has only loopback ones.
    pub fallback_dns: Vec<IpAddr>,
    /// The largest packet, in bytes; that of the default route's interface if absent.
    pub mtu: Option<u32>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        NetworkConfig {
            bridge: "hostd0".into(),
            subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, 209, 0, 0), 16),
            netns_dir: "/run/hostd/netns".into(),
            isolate_instances: false,
            instances_reach_host: true,
            // Docker's choice, and for the same reason: a name server that works beats none.
            fallback_dns: vec![IpAddr::from([8, 8, 8, 8]), IpAddr::from([8, 8, 4, 4])],
            mtu: None,
        }
    }
}

impl NetworkConfig {
    /// The bridge's own address.
    pub(super) fn gateway_net(&self) -> Ipv4Net {
        let first = Ipv4Addr::from(u32::from(self.subnet.network()) + 1);
        Ipv4Net::new_assert(first, self.subnet.prefix_len())
    }

    /// Refuses what cannot work, whatever the host is.
    pub(super) fn check(&self) -> Result<(), NetworkError> {
        let NetworkConfig { bridge, subnet, .. } = self;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        let length = 1..=INTERFACE_NAME_BYTES_MAX;
        if !length.contains(&bridge.len())
            || !bridge.bytes().all(plain)
            || bridge.starts_with(PREFIX)
        {
            return Err(NetworkError::BadBridgeName {
                name: bridge.clone(),
            });
        }
        if subnet.prefix_len() > 30 {
            return Err(NetworkError::SubnetTooSmall { subnet: *subnet });
        }
        Ok(())
    }
}

/// The lowest free address after the highest used one; then any.
pub(super) fn allocate(
    subnet: Ipv4Net,
    used: &HashSet<Ipv4Addr>,
) -> Result<Ipv4Addr, NetworkError> {
    let first = u32::from(subnet.network()) + 2;
    let last = u32::from(subnet.broadcast()) - 1;
    let highest = used
        .iter()
        .map(|address| u32::from(*address))
        .filter(|n| *n <= last)
        .max();
    let start = highest.map_or(first, |highest| (highest + 1).max(first));
    (start..=last)
        .chain(first..start.min(last + 1))
        .map(Ipv4Addr::from)
        .find(|address| !used.contains(address))
        .ok_or(NetworkError::Exhausted { subnet })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_that_was_just_given_back_is_not_the_next_one() {
        let table = [
            ("10.209.0.0/16", &[][..], Some("10.209.0.2")),
            (
                "10.209.0.0/16",
                &["10.209.0.2", "10.209.0.4"][..],
                Some("10.209.0.5"),
            ),
            ("10.0.0.0/29", &["10.0.0.6"][..], Some("10.0.0.2")),
            (
                "10.0.0.0/29",
                &["10.0.0.2", "10.0.0.6"][..],
                Some("10.0.0.3"),
            ),
            ("10.0.0.0/30", &["10.0.0.2"][..], None),
            ("10.0.0.0/30", &["10.1.0.2"][..], Some("10.0.0.2")),
            ("10.0.0.0/30", &["9.1.0.2"][..], Some("10.0.0.2")),
        ];
        for (net, used, expected) in table {
            let used = used.iter().map(|text| text.parse().unwrap()).collect();
            let found = allocate(subnet(net), &used)
                .ok()
                .map(|address| address.to_string());
            assert_eq!(found.as_deref(), expected, "{net} {used:?}");
        }
    }

    #[test]
    fn a_config_that_cannot_work_is_refused() {
        let table = [
            ("hostd0", "10.209.0.0/16", true),
            ("hostd0", "10.0.0.0/30", true),
        ]
        .into_iter()
        .chain([
            ("hostd0", "10.0.0.0/31", false),
            ("", "10.209.0.0/16", false),
            ("a-very-long-name", "10.209.0.0/16", false),
            ("a\"b", "10.209.0.0/16", false),
            ("hostd-bridge", "10.209.0.0/16", false),
        ]);
        for (bridge, net, valid) in table {
            let config = NetworkConfig {
                bridge: bridge.into(),
                subnet: subnet(net),
                ..NetworkConfig::default()
            };
            assert_eq!(config.check().is_ok(), valid, "{bridge:?} {net}");
        }
    }
}
