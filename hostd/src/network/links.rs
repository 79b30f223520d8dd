//! Interfaces, addresses and routes, over netlink.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::RawFd;

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use nix::libc;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage, Stats64,
};
use rtnetlink::packet_route::route::RouteAttribute;
use rtnetlink::{
    Error, Handle, LinkBridge, LinkBridgePort, LinkIfb, LinkMessageBuilder, LinkUnspec, LinkVeth,
    RouteMessageBuilder,
};

use super::error::NetworkError;
use super::names::PREFIX;

/// The name of a container's interface, as everyone who knows containers expects it.
const INSIDE_NAME: &str = "eth0";

/// What a container finds in its network namespace besides a loopback.
#[derive(Clone, Debug)]
pub(super) struct Inside {
    /// The name of the veth pair's other end, in the host's namespace.
    pub(super) host_end: String,
    pub(super) mac: [u8; 6],
    pub(super) address: Ipv4Net,
    pub(super) gateway: Ipv4Addr,
    pub(super) mtu: u32,
}

/// One netlink socket, bound to the network namespace of the thread that opened it.
#[derive(Clone, Debug)]
pub(super) struct Links {
    handle: Handle,
}

impl Links {
    /// Must be called within a tokio runtime, which then drives the socket.
    pub(super) fn open() -> Result<Links, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetworkError::Host {
                action: "open a netlink socket",
                source,
            })?;
        tokio::spawn(connection);
        Ok(Links { handle })
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(super) async fn find(&self, name: &str) -> Result<Option<LinkMessage>, NetworkError> {
        match self
            .handle
            .link()
            .get()
            .match_name(name)
            .execute()
            .try_next()
            .await
        {
            Err(error) if is_errno(&error, libc::ENODEV) => Ok(None),
            found => found.map_err(NetworkError::netlink(format!("look up {name}"))),
        }
    }

    pub(super) async fn index(&self, name: &str) -> Result<Option<u32>, NetworkError> {
        Ok(self.find(name).await?.map(|link| link.header.index))
    }

    /// Every interface that belongs to an instance, also one that no longer exists.
    pub(super) async fn own_names(&self) -> Result<Vec<String>, NetworkError> {
        let action = "list the interfaces";
        let mut links = self.handle.link().get().execute();
        let mut names = Vec::new();
        while let Some(link) = links
            .try_next()
            .await
            .map_err(NetworkError::netlink(action))?
        {
            names.extend(name_of(&link).filter(|name| name.starts_with(PREFIX)));
        }
        Ok(names)
    }

    /// Removes an interface; it is no error if there is none. A veth's other end goes with it.
    pub(super) async fn delete(&self, name: &str) -> Result<(), NetworkError> {
        let Some(index) = self.index(name).await? else {
            return Ok(());
        };
        match self.handle.link().del(index).execute().await {
            Err(error) if is_errno(&error, libc::ENODEV) => Ok(()),
            result => result.map_err(NetworkError::netlink(format!("remove {name}"))),
        }
    }

    /// Makes the bridge unless it is there, and returns its index.
    pub(super) async fn ensure_bridge(
        &self,
        name: &str,
        address: Ipv4Net,
        mtu: u32,
    ) -> Result<u32, NetworkError> {
        let action = || format!("set up the bridge {name}");
        if let Some(link) = self.find(name).await? {
            if !is_bridge(&link) {
                return Err(NetworkError::NotABridge { name: name.into() });
            }
        } else {
            // A MAC of its own, since a bridge without one takes that of a port and changes it.
            let [a, b, c, d] = address.addr().octets();
            let bridge = LinkBridge::new(name)
                .address(vec![0x02, 0x68, a, b, c, d])
                .mcast_snooping(false)
                .build();
            let made = self.handle.link().add(bridge).execute().await;
            made.map_err(NetworkError::netlink(action()))?;
        }
        let index = self.index(name).await?.ok_or_else(|| missing(name))?;
        let up = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        self.handle
            .link()
            .set(up)
            .execute()
            .await
            .map_err(NetworkError::netlink(action()))?;
        let address =
            self.handle
                .address()
                .add(index, IpAddr::V4(address.addr()), address.prefix_len());
        address
            .replace()
            .execute()
            .await
            .map_err(NetworkError::netlink(action()))?;
        Ok(index)
    }

    /// Puts an interface that was just made on the bridge and brings it up.
    ///
    /// `alias` is a text that `ip link` shows. An `isolated` port cannot reach other such ports.
    pub(super) async fn join(
        &self,
        name: &str,
        bridge: u32,
        alias: &str,
        mtu: u32,
        isolated: bool,
    ) -> Result<(), NetworkError> {
        let action = || format!("put {name} on the bridge");
        let index = self.index(name).await?.ok_or_else(|| missing(name))?;
        let port = LinkUnspec::new_with_index(index)
            .mtu(mtu)
            .alias(alias)
            .controller(bridge);
        let port = port.build();
        self.handle
            .link()
            .set(port)
            .execute()
            .await
            .map_err(NetworkError::netlink(action()))?;
        // Hairpin: where br_netfilter is on, the bridge itself carries what an instance sends to its
        // own published port, and it must go back out of the port that it came in by.
        let port = LinkBridgePort::new(index)
            .hairpin(true)
            .isolated(isolated)
            .build();
        let set = self.handle.link().set_port(port).execute().await;
        set.map_err(NetworkError::netlink(action()))?;
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle
            .link()
            .set(up)
            .execute()
            .await
            .map_err(NetworkError::netlink(action()))
    }

    /// Makes an intermediate functional block that is up, unless it is there; returns its index.
    pub(super) async fn ensure_ifb(&self, name: &str) -> Result<u32, NetworkError> {
        if let Some(index) = self.index(name).await? {
            return Ok(index);
        }
        let ifb = LinkIfb::new(name).up().build();
        let made = self.handle.link().add(ifb).execute().await;
        made.map_err(NetworkError::netlink(format!("make {name}")))?;
        self.index(name).await?.ok_or_else(|| missing(name))
    }

    pub(super) async fn counters(&self, name: &str) -> Result<Option<Stats64>, NetworkError> {
        let Some(link) = self.find(name).await? else {
            return Ok(None);
        };
        Ok(link.attributes.into_iter().find_map(|attribute| {
            let LinkAttribute::Stats64(counters) = attribute else {
                return None;
            };
            Some(counters)
        }))
    }

    /// The IPv4 addresses of all interfaces but `except`, with the interfaces' indexes.
    pub(super) async fn addresses(
        &self,
        except: Option<u32>,
    ) -> Result<Vec<(u32, Ipv4Net)>, NetworkError> {
        let action = "list the addresses";
        let mut messages = self.handle.address().get().execute();
        let mut found = Vec::new();
        while let Some(message) = messages
            .try_next()
            .await
            .map_err(NetworkError::netlink(action))?
        {
            let index = message.header.index;
            for attribute in message.attributes {
                if let AddressAttribute::Local(IpAddr::V4(address)) = attribute
                    && Some(index) != except
                    && let Ok(net) = Ipv4Net::new(address, message.header.prefix_len)
                {
                    found.push((index, net));
                }
            }
        }
        Ok(found)
    }

    pub(super) async fn name(&self, index: u32) -> Result<String, NetworkError> {
        let link = self.by_index(index).await?;
        Ok(link
            .and_then(|link| name_of(&link))
            .unwrap_or_else(|| format!("number {index}")))
    }

    /// The largest packet of the interface that the default route leaves by.
    pub(super) async fn outside_mtu(&self) -> Result<Option<u32>, NetworkError> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut routes = self.handle.route().get(query).execute();
        let action = "list the routes";
        while let Some(route) = routes
            .try_next()
            .await
            .map_err(NetworkError::netlink(action))?
        {
            if route.header.destination_prefix_length != 0 {
                continue;
            }
            for attribute in route.attributes {
                if let RouteAttribute::Oif(index) = attribute {
                    return Ok(self.by_index(index).await?.and_then(|link| mtu_of(&link)));
                }
            }
        }
        Ok(None)
    }

    async fn by_index(&self, index: u32) -> Result<Option<LinkMessage>, NetworkError> {
        match self
            .handle
            .link()
            .get()
            .match_index(index)
            .execute()
            .try_next()
            .await
        {
            Err(error) if is_errno(&error, libc::ENODEV) => Ok(None),
            found => found.map_err(NetworkError::netlink("look up an interface")),
        }
    }
}

