//! Bandwidth limits, by the kernel's traffic control on the host's side of an instance.
//!
//! Towards the instance, a token bucket filter (`tbf`) sits on the host's end of the veth pair or on
//! the tap. From the instance, the same interface's ingress is redirected to an intermediate device
//! (`ifb`) with a `tbf` of its own. The alternative, an ingress policer, drops what exceeds the rate
//! instead of delaying it, and TCP then stays far below the limit; and a qdisc on the inner end of
//! the veth pair could be taken away by a workload with CAP_NET_ADMIN.
//!
//! rtnetlink knows qdiscs but not `tbf`'s options, so these are laid out here, as
//! linux/pkt_sched.h has them. The redirect uses the `u32` classifier, since that is what rtnetlink
//! offers and every kernel has.

use futures::StreamExt;
use nix::libc;
use rtnetlink::Error;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use super::error::NetworkError;
use super::links::{Links, is_errno, missing};

/// The least rate in bytes per second: below it, one full packet takes over a second.
pub(crate) const RATE_BPS_MIN: u64 = 2_000;

/// What the size of a bucket is a multiple of.
const BURST_STEP: u64 = 4 * 1024;
/// A bucket must hold one packet of the largest MTU in use; segmentation-offloaded ones are split.
const BURST_STEPS_MIN: u64 = 4;
/// Handles (see [`handle`]) from 0x8000 on are those that the kernel gives out itself, and no packet is
/// as large.
const BURST_STEPS_MAX: u64 = 0x7fff;
/// 20 ms at the rate: enough tokens to keep the rate up when the timer is late.
const BURST_PER_SECOND: u64 = 50;
/// The queue holds 100 ms at the rate: TCP keeps the link busy, and delay stays bearable.
const QUEUE_PER_SECOND: u64 = 10;
/// Below that a slow link's queue would hold less than one window of TCP's first packets.
const QUEUE_BYTES_MIN: u64 = 32 * 1024;

const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// Tells the kernel not to guess the link layer from a rate table, which then is not needed.
const TC_LINKLAYER_ETHERNET: u8 = 1;

/// Limits what leaves `interface` towards the instance, or no longer does.
pub(super) async fn limit_ingress(
    links: &Links,
    interface: &str,
    rate_bps: Option<u64>,
) -> Result<(), NetworkError> {
    let index = links
        .index(interface)
        .await?
        .ok_or_else(|| missing(interface))?;
    match rate_bps {
        Some(rate) => set_bucket(links, interface, index, rate).await,
        None => remove_qdisc(links, interface, index, Place::Root).await,
    }
}

/// Limits what enters `interface` from the instance, or no longer does. `ifb` is the name of the
/// device to shape on, which exists while there is a limit.
pub(super) async fn limit_egress(
    links: &Links,
    interface: &str,
    ifb: &str,
    rate_bps: Option<u64>,
) -> Result<(), NetworkError> {
    let index = links
        .index(interface)
        .await?
        .ok_or_else(|| missing(interface))?;
    let Some(rate) = rate_bps else {
        remove_qdisc(links, interface, index, Place::Ingress).await?;
        return links.delete(ifb).await;
    };
    if let Some(shaped) = links.index(ifb).await? {
        return set_bucket(links, ifb, shaped, rate).await;
    }
    // The bucket first: what is redirected before there is one would pass without a limit.
    let shaped = links.ensure_ifb(ifb).await?;
    set_bucket(links, ifb, shaped, rate).await?;
    redirect(links, interface, index, shaped).await
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Root,
    Ingress,
}

async fn set_bucket(
    links: &Links,
    interface: &str,
    index: u32,
    rate_bps: u64,
) -> Result<(), NetworkError> {
    let options = bucket(rate_bps).into_iter().map(TcOption::Other).collect();
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::ROOT;
    message.header.handle = handle(rate_bps);
    message.attributes = vec![
        TcAttribute::Kind("tbf".into()),
        TcAttribute::Options(options),
    ];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    acknowledged(links, request)
        .await
        .map_err(NetworkError::netlink(format!(
            "limit the rate of {interface}"
        )))
}

/// Sends a request that rtnetlink has no builder for, and waits until the kernel has done it.
async fn acknowledged(
    links: &Links,
    request: NetlinkMessage<RouteNetlinkMessage>,
) -> Result<(), Error> {
    let mut answers = links.handle().clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(message) = answer.payload
            && message.code.is_some()
        {
            return Err(Error::NetlinkError(message));
        }
    }
    Ok(())
}

async fn redirect(links: &Links, interface: &str, from: u32, to: u32) -> Result<(), NetworkError> {
    let action = || format!("redirect what comes from {interface}");
    let from = from.cast_signed();
    let qdisc = links.handle().qdisc().add(from).ingress().execute().await;
    match qdisc {
        Err(error) if is_errno(&error, libc::EEXIST) => {}
        result => result.map_err(NetworkError::netlink(action()))?,
    }
    const INGRESS_QDISC: u32 = 0xffff_0000;
    /// ETH_P_ALL of linux/if_ether.h.
    const EVERY_PROTOCOL: u16 = 3;
    let mut filters = links.handle().traffic_filter(from);
    let filter = filters
        .add()
        .parent(INGRESS_QDISC)
        .protocol(EVERY_PROTOCOL.to_be())
        .redirect(to)
        .map_err(NetworkError::netlink(action()))?;
    filter
        .execute()
        .await
        .map_err(NetworkError::netlink(action()))
}

