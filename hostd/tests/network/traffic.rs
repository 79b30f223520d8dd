//! Who can reach whom.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use hostd::api::types::Protocol;
use hostd::network::{Endpoint, Network, NetworkConfig};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::world::{
    HOST, METADATA, Namespace, OUTSIDE, PATIENCE, SILENCE, ask, attach, ip, next_sender, on_a_host,
    output, port, request, serve,
};

#[test]
fn instances_reach_each_other_the_host_and_the_outside_but_not_the_metadata_service() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let (one, two) = (request("one", 2), request("two", 3));
        let (one, two) = (attach(&network, &one).await, attach(&network, &two).await);

        serve(&two.inside, 80);
        let target = two.address;
        let seen = one.inside.run(move || ask(target, 80, PATIENCE));
        assert_eq!(
            seen.as_deref(),
            Some("10.209.0.2"),
            "a peer sees the true source"
        );

        serve(&world.outside, 80);
        let seen = one.inside.run(|| ask(OUTSIDE, 80, PATIENCE));
        assert_eq!(
            seen.as_deref(),
            Some("198.51.100.1"),
            "the outside sees the host"
        );

        let gateway = network.gateway();
        let listener = std::net::TcpListener::bind((gateway, 8080)).unwrap();
        let dialled = one
            .inside
            .run(move || std::net::TcpStream::connect((gateway, 8080)).is_ok());
        assert!(dialled, "a service of the host at the gateway");
        drop(listener);

        serve(&world.outside, 81);
        assert_eq!(one.inside.run(|| ask(METADATA, 81, SILENCE)), None);
        assert!(ask(METADATA, 81, PATIENCE).is_some(), "the host may");
    });
}

#[test]
fn nothing_unpublished_is_reached_from_outside_even_with_a_route() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let web = attach(&network, &request("web", 2)).await;
        serve(&web.inside, 80);
        let target = web.address;
        let seen = world.outside.run(move || {
            ip(&format!("route add 10.209.0.0/16 via {HOST}"));
            ask(target, 80, SILENCE)
        });
        assert_eq!(seen, None);
        assert!(
            ask(target, 80, PATIENCE).is_some(),
            "the host itself reaches it"
        );
    });
}

#[test]
fn a_published_port_is_reached_from_everywhere() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let mut web = request("web", 2);
        web.ports = vec![port(8080, 80, Protocol::Tcp)];
        let web = attach(&network, &web).await;
        let peer = attach(&network, &request("peer", 3)).await;
        let gateway = network.gateway();

        serve(&web.inside, 80);
        let seen = world.outside.run(|| ask(HOST, 8080, PATIENCE));
        assert_eq!(
            seen.as_deref(),
            Some("198.51.100.2"),
            "from outside, with the true source"
        );
        serve(&web.inside, 80);
        assert!(
            ask(HOST, 8080, PATIENCE).is_some(),
            "from the host by its address"
        );
        serve(&web.inside, 80);
        let seen = ask(Ipv4Addr::LOCALHOST, 8080, PATIENCE);
        assert_eq!(
            seen.as_deref(),
            Some("10.209.0.1"),
            "from the host by 127.0.0.1"
        );
        serve(&web.inside, 80);
        assert!(
            peer.inside.run(|| ask(HOST, 8080, PATIENCE)).is_some(),
            "from a peer"
        );
        serve(&web.inside, 80);
        assert!(
            peer.inside
                .run(move || ask(gateway, 8080, PATIENCE))
                .is_some(),
            "by the gateway"
        );
        serve(&web.inside, 80);
        assert!(
            web.inside.run(|| ask(HOST, 8080, PATIENCE)).is_some(),
            "from itself"
        );
        assert_eq!(
            world.outside.run(|| ask(HOST, 80, SILENCE)),
            None,
            "no other port"
        );
    });
}

#[test]
fn a_port_published_on_one_address_is_not_on_the_others() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let mut web = request("web", 2);
        web.ports = vec![port(8080, 80, Protocol::Tcp)];
        web.ports[0].host_ip = Some(Ipv4Addr::LOCALHOST);
        let web = attach(&network, &web).await;
        serve(&web.inside, 80);
        assert_eq!(world.outside.run(|| ask(HOST, 8080, SILENCE)), None);
        assert!(ask(Ipv4Addr::LOCALHOST, 8080, PATIENCE).is_some());
    });
}

