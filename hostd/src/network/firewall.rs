//! Keeps the kernel's packet filter equal to what is known of the instances.
//!
//! The memory of this process is what should be; the kernel is what is. Where a small change does
//! not apply, since somebody flushed or changed our tables, all of it is loaded anew.

use std::collections::BTreeMap;
use std::env;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;

use serde::Deserialize;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::api::types::{PortSpec, Protocol};

use super::NetworkConfig;
use super::error::NetworkError;
use super::rules::{self, Guest};

/// Where Debian has `nft`, which a service or a first process may not have in its PATH.
const SYSTEM_PATH: &str = "/usr/sbin:/sbin";

/// The instances that the filter lets through, by name.
#[derive(Debug)]
pub(super) struct Firewall {
    config: NetworkConfig,
    resolvers: Vec<IpAddr>,
    guests: BTreeMap<String, Guest>,
}

impl Firewall {
    /// Loads the rules. Instances that an earlier process let through stay so.
    pub(super) async fn load(
        config: NetworkConfig,
        resolvers: Vec<IpAddr>,
    ) -> Result<Firewall, NetworkError> {
        let guests = recall().await?;
        let firewall = Firewall {
            config,
            resolvers,
            guests,
        };
        firewall.reload().await?;
        Ok(firewall)
    }

    pub(super) fn guests(&self) -> &BTreeMap<String, Guest> {
        &self.guests
    }

    /// Lets one more instance through.
    pub(super) async fn admit(&mut self, name: &str, guest: Guest) -> Result<(), NetworkError> {
        let change = rules::elements("add", name, &guest);
        self.guests.insert(name.into(), guest);
        if apply("add an instance", &change).await.is_err()
            && let Err(error) = self.reload().await
        {
            self.guests.remove(name);
            return Err(error);
        }
        Ok(())
    }

    /// Forgets an instance; it is no error if it is not known.
    pub(super) async fn dismiss(&mut self, name: &str) -> Result<(), NetworkError> {
        let Some(guest) = self.guests.remove(name) else {
            return Ok(());
        };
        let change = rules::elements("delete", name, &guest);
        if apply("remove an instance", &change).await.is_err() {
            self.reload().await?;
        }
        Ok(())
    }

    /// Knows these instances and no others.
    pub(super) async fn replace(
        &mut self,
        guests: BTreeMap<String, Guest>,
    ) -> Result<(), NetworkError> {
        self.guests = guests;
        self.reload().await
    }

    async fn reload(&self) -> Result<(), NetworkError> {
        let text = rules::whole(&self.config, &self.resolvers, &self.guests);
        apply("load the rules", &text).await
    }
}

/// Loads a text in one transaction: all of it or nothing.
async fn apply(action: &'static str, text: &str) -> Result<(), NetworkError> {
    run(action, &["-f", "-"], text).await.map(drop)
}