/// Sets up the namespace that the calling thread is in; `outside` is the host's namespace, which
/// gets the veth pair's other end.
pub(super) async fn set_up_inside(inside: &Inside, outside: RawFd) -> Result<(), NetworkError> {
    let links = Links::open()?;
    let up = |name| LinkUnspec::new_with_name(name).up().build();
    let loopback = links.handle.link().set(up("lo")).execute().await;
    loopback.map_err(NetworkError::netlink("bring up the loopback"))?;

    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(&inside.host_end)
        .mtu(inside.mtu)
        .setns_by_fd(outside)
        .build();
    let pair = LinkVeth::new(INSIDE_NAME, &inside.host_end)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .address(inside.mac.to_vec())
        .mtu(inside.mtu)
        .up()
        .build();
    let made = links.handle.link().add(pair).execute().await;
    made.map_err(NetworkError::netlink(format!("make {}", inside.host_end)))?;

    let index = links
        .index(INSIDE_NAME)
        .await?
        .ok_or_else(|| missing(INSIDE_NAME))?;
    let address = links.handle.address().add(
        index,
        IpAddr::V4(inside.address.addr()),
        inside.address.prefix_len(),
    );
    let action = format!("give an instance the address {}", inside.address);
    address
        .execute()
        .await
        .map_err(NetworkError::netlink(action))?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(inside.gateway)
        .build();
    let added = links.handle.route().add(route).execute().await;
    added.map_err(NetworkError::netlink("give an instance a default route"))
}

pub(super) fn is_errno(error: &Error, errno: i32) -> bool {
    matches!(error, Error::NetlinkError(message) if message.raw_code() == -errno)
}

pub(super) fn missing(name: &str) -> NetworkError {
    let source = Error::RequestFailed;
    NetworkError::Netlink {
        action: format!("find {name}, which was there before"),
        source,
    }
}

fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| {
        let LinkAttribute::IfName(name) = attribute else {
            return None;
        };
        Some(name.clone())
    })
}

fn mtu_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| {
        let LinkAttribute::Mtu(mtu) = attribute else {
            return None;
        };
        Some(*mtu)
    })
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.header.interface_family == AddressFamily::Bridge
        || link.attributes.iter().any(|attribute| {
            matches!(attribute, LinkAttribute::LinkInfo(infos)
                if infos.contains(&LinkInfo::Kind(InfoKind::Bridge)))
        })
}
