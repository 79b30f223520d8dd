//! Gives the machine's interface the address and the route that the host has chosen for it.

use std::fs;
use std::io;
use std::path::Path;

use super::SetUpError;
use super::netlink::Netlink;
use crate::protocol::Network;

const INTERFACES: &str = "/sys/class/net";

/// The interface that is there from the start.
const LOOPBACK: &str = "lo";

pub(super) fn bring_up_loopback() -> Result<(), SetUpError> {
    let index = index(Path::new(INTERFACES), LOOPBACK).map_err(SetUpError::Interfaces)?;
    let mut netlink = netlink()?;
    netlink
        .bring_up(index)
        .map_err(failed("bring up the loopback interface"))
}

pub(super) fn configure(network: &Network) -> Result<(), SetUpError> {
    let folder = Path::new(INTERFACES);
    let name = find(folder, &network.mac)
        .map_err(SetUpError::Interfaces)?
        .ok_or_else(|| SetUpError::NoInterface {
            mac: network.mac.clone(),
        })?;
    let index = index(folder, &name).map_err(SetUpError::Interfaces)?;
    let mut netlink = netlink()?;
    netlink
        .add_address(index, network.address, network.prefix_len)
        .map_err(failed("give the network interface its address"))?;
    netlink
        .bring_up(index)
        .map_err(failed("bring up the network interface"))?;
    netlink
        .add_default_route(index, network.gateway)
        .map_err(failed("set the route to the gateway"))
}

/// Gives the interface that has `former`'s hardware address another one, and all that goes with it.
pub(super) fn change(former: &Network, network: &Network) -> Result<(), SetUpError> {
    let folder = Path::new(INTERFACES);
    let found = find(folder, &former.mac).map_err(SetUpError::Interfaces)?;
    if let Some(name) = found {
        let index = index(folder, &name).map_err(SetUpError::Interfaces)?;
        let mut netlink = netlink()?;
        netlink
            .set_hardware_address(index, octets(&network.mac)?)
            .map_err(failed("give the network interface its hardware address"))?;
        netlink
            .remove_address(index, former.address, former.prefix_len)
            .map_err(failed("take the network interface's old address away"))?;
    }
    configure(network)
}

fn octets(mac: &str) -> Result<[u8; 6], SetUpError> {
    let mut octets = [0; 6];
    let mut parts = mac.split(':');
    for octet in &mut octets {
        let part = parts
            .next()
            .and_then(|part| u8::from_str_radix(part, 16).ok());
        *octet = part.ok_or_else(|| SetUpError::NoInterface { mac: mac.into() })?;
    }
    Ok(octets)
}

fn netlink() -> Result<Netlink, SetUpError> {
    Netlink::open().map_err(failed("speak with the kernel about networks"))
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> SetUpError {
    move |source| SetUpError::Network { action, source }
}

/// The name of the interface with the hardware address `mac`.
fn find(folder: &Path, mac: &str) -> io::Result<Option<String>> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim().eq_ignore_ascii_case(mac) {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

/// The number that the kernel knows the interface `name` by.
fn index(folder: &Path, name: &str) -> io::Result<i32> {
    let text = fs::read_to_string(folder.join(name).join("ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_by_its_hardware_address() {
        let folder = tempfile::tempdir().unwrap();
        for (name, address) in [("lo", "00:00:00:00:00:00"), ("eth0", "02:fc:00:00:00:0a")] {
            let interface = folder.path().join(name);
            fs::create_dir(&interface).unwrap();
            fs::write(interface.join("address"), format!("{address}\n")).unwrap();
            fs::write(interface.join("ifindex"), "2\n").unwrap();
        }
        let found = |mac: &str| find(folder.path(), mac).unwrap();
        assert_eq!(found("02:FC:00:00:00:0A").as_deref(), Some("eth0"));
        assert_eq!(found("02:fc:00:00:00:0b"), None);
        assert_eq!(index(folder.path(), "eth0").unwrap(), 2);
    }
}
