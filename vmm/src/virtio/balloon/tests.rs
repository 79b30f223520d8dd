//! A balloon behind a driver: what goes, what stays, what is told.

use proptest::proptest;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{
    Buffer, Driver, HOLE, MEMORY_END, any_noise, assert_noise_is_survived,
    assert_tricks_are_the_guests_error, noise_config, resident,
};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS_QUEUE: usize = 2;

/// Memory that the tests give back, far from what the driver needs.
const SPARE: u64 = 0xc0_0000;
const SPARE_BYTES: usize = 0x40_0000;

const MEMORY: MemoryPlan = MemoryPlan {
    boot_bytes: 32 << 20,
    hotplug_bytes: 0,
    huge_pages: spec::HugePages::Transparent,
};

fn balloon() -> Balloon {
    Balloon::new(spec::Balloon::default(), &MEMORY).unwrap()
}

/// Memory of which the spare part is in use.
fn driver(balloon: &mut Balloon, features: u64) -> Driver {
    let driver = Driver::start_with(balloon, features);
    let bytes = vec![7; SPARE_BYTES];
    driver
        .memory
        .write_slice(&bytes, GuestAddress(SPARE))
        .unwrap();
    driver
}

fn all() -> u64 {
    balloon().info().features
}

/// One request from beginning to end.
fn request(balloon: &mut Balloon, driver: &mut Driver, queue: usize, buffers: &[Buffer]) {
    let head = driver.offer(queue, buffers);
    assert_eq!(driver.kick(balloon, queue).unwrap(), Signal::queue(queue));
    assert_eq!(driver.used(queue), [(head, 0)]);
}

fn page_numbers(driver: &mut Driver, numbers: impl IntoIterator<Item = u32>) -> Buffer {
    let bytes: Vec<u8> = numbers.into_iter().flat_map(u32::to_le_bytes).collect();
    driver.readable(&bytes)
}

fn page(address: u64) -> u32 {
    u32::try_from(address / PAGE_BYTES).unwrap()
}

#[test]
fn pages_in_the_balloon_are_the_hosts_whatever_order_they_come_in() {
    let mut balloon = balloon();
    let mut driver = driver(&mut balloon, all());
    let first = page(SPARE);
    let numbers = (0..256).rev().map(|number| first + number);
    let buffer = page_numbers(&mut driver, numbers.chain([first, first + 2]));
    request(&mut balloon, &mut driver, INFLATE, &[buffer]);
    // The last two would be one too many: a request has room for 256.
    assert_eq!(resident(&driver.memory, SPARE, 0x10_0000), 0);
    assert_eq!(
        resident(&driver.memory, SPARE + 0x10_0000, 0x10_0000),
        0x10_0000
    );
    // Taken out of the balloon they are the guest's again, and it may use them.
    request(&mut balloon, &mut driver, DEFLATE, &[buffer]);
    driver.write(SPARE, b"again");
    assert_eq!(driver.read(SPARE, 5), b"again");
}

#[test]
fn numbers_of_pages_that_are_none_mean_nothing() {
    let mut balloon = balloon();
    let mut driver = driver(&mut balloon, all());
    let numbers = [page(HOLE), page(MEMORY_END), u32::MAX, page(SPARE)];
    let mut buffer = page_numbers(&mut driver, numbers);
    buffer.len -= 2; // The last number is cut short.
    request(&mut balloon, &mut driver, INFLATE, &[buffer]);
    let writable = driver.writable(64);
    request(&mut balloon, &mut driver, INFLATE, &[writable]);
    let none = driver.readable(&[]);
    request(&mut balloon, &mut driver, INFLATE, &[none]);
    assert_eq!(resident(&driver.memory, SPARE, SPARE_BYTES), SPARE_BYTES);
}

#[test]
fn reported_pages_are_taken_on_the_queue_that_the_specification_and_linux_name() {
    let with = |bits: &[u32]| bits.iter().fold(0, |sum, bit| sum | 1 << bit);
    for (features, queue, taken) in [
        (with(&[STATISTICS, REPORTING]), 3, true),
        (with(&[STATISTICS, REPORTING]), 4, true),
        (with(&[REPORTING]), 2, true),
        (with(&[REPORTING]), 4, true),
        (with(&[REPORTING]), 3, false),
        (with(&[STATISTICS]), 3, false),
        (with(&[STATISTICS]), 4, false),
        (0, 2, false),
        (0, 4, false),
    ] {
        let mut balloon = balloon();
        let mut driver = driver(&mut balloon, features);
        // Two blocks in one report, and a range that holds no whole page.
        let report = [
            (SPARE, 0x20_0000),
            (SPARE + 0x20_0000, 0x10_0000),
            (SPARE + 0x3f_0001, 0x1ffe),
        ];
        let report = report.map(|(address, len)| Buffer {
            address,
            len,
            writable: true,
        });
        request(&mut balloon, &mut driver, queue, &report);
        let want = if taken { 0x30_0000 } else { 0 };
        assert_eq!(balloon.handle().reported(), want, "{features:#b} {queue}");
        let left = resident(&driver.memory, SPARE, SPARE_BYTES) as u64;
        assert_eq!(left + want, SPARE_BYTES as u64, "{features:#b} {queue}");
    }
}

