//! The three messages of rtnetlink(7) that a static set-up takes.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// Of linux/rtnetlink.h, where libc has none.
const RTNH_F_ONLINK: u32 = 4;

/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

/// An answer is a header, an error number and the request.
const ANSWER_BYTES_MAX: usize = 1024;

/// A connection to the kernel's network configuration.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// A request without its header: a fixed part and attributes, in the machine's byte order.
struct Message {
    kind: u16,
    flags: i32,
    body: Vec<u8>,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Netlink> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Netlink {
            socket,
            sequence: 0,
        })
    }

    pub(super) fn bring_up(&mut self, index: i32) -> io::Result<()> {
        let up = libc::IFF_UP.cast_unsigned();
        // struct ifinfomsg: family, padding, type, index, flags, and which of the flags to change.
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.put(&[0; 4]);
        message.put(&index.to_ne_bytes());
        message.put(&up.to_ne_bytes());
        message.put(&up.to_ne_bytes());
        self.request(&message)
    }

    pub(super) fn set_hardware_address(&mut self, index: i32, mac: [u8; 6]) -> io::Result<()> {
        // struct ifinfomsg, as above.
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.put(&[0; 4]);
        message.put(&index.to_ne_bytes());
        message.put(&[0; 8]);
        message.attribute(libc::IFLA_ADDRESS, &mac);
        self.request(&message)
    }

    pub(super) fn remove_address(
        &mut self,
        index: i32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_DELADDR, 0);
        message.put(&[INET, prefix_len, 0, libc::RT_SCOPE_UNIVERSE]);
        message.put(&index.to_ne_bytes());
        message.attribute(libc::IFA_LOCAL, &address.octets());
        self.request(&message)
    }

    pub(super) fn add_address(
        &mut self,
        index: i32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        let mut message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        message.put(&[INET, prefix_len, 0, libc::RT_SCOPE_UNIVERSE]);
        message.put(&index.to_ne_bytes());
        message.attribute(libc::IFA_LOCAL, &address.octets());
        message.attribute(libc::IFA_ADDRESS, &address.octets());
        self.request(&message)
    }

    /// The gateway need not lie in the subnet of the interface's address.
    pub(super) fn add_default_route(&mut self, index: i32, gateway: Ipv4Addr) -> io::Result<()> {
        // struct rtmsg: family, lengths of destination and source, type of service, table, protocol,
        // scope, type, flags.
        let mut message =
            Message::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        message.put(&[INET, 0, 0, 0]);
        message.put(&[
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ]);
        message.put(&RTNH_F_ONLINK.to_ne_bytes());
        message.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        message.attribute(libc::RTA_GATEWAY, &gateway.octets());
        self.request(&message)
    }

    /// Sends a request and waits for its acknowledgement.
    fn request(&mut self, message: &Message) -> io::Result<()> {
        self.sequence += 1;
        let bytes = message.encode(self.sequence)?;
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        let mut answer = [0; ANSWER_BYTES_MAX];
        let count = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        acknowledged(&answer[..count])
    }
}

/// `AF_INET`.
const INET: u8 = 2;

impl Message {
    fn new(kind: u16, flags: i32) -> Self {
        Self {
            kind,
            flags: flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK,
            body: Vec::new(),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.body.extend_from_slice(bytes);
    }

    /// Adds an attribute, and what is missing to a multiple of four bytes.
    fn attribute<const N: usize>(&mut self, kind: u16, value: &[u8; N]) {
        let length = u16::try_from(4 + N).expect("values are a few bytes");
        self.put(&length.to_ne_bytes());
        self.put(&kind.to_ne_bytes());
        self.put(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
    }

    fn encode(&self, sequence: u32) -> io::Result<Vec<u8>> {
        let length = u32::try_from(HEADER_BYTES + self.body.len()).map_err(io::Error::other)?;
        let flags = u16::try_from(self.flags).map_err(io::Error::other)?;
        let sender: u32 = 0;
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&sender.to_ne_bytes());
        bytes.extend_from_slice(&self.body);
        Ok(bytes)
    }
}

/// What the kernel says to a request: an error number, zero for none.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let field = answer.get(HEADER_BYTES..HEADER_BYTES + 4);
    let field = field.and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
    match field.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use nix::net::if_::if_nametoindex;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn ip(arguments: &str) -> String {
        let output = Command::new("ip")
            .args(arguments.split(' '))
            .output()
            .unwrap();
        assert!(output.status.success(), "ip {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// In a network namespace that goes with the thread.
    #[test]
    fn the_kernel_does_what_the_messages_say() {
        let test = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link add nic type veth peer name other");
            let index = if_nametoindex("nic").unwrap();
            let index = i32::try_from(index).unwrap();
            let mut netlink = Netlink::open().unwrap();
            netlink
                .add_address(index, [10, 9, 8, 7].into(), 24)
                .unwrap();
            netlink.bring_up(index).unwrap();
            netlink
                .add_default_route(index, [10, 9, 8, 1].into())
                .unwrap();
            let address = ip("-brief address show dev nic");
            assert!(address.contains("10.9.8.7/24"), "{address}");
            let route = ip("route show default");
            assert!(route.contains("via 10.9.8.1 dev nic"), "{route}");

            // Once more is the same, and another gateway, outside of the subnet, replaces the first.
            netlink
                .add_address(index, [10, 9, 8, 7].into(), 24)
                .unwrap();
            netlink
                .add_default_route(index, [169, 254, 0, 1].into())
                .unwrap();
            let routes = ip("route show default");
            assert_eq!(routes.lines().count(), 1, "{routes}");
            assert!(routes.contains("via 169.254.0.1 dev nic"), "{routes}");

            // Another machine's place in the network, on an interface that is up.
            netlink
                .set_hardware_address(index, [2, 0, 10, 9, 8, 9])
                .unwrap();
            netlink
                .remove_address(index, [10, 9, 8, 7].into(), 24)
                .unwrap();
            assert!(ip("link show dev nic").contains("02:00:0a:09:08:09"));
            assert!(!ip("-brief address show dev nic").contains("10.9.8.7"));
            let again = netlink.remove_address(index, [10, 9, 8, 7].into(), 24);
            let errno = again.unwrap_err().raw_os_error();
            assert_eq!(errno, Some(libc::EADDRNOTAVAIL));

            let error = netlink.bring_up(9999).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        });
        test.join().unwrap();
    }
}
