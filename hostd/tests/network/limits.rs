//! Bandwidth limits, measured by exceeding them, and counters.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use hostd::api::types::NetworkLimits;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpCongestion;

use crate::world::{Namespace, OUTSIDE, PATIENCE, attach, on_a_host, request};

const MB: f64 = 1e6;
/// The bucket is full at first, and TCP takes a moment: not measured.
const WARM_UP: Duration = Duration::from_millis(500);
const MEASURED: Duration = Duration::from_secs(2);

/// Bytes per second that arrive at `to` when `from` sends as fast as it can.
fn throughput(from: &Namespace, to: &Namespace, address: Ipv4Addr) -> f64 {
    let listener = to.run(move || TcpListener::bind((address, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let sender = from.spawn(move || {
        let mut stream = TcpStream::connect((address, port)).unwrap();
        // The usual one, whatever is this host's: BBR probes for more than there is, and what arrives
        // over two seconds then varies by more than a tenth.
        setsockopt(&stream, TcpCongestion, &"cubic".into()).unwrap();
        // Ends when the receiver has seen enough and goes.
        while stream.write_all(&[7; 65_536]).is_ok() {}
    });
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = vec![0; 65_536];
    let mut receive_for = |time| {
        let (begin, mut bytes) = (Instant::now(), 0);
        while begin.elapsed() < time {
            bytes += stream.read(&mut buffer).unwrap();
        }
        (bytes, begin.elapsed().as_secs_f64())
    };
    receive_for(WARM_UP);
    let (bytes, seconds) = receive_for(MEASURED);
    drop((stream, listener));
    sender.join().unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = bytes as f64 / seconds;
    rate
}

/// What is left for the payload of a rate of whole frames, within a tenth.
fn assert_near(rate: f64, limit: f64, what: &str) {
    assert!(
        rate > 0.9 * limit && rate < 1.1 * limit,
        "{what}: {rate:.0} B/s of {limit:.0}"
    );
}

#[test]
fn both_directions_keep_their_limits_within_a_tenth_and_follow_a_change() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let mut web = request("web", 2);
        web.limits = NetworkLimits {
            ingress_bps: Some(1_000_000),
            egress_bps: Some(2_000_000),
        };
        let web = attach(&network, &web).await;
        let peer = attach(&network, &request("peer", 3)).await;

        let ingress = throughput(&peer.inside, &web.inside, web.address);
        assert_near(ingress, 1.0 * MB, "ingress from a peer");
        let egress = throughput(&web.inside, &peer.inside, peer.address);
        assert_near(egress, 2.0 * MB, "egress to a peer");
        let egress = throughput(&web.inside, &world.outside, OUTSIDE);
        assert_near(egress, 2.0 * MB, "egress to the outside");

        let swapped = NetworkLimits {
            ingress_bps: Some(20_000_000),
            egress_bps: Some(1_000_000),
        };
        network.set_limits("web", &swapped).await.unwrap();
        let ingress = throughput(&peer.inside, &web.inside, web.address);
        assert_near(ingress, 20.0 * MB, "ingress after a change");
        let egress = throughput(&web.inside, &peer.inside, peer.address);
        assert_near(egress, 1.0 * MB, "egress after a change");

        network
            .set_limits("web", &NetworkLimits::default())
            .await
            .unwrap();
        for (from, to, address) in [(&peer, &web, web.address), (&web, &peer, peer.address)] {
            let free = throughput(&from.inside, &to.inside, address);
            assert!(free > 50.0 * MB, "without limits: {free:.0} B/s");
        }
    });
}

#[test]
fn the_counters_are_seen_from_the_instance() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let web = attach(&network, &request("web", 2)).await;
        let listener = world
            .outside
            .run(|| TcpListener::bind((OUTSIDE, 80)).unwrap());
        let before = network.stats("web").await.unwrap();
        let client = web.inside.spawn(|| {
            let mut stream = TcpStream::connect((OUTSIDE, 80)).unwrap();
            stream.write_all(&[7; 1_000_000]).unwrap();
        });
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_to_end(&mut Vec::new()).unwrap()
        });
        client.join().unwrap();
        assert_eq!(server.join().unwrap(), 1_000_000);
        let after = network.stats("web").await.unwrap();
        let egress = after.egress_bytes - before.egress_bytes;
        assert!((1_000_000..1_200_000).contains(&egress), "{egress}");
        let ingress = after.ingress_bytes - before.ingress_bytes;
        assert!(ingress > 0 && ingress < 200_000, "{ingress}");
        assert!(after.egress_packets > before.egress_packets);
        network.stats("other").await.unwrap_err();
    });
}
