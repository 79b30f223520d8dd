//! Connections that end at a descriptor of the host.

use super::*;

#[test]
fn a_stream_to_the_guest_ends_with_its_file() {
    let (reader, mut writer) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
    let mut file = tempfile().unwrap();
    file.write_all(&pattern(100_000)).unwrap();
    file.rewind().unwrap();
    let mut guest = Guest::with_streams(vec![
        stream(10, StreamDirection::ToGuest, reader),
        stream(11, StreamDirection::ToGuest, file),
    ]);
    let mut socket = guest.join(10, 1);
    assert_eq!(socket.host_allocation, 0, "nothing can be sent there");
    writer.write_all(b"typed").unwrap();
    assert_eq!(guest.receive_data(&mut socket, 5), b"typed");
    // The stream is taken.
    let second = Socket::new(10, 2, 0);
    guest.send(&second, Operation::Request, 0);
    guest.assert_reset(&second);
    drop(writer);
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_SEND
    );
    guest.send(
        &socket,
        Operation::Shutdown,
        SHUTDOWN_SEND | SHUTDOWN_RECEIVE,
    );
    guest.assert_reset(&socket);
    // The next one who asks is told the same.
    guest.join(10, 3);
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_SEND
    );

    let mut socket = guest.join(11, 4);
    assert!(guest.receive_data(&mut socket, 100_000) == pattern(100_000));
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_SEND
    );
    // Data for a file that is only read from.
    guest.send_data(&mut socket, b"x");
    guest.assert_reset(&socket);
}

#[test]
fn a_stream_from_the_guest_is_reset_once_everything_has_been_written() {
    let (reader, writer) = pipe().unwrap();
    let mut guest = Guest::with_streams(vec![stream(20, StreamDirection::FromGuest, writer)]);
    let mut socket = guest.join(20, 1);
    // More than the pipe holds, so that some of it waits with us.
    let data = pattern(65_536 + 50_000);
    guest.transmit_data(&mut socket, &data);
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    while guest
        .driver
        .turn(&mut guest.vsock, Duration::from_millis(20))
    {}
    guest.collect();
    assert!(
        guest
            .received
            .iter()
            .all(|one| one.header.operation == Operation::CreditUpdate)
    );
    guest.received.clear();
    let mut reader = File::from(reader);
    let mut read = read_exact(&mut reader, 60_000);
    let left = data.len() - read.len();
    let rest = thread::spawn(move || read_exact(&mut reader, left));
    loop {
        match guest.next().header.operation {
            Operation::CreditUpdate => {}
            Operation::Reset => break,
            operation => panic!("{operation:?}"),
        }
    }
    read.extend(rest.join().unwrap());
    assert!(read == data);
    // The next process of the guest's may go on where this one ended.
    guest.join(20, 2);
}

#[test]
fn a_stream_whose_reader_is_gone_tells_the_guest_and_swallows_what_comes() {
    let (reader, writer) = pipe().unwrap();
    let mut guest = Guest::with_streams(vec![stream(20, StreamDirection::FromGuest, writer)]);
    let mut socket = guest.join(20, 1);
    drop(reader);
    assert_eq!(
        guest.next_is(Operation::Shutdown).header.flags,
        SHUTDOWN_RECEIVE
    );
    for _ in 0..40 {
        guest.send_data(&mut socket, &[0; DATA_BYTES]);
    }
    while guest.driver.turn(&mut guest.vsock, Duration::ZERO) {}
    guest.collect();
    assert!(
        guest
            .received
            .iter()
            .all(|one| one.header.operation == Operation::CreditUpdate)
    );
    guest.received.clear();
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    guest.assert_reset(&socket);
}

#[test]
fn a_regular_file_takes_what_the_guest_sends() {
    let mut file = tempfile().unwrap();
    let clone = file.try_clone().unwrap();
    let mut guest = Guest::with_streams(vec![stream(20, StreamDirection::FromGuest, clone)]);
    let mut socket = guest.join(20, 1);
    let data = pattern(200_000);
    guest.transmit_data(&mut socket, &data);
    guest.send(&socket, Operation::Shutdown, SHUTDOWN_SEND);
    loop {
        match guest.next().header.operation {
            Operation::CreditUpdate => {}
            Operation::Reset => break,
            operation => panic!("{operation:?}"),
        }
    }
    file.rewind().unwrap();
    assert!(read_to_end(&mut file) == data);
}

#[test]
fn two_streams_with_one_port_and_a_directory_are_refused() {
    let make = |streams| {
        let directory = tempdir().unwrap();
        let host = VsockHost::bind(&directory.path().join("v")).unwrap();
        Vsock::new(CID, host, streams)
    };
    let null = || File::open("/dev/null").unwrap();
    let twice = [1, 1].map(|port| stream(port, StreamDirection::ToGuest, null()));
    assert!(matches!(
        make(twice.into()),
        Err(VsockError::Ambiguous { port: 1 })
    ));
    let directory = stream(2, StreamDirection::ToGuest, File::open("/").unwrap());
    assert!(matches!(
        make(vec![directory]),
        Err(VsockError::Stream { port: 2, .. })
    ));
}
