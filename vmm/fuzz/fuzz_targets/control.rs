//! The control socket: clients that send anything, in pieces of any size, and are answered, refused
//! or hung up on.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use vmm::control::controls::Controls;
use vmm::control::memory::MemoryControls;
use vmm::control::server::Server;
use vmm::devices::guest_status::Readiness as GuestReadiness;
use vmm::events::{EventLoop, Readiness, Source, event};
use vmm::exit::ExitSwitch;
use vmm::inventory::Inventory;
use vmm::listen::Listener;
use vmm::vcpu::{Buses, VcpuThreads, Vcpus};

/// Tokens of the server: the listener, the guest's readiness, snapshots, devices, output, and then clients
/// as they come.
const LISTENER: u32 = 0;
const GUEST_READY: u32 = 1;
const CLIENT: u32 = 5;

/// A machine without a processor or a device.
fn server(listener: UnixListener) -> (Server, EventLoop) {
    let exit = ExitSwitch::new().expect("an event can be made");
    let mut events = EventLoop::new(exit.clone()).expect("an event loop can be made");
    let source = events.reserve();
    let enter: Arc<dyn Fn() + Send + Sync> = Arc::new(|| ());
    let threads = VcpuThreads::start(0, &enter).expect("there are none");
    let vcpus = Vcpus::new(threads, Vec::new(), &Arc::new(Buses::default()), &exit);
    let spec = serde_json::from_str(r#"{"boot":{"kernel":"k"}}"#).expect("it is complete");
    let controls = Controls {
        vcpus: Arc::new(vcpus),
        exit,
        readiness: GuestReadiness::new().expect("an event can be made"),
        power_button: event().expect("an event can be made"),
        inventory: Arc::new(Mutex::new(Inventory::new(spec))),
        hotplug: None,
        snapshots: None,
        console: None,
        memory: MemoryControls {
            boot_bytes: 32 << 20,
            balloon: None,
            mem: None,
        },
    };
    let listener = Listener::inherited(listener);
    let server = Server::new(listener, controls, events.poller(), source);
    (server.expect("it can be served"), events)
}

/// Ends a piece, so that inputs in the tree can be read.
const PIECE_END: u8 = 0xff;

fuzz_target!(|text: &[u8]| {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = directory.path().join("control");
    let listener = UnixListener::bind(&path).expect("it is new");
    let (server, _events) = server(listener);
    let mut client = UnixStream::connect(&path).expect("somebody listens");
    client.set_nonblocking(true).expect("it can be");
    server.on_ready(LISTENER, Readiness::READABLE);
    for piece in text.split(|byte| *byte == PIECE_END) {
        let sent = client.write_all(piece);
        server.on_ready(CLIENT, Readiness::READABLE);
        if piece.len() % 8 == 7 {
            server.on_ready(GUEST_READY, Readiness::READABLE);
        }
        let mut answers = [0; 4096];
        match client.read(&mut answers) {
            Ok(0) => return,
            _ if sent.is_err() => return,
            _ => {}
        }
    }
});
