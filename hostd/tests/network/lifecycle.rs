//! What is made is removed, whatever came between.

use std::fs;
use std::net::TcpListener;

use hostd::api::types::Protocol;
use hostd::network::{Endpoint, NetworkError, Reconciled};

use crate::world::{
    HOST, PATIENCE, ask, attach, everything, ip, on_a_host, output, port, request, serve,
};

#[test]
fn detach_leaves_nothing_and_can_be_repeated() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let before = everything();
        for endpoint in [Endpoint::Namespace, Endpoint::Tap] {
            let mut web = request("web", 2);
            web.endpoint = endpoint;
            web.ports = vec![port(8080, 80, Protocol::Tcp), port(53, 53, Protocol::Udp)];
            web.limits.egress_bps = Some(1_000_000);
            web.limits.ingress_bps = Some(1_000_000);
            network.attach(&web).await.unwrap();
            assert_ne!(everything(), before);
            network.detach("web").await.unwrap();
            assert_eq!(everything(), before, "{endpoint:?}");
            assert_eq!(fs::read_dir(world.config().netns_dir).unwrap().count(), 0);
            network.detach("web").await.unwrap();
        }
        network.detach("never-was").await.unwrap();
    });
}

#[test]
fn a_refused_port_leaves_nothing_and_is_named() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let mut web = request("web", 2);
        web.ports = vec![port(8080, 80, Protocol::Tcp)];
        network.attach(&web).await.unwrap();
        let before = everything();

        let mut other = request("other", 3);
        other.ports = vec![port(8081, 80, Protocol::Tcp), port(8080, 80, Protocol::Tcp)];
        let error = network.attach(&other).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "port 8080/tcp is already published by the instance `web`"
        );
        assert_eq!(error.port_index(), Some(1));

        let _listener = TcpListener::bind((HOST, 8082)).unwrap();
        other.ports = vec![port(8082, 80, Protocol::Tcp)];
        let error = network.attach(&other).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "port 8082/tcp of the host is in use by another process"
        );
        assert_eq!(everything(), before);

        network.detach("web").await.unwrap();
        other.ports = vec![port(8080, 80, Protocol::Tcp)];
        network.attach(&other).await.unwrap();
    });
}

#[test]
fn an_address_that_is_not_for_instances_is_refused() {
    on_a_host(|world| async move {
        let network = world.network().await;
        for address in ["10.209.0.0", "10.209.0.1", "10.209.255.255", "10.210.0.2"] {
            let mut web = request("web", 2);
            web.address = address.parse().unwrap();
            let error = network.attach(&web).await.unwrap_err();
            assert!(error.is_callers_fault(), "{error}");
        }
    });
}

#[test]
fn a_new_process_finds_the_instances_of_the_old_one_and_their_ports() {
    on_a_host(|world| async move {
        let old = world.network().await;
        let mut web = request("web", 2);
        web.ports = vec![port(8080, 80, Protocol::Tcp)];
        let instance = attach(&old, &web).await;
        drop(old); // Killed, as far as the kernel can tell.

        let new = world.network().await;
        serve(&instance.inside, 80);
        assert!(world.outside.run(|| ask(HOST, 8080, PATIENCE)).is_some());
        let mut other = request("other", 3);
        other.ports = web.ports.clone();
        let error = new.attach(&other).await.unwrap_err();
        assert!(matches!(error, NetworkError::PortTaken { .. }), "{error}");
        assert_eq!(new.reconcile(&[web]).await.unwrap(), Reconciled::default());
    });
}

#[test]
fn reconcile_removes_the_leftovers_of_a_crash_and_says_what_is_missing() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let web = request("web", 2);
        let instance = attach(&network, &web).await;
        let before = everything();

        let mut lost = request("lost", 3);
        lost.ports = vec![port(8080, 80, Protocol::Tcp)];
        lost.limits.egress_bps = Some(1_000_000);
        network.attach(&lost).await.unwrap();
        let mut vm = request("vm", 4);
        vm.endpoint = Endpoint::Tap;
        network.attach(&vm).await.unwrap();
        // A crash between making the file and mounting on it.
        fs::write(world.config().netns_dir.join("half"), "").unwrap();

        let gone = request("gone", 5);
        let network = world.network().await;
        let found = network.reconcile(&[web, gone]).await.unwrap();
        assert_eq!(found.missing, ["gone"]);
        assert_eq!(
            found.removed.len(),
            5,
            "veth, ifb, tap and two files: {found:?}"
        );
        assert_eq!(everything(), before);
        assert_eq!(fs::read_dir(world.config().netns_dir).unwrap().count(), 1);
        serve(&instance.inside, 80);
        assert!(
            ask(instance.address, 80, PATIENCE).is_some(),
            "the expected one lives on"
        );
    });
}

#[test]
fn flushed_rules_come_back_with_the_next_change() {
    on_a_host(|world| async move {
        let network = world.network().await;
        let mut web = request("web", 2);
        web.ports = vec![port(8080, 80, Protocol::Tcp)];
        let instance = attach(&network, &web).await;
        output("nft", "flush ruleset");
        network.attach(&request("other", 3)).await.unwrap();
        serve(&instance.inside, 80);
        assert!(world.outside.run(|| ask(HOST, 8080, PATIENCE)).is_some());
    });
}

#[test]
fn the_rules_of_others_are_left_alone() {
    on_a_host(|world| async move {
        output("nft", "add table inet theirs");
        output(
            "nft",
            "add chain inet theirs forward { type filter hook forward priority 0 ; }",
        );
        output("nft", "add rule inet theirs forward tcp dport 1 drop");
        let theirs = output("nft", "list table inet theirs");
        let network = world.network().await;
        network.attach(&request("web", 2)).await.unwrap();
        network.detach("web").await.unwrap();
        network.reconcile(&[]).await.unwrap();
        assert_eq!(output("nft", "list table inet theirs"), theirs);
    });
}

#[test]
fn a_subnet_that_the_host_already_uses_is_refused() {
    on_a_host(|world| async move {
        ip("addr add 10.209.7.1/24 dev out0");
        let error = hostd::network::Network::ensure(world.config())
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the subnet 10.209.0.0/16 overlaps 10.209.7.1/24 of the interface out0"
        );
    });
}

#[test]
fn the_mtu_is_that_of_the_way_out() {
    on_a_host(|world| async move {
        ip("link set out0 mtu 1400");
        let network = world.network().await;
        let attachment = network.attach(&request("web", 2)).await.unwrap();
        assert_eq!(attachment.mtu, 1400);
        let inside = crate::world::Namespace::open(attachment.netns.as_deref().unwrap());
        assert!(inside.run(|| ip("-o link show eth0")).contains("mtu 1400"));
    });
}
