//! The network of instances: one bridge with NAT, addresses, published ports and bandwidth limits.
//!
//! [`Network::ensure`] makes the bridge; [`Network::attach`] gives one instance an interface on it,
//! for a container a veth pair into a network namespace of its own, for a virtual machine a tap.
//! What follows is the same for both: address, packet filter, limits and counters.
//!
//! **What an instance may reach**, unless the configuration says otherwise:
//! - the outside through the host's addresses (masquerading), private ranges included: databases
//!   and registries live there;
//! - other instances of the bridge, as on Docker's default bridge
//!   ([`NetworkConfig::isolate_instances`] forbids it);
//! - services of the host that listen on the bridge's address or on all of them
//!   ([`NetworkConfig::instances_reach_host`]), never those on 127.0.0.0/8;
//! - not 169.254.0.0/16: there, clouds hand the host's credentials to whoever asks;
//! - nothing under a MAC or an IPv4 address that is not its own, and nothing over IPv6.
//!
//! **What reaches an instance**: its own answers, its neighbours and its published ports. Published
//! ports are IPv4 only; they also work on the host's 127.0.0.1 and from instances.
//!
//! **What is changed on the host**: the bridge and interfaces named `hostd-…`, the nftables tables
//! `ip hostd` and `bridge hostd`, and `net.ipv4.ip_forward`, which is turned on and stays on. Rules of
//! others are never touched; so a firewall whose forward chain drops by default, as Docker's does,
//! must itself let the bridge through.
//!
//! **What the kernel must offer**, as modules or built in: `bridge` (with `stp`, `llc`), `veth`, `tun`,
//! `nf_tables`, `nf_conntrack`, `nf_nat`, `nft_chain_nat`, `nft_nat`, `nft_masq`, `nft_ct`, `nft_fib`,
//! `nft_fib_ipv4`, and for limits `ifb`, `sch_tbf`, `sch_ingress`, `cls_u32`, `act_mirred`. With
//! `nf_conntrack_netlink`, flows to an instance that has gone are forgotten at once. IPv6 may be off.
//! The program `nft` 1.0 or later must be there.

mod config;
mod error;
mod firewall;
mod flows;
mod links;
mod names;
mod netns;
mod ports;
mod resolvers;
mod rules;
mod shaping;
mod tap;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use tokio::sync::Mutex;

use crate::api::types::{NetworkLimits, PortSpec, Protocol};

pub use self::config::NetworkConfig;
pub use self::error::NetworkError;

use self::firewall::Firewall;
use self::flows::Flows;
use self::links::{Inside, Links};
use self::names::Names;
use self::rules::Guest;

/// What an instance's interface looks like from the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Endpoint {
    /// A network namespace with a loopback and `eth0`: for a container.
    Namespace,
    /// A tap, opened by the VMM: for a virtual machine.
    Tap,
}

/// An instance that is to have a network.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachRequest {
    /// The instance's name.
    pub name: String,
    pub endpoint: Endpoint,
    /// One that [`Network::allocate`] chose.
    pub address: Ipv4Addr,
    pub mac: [u8; 6],
    pub ports: Vec<PortSpec>,
    pub limits: NetworkLimits,
    /// Who may open the tap without privilege.
    pub owner_uid: Option<u32>,
}

/// What an instance got.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// The file of the network namespace, for [`Endpoint::Namespace`].
    pub netns: Option<PathBuf>,
    /// The name of the tap, for [`Endpoint::Tap`]: persistent, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    pub tap: Option<String>,
    pub address: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Ipv4Addr,
    pub mac: [u8; 6],
    /// Name servers; may be empty.
    pub dns: Vec<IpAddr>,
    /// The largest packet, in bytes.
    pub mtu: u32,
}

/// What has passed since the instance was attached. Ingress is towards the instance.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct NetworkStats {
    pub ingress_bytes: u64,
    pub ingress_packets: u64,
    pub egress_bytes: u64,
    pub egress_packets: u64,
    /// Packets that the interface could not take.
    pub ingress_dropped: u64,
    pub egress_dropped: u64,
}