async fn run(
    action: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<Vec<u8>, NetworkError> {
    let path = env::var("PATH").unwrap_or_default();
    let mut child = Command::new("nft")
        .args(arguments)
        .env("PATH", format!("{path}:{SYSTEM_PATH}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(NetworkError::NoNft)?;
    let pipe = |source| NetworkError::Host {
        action: "speak with nft",
        source,
    };
    // nft reads all its input before it writes, so this cannot block on a full pipe of output.
    let mut stdin = child.stdin.take().expect("piped above");
    let written = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await.map_err(pipe)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let message = message
            .lines()
            .next()
            .unwrap_or("it gave no reason")
            .to_string();
        return Err(NetworkError::Nft { action, message });
    }
    written.map_err(pipe)?;
    Ok(output.stdout)
}

/// The instances that the kernel's tables hold, as an earlier process left them.
async fn recall() -> Result<BTreeMap<String, Guest>, NetworkError> {
    let mut guests = BTreeMap::new();
    for element in list(&["bridge", "hostd"], "sources").await? {
        if let Some((name, guest)) = source(&element) {
            guests.insert(name, guest);
        }
    }
    for map in ["published", "published_on"] {
        for element in list(&["ip", "hostd"], map).await? {
            if let Some((name, port)) = published(&element)
                && let Some(guest) = guests.get_mut(&name)
            {
                guest.ports.push(port);
            }
        }
    }
    Ok(guests)
}

/// The elements of a set or map; none if it is not there.
async fn list(table: &[&str], name: &str) -> Result<Vec<Value>, NetworkError> {
    let kind = if name == "sources" { "set" } else { "map" };
    let arguments = [&["-j", "list", kind], table, &[name]].concat();
    let answer = match run("list the rules", &arguments, "").await {
        Err(NetworkError::Nft { .. }) => return Ok(Vec::new()),
        answer => answer?,
    };
    parse_list(&answer)
}

#[derive(Debug, Deserialize)]
struct Listing {
    nftables: Vec<ListingEntry>,
}

#[derive(Debug, Deserialize)]
struct ListingEntry {
    #[serde(alias = "map")]
    set: Option<ListingSet>,
}

#[derive(Debug, Deserialize)]
struct ListingSet {
    #[serde(default)]
    elem: Vec<Value>,
}

fn parse_list(answer: &[u8]) -> Result<Vec<Value>, NetworkError> {
    let listing: Listing = serde_json::from_slice(answer).map_err(NetworkError::NftAnswer)?;
    Ok(listing
        .nftables
        .into_iter()
        .filter_map(|entry| entry.set)
        .flat_map(|set| set.elem)
        .collect())
}

/// An element of `sources`; `None` for what is not as this module writes it.
fn source(element: &Value) -> Option<(String, Guest)> {
    let (name, parts) = commented(element)?;
    let [interface, mac, address] = parts.as_slice() else {
        return None;
    };
    let mut octets = [0; 6];
    for (octet, text) in octets.iter_mut().zip(mac.as_str()?.split(':')) {
        *octet = u8::from_str_radix(text, 16).ok()?;
    }
    let guest = Guest {
        interface: interface.as_str()?.into(),
        mac: octets,
        address: address.as_str()?.parse().ok()?,
        ports: Vec::new(),
    };
    Some((name, guest))
}

/// An element of `published` or `published_on`.
fn published(element: &Value) -> Option<(String, PortSpec)> {
    let [key, target] = element.as_array()?.as_slice() else {
        return None;
    };
    let (name, parts) = commented(key)?;
    let (host_ip, protocol, host) = match parts.as_slice() {
        [protocol, host] => (None, protocol, host),
        [ip, protocol, host] => (Some(ip.as_str()?.parse::<Ipv4Addr>().ok()?), protocol, host),
        _ => return None,
    };
    let protocol = match protocol.as_str()? {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    let number = |value: &Value| u16::try_from(value.as_u64()?).ok();
    let instance = number(target.get("concat")?.get(1)?)?;
    Some((
        name,
        PortSpec {
            host_ip,
            host: number(host)?,
            instance,
            protocol,
        },
    ))
}

/// The comment of an element, which is its instance's name, and the parts of its key.
fn commented(element: &Value) -> Option<(String, Vec<Value>)> {
    let element = element.get("elem")?;
    let name = element.get("comment")?.as_str()?.to_string();
    Some((name, element.get("val")?.get("concat")?.as_array()?.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nft_lists_becomes_the_instances_it_was_made_of() {
        let sources = br#"{"nftables":[{"metainfo":{"version":"1.0.6"}},{"set":{"family":"bridge",
            "name":"sources","table":"hostd","type":["ifname","ether_addr","ipv4_addr"],"elem":[
            {"elem":{"val":{"concat":["hostd-vabcdefgh","02:00:0a:d1:00:02","10.209.0.2"]},
            "comment":"web"}},{"concat":["eth0","02:00:00:00:00:01","10.0.0.1"]}]}}]}"#;
        let found: Vec<_> = parse_list(sources)
            .unwrap()
            .iter()
            .filter_map(source)
            .collect();
        let guest = Guest {
            interface: "hostd-vabcdefgh".into(),
            mac: [2, 0, 10, 209, 0, 2],
            address: Ipv4Addr::new(10, 209, 0, 2),
            ports: Vec::new(),
        };
        assert_eq!(found, [("web".to_string(), guest)]);
    }

    #[test]
    fn what_nft_lists_becomes_the_ports_it_was_made_of() {
        let maps = br#"{"nftables":[{"map":{"name":"published","elem":[
            [{"elem":{"val":{"concat":["tcp",8080]},"comment":"web"}},{"concat":["10.209.0.2",80]}],
            [{"elem":{"val":{"concat":["127.0.0.1","udp",53]},"comment":"dns"}},
             {"concat":["10.209.0.3",5353]}],
            [{"concat":["tcp",1]},{"concat":["10.0.0.1",1]}]]}}]}"#;
        let found: Vec<_> = parse_list(maps)
            .unwrap()
            .iter()
            .filter_map(published)
            .collect();
        let web = PortSpec {
            host_ip: None,
            host: 8080,
            instance: 80,
            protocol: Protocol::Tcp,
        };
        let dns = PortSpec {
            host_ip: Some(Ipv4Addr::LOCALHOST),
            host: 53,
            instance: 5353,
            protocol: Protocol::Udp,
        };
        assert_eq!(found, [("web".to_string(), web), ("dns".to_string(), dns)]);
    }

    #[test]
    fn an_empty_map_has_no_elements() {
        let empty = br#"{"nftables":[{"map":{"name":"published"}}]}"#;
        assert_eq!(parse_list(empty).unwrap(), Vec::<Value>::new());
    }
}