#[test]
fn another_size_is_asked_for_and_the_driver_says_how_far_it_is() {
    let spec = spec::Balloon {
        target_mib: 2,
        ..spec::Balloon::default()
    };
    let mut balloon = Balloon::new(spec, &MEMORY).unwrap();
    let handle = balloon.handle();
    let mut driver = Driver::start(&mut balloon);
    assert_eq!(balloon.config(), [0, 2, 0, 0, 0, 0, 0, 0]);
    handle.set_target(5 << 20);
    // Not before the driver is told of the change.
    assert_eq!(balloon.config()[..4], [0, 2, 0, 0]);
    let want = Signal {
        config: true,
        ..Signal::NONE
    };
    let ready = balloon.on_ready(0, &mut driver.queues, &driver.memory);
    assert_eq!(ready.unwrap(), want);
    assert_eq!(balloon.config()[..4], [0, 5, 0, 0]);
    let again = balloon.on_ready(0, &mut driver.queues, &driver.memory);
    assert_eq!(again.unwrap(), Signal::NONE);

    for (offset, data, want) in [
        (4, &[1, 2, 3, 0][..], 0x0003_0201),
        (5, &[7], 0x0003_0701),
        (0, &[9; 4], 0x0003_0701),
        (7, &[9; 2], 0x0003_0701),
        (8, &[9; 4], 0x0003_0701),
        (u64::MAX, &[9; 8], 0x0003_0701),
        (4, &[0; 8], 0x0003_0701),
    ] {
        balloon.write_config(offset, data);
        assert_eq!(handle.actual(), want * PAGE_BYTES, "{offset} {data:?}");
    }
    balloon.reset();
    assert_eq!((handle.actual(), handle.target()), (0, 5 << 20));
}

#[test]
fn a_driver_may_take_out_of_the_balloon_what_it_was_not_asked_to_where_that_is_offered() {
    for deflate_on_oom in [false, true] {
        let spec = spec::Balloon {
            target_mib: 1,
            deflate_on_oom,
            ..spec::Balloon::default()
        };
        let mut balloon = Balloon::new(spec, &MEMORY).unwrap();
        let offered = balloon.info().features;
        assert_eq!(offered & 1 << DEFLATE_ON_OOM != 0, deflate_on_oom);
        let handle = balloon.handle();
        let mut driver = driver(&mut balloon, offered);
        let first = page(SPARE);
        let buffer = page_numbers(&mut driver, first..first + 256);
        request(&mut balloon, &mut driver, INFLATE, &[buffer]);
        balloon.write_config(4, &256_u32.to_le_bytes());
        assert_eq!(resident(&driver.memory, SPARE, 0x10_0000), 0);

        // Its memory runs out, and it takes half of the pages back. Without the feature Linux does not; a
        // driver that does it all the same has what is its own.
        let half = page_numbers(&mut driver, first..first + 128);
        request(&mut balloon, &mut driver, DEFLATE, &[half]);
        balloon.write_config(4, &128_u32.to_le_bytes());
        driver.write(SPARE, &[1; 0x8_0000]);
        assert_eq!(driver.read(SPARE, 0x8_0000), [1; 0x8_0000]);
        assert_eq!(resident(&driver.memory, SPARE, 0x10_0000), 0x8_0000);
        // The host sees how large the balloon is, and still wants what it wanted. The driver is not told
        // so again: it would go on to give back what it has just run out of.
        assert_eq!(
            (handle.target(), handle.actual()),
            (1 << 20, 128 * PAGE_BYTES)
        );
        assert_eq!(balloon.config(), [0, 1, 0, 0, 128, 0, 0, 0]);
        let ready = balloon.on_ready(0, &mut driver.queues, &driver.memory);
        assert_eq!(ready.unwrap(), Signal::NONE);
        // Pages that went in again are the host's again.
        request(&mut balloon, &mut driver, INFLATE, &[half]);
        assert_eq!(resident(&driver.memory, SPARE, 0x10_0000), 0);
    }
}

fn statistics(entries: &[(u16, u64)]) -> Vec<u8> {
    let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    entries.iter().flat_map(entry).collect()
}