/// What [`Network::reconcile`] found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Reconciled {
    /// Interfaces and namespace files that belonged to no expected instance, and are gone.
    pub removed: Vec<String>,
    /// Expected instances that have no interface any more.
    pub missing: Vec<String>,
}

/// The bridge and all that is on it.
#[derive(Debug)]
pub struct Network {
    config: NetworkConfig,
    links: Links,
    bridge_index: u32,
    mtu: u32,
    dns: Vec<IpAddr>,
    firewall: Mutex<Firewall>,
}

impl Network {
    /// Makes the bridge and the packet filter, or finds them as an earlier process left them;
    /// instances that are attached notice nothing.
    ///
    /// Works on the network namespace of the calling thread, and must be called within a tokio
    /// runtime.
    pub async fn ensure(config: NetworkConfig) -> Result<Network, NetworkError> {
        config.check()?;
        let path = &config.netns_dir;
        fs::create_dir_all(path).map_err(at("create", path))?;

        let links = Links::open()?;
        check_subnet(&links, &config).await?;
        let mtu = match config.mtu {
            Some(mtu) => mtu,
            None => links.outside_mtu().await?.unwrap_or(config::MTU_DEFAULT),
        };
        let gateway = config.gateway_net();
        let bridge_index = links.ensure_bridge(&config.bridge, gateway, mtu).await?;
        disable_ipv6(&config.bridge)?;

        let dns = resolvers::of_host(&config.fallback_dns);
        let firewall = Firewall::load(config.clone(), dns.clone()).await?;
        // Only now: the rules keep instances away from what this opens.
        set_sysctl(&format!("ipv4/conf/{}/route_localnet", config.bridge), "1")?;
        set_sysctl("ipv4/ip_forward", "1")?;
        let firewall = Mutex::new(firewall);
        Ok(Network {
            config,
            links,
            bridge_index,
            mtu,
            dns,
            firewall,
        })
    }

    /// Where instances find the outside: the bridge's own address.
    pub fn gateway(&self) -> Ipv4Addr {
        self.config.gateway_net().addr()
    }

    /// The lowest free address after the highest used one, so that an address that was just given
    /// back, and that peers may still have in mind, is not given out at once.
    pub fn allocate(&self, used: &HashSet<Ipv4Addr>) -> Result<Ipv4Addr, NetworkError> {
        config::allocate(self.config.subnet, used)
    }

    /// Gives an instance its interface. What an earlier attach of the same name left is replaced.
    ///
    /// A failure leaves nothing behind. An error whose [`NetworkError::is_callers_fault`] holds is
    /// about the request.
    pub async fn attach(&self, request: &AttachRequest) -> Result<Attachment, NetworkError> {
        self.attach_to(request, None).await
    }

    /// As [`Network::attach`], with a new network namespace of the caller's for [`Endpoint::Namespace`]:
    /// one that belongs to a user namespace, say.
    pub async fn attach_to(
        &self,
        request: &AttachRequest,
        namespace: Option<OwnedFd>,
    ) -> Result<Attachment, NetworkError> {
        self.detach(&request.name).await?;
        let guest = self.guest(request)?;
        // Side by side, since each takes milliseconds. The one without the other lets nothing through.
        let (admitted, connected) = tokio::join!(
            self.admit(&request.name, guest),
            self.connect(request, namespace)
        );
        match admitted.and(connected) {
            Ok(attachment) => Ok(attachment),
            Err(error) => {
                // The first error is the one that explains.
                if let Err(error) = self.detach(&request.name).await {
                    tracing::warn!(name = request.name, %error, "cannot undo a failed attach");
                }
                Err(error)
            }
        }
    }

    /// Removes every trace of an instance; it is no error if there is none. All that can be removed
    /// is, also when something cannot.
    pub async fn detach(&self, name: &str) -> Result<(), NetworkError> {
        let names = Names::of(name);
        let links = names
            .all()
            .into_iter()
            .map(|interface| self.links.delete(interface));
        // The kernel makes each remover of an interface wait for all its processors. The packet filter
        // and what it has tracked need not wait for that: without its interface an instance gets
        // nothing through, and without being admitted neither.
        let (links, namespace, dismissed) = tokio::join!(
            futures::future::join_all(links),
            async { netns::remove(&self.netns_path(name)) },
            self.dismiss(name),
        );
        let mut results = links;
        results.extend([namespace, dismissed]);
        results.into_iter().collect()
    }

