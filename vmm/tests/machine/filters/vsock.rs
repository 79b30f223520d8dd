//! A guest that connects to a socket of the host's.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::json;

use super::{ALONE, Company, DATA, REQUESTS, Row, in_every_way};
use crate::driver::{Buffer, Queue};
use crate::guest::Guest;

const RECEIVE: Queue = Queue(0);
const TRANSMIT: Queue = Queue(1);

const PORT: u32 = 5000;
const CID: u32 = 3;

/// The length of a packet's header, and where in it are the type of the socket and what the packet is for.
const HEADER: u32 = 44;
const OPERATION: u32 = 28;

/// What packets are for, on stream sockets.
const REQUEST: u32 = 1 << 16 | 1;
const DATA_FOLLOWS: u32 = 5 << 16 | 1;

fn path(folder: &Path) -> PathBuf {
    folder.join("vsock")
}

/// A host that says `pong` to whoever says `ping`, and hangs up on nobody.
fn host(folder: &Path) -> Company {
    let mut name = path(folder).into_os_string();
    name.push(format!("_{PORT}"));
    let listener = UnixListener::bind(name).unwrap();
    let heard = Mutex::new(Vec::new());
    Company::default().work(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut said = [0; 4];
        // A machine that was ended says nothing.
        if stream.read_exact(&mut said).is_ok() {
            assert_eq!(&said, b"ping");
            stream.write_all(b"pong").unwrap();
        }
        heard.lock().unwrap().push(stream);
    })
}

/// Writes a packet's header for the host, from one of the guest's ports.
fn header(guest: Guest, at: u32, source: u32, bytes: u32, operation: u32) -> Guest {
    let words = [CID, 0, 2, 0, source, PORT, bytes, operation, 0, 0x1_0000, 0];
    let words = (at..).step_by(4).zip(words);
    words.fold(guest, |guest, (at, word)| guest.store_long(at, word))
}

/// Where the packets of a round are, and the buffers for the answers.
fn packets(round: u32) -> [u32; 2] {
    [0, 0x100].map(|offset| REQUESTS + 0x1000 * round + offset)
}

fn buffers(round: u32) -> [u32; 2] {
    [0, 0x1000].map(|offset| DATA + 0x2000 * round + offset)
}

#[test]
fn a_connection_that_the_guest_makes() {
    in_every_way(&Row {
        equip: |machine, folder| {
            machine.spec["vsock"] = json!({"cid": CID, "path": path(folder)});
        },
        company: host,
        start: |guest, place| {
            let mut guest = guest.set_up_device(place, 0, 2, 8);
            for (round, source) in [(0, 6000), (1, 6001)] {
                let [request, data] = packets(round);
                guest = header(guest, request, source, 0, REQUEST);
                guest = header(guest, data, source, 4, DATA_FOLLOWS)
                    .store_long(data + HEADER, u32::from_le_bytes(*b"ping"));
            }
            let outgoing = [0, 1].map(packets);
            let outgoing = outgoing
                .map(|[request, data]| [[(request, HEADER, false)], [(data, HEADER + 4, false)]]);
            let incoming = [0, 1].map(buffers);
            let incoming = incoming.map(|pair| pair.map(|at| [(at, 0x1000, true)]));
            let [outgoing, incoming] = [&outgoing, &incoming].map(|pairs| {
                let chains = pairs.as_flattened().iter();
                chains.map(<[Buffer; 1]>::as_slice).collect::<Vec<_>>()
            });
            guest
                .describe(TRANSMIT, &outgoing)
                .describe(RECEIVE, &incoming)
                .start_device(place)
        },
        work: |guest, place, round| {
            // The request, and its answer; then what each has to say.
            let exchanged = buffers(round).into_iter().fold(guest, |guest, answer| {
                guest
                    .make_more_available(RECEIVE, 1)
                    .kick(place, RECEIVE)
                    .make_more_available(TRANSMIT, 1)
                    .kick(place, TRANSMIT)
                    .wait_all_used(RECEIVE)
                    .print_long(answer + OPERATION)
            });
            exchanged.print_long(buffers(round)[1] + HEADER)
        },
        said: [b"\x01\0\x02\0\x01\0\x05\0pong"; 2],
        has_worked: |stats| {
            let vsock = stats.vsock.unwrap();
            (vsock.connections, vsock.open, vsock.refused) == (1, 1, 0)
        },
        ..ALONE
    });
}
