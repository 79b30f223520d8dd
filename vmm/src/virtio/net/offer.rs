//! What a driver of a network device is offered, by whoever serves it, and what its choice means for the tap.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use crate::virtio::DeviceError;
use crate::virtio::tap::Tap;

/// Which offload of the tap each accepted feature turns on.
const OFFLOADS: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// The features that a driver is offered, by whoever serves it.
pub(super) fn features(mtu: Option<u16>) -> u64 {
    let features = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_MRG_RXBUF,
    ];
    features
        .iter()
        .chain(mtu.map(|_| &VIRTIO_NET_F_MTU))
        .fold(0, |all, bit| all | 1 << bit)
}

/// `struct virtio_net_config`, of which the address and the MTU are offered: between them are the
/// status and the number of queues.
pub(super) fn config_space(mac: [u8; 6], mtu: Option<u16>) -> Vec<u8> {
    let mtu = mtu.unwrap_or(0).to_le_bytes();
    [&mac[..], &[0; 4], &mtu].concat()
}

/// Has the tap leave to the guest what it may.
pub(super) fn set_offloads(tap: &Tap, offloads: u32) -> Result<(), DeviceError> {
    tap.set_offloads(offloads)
        .map_err(|source| DeviceError::Host {
            action: "set a tap's offloads",
            source,
        })
}

/// What the tap may leave to a guest that accepted these features: what the specification says
/// depends on another feature (virtio 1.2, 5.1.3.1), the tap refuses without it.
pub(super) fn offloads(features: u64) -> u32 {
    let offloads = OFFLOADS
        .iter()
        .filter(|(feature, _)| features & (1 << feature) != 0)
        .fold(0, |all, (_, offload)| all | offload);
    let segmentation = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    if offloads & libc::TUN_F_CSUM == 0 {
        0
    } else if offloads & segmentation == 0 {
        libc::TUN_F_CSUM
    } else {
        offloads
    }
}
