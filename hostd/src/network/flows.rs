//! Makes connection tracking forget flows whose rules have changed.
//!
//! NAT is decided by a flow's first packet and then remembered. A client that sends UDP from one
//! port, as resolvers and games do, would go on to reach an instance that is gone, or miss the one
//! that has just published a port, for as long as it does not pause.
//!
//! This is `conntrack -D` over netlink (linux/netfilter/nfnetlink_conntrack.h): the kernel filters a
//! dump (since 5.8), and each flow found is deleted by its own tuple, since kernels before 6.11 cannot
//! delete by filter. Nothing depends on its success: a kernel without `nf_conntrack_netlink` only has
//! such flows for a minute longer.

use std::io;
use std::net::Ipv4Addr;

use nix::libc;
use rtnetlink::packet_core::{
    DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NlasIterator,
};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};
use tokio::task;

const CTNETLINK: u16 = 1 << 8;
const IPCTNL_MSG_CT_GET: u16 = CTNETLINK | 1;
const IPCTNL_MSG_CT_DELETE: u16 = CTNETLINK | 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// What of a tuple a filter compares.
const COMPARE_IP_SRC: u32 = 1 << 0;
const COMPARE_PROTO_NUM: u32 = 1 << 3;
const COMPARE_PROTO_DST_PORT: u32 = 1 << 5;
/// IPS_SRC_NAT and IPS_DST_NAT of a flow's status.
const TRANSLATED: u32 = 1 << 4 | 1 << 5;

const HEADER_BYTES: usize = 16;
/// struct nfgenmsg: family (AF_INET), version, resource.
const FAMILY_HEADER: [u8; 4] = [2, 0, 0, 0];
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Which flows to forget.
#[derive(Clone, Copy, Debug)]
pub(super) enum Flows {
    /// Those that an instance began.
    From(Ipv4Addr),
    /// Those that were led to an instance.
    LedTo(Ipv4Addr),
    /// UDP to this port that is led nowhere: such a flow is older than the port's being published.
    UntranslatedUdpTo(u16),
}

/// Forgets flows as far as the kernel lets us.
///
/// The socket is of the calling thread's network namespace. The walk through the kernel's table, 10 ms
/// each for a table of usual size however few flows it has, happens on a thread that may block.
pub(super) async fn forget(stale: Vec<Flows>) {
    if stale.is_empty() {
        return;
    }
    let forgotten = match connect() {
        Ok(socket) => {
            let flows = stale.clone();
            let walks = move || flows.into_iter().try_for_each(|flows| walk(&socket, flows));
            let walked = task::spawn_blocking(walks).await;
            walked.unwrap_or_else(|error| Err(error.into()))
        }
        Err(error) => Err(error),
    };
    if let Err(error) = forgotten {
        tracing::debug!(flows = ?stale, %error, "flows are not forgotten at once");
    }
}

fn connect() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn walk(socket: &Socket, flows: Flows) -> io::Result<()> {
    send(socket, IPCTNL_MSG_CT_GET, NLM_F_DUMP, &filter(flows))?;
    for flow in receive(socket)? {
        let translated = flow.status & TRANSLATED != 0;
        if matches!(flows, Flows::UntranslatedUdpTo(_)) && translated {
            continue;
        }
        let tuple = DefaultNla::new(CTA_TUPLE_ORIG | NLA_F_NESTED, flow.original);
        send(socket, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, &[tuple])?;
        match receive(socket) {
            // It ended by itself meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => drop(result?),
        }
    }
    Ok(())
}

