//! Hostile drivers before the kernel's own device. Hosts without it have nothing to test; the simulated one
//! has it.

use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;

use super::super::tests::{GUEST, GUEST_MAC, HOST, PORT, in_network, wait_for_link};
use super::super::{RECEIVE, TRANSMIT};
use super::*;
use crate::virtio::testing::{Driver, PATIENCE, REGION_BORDER, TRICKS};

const DEVICE: &str = "/dev/vhost-net";
/// Virtio's header, and the shortest frame.
const FRAME: [u8; 12 + 60] = [0; 12 + 60];

#[expect(
    clippy::print_stderr,
    reason = "nobody else says that nothing was tested"
)]
fn is_here() -> bool {
    let is_here = Path::new(DEVICE).exists();
    if !is_here {
        eprintln!("nothing is tested: this host has no {DEVICE}");
    }
    is_here
}

/// Runs a test with a device, and a socket whose datagrams reach it.
fn with_device(test: impl FnOnce(VhostNet, UdpSocket) + Send + 'static) {
    if !is_here() {
        return;
    }
    in_network(|| {
        let tap = Tap::open("tap0").unwrap();
        let host = UdpSocket::bind((Ipv4Addr::from(HOST), PORT)).unwrap();
        wait_for_link(&tap, &host, GUEST);
        let device = File::options().read(true).write(true).open(DEVICE).unwrap();
        let device = VhostNet::new(device, tap, GUEST_MAC, None).unwrap();
        test(device, host);
    });
}

/// A new driver sends a frame, and gets its buffer back.
fn assert_serves(device: &mut VhostNet) {
    let mut driver = Driver::start(device);
    let frame = driver.readable(&FRAME);
    driver.offer(TRANSMIT, &[frame]);
    let _ = driver.kick(device, TRANSMIT).unwrap();
    assert_eq!(driver.wait_used(device, TRANSMIT, 1).len(), 1);
    device.reset();
}

#[test]
fn tricks_are_the_guests_error_and_the_next_driver_is_served() {
    with_device(|mut device, host| {
        for (name, trick) in TRICKS {
            for queue in [RECEIVE, TRANSMIT] {
                let mut driver = Driver::start(&mut device);
                trick(&mut driver, queue);
                // The kernel looks for a buffer when there is something to put into it.
                host.send_to(b"frame", (Ipv4Addr::from(GUEST), PORT))
                    .unwrap();
                let _ = driver.kick(&mut device, queue).unwrap();
                let error = loop {
                    match driver.try_turn(&mut device, PATIENCE) {
                        Ok(true) => {}
                        Ok(false) => panic!("{name}, queue {queue}: nothing was wrong"),
                        Err(error) => break error,
                    }
                };
                assert!(
                    matches!(error, DeviceError::Guest { index, .. } if index == queue),
                    "{name}, queue {queue}: {error:?}"
                );
                device.reset();
            }
        }
        assert_serves(&mut device);
    });
}

#[test]
fn a_queue_over_two_regions_is_the_guests_error() {
    with_device(|mut device, _host| {
        let mut driver = Driver::start(&mut device);
        let table = u32::try_from(REGION_BORDER - 64).unwrap();
        driver.queues[TRANSMIT].set_desc_table_address(Some(table), Some(0));
        let refused = driver.kick(&mut device, TRANSMIT).unwrap_err();
        assert!(
            matches!(
                refused,
                DeviceError::Guest {
                    index: TRANSMIT,
                    ..
                }
            ),
            "{refused:?}"
        );
        device.reset();
        assert_serves(&mut device);
    });
}
