//! virtio-vsock against a hostile driver, with a socket, a stream in each direction, and a client.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use vmm::devices::guest_status::{Readiness, Reports};
use vmm::exit::ExitSwitch;
use vmm::spec::StreamDirection;
use vmm::virtio::vsock::{HostStream, Vsock, VsockHost};
use vmm_fuzz::{Script, run};

thread_local! {
    /// One directory for all runs, with a listener for the guest's connections to port 1.
    static PLACE: RefCell<(TempDir, UnixListener)> = RefCell::new(place());
}

fn place() -> (TempDir, UnixListener) {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let listener = UnixListener::bind(directory.path().join("v_1")).expect("it is new");
    listener.set_nonblocking(true).expect("it can be");
    (directory, listener)
}

fn stream(port: u32, direction: StreamDirection, file: &str) -> HostStream {
    let file = match direction {
        StreamDirection::ToGuest => File::open(file),
        StreamDirection::FromGuest => File::create(file),
    };
    HostStream {
        port,
        direction,
        file: file.expect("the device exists"),
    }
}

fuzz_target!(|script: Script| {
    PLACE.with_borrow(|(directory, listener)| {
        let path = directory.path().join("v");
        let host = VsockHost::bind(&path).expect("the last run's socket is gone");
        let streams = vec![
            stream(2, StreamDirection::ToGuest, "/dev/zero"),
            stream(3, StreamDirection::FromGuest, "/dev/null"),
        ];
        let exit = ExitSwitch::new().expect("events can be made");
        let readiness = Readiness::new().expect("events can be made");
        let vsock = Vsock::new(3, host, streams).expect("it is complete");
        let mut vsock = vsock.with_reports(Reports::new(exit, readiness));
        let mut client = UnixStream::connect(&path).expect("somebody listens");
        client
            .write_all(b"CONNECT 4\nhello")
            .expect("there is room");
        run(&mut vsock, script);
        while listener.accept().is_ok() {}
    });
});