#[test]
fn a_published_udp_port_answers() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let mut dns = request("dns", 2);
        dns.ports = vec![port(5353, 53, Protocol::Udp)];
        let dns = attach(&network, &dns).await;
        let server = dns.inside.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
        let client = world.outside.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        client.send_to(b"?", (HOST, 5353)).unwrap();
        let sender = next_sender(&server, PATIENCE).expect("the question");
        server.send_to(b"!", sender).unwrap();
        let answer = next_sender(&client, PATIENCE).expect("the answer");
        assert_eq!(answer, (HOST, 5353).into(), "from where it was asked");
    });
}

#[test]
fn a_udp_client_that_never_pauses_finds_who_has_the_port_now() {
    on_a_host(|world| async move {
        let network = world.network().await;
        // One socket throughout: to connection tracking it is one flow.
        let client = world.outside.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        client.send_to(b"?", (HOST, 5353)).unwrap();
        for (name, last) in [("old", 2), ("new", 3)] {
            let mut request = request(name, last);
            request.ports = vec![port(5353, 53, Protocol::Udp)];
            let instance = attach(&network, &request).await;
            let server = instance
                .inside
                .run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
            client.send_to(b"?", (HOST, 5353)).unwrap();
            assert!(next_sender(&server, PATIENCE).is_some(), "{name}");
            network.detach(name).await.unwrap();
        }
    });
}

#[test]
fn the_hosts_loopback_services_are_out_of_an_instances_reach() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let evil = attach(&network, &request("evil", 2)).await;
        let secret = UdpSocket::bind("127.0.0.1:7000").unwrap();
        let gateway = network.gateway();
        // What CVE-2020-8558 was about: a packet to 127.0.0.1 that leaves by the wire.
        let attack = move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"x", "127.0.0.1:7000").unwrap();
        };
        evil.inside.run(move || {
            ip("addr del 127.0.0.1/8 dev lo");
            std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").unwrap();
            ip(&format!("route add 127.0.0.1/32 via {gateway}"));
            attack();
        });
        assert_eq!(next_sender(&secret, SILENCE), None);
        output("nft", "flush chain ip hostd guard");
        evil.inside.run(attack);
        assert!(
            next_sender(&secret, PATIENCE).is_some(),
            "the guard was what stopped it"
        );
    });
}

#[test]
fn a_frame_with_a_foreign_address_or_mac_is_dropped() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let evil = attach(&network, &request("evil", 2)).await;
        let victim = attach(&network, &request("victim", 3)).await;
        let sink = victim.inside.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
        let send = |from: &'static str| {
            move || {
                let socket = UdpSocket::bind((from, 0)).unwrap();
                socket.send_to(b"x", "10.209.0.3:9").unwrap();
            }
        };

        evil.inside.run(send("10.209.0.2"));
        assert!(
            next_sender(&sink, PATIENCE).is_some(),
            "its own address passes"
        );
        evil.inside
            .run(|| drop(ip("addr add 10.209.0.9/16 dev eth0")));
        evil.inside.run(send("10.209.0.9"));
        assert_eq!(next_sender(&sink, SILENCE), None, "a foreign address");
        evil.inside
            .run(|| drop(ip("link set eth0 address 02:00:0a:d1:00:03")));
        evil.inside.run(send("10.209.0.2"));
        assert_eq!(next_sender(&sink, SILENCE), None, "a foreign MAC");
    });
}

#[test]
fn isolated_instances_reach_each_other_by_published_ports_only() {
    on_a_host(|world| async move {
        // Per network namespace; not there unless br_netfilter is loaded.
        let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        let config = NetworkConfig {
            isolate_instances: true,
            ..world.config()
        };
        let network = Network::ensure(config).await.unwrap();
        let mut web = request("web", 2);
        web.ports = vec![port(8080, 80, Protocol::Tcp)];
        let web = attach(&network, &web).await;
        let peer = attach(&network, &request("peer", 3)).await;
        let (target, gateway) = (web.address, network.gateway());
        serve(&web.inside, 80);
        assert_eq!(
            peer.inside.run(move || ask(target, 80, SILENCE)),
            None,
            "over the bridge"
        );
        let seen = peer.inside.run(move || {
            ip(&format!("route add {target}/32 via {gateway}"));
            ask(target, 80, SILENCE)
        });
        assert_eq!(seen, None, "through the gateway");
        assert!(
            peer.inside.run(|| ask(HOST, 8080, PATIENCE)).is_some(),
            "as it is published"
        );
    });
}

