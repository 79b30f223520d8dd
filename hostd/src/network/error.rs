//! What can go wrong with an instance's network.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::Ipv4Net;

use crate::api::types::Protocol;

/// An error of [`super::Network`]. Those for which [`NetworkError::is_callers_fault`] holds can be
/// repaired by asking for something else; the others are the host's.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("port {port}/{} is already published by the instance `{by}`", protocol_name(*.protocol))]
    PortTaken {
        index: usize,
        port: u16,
        protocol: Protocol,
        by: String,
    },

    #[error(
        "port {port}/{} of the host is in use by another process",
        protocol_name(*.protocol)
    )]
    PortInUse {
        index: usize,
        port: u16,
        protocol: Protocol,
    },

    #[error("port {port}/{} is published twice", protocol_name(*.protocol))]
    PortTwice {
        index: usize,
        port: u16,
        protocol: Protocol,
    },

    #[error("a port must be 1 to 65535")]
    PortZero { index: usize },

    #[error("{address} is not an address of this host")]
    NotALocalAddress { index: usize, address: Ipv4Addr },

    #[error("every address of {subnet} is taken")]
    Exhausted { subnet: Ipv4Net },

    #[error("{address} is not an address that {subnet} has for instances")]
    OutsideSubnet { address: Ipv4Addr, subnet: Ipv4Net },

    #[error("the subnet {subnet} overlaps {address} of the interface {interface}")]
    SubnetInUse {
        subnet: Ipv4Net,
        address: Ipv4Net,
        interface: String,
    },

    #[error("the subnet {subnet} is too small: it needs at least 4 addresses")]
    SubnetTooSmall { subnet: Ipv4Net },

    #[error("the interface {name} exists and is not a bridge")]
    NotABridge { name: String },

    #[error("{name:?} cannot name a bridge")]
    BadBridgeName { name: String },

    #[error("the instance `{name}` has no network interface")]
    NotAttached { name: String },

    #[error("cannot {action}")]
    Netlink {
        action: String,
        source: rtnetlink::Error,
    },

    #[error("the program `nft` cannot be run; is the package nftables installed?")]
    NoNft(#[source] io::Error),

    #[error("nft refused to {action}: {message}")]
    Nft {
        action: &'static str,
        message: String,
    },

    #[error("what nft answered is not understood")]
    NftAnswer(#[source] serde_json::Error),

    #[error("cannot {action} {}", .path.display())]
    Path {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error("cannot {action}")]
    Host {
        action: &'static str,
        source: io::Error,
    },
}

impl NetworkError {
    /// Whether the request asked for something that cannot be had, as opposed to a host that fails.
    pub fn is_callers_fault(&self) -> bool {
        self.port_index().is_some()
            || matches!(
                self,
                NetworkError::Exhausted { .. } | NetworkError::OutsideSubnet { .. }
            )
    }

    /// The position in the request's `ports` of the port at fault.
    pub fn port_index(&self) -> Option<usize> {
        #[expect(clippy::wildcard_enum_match_arm, reason = "only ports have a position")]
        match self {
            NetworkError::PortTaken { index, .. }
            | NetworkError::PortInUse { index, .. }
            | NetworkError::PortTwice { index, .. }
            | NetworkError::PortZero { index }
            | NetworkError::NotALocalAddress { index, .. } => Some(*index),
            _ => None,
        }
    }

    pub(super) fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let action = action.into();
        move |source| NetworkError::Netlink { action, source }
    }
}

pub(super) fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}
