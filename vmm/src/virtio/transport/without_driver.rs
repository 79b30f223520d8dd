//! Tests of devices whose driver has gone, with one that people of the host wait for.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use tempfile::tempdir;
use virtio_queue::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::testing::{Driver, VERSION_1};
use crate::virtio::DeviceError;
use crate::virtio::registers::STATUS;
use crate::virtio::vsock::{Vsock, VsockHost};

const PATIENCE: Duration = Duration::from_mins(1);

fn vsock(path: &Path) -> Driver {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let device = Vsock::new(3, VsockHost::bind(path).unwrap(), Vec::new()).unwrap();
    Driver::of(Box::new(device), memory)
}

/// How many descriptors are waited for, all of which are said to be ready.
fn turn(driver: &mut Driver) -> usize {
    let watched = driver.platform.0.lock().unwrap().watched.clone();
    for interest in &watched {
        driver.transport.on_device_ready(interest.token);
    }
    watched.len()
}

fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

fn is_turned_away(mut client: UnixStream) -> bool {
    matches!(client.read(&mut [0]), Ok(0))
}

fn start(driver: &mut Driver) {
    driver.negotiate(VERSION_1);
    driver.write(STATUS, 15);
    assert_eq!(driver.read(STATUS), 15);
}

#[test]
fn nobody_waits_for_a_driver_that_has_gone_or_broken_the_rules() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("v");
    let mut driver = vsock(&path);
    // The first one may be about to come.
    let early = client(&path);
    assert_eq!(turn(&mut driver), 0);
    start(&mut driver);
    assert_eq!(turn(&mut driver), 1);
    early.set_nonblocking(true).unwrap();
    assert!((&early).read(&mut [0]).is_err(), "it waits");
    early.set_nonblocking(false).unwrap();

    driver.write(STATUS, 0);
    assert!(is_turned_away(early));
    let late = [client(&path), client(&path)];
    assert_eq!(turn(&mut driver), 1);
    assert!(late.into_iter().all(is_turned_away));
    // The next one is served like the first.
    let waiting = client(&path);
    start(&mut driver);
    assert_eq!(turn(&mut driver), 1);
    let index = 0;
    let source = Error::InvalidChain;
    let broken = Err(DeviceError::Guest { index, source });
    assert!(!driver.transport.settle(broken));
    assert_eq!(turn(&mut driver), 1);
    assert!(is_turned_away(waiting));
    assert!(driver.needs_reset());
}

#[test]
fn whoever_comes_while_the_device_is_held_is_turned_away_afterwards() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("v");
    let mut driver = vsock(&path);
    start(&mut driver);
    driver.write(STATUS, 0);
    driver.transport.hold();
    let client = client(&path);
    assert_eq!(turn(&mut driver), 0);
    driver.transport.release();
    assert_eq!(turn(&mut driver), 1);
    assert!(is_turned_away(client));
}
