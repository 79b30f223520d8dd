//! A device that was restored: the guest's connections are gone, and it must learn that first.

use super::*;

/// A device as it is after a restore, with a driver that is in the middle of its work.
fn restored() -> Guest {
    let mut guest = Guest::new();
    let own = guest.vsock.save().unwrap().own;
    guest.vsock.restore(&own).unwrap();
    guest
}

fn offer_event_buffer(guest: &mut Guest) -> (u16, Buffer) {
    let buffer = guest.driver.writable(4);
    guest.driver.write(buffer.address, &[0xff; 4]);
    let head = guest.driver.offer(EVENT, &[buffer]);
    (head, buffer)
}

#[test]
fn nothing_reaches_a_restored_guest_before_it_knows_that_its_connections_are_gone() {
    let mut guest = restored();
    let (head, buffer) = offer_event_buffer(&mut guest);
    let signal = guest.driver.kick(&mut guest.vsock, EVENT).unwrap();
    assert_eq!(signal, Signal::queue(EVENT));
    assert_eq!(guest.driver.used(EVENT), [(head, 4)]);
    assert_eq!(guest.driver.read(buffer.address, 4), [0; 4]);

    // A client of the host is let in, and its request kept.
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !guest.vsock.muxer.has_outgoing() {
        assert!(Instant::now() < deadline);
        guest.driver.turn(&mut guest.vsock, PATIENCE);
    }
    assert_eq!(guest.driver.used(RECEIVE), []);

    // The driver has dealt with the event when it gives the buffer back.
    let _ = offer_event_buffer(&mut guest);
    let signal = guest.driver.kick(&mut guest.vsock, EVENT).unwrap();
    assert_eq!(signal, Signal::queue(RECEIVE));
    assert_eq!(guest.driver.used(EVENT), []);
    assert_eq!(guest.driver.used(RECEIVE).len(), 1);
}

#[test]
fn a_driver_that_starts_anew_has_no_connections_to_lose() {
    let mut guest = restored();
    guest.vsock.reset();
    let _ = offer_event_buffer(&mut guest);
    let _ = guest.driver.kick(&mut guest.vsock, EVENT).unwrap();
    assert_eq!(guest.driver.used(EVENT), []);
}

#[test]
fn empty_buffers_are_offered_again_and_ports_go_on() {
    let mut guest = Guest::new();
    let _ = offer_event_buffer(&mut guest);
    let _ = guest.driver.kick(&mut guest.vsock, EVENT).unwrap();
    let state = guest.vsock.save().unwrap();
    assert_eq!(state.held, [32, 0, 1]);
    let port = serde_json::json!({"next_port": (1_u32 << 30) + 5});
    guest.vsock.restore(&port).unwrap();
    assert_eq!(guest.vsock.save().unwrap().own, port);
}

#[test]
fn a_port_that_is_not_for_clients_is_refused() {
    let mut guest = Guest::new();
    for port in [0, 1 << 31, u32::MAX] {
        let own = serde_json::json!({ "next_port": port });
        guest.vsock.restore(&own).unwrap_err();
    }
}
