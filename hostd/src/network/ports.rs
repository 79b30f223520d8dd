//! Whether the ports that an instance asks for are free.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt,
};

use crate::api::types::{PortSpec, Protocol};

use super::error::NetworkError;
use super::rules::Guest;

/// Refuses ports that are nonsense, that another instance publishes or that a process of the host
/// has bound; the error names the port.
pub(super) fn check(
    ports: &[PortSpec],
    guests: &BTreeMap<String, Guest>,
) -> Result<(), NetworkError> {
    for (index, port) in ports.iter().enumerate() {
        let (number, protocol) = (port.host, port.protocol);
        if number == 0 || port.instance == 0 {
            return Err(NetworkError::PortZero { index });
        }
        if ports[..index].iter().any(|other| collide(port, other)) {
            return Err(NetworkError::PortTwice {
                index,
                port: number,
                protocol,
            });
        }
        let taken = |guest: &Guest| guest.ports.iter().any(|other| collide(port, other));
        if let Some((by, _)) = guests.iter().find(|(_, guest)| taken(guest)) {
            let by = by.clone();
            return Err(NetworkError::PortTaken {
                index,
                port: number,
                protocol,
                by,
            });
        }
        try_bind(index, port)?;
    }
    Ok(())
}

/// Two ports collide as two sockets would: on the same address, or if one is on all of them.
fn collide(one: &PortSpec, other: &PortSpec) -> bool {
    let address = |port: &PortSpec| port.host_ip.filter(|ip| !ip.is_unspecified());
    let same_address = match (address(one), address(other)) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    };
    (one.host, one.protocol) == (other.host, other.protocol) && same_address
}

/// The kernel knows best whether a process has the port: it is asked by binding, never listening.
///
/// Nothing holds the port afterwards. A process that binds it later gets no connections from other
/// hosts, since the packet filter comes first.
fn try_bind(index: usize, port: &PortSpec) -> Result<(), NetworkError> {
    let host = |errno: Errno| NetworkError::Host {
        action: "try a port",
        source: errno.into(),
    };
    let kind = match port.protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None).map_err(host)?;
    if port.protocol == Protocol::Tcp {
        // Connections that linger in TIME_WAIT do not have the port.
        setsockopt(&socket, sockopt::ReuseAddr, &true).map_err(host)?;
    }
    let address = port.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
    match bind(
        socket.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(address, port.host)),
    ) {
        Ok(()) => Ok(()),
        Err(Errno::EADDRINUSE) => Err(NetworkError::PortInUse {
            index,
            port: port.host,
            protocol: port.protocol,
        }),
        Err(Errno::EADDRNOTAVAIL) => Err(NetworkError::NotALocalAddress { index, address }),
        Err(errno) => Err(host(errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn port(host_ip: Option<[u8; 4]>, host: u16, protocol: Protocol) -> PortSpec {
        PortSpec {
            host_ip: host_ip.map(Ipv4Addr::from),
            host,
            instance: 80,
            protocol,
        }
    }

    #[test]
    fn ports_collide_as_sockets_do() {
        use Protocol::{Tcp, Udp};
        let table = [
            (port(None, 80, Tcp), port(None, 80, Tcp), true),
            (port(None, 80, Tcp), port(None, 80, Udp), false),
            (port(None, 80, Tcp), port(None, 81, Tcp), false),
            (port(Some([1, 2, 3, 4]), 80, Tcp), port(None, 80, Tcp), true),
            (
                port(Some([0, 0, 0, 0]), 80, Tcp),
                port(Some([1, 2, 3, 4]), 80, Tcp),
                true,
            ),
            (
                port(Some([1, 2, 3, 4]), 80, Tcp),
                port(Some([1, 2, 3, 5]), 80, Tcp),
                false,
            ),
            (
                port(Some([1, 2, 3, 4]), 80, Tcp),
                port(Some([1, 2, 3, 4]), 80, Tcp),
                true,
            ),
        ];
        for (one, other, expected) in table {
            assert_eq!(collide(&one, &other), expected, "{one:?} {other:?}");
            assert_eq!(collide(&other, &one), expected, "{other:?} {one:?}");
        }
    }

    #[test]
    fn a_port_that_a_process_listens_on_is_refused_by_number() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = tcp.local_addr().unwrap().port();
        let error = check(&[port(None, number, Protocol::Tcp)], &BTreeMap::new()).unwrap_err();
        assert!(
            error.to_string().contains(&format!("port {number}/tcp")),
            "{error}"
        );

        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let number = udp.local_addr().unwrap().port();
        let wanted = port(Some([127, 0, 0, 1]), number, Protocol::Udp);
        let error = check(&[wanted], &BTreeMap::new()).unwrap_err();
        assert!(
            matches!(error, NetworkError::PortInUse { index: 0, .. }),
            "{error}"
        );
    }

    #[test]
    fn the_error_says_which_of_the_ports_is_wrong() {
        let guests = BTreeMap::from([(
            "web".to_string(),
            Guest {
                interface: "hostd-vabcdefgh".into(),
                mac: [2; 6],
                address: Ipv4Addr::new(10, 209, 0, 2),
                ports: vec![port(None, 8080, Protocol::Tcp)],
            },
        )]);
        let udp = port(None, 8080, Protocol::Udp);
        let table = [
            (vec![udp.clone(), port(None, 8080, Protocol::Tcp)], 1),
            (vec![udp.clone(), udp.clone()], 1),
            (vec![port(None, 0, Protocol::Tcp)], 0),
            (vec![port(Some([192, 0, 2, 250]), 8081, Protocol::Tcp)], 0),
        ];
        for (ports, expected) in table {
            let error = check(&ports, &guests).unwrap_err();
            assert_eq!(error.port_index(), Some(expected), "{ports:?}: {error}");
        }
    }
}