fn filter(flows: Flows) -> Vec<DefaultNla> {
    let number = |kind, value: u32| DefaultNla::new(kind, value.to_ne_bytes().to_vec());
    let source = |address: Ipv4Addr, tuple, flags| {
        let source = DefaultNla::new(CTA_IP_V4_SRC, address.octets().to_vec());
        let ip = nested(CTA_TUPLE_IP, &[source]);
        let compare = number(flags, COMPARE_IP_SRC);
        vec![nested(tuple, &[ip]), nested(CTA_FILTER, &[compare])]
    };
    match flows {
        Flows::From(address) => source(address, CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS),
        Flows::LedTo(address) => source(address, CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS),
        Flows::UntranslatedUdpTo(port) => {
            let udp = u8::try_from(libc::IPPROTO_UDP).expect("17");
            let protocol = DefaultNla::new(CTA_PROTO_NUM, vec![udp]);
            let port = DefaultNla::new(CTA_PROTO_DST_PORT, port.to_be_bytes().to_vec());
            let to = nested(CTA_TUPLE_PROTO, &[protocol, port]);
            let compare = number(
                CTA_FILTER_ORIG_FLAGS,
                COMPARE_PROTO_NUM | COMPARE_PROTO_DST_PORT,
            );
            vec![
                nested(CTA_TUPLE_ORIG, &[to]),
                nested(CTA_FILTER, &[compare]),
            ]
        }
    }
}

fn nested(kind: u16, children: &[DefaultNla]) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, emitted(children))
}

fn emitted(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

fn send(socket: &Socket, kind: u16, flags: u16, attributes: &[DefaultNla]) -> io::Result<()> {
    let attributes = emitted(attributes);
    let length = HEADER_BYTES + FAMILY_HEADER.len() + attributes.len();
    let length = u32::try_from(length).expect("a few attributes");
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]); // The sequence number and the port: each answer is awaited.
    message.extend(FAMILY_HEADER);
    message.extend(attributes);
    socket.send(&message, 0).map(drop)
}

/// A flow of the kernel's table.
#[derive(Debug, Eq, PartialEq)]
struct Flow {
    /// The tuple of its first packet, as the kernel wrote it.
    original: Vec<u8>,
    status: u32,
}

/// The flows of an answer, to the end of the answer.
fn receive(socket: &Socket) -> io::Result<Vec<Flow>> {
    let mut flows = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some((kind, body, next)) = next_message(rest) {
            match kind {
                NLMSG_DONE => return Ok(flows),
                NLMSG_ERROR => return errno(body).map(|()| flows),
                _ => flows.extend(parse(body.get(FAMILY_HEADER.len()..).unwrap_or_default())),
            }
            rest = next;
        }
    }
}

/// The kind and the body of the first message, and what follows it.
fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let length = usize::try_from(length).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((
        kind,
        body,
        bytes.get(length.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

fn errno(body: &[u8]) -> io::Result<()> {
    let code = body
        .get(..4)
        .and_then(|code| code.try_into().ok())
        .map_or(0, i32::from_ne_bytes);
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(-code))
    }
}

fn parse(attributes: &[u8]) -> Option<Flow> {
    let (mut original, mut status) = (None, 0);
    for attribute in NlasIterator::new(attributes).map_while(Result::ok) {
        match attribute.kind() {
            CTA_TUPLE_ORIG => original = Some(attribute.value().to_vec()),
            CTA_STATUS => {
                status = u32::from_be_bytes(attribute.value().try_into().ok()?);
            }
            _ => {}
        }
    }
    Some(Flow {
        original: original?,
        status,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_one_after_the_other_and_a_cut_one_ends_them() {
        let message = |kind: u16, body: &[u8]| {
            let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
            let mut bytes = [
                &length.to_ne_bytes()[..],
                &kind.to_ne_bytes(),
                &[0; 10],
                body,
            ]
            .concat();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let bytes = [message(7, b"abc"), message(NLMSG_DONE, b"")].concat();
        let (kind, body, rest) = next_message(&bytes).unwrap();
        assert_eq!((kind, body), (7, &b"abc"[..]));
        assert_eq!(next_message(rest).unwrap().0, NLMSG_DONE);
        assert_eq!(next_message(&bytes[..18]), None);
        assert_eq!(next_message(&[1, 0, 0, 0]), None);
    }

    #[test]
    fn a_flow_is_its_tuple_and_its_status() {
        let tuple = DefaultNla::new(CTA_TUPLE_ORIG | NLA_F_NESTED, vec![1, 2, 3, 4]);
        let status = DefaultNla::new(CTA_STATUS, TRANSLATED.to_be_bytes().to_vec());
        let flow = Flow {
            original: vec![1, 2, 3, 4],
            status: TRANSLATED,
        };
        assert_eq!(parse(&emitted(&[status, tuple])), Some(flow));
        assert_eq!(parse(&[]), None);
    }
}
