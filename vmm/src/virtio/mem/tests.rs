//! A memory device behind a driver: what is plugged in, what comes back.

use proptest::proptest;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{
    Driver, REGION_BORDER, any_noise, assert_noise_is_survived, assert_tricks_are_the_guests_error,
    noise_config, resident,
};

/// Eight blocks of the driver's memory, behind what it needs itself.
const START: u64 = REGION_BORDER - COUNT * BLOCK_BYTES / 2;
const COUNT: u64 = 8;

fn mem() -> Mem {
    Mem::new(START..START + COUNT * BLOCK_BYTES).unwrap()
}

/// A device that is asked for this many blocks, and its driver.
fn bench(blocks: u64) -> (Mem, Driver) {
    let mut mem = mem();
    mem.handle().request(blocks * BLOCK_BYTES);
    let driver = Driver::start(&mut mem);
    (mem, driver)
}

fn block(number: u64) -> u64 {
    START + number * BLOCK_BYTES
}

fn request(kind: u16, address: u64, blocks: u16) -> Vec<u8> {
    let mut bytes = vec![0; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// One request from beginning to end.
fn ask(mem: &mut Mem, driver: &mut Driver, bytes: &[u8]) -> [u8; RESPONSE_BYTES] {
    let buffers = [driver.readable(bytes), driver.writable(16)];
    let head = driver.offer(0, &buffers);
    assert_eq!(driver.kick(mem, 0).unwrap(), Signal::queue(0));
    assert_eq!(driver.used(0), [(head, 10)]);
    driver.read(buffers[1].address, 10).try_into().unwrap()
}

#[test]
fn blocks_are_plugged_in_as_far_as_the_host_asks_and_out_again() {
    let (mut mem, mut driver) = bench(4);
    let (done, refused, error) = (Response::Done, Response::Refused, Response::Error);
    let state = Response::State;
    for (kind, address, blocks, want, plugged) in [
        (STATE, block(0), 8, state(UNPLUGGED), 0),
        (PLUG, block(1), 3, done, 3),
        (STATE, block(1), 3, state(PLUGGED), 3),
        (STATE, block(0), 2, state(MIXED), 3),
        (PLUG, block(3), 2, error, 3), // One is already.
        (PLUG, block(4), 2, refused, 3),
        (PLUG, block(7), 1, done, 4),
        (PLUG, block(6), 1, refused, 4),
        (UNPLUG, block(2), 3, error, 4), // One is not.
        (UNPLUG, block(2), 1, done, 3),
        (PLUG, block(0), 1, done, 4),
        (UNPLUG_ALL, 0, 0, done, 0),
        // What are no blocks of this device.
        (PLUG, block(0) + 4096, 1, error, 0),
        (PLUG, block(8), 1, error, 0),
        (PLUG, block(7), 2, error, 0),
        (PLUG, block(0) - BLOCK_BYTES, 1, error, 0),
        (PLUG, u64::MAX, u16::MAX, error, 0),
        (PLUG, block(0), 0, error, 0),
        (STATE, block(0), 9, error, 0),
        (UNPLUG, 0, 1, error, 0),
        (4, block(0), 1, error, 0),
        (u16::MAX, block(0), 1, error, 0),
    ] {
        let got = ask(&mut mem, &mut driver, &request(kind, address, blocks));
        assert_eq!(got, want.bytes(), "{kind} {address:#x} {blocks}");
        assert_eq!(mem.handle().plugged(), plugged * BLOCK_BYTES);
    }
}

#[test]
fn memory_that_is_plugged_out_is_the_hosts() {
    let (mut mem, mut driver) = bench(8);
    let bytes = usize::try_from(BLOCK_BYTES).unwrap();
    let fill = |driver: &Driver| {
        let all = vec![7; 8 * bytes];
        driver
            .memory
            .write_slice(&all, GuestAddress(START))
            .unwrap();
    };
    ask(&mut mem, &mut driver, &request(PLUG, block(0), 8));
    fill(&driver);
    // Two blocks, of which each is in a region of its own.
    ask(&mut mem, &mut driver, &request(UNPLUG, block(3), 2));
    assert_eq!(resident(&driver.memory, block(3), 2 * bytes), 0);
    assert_eq!(resident(&driver.memory, block(0), 3 * bytes), 3 * bytes);
    assert_eq!(resident(&driver.memory, block(5), 3 * bytes), 3 * bytes);
    // Also what the guest had no right to.
    fill(&driver);
    ask(&mut mem, &mut driver, &request(UNPLUG_ALL, 0, 0));
    assert_eq!(resident(&driver.memory, START, 8 * bytes), 0);
}

#[test]
fn another_size_is_asked_for_in_whole_blocks() {
    let (mut mem, mut driver) = bench(1);
    let word = |mem: &Mem, index: usize| {
        let config = mem.config();
        u64::from_le_bytes(config[8 * index..8 * index + 8].try_into().unwrap())
    };
    assert_eq!(mem.config().len(), 56);
    let bytes = COUNT * BLOCK_BYTES;
    for (index, want) in [
        (0, BLOCK_BYTES),
        (2, START),
        (3, bytes),
        (4, bytes),
        (6, BLOCK_BYTES),
    ] {
        assert_eq!(word(&mem, index), want, "{index}");
    }
    for (asked, want) in [(3 * BLOCK_BYTES + 4096, 3), (u64::MAX, 8), (0, 0)] {
        mem.handle().request(asked);
        let signal = mem.on_ready(0, &mut driver.queues, &driver.memory).unwrap();
        assert!(signal.config);
        assert_eq!(word(&mem, 6), want * BLOCK_BYTES);
    }
    mem.handle().request(4096);
    let signal = mem.on_ready(0, &mut driver.queues, &driver.memory).unwrap();
    assert_eq!(signal, Signal::NONE, "nothing has changed");
}

#[test]
fn what_is_plugged_in_outlives_a_reset_and_a_snapshot() {
    let (mut mem, mut driver) = bench(4);
    ask(&mut mem, &mut driver, &request(PLUG, block(2), 3));
    mem.reset();
    let mut driver = Driver::start(&mut mem);
    let state = request(STATE, block(2), 3);
    let plugged = Response::State(PLUGGED).bytes();
    assert_eq!(ask(&mut mem, &mut driver, &state), plugged);

    let own = mem.save().unwrap().own;
    let mut restored = self::mem();
    restored.restore(&own).unwrap();
    assert_eq!(restored.handle().requested(), 4 * BLOCK_BYTES);
    assert_eq!(restored.handle().plugged(), 3 * BLOCK_BYTES);
    let mut driver = Driver::start(&mut restored);
    assert_eq!(ask(&mut restored, &mut driver, &state), plugged);

    for (field, value) in [
        ("start", Value::from(0)),
        ("bytes", Value::from(BLOCK_BYTES)),
        ("plugged", Value::from("1c0")),
        ("plugged", Value::from("x")),
        ("more", Value::from(1)),
    ] {
        let mut wrong = own.clone();
        wrong[field] = value;
        self::mem().restore(&wrong).unwrap_err();
    }
}

#[test]
fn hostile_drivers_are_survived() {
    let (mut mem, mut driver) = bench(8);
    // Requests and answers without room.
    let short = request(PLUG, block(0), 1);
    for (readable, room, written) in [(23, 16, 10), (0, 16, 10), (24, 3, 3), (24, 0, 0)] {
        let mut buffers = vec![driver.readable(&short[..readable]), driver.writable(room)];
        buffers.retain(|buffer| buffer.len > 0);
        let head = driver.offer(0, &buffers);
        let _ = driver.kick(&mut mem, 0).unwrap();
        assert_eq!(driver.used(0), [(head, written)], "{readable} {room}");
    }
    mem.reset();
    assert_tricks_are_the_guests_error(&mut mem);
}

proptest! {
    #![proptest_config(noise_config())]

    #[test]
    fn noise_is_survived(noise in any_noise(1)) {
        let mut mem = mem();
        mem.handle().request(u64::MAX);
        assert_noise_is_survived(&mut mem, &noise);
    }
}
