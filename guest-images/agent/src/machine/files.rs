//! Writes the files that say who the machine is and how names are found: what belongs to the machine
//! rather than to the image.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::IpAddr;

use nix::unistd::sync;

use super::SetUpError;
use crate::protocol::Network;

/// What every machine calls itself.
const LOCAL_HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// What programs know a machine by, if they have made one up for it.
const MACHINE_ID: &str = "/etc/machine-id";

/// Writes them all, afresh at every boot, since addresses may have changed.
pub(super) fn write_identity(
    host_name: &str,
    network: Option<&Network>,
    machine_id: Option<&str>,
) -> Result<(), SetUpError> {
    fs::create_dir_all("/etc").map_err(|source| SetUpError::File {
        path: "/etc".into(),
        source,
    })?;
    write("/etc/hostname", &format!("{host_name}\n"))?;
    write("/etc/hosts", &hosts(host_name, network))?;
    if let Some(network) = network {
        write("/etc/resolv.conf", &resolver(network))?;
    }
    match machine_id {
        Some(machine_id) => replace_machine_id(machine_id),
        None => Ok(()),
    }
}

/// Whether the files are those of another machine than the one that is to have this id.
pub(super) fn is_of_another(machine_id: Option<&str>) -> bool {
    let Some(machine_id) = machine_id else {
        return false;
    };
    // An empty one is for a later boot to fill, and an absent one for nobody.
    let found = fs::read_to_string(MACHINE_ID).unwrap_or_default();
    !found.is_empty() && found.trim_end() != machine_id
}

fn replace_machine_id(machine_id: &str) -> Result<(), SetUpError> {
    if !is_of_another(Some(machine_id)) {
        return Ok(());
    }
    write(MACHINE_ID, &format!("{machine_id}\n"))?;
    // It is there once and for all, however the machine ends.
    sync();
    Ok(())
}

fn hosts(host_name: &str, network: Option<&Network>) -> String {
    let mut text = LOCAL_HOSTS.to_owned();
    if let Some(network) = network {
        text.push_str(&format!("{}\t{host_name}\n", network.address));
        let own = (IpAddr::from(network.address), host_name);
        for (address, name) in &network.hosts {
            if (*address, name.as_str()) != own {
                text.push_str(&format!("{address}\t{name}\n"));
            }
        }
    }
    text
}

fn resolver(network: &Network) -> String {
    network.dns.iter().fold(String::new(), |mut text, server| {
        let _ = writeln!(text, "nameserver {server}");
        text
    })
}

/// Replaces the file at `path`. An image may have a link there that leads nowhere now.
fn write(path: &str, text: &str) -> Result<(), SetUpError> {
    let removed = match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    removed
        .and_then(|()| fs::write(path, text))
        .map_err(|source| SetUpError::File {
            path: path.into(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_without_and_with_a_network() {
        assert_eq!(hosts("web", None), LOCAL_HOSTS);
        let network = Network {
            mac: "02:00:00:00:00:01".into(),
            address: [10, 0, 0, 7].into(),
            prefix_len: 24,
            gateway: [10, 0, 0, 1].into(),
            dns: vec![[10, 0, 0, 1].into(), "fd00::1".parse().unwrap()],
            hosts: vec![
                ([10, 0, 0, 8].into(), "db".into()),
                ([10, 0, 0, 7].into(), "web".into()),
            ],
        };
        let text = hosts("web", Some(&network));
        assert_eq!(
            text.strip_prefix(LOCAL_HOSTS),
            Some("10.0.0.7\tweb\n10.0.0.8\tdb\n")
        );
        assert_eq!(
            resolver(&network),
            "nameserver 10.0.0.1\nnameserver fd00::1\n"
        );
    }
}