async fn remove_qdisc(
    links: &Links,
    interface: &str,
    index: u32,
    place: Place,
) -> Result<(), NetworkError> {
    let mut request = links.handle().qdisc().del(index.cast_signed());
    let message: &mut TcMessage = request.message_mut();
    message.header.parent = match place {
        Place::Root => TcHandle::ROOT,
        Place::Ingress => TcHandle::INGRESS,
    };
    match request.execute().await {
        // What the kernel answers where there is none, depending on the place and its version.
        Err(error)
            if [libc::ENOENT, libc::EINVAL]
                .iter()
                .any(|errno| is_errno(&error, *errno)) =>
        {
            Ok(())
        }
        result => result.map_err(NetworkError::netlink(format!("unlimit {interface}"))),
    }
}

/// The size of the bucket for this rate.
fn burst_steps(rate_bps: u64) -> u64 {
    let steps = (rate_bps / BURST_PER_SECOND).div_ceil(BURST_STEP);
    steps.clamp(BURST_STEPS_MIN, BURST_STEPS_MAX)
}

/// The handle of a bucket says its size. A change to one of the same size is made in place and loses no
/// packet. One of another size is another qdisc, which takes the place of the old one and its queue in
/// one step: in place, a packet that is larger than the new bucket would wait for it to be full enough
/// for ever, and every other packet with it.
fn handle(rate_bps: u64) -> TcHandle {
    let steps = burst_steps(rate_bps);
    TcHandle {
        major: u16::try_from(steps).unwrap_or(u16::MAX),
        minor: 0,
    }
}

/// The attributes of a `tbf` of this rate: `struct tc_tbf_qopt` and what has outgrown it.
fn bucket(rate_bps: u64) -> Vec<DefaultNla> {
    let rate = rate_bps.max(RATE_BPS_MIN);
    let burst = burst_steps(rate) * BURST_STEP;
    let queue = burst.saturating_add((rate / QUEUE_PER_SECOND).max(QUEUE_BYTES_MIN));
    let narrow = |wide: u64| u32::try_from(wide).unwrap_or(u32::MAX);

    let mut parameters = Vec::with_capacity(36);
    // rate: struct tc_ratespec { u8 cell_log, u8 linklayer, u16 overhead, s16 cell_align, u16 mpu,
    // u32 rate }. A rate beyond 32 bits is in RATE64.
    parameters.extend([0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0]);
    parameters.extend(narrow(rate).to_ne_bytes());
    parameters.extend([0; 12]); // peakrate: none
    parameters.extend(narrow(queue).to_ne_bytes()); // limit
    parameters.extend(0_u32.to_ne_bytes()); // buffer: BURST says it exactly
    parameters.extend(0_u32.to_ne_bytes()); // mtu: of the peak rate
    let mut attributes = vec![DefaultNla::new(TCA_TBF_PARMS, parameters)];
    if rate > u64::from(u32::MAX) {
        attributes.push(DefaultNla::new(TCA_TBF_RATE64, rate.to_ne_bytes().to_vec()));
    }
    attributes.push(DefaultNla::new(
        TCA_TBF_BURST,
        narrow(burst).to_ne_bytes().to_vec(),
    ));
    attributes
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::Nla;

    use super::*;

    #[test]
    fn buckets_of_one_handle_are_of_one_size() {
        let burst = |rate| bucket(rate).pop().unwrap();
        let size = |rate| {
            let mut bytes = [0; 4];
            burst(rate).emit_value(&mut bytes);
            u32::from_ne_bytes(bytes)
        };
        for rate in [1, 800_000, 1_000_000, 2_000_000, 2_000_001, 1 << 33] {
            let major = u32::from(handle(rate).major);
            assert_eq!(size(rate), major * 4096, "{rate}");
        }
        assert_eq!(size(800_000), 16_384);
        assert_eq!(size(u64::MAX), 0x7fff * 4096);
    }

    #[test]
    fn a_bucket_has_the_size_of_the_kernels_struct_and_wide_rates_get_their_own_attribute() {
        let kinds = |rate| -> Vec<(u16, usize)> {
            bucket(rate)
                .iter()
                .map(|nla| (nla.kind(), nla.value_len()))
                .collect()
        };
        assert_eq!(kinds(1_000_000), [(TCA_TBF_PARMS, 36), (TCA_TBF_BURST, 4)]);
        assert_eq!(
            kinds(5_000_000_000),
            [(TCA_TBF_PARMS, 36), (TCA_TBF_RATE64, 8), (TCA_TBF_BURST, 4)]
        );
    }
}
