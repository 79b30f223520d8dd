//! Questions to the kernel about network devices, and orders, in one network namespace (rtnetlink(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sched::{CloneFlags, setns};

/// A connection to the kernel's network configuration.
pub(crate) struct Netlink {
    socket: Socket,
}

/// A network device, as far as its move is concerned.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) up: bool,
}

impl Netlink {
    /// In the caller's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// In another network namespace. The caller, which has a single thread, enters it meanwhile.
    pub(crate) fn open_in(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let own = std::fs::File::open("/proc/self/ns/net")?;
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let opened = Self::open();
        setns(own.as_fd(), CloneFlags::CLONE_NEWNET)?;
        opened
    }

    pub(crate) fn devices(&self) -> io::Result<Vec<Device>> {
        let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let mut devices = Vec::new();
        self.ask(question, NLM_F_DUMP, |answer| {
            let RouteNetlinkMessage::NewLink(link) = answer else {
                return;
            };
            let name = link.attributes.iter().find_map(|attribute| {
                if let LinkAttribute::IfName(name) = attribute {
                    return Some(name.clone());
                }
                None
            });
            devices.push(Device {
                index: link.header.index,
                name: name.unwrap_or_default(),
                up: link.header.flags.contains(LinkFlags::Up),
            });
        })?;
        Ok(devices)
    }

    /// The device of this name; ENODEV if there is none.
    pub(crate) fn device(&self, name: &str) -> io::Result<Device> {
        let found = self
            .devices()?
            .into_iter()
            .find(|device| device.name == name);
        found.ok_or_else(|| rustix::io::Errno::NODEV.into())
    }

    pub(crate) fn addresses(&self, index: u32) -> io::Result<Vec<AddressMessage>> {
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut addresses = Vec::new();
        self.ask(question, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewAddress(address) = answer
                && address.header.index == index
            {
                addresses.push(address);
            }
        })?;
        Ok(addresses)
    }

    /// Gives a device an address that another one had. What the kernel itself keeps of an address
    /// (label, lifetime) is not given.
    pub(crate) fn add_address(&self, mut address: AddressMessage, index: u32) -> io::Result<()> {
        address.header.index = index;
        address.attributes.retain(|attribute| {
            matches!(
                attribute,
                AddressAttribute::Address(_)
                    | AddressAttribute::Local(_)
                    | AddressAttribute::Broadcast(_)
                    | AddressAttribute::Flags(_)
                    | AddressAttribute::RoutePriority(_)
            )
        });
        let order = RouteNetlinkMessage::NewAddress(address);
        self.ask(order, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, |_| {})
    }

    /// Moves a device to another network namespace, under another name. Its addresses are lost, and it
    /// is down.
    pub(crate) fn move_device(
        &self,
        index: u32,
        namespace: BorrowedFd<'_>,
        name: &str,
    ) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![
            LinkAttribute::NetNsFd(namespace.as_raw_fd()),
            LinkAttribute::IfName(name.to_owned()),
        ];
        self.ask(RouteNetlinkMessage::SetLink(link), NLM_F_ACK, |_| {})
    }

    pub(crate) fn set_up(&self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.ask(RouteNetlinkMessage::SetLink(link), NLM_F_ACK, |_| {})
    }

    /// Sends a message, and hands the answers on until the kernel has no more, or acknowledges.
    fn ask(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut answered: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            let (packet, _) = self.socket.recv_from_full()?;
            let mut rest = packet.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                let length = usize::try_from(answer.header.length).map_err(io::Error::other)?;
                // Messages are aligned to four bytes.
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                match answer.payload {
                    NetlinkPayload::InnerMessage(answer) => answered(answer),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(()),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    // Too many answers for the socket's buffer: some were lost.
                    NetlinkPayload::Overrun(_) => return Err(rustix::io::Errno::NOBUFS.into()),
                    NetlinkPayload::Noop => {}
                    other => {
                        let message = format!("an unexpected message: {other:?}");
                        return Err(io::Error::other(message));
                    }
                }
            }
        }
    }
}
