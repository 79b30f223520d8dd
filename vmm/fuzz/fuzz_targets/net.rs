//! virtio-net against a hostile driver, on a tap in a namespace of its own. Needs root and `ip`.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use nix::sched::{CloneFlags, unshare};
use vmm::virtio::net::Net;
use vmm::virtio::tap::Tap;
use vmm_fuzz::{Script, run};

static NETWORK: Once = Once::new();

fn make_network() {
    unshare(CloneFlags::CLONE_NEWNET).expect("this target needs root");
    for arguments in ["tuntap add dev tap0 mode tap", "link set tap0 up"] {
        let status = Command::new("ip").args(arguments.split(' ')).status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "ip {arguments}"
        );
    }
}

thread_local! {
    static TAP: Tap = Tap::open("tap0").expect("it was made");
}

fn tap() -> OwnedFd {
    NETWORK.call_once(make_network);
    TAP.with(|tap| tap.as_fd().try_clone_to_owned())
        .expect("a descriptor can be had")
}

fuzz_target!(|script: Script| {
    let tap = Tap::from_fd(tap()).expect("it is a tap");
    let net = Net::new(tap, [2, 0, 0, 0, 0, 2]);
    run(&mut net.expect("an event can be made"), script);
});