    async fn admit(&self, name: &str, guest: Guest) -> Result<(), NetworkError> {
        let published = guest.ports.clone();
        {
            let mut firewall = self.firewall.lock().await;
            ports::check(&guest.ports, firewall.guests())?;
            firewall.admit(name, guest).await?;
        }
        let udp = published
            .iter()
            .filter(|port| port.protocol == Protocol::Udp);
        let stale = udp.map(|port| Flows::UntranslatedUdpTo(port.host));
        flows::forget(stale.collect()).await;
        Ok(())
    }

    async fn dismiss(&self, name: &str) -> Result<(), NetworkError> {
        let guest = self.firewall.lock().await.guests().get(name).cloned();
        let Some(guest) = guest else {
            return Ok(());
        };
        // What the instance began can be forgotten meanwhile, since nothing of it runs any more. Others
        // need not wait for that.
        let (dismissed, ()) = tokio::join!(
            async { self.firewall.lock().await.dismiss(name).await },
            flows::forget(vec![Flows::From(guest.address)])
        );
        // Only from now on nobody is led to it. Where no port was published nobody ever was.
        if !guest.ports.is_empty() {
            flows::forget(vec![Flows::LedTo(guest.address)]).await;
        }
        dismissed
    }

    /// Changes the bandwidth limits of an attached instance, while traffic flows.
    pub async fn set_limits(&self, name: &str, limits: &NetworkLimits) -> Result<(), NetworkError> {
        let interface = self.interface(name).await?;
        let ifb = Names::of(name).ifb;
        shaping::limit_ingress(&self.links, &interface, limits.ingress_bps).await?;
        shaping::limit_egress(&self.links, &interface, &ifb, limits.egress_bps).await
    }

    /// What has passed through an instance's interface.
    pub async fn stats(&self, name: &str) -> Result<NetworkStats, NetworkError> {
        let names = Names::of(name);
        for interface in [&names.veth, &names.tap] {
            if let Some(counters) = self.links.counters(interface).await? {
                return Ok(NetworkStats {
                    // What the host's end sends, the instance receives.
                    ingress_bytes: counters.tx_bytes,
                    ingress_packets: counters.tx_packets,
                    egress_bytes: counters.rx_bytes,
                    egress_packets: counters.rx_packets,
                    ingress_dropped: counters.tx_dropped,
                    egress_dropped: counters.rx_dropped,
                });
            }
        }
        Err(NetworkError::NotAttached { name: name.into() })
    }

    /// Makes the host agree with the list of instances that should be attached: removes what belongs
    /// to no other, as a crash leaves it, and restores the packet filter if somebody flushed it.
    pub async fn reconcile(&self, expected: &[AttachRequest]) -> Result<Reconciled, NetworkError> {
        let mut found = Reconciled::default();
        let mut guests = BTreeMap::new();
        let mut keep = HashSet::new();
        for request in expected {
            let guest = self.guest(request)?;
            if self.links.index(&guest.interface).await?.is_none() {
                found.missing.push(request.name.clone());
                continue;
            }
            keep.extend([guest.interface.clone(), Names::of(&request.name).ifb]);
            guests.insert(request.name.clone(), guest);
        }
        for interface in self.links.own_names().await? {
            if !keep.contains(&interface) {
                self.links.delete(&interface).await?;
                found.removed.push(interface);
            }
        }
        let dir = &self.config.netns_dir;
        for entry in fs::read_dir(dir).map_err(at("read", dir))? {
            let path = entry.map_err(at("read", dir))?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if !guests.contains_key(name) {
                netns::remove(&path)?;
                found.removed.push(path.display().to_string());
            }
        }
        self.firewall.lock().await.replace(guests).await?;
        Ok(found)
    }

