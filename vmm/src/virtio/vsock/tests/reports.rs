//! What guests say of their workload by way of vsock.

use super::*;
use crate::devices::guest_status::Readiness;
use crate::exit::ExitSwitch;
use crate::guest_status::{READY, VSOCK_GUEST_PORTS_END, VSOCK_PORT, exit};

fn guest() -> (Guest, Reports, ExitSwitch) {
    let switch = ExitSwitch::new().unwrap();
    let reports = Reports::new(switch.clone(), Readiness::new().unwrap());
    let mut guest = Guest::new();
    guest.vsock.muxer.reports = Some(reports.clone());
    (guest, reports, switch)
}

#[test]
fn reports_are_taken_before_the_connection_is_seen_to_end() {
    let (mut guest, reports, switch) = guest();
    let mut socket = guest.join(VSOCK_PORT, VSOCK_GUEST_PORTS_END - 1);
    guest.send_data(&mut socket, &READY.to_le_bytes());
    assert!(reports.readiness().get());
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    guest.assert_reset(&socket);
    assert_eq!(switch.status(), None);

    let mut socket = guest.join(VSOCK_PORT, 1);
    guest.send_data(&mut socket, &exit(9, true).to_le_bytes());
    let status = switch.status().unwrap();
    assert_eq!((status.code, status.oom), (Some(9), true));
}

#[test]
fn what_is_no_report_does_nothing() {
    let (mut guest, reports, switch) = guest();
    let mut socket = guest.join(VSOCK_PORT, 1);
    let ready = READY.to_le_bytes();
    for data in [
        &ready[..1],
        &ready[1..],
        &[ready, ready].concat(),
        &pattern(DATA_BYTES),
        &u32::MAX.to_le_bytes(),
    ] {
        guest.send_data(&mut socket, data);
        assert!(!reports.readiness().get());
        assert_eq!(switch.status(), None);
    }
}

#[test]
fn unprivileged_processes_of_the_guest_do_not_speak_for_it() {
    let (mut guest, ..) = guest();
    let stranger = Socket::new(VSOCK_PORT, VSOCK_GUEST_PORTS_END, 0);
    guest.send(&stranger, Operation::Request, 0);
    guest.assert_reset(&stranger);
}

#[test]
fn a_guest_has_a_few_connections_for_reports_at_a_time() {
    let (mut guest, ..) = guest();
    let sockets: Vec<_> = (0..4).map(|port| guest.join(VSOCK_PORT, port)).collect();
    let fifth = Socket::new(VSOCK_PORT, 5, 0);
    guest.send(&fifth, Operation::Request, 0);
    guest.assert_reset(&fifth);
    guest.send(&sockets[0], Operation::Reset, 0);
    guest.join(VSOCK_PORT, 5);
}