#[test]
fn a_host_that_is_out_of_reach_still_answers_pings_and_routes() {
    on_a_host(|world| async move {
        let config = NetworkConfig {
            instances_reach_host: false,
            ..world.config()
        };
        let network = Network::ensure(config).await.unwrap();
        let web = attach(&network, &request("web", 2)).await;
        let gateway = network.gateway();
        let _listener = std::net::TcpListener::bind((gateway, 8080)).unwrap();
        assert_eq!(web.inside.run(move || ask(gateway, 8080, SILENCE)), None);
        serve(&world.outside, 80);
        assert!(web.inside.run(|| ask(OUTSIDE, 80, PATIENCE)).is_some());
    });
}

/// struct virtio_net_hdr, in front of each frame of a tap with IFF_VNET_HDR.
const VNET_HEADER: usize = 10;

#[test]
fn a_tap_carries_frames_of_its_mac_and_address_and_no_others() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let mut vm = request("vm", 2);
        vm.endpoint = Endpoint::Tap;
        vm.owner_uid = Some(12_345);
        let attachment = network.attach(&vm).await.unwrap();
        let name = attachment.tap.unwrap();
        let shown = ip(&format!("-d link show dev {name}"));
        for word in [
            "tap",
            "pi off",
            "vnet_hdr on",
            "persist on",
            "user 12345",
            "master hostd0",
        ] {
            assert!(shown.contains(word), "{word:?} in {shown}");
        }

        let mut tap = open_tap(&name);
        let gateway = network.gateway().octets();
        // The port takes frames once the kernel has noticed that somebody holds the tap.
        let deadline = Instant::now() + PATIENCE;
        let answer = loop {
            tap.write_all(&arp_request(vm.mac, [10, 209, 0, 9], gateway))
                .unwrap();
            tap.write_all(&arp_request([2, 0, 0, 0, 0, 9], [10, 209, 0, 2], gateway))
                .unwrap();
            tap.write_all(&arp_request(vm.mac, [10, 209, 0, 2], gateway))
                .unwrap();
            if let Some(answer) = next_arp_answer(&mut tap) {
                break answer;
            }
            assert!(Instant::now() < deadline, "no answer");
        };
        assert_eq!(answer, [10, 209, 0, 2], "only the true one is answered");
    });
}

fn open_tap(name: &str) -> std::fs::File {
    nix::ioctl_write_ptr_bad!(set_iff, 0x4004_54ca, libc::ifreq);
    let tun = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let ifr_ifru = libc::__c_anonymous_ifr_ifru {
        ifru_flags: i16::try_from(flags).unwrap(),
    };
    let request = libc::ifreq { ifr_name, ifr_ifru };
    // SAFETY: `request` is a whole `ifreq` that outlives the call.
    unsafe { set_iff(tun.as_raw_fd(), &raw const request) }.unwrap();
    tun
}

fn arp_request(mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(sender);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

/// The address that the next ARP answer is for, if one comes soon.
fn next_arp_answer(tap: &mut std::fs::File) -> Option<[u8; 4]> {
    loop {
        let timeout = PollTimeout::try_from(SILENCE).unwrap();
        let mut ready = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, timeout).unwrap() == 0 {
            return None;
        }
        let mut buffer = [0; 2048];
        let length = tap.read(&mut buffer).unwrap();
        let frame = &buffer[VNET_HEADER..length];
        if frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 2] {
            return frame[38..42].try_into().ok();
        }
    }
}

#[test]
fn the_namespace_has_a_loopback_an_address_and_a_route() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let attachment = network.attach(&request("web", 2)).await.unwrap();
        let inside = Namespace::open(attachment.netns.as_deref().unwrap());
        let (address, route, lo) = inside.run(|| {
            (
                ip("-4 -o addr show eth0"),
                ip("route"),
                ip("-o link show lo"),
            )
        });
        assert!(address.contains("10.209.0.2/16"), "{address}");
        assert!(route.contains("default via 10.209.0.1 dev eth0"), "{route}");
        assert!(lo.contains("LOOPBACK,UP"), "{lo}");
        assert!(
            ip("-o link show type veth").contains("alias web"),
            "a person can tell whose it is"
        );
    });
}