    async fn connect(
        &self,
        request: &AttachRequest,
        namespace: Option<OwnedFd>,
    ) -> Result<Attachment, NetworkError> {
        let names = Names::of(&request.name);
        let address = Ipv4Net::new_assert(request.address, self.config.subnet.prefix_len());
        let mut attachment = Attachment {
            netns: None,
            tap: None,
            address: request.address,
            prefix_len: address.prefix_len(),
            gateway: self.gateway(),
            mac: request.mac,
            dns: self.dns.clone(),
            mtu: self.mtu,
        };
        let interface = match request.endpoint {
            Endpoint::Namespace => {
                let path = self.netns_path(&request.name);
                let inside = Inside {
                    host_end: names.veth.clone(),
                    mac: request.mac,
                    address,
                    gateway: self.gateway(),
                    mtu: self.mtu,
                };
                netns::create(path.clone(), namespace, inside).await?;
                attachment.netns = Some(path);
                &names.veth
            }
            Endpoint::Tap => {
                tap::create(&names.tap, request.owner_uid)?;
                attachment.tap = Some(names.tap.clone());
                &names.tap
            }
        };
        disable_ipv6(interface)?;
        let isolated = self.config.isolate_instances;
        self.links
            .join(
                interface,
                self.bridge_index,
                &request.name,
                self.mtu,
                isolated,
            )
            .await?;
        shaping::limit_ingress(&self.links, interface, request.limits.ingress_bps).await?;
        let egress = request.limits.egress_bps;
        shaping::limit_egress(&self.links, interface, &names.ifb, egress).await?;
        Ok(attachment)
    }

    /// The request as the packet filter knows it.
    fn guest(&self, request: &AttachRequest) -> Result<Guest, NetworkError> {
        let AttachRequest {
            name,
            endpoint,
            address,
            mac,
            ..
        } = request;
        let subnet = &self.config.subnet;
        let reserved = [subnet.network(), self.gateway(), subnet.broadcast()];
        if !subnet.contains(address) || reserved.contains(address) {
            let (address, subnet) = (*address, self.config.subnet);
            return Err(NetworkError::OutsideSubnet { address, subnet });
        }
        let names = Names::of(name);
        let interface = match endpoint {
            Endpoint::Namespace => names.veth,
            Endpoint::Tap => names.tap,
        };
        let mut ports = request.ports.clone();
        for port in &mut ports {
            port.host_ip = port.host_ip.filter(|ip| !ip.is_unspecified());
        }
        Ok(Guest {
            interface,
            mac: *mac,
            address: *address,
            ports,
        })
    }

    async fn interface(&self, name: &str) -> Result<String, NetworkError> {
        let names = Names::of(name);
        for interface in [names.veth, names.tap] {
            if self.links.index(&interface).await?.is_some() {
                return Ok(interface);
            }
        }
        Err(NetworkError::NotAttached { name: name.into() })
    }

    fn netns_path(&self, name: &str) -> PathBuf {
        self.config.netns_dir.join(name)
    }
}

/// The text form of a MAC, `02:00:00:00:00:01`.
pub fn format_mac(mac: [u8; 6]) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

/// A locally administered unicast MAC that belongs to the address, so that a peer's ARP entry never
/// contradicts the truth.
pub fn mac_for(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x00, a, b, c, d]
}

async fn check_subnet(links: &Links, config: &NetworkConfig) -> Result<(), NetworkError> {
    let subnet = config.subnet.trunc();
    let bridge = links.index(&config.bridge).await?;
    for (index, address) in links.addresses(bridge).await? {
        if subnet.contains(&address.addr()) || address.contains(&subnet.network()) {
            let interface = links.name(index).await?;
            return Err(NetworkError::SubnetInUse {
                subnet,
                address,
                interface,
            });
        }
    }
    Ok(())
}

/// Instances speak IPv4 only; the host must not offer them its link-local IPv6 address either.
fn disable_ipv6(interface: &str) -> Result<(), NetworkError> {
    match set_sysctl(&format!("ipv6/conf/{interface}/disable_ipv6"), "1") {
        Err(NetworkError::Path { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        result => result,
    }
}

/// Sets a `net` sysctl of the calling thread's network namespace.
fn set_sysctl(key: &str, value: &str) -> Result<(), NetworkError> {
    let path = Path::new("/proc/sys/net").join(key);
    fs::write(&path, value).map_err(at("set", &path))
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NetworkError + use<> {
    let path = path.to_owned();
    move |source| NetworkError::Path {
        action,
        path,
        source,
    }
}