#[test]
fn statistics_are_asked_for_by_giving_the_buffer_back() {
    let mut balloon = balloon();
    let handle = balloon.handle();
    let mut driver = Driver::start(&mut balloon);
    assert_eq!(handle.statistics(), None);
    let _ = balloon
        .on_ready(0, &mut driver.queues, &driver.memory)
        .unwrap();
    let mut bytes = statistics(&[(4, 1 << 40), (10, 3), (999, 1), (5, u64::MAX)]);
    bytes.extend([6, 0, 1]); // Cut short.
    let buffer = driver.readable(&bytes);
    let head = driver.offer(STATISTICS_QUEUE, &[buffer]);
    assert_eq!(
        driver.kick(&mut balloon, STATISTICS_QUEUE).unwrap(),
        Signal::NONE
    );
    assert_eq!(driver.used(STATISTICS_QUEUE), []);

    let (_, told) = handle.statistics().unwrap();
    let want = GuestStatistics {
        free: Some(1 << 40),
        total: Some(u64::MAX),
        oom_kills: Some(3),
        ..GuestStatistics::default()
    };
    assert_eq!(told, want);
    let signal = balloon.on_ready(0, &mut driver.queues, &driver.memory);
    assert_eq!(signal.unwrap(), Signal::queue(STATISTICS_QUEUE));
    assert_eq!(driver.used(STATISTICS_QUEUE), [(head, 0)]);
    balloon.reset();
    assert_eq!(handle.statistics(), None);
}

#[test]
fn hostile_drivers_are_survived() {
    let mut balloon = balloon();
    assert_tricks_are_the_guests_error(&mut balloon);
    // A driver that offers statistics again and again has its older buffers back at once.
    let mut driver = Driver::start(&mut balloon);
    let buffers: Vec<Buffer> = (0..32).map(|_| driver.readable(&[0; 10])).collect();
    for buffer in &buffers {
        driver.offer(STATISTICS_QUEUE, &[*buffer]);
    }
    let signal = driver.kick(&mut balloon, STATISTICS_QUEUE).unwrap();
    assert_eq!(signal, Signal::queue(STATISTICS_QUEUE));
    assert_eq!(driver.used(STATISTICS_QUEUE).len(), 31);
    balloon.reset();
    // A balloon of all memory, the driver's rings included, harms the driver alone.
    let mut driver = Driver::start(&mut balloon);
    let numbers = driver.writable(1024);
    for first in (0..page(MEMORY_END)).step_by(256) {
        let bytes: Vec<u8> = (first..first + 256).flat_map(u32::to_le_bytes).collect();
        driver.write(numbers.address, &bytes);
        driver.describe(INFLATE, 0, (numbers.address, 1024), 0, 0);
        driver.make_available(INFLATE, 0);
        match driver.kick(&mut balloon, INFLATE) {
            Ok(_) | Err(DeviceError::Guest { .. }) => {}
            Err(error @ DeviceError::Host { .. }) => panic!("{error:?}"),
        }
    }
    balloon.reset();
    let mut driver = Driver::start(&mut balloon);
    let buffer = page_numbers(&mut driver, [page(SPARE)]);
    request(&mut balloon, &mut driver, INFLATE, &[buffer]);
}

#[test]
fn a_buffer_of_statistics_that_is_held_counts() {
    let mut balloon = balloon();
    let buffer = Buffer {
        address: SPARE,
        len: 10,
        writable: false,
    };
    let mut driver = Driver::start(&mut balloon);
    driver.describe(STATISTICS_QUEUE, 0, (buffer.address, buffer.len), 0, 0);
    driver.make_available(STATISTICS_QUEUE, 0);
    let _ = driver.kick(&mut balloon, STATISTICS_QUEUE).unwrap();
    for _ in 0..QUEUE_SIZE {
        driver.make_available(STATISTICS_QUEUE, 0);
    }
    let result = driver.kick(&mut balloon, STATISTICS_QUEUE);
    assert!(matches!(result, Err(DeviceError::Guest { index: 2, .. })));
    balloon.reset();
}

#[test]
fn a_restored_balloon_is_as_large_as_the_saved_one() {
    let mut saved = balloon();
    let mut driver = Driver::start(&mut saved);
    saved.handle().set_target(7 << 20);
    saved.write_config(4, &[3, 0, 0, 0]);
    let buffer = driver.readable(&statistics(&[(5, 1)]));
    driver.offer(STATISTICS_QUEUE, &[buffer]);
    let _ = driver.kick(&mut saved, STATISTICS_QUEUE).unwrap();
    let state = saved.save().unwrap();
    assert_eq!(state.held, [0, 0, 1]);

    let mut restored = balloon();
    restored.restore(&state.own).unwrap();
    restored.activate(all()).unwrap();
    let handle = restored.handle();
    assert_eq!(
        (handle.target(), handle.actual()),
        (7 << 20, 3 * PAGE_BYTES)
    );
    assert_eq!(restored.config(), [0, 7, 0, 0, 3, 0, 0, 0]);
    restored.restore(&Value::Null).unwrap_err();
}

#[test]
fn a_balloon_cannot_be_made_to_ask_for_more_than_the_guest_has() {
    let most = MEMORY.boot_bytes / PAGE_BYTES;
    for (target, possible) in [(most, true), (most + 1, false), (u32::MAX.into(), false)] {
        let own = serde_json::json!({"target_pages": target, "actual_pages": u32::MAX});
        assert_eq!(balloon().restore(&own).is_ok(), possible, "{target}");
    }
}

proptest! {
    #![proptest_config(noise_config())]

    #[test]
    fn noise_is_survived(noise in any_noise(QUEUES)) {
        assert_noise_is_survived(&mut balloon(), &noise);
    }
}
