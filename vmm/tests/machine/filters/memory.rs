//! Devices that have to do with memory, and the one that fills it with random bytes.

use std::fs;

use serde_json::json;
use vmm::control::{Request, Response};

use super::{ALONE, ANSWERS, DATA, REQUESTS, Row, in_every_way};
use crate::driver::Queue;

const QUEUE: Queue = Queue(0);

#[test]
fn an_image_as_memory() {
    // Behind the guest's 16 MiB.
    const IMAGE: u32 = 16 << 20;
    in_every_way(&Row {
        equip: |machine, folder| {
            let path = folder.join("image");
            fs::write(&path, b"pmem and more").unwrap();
            machine.spec["pmem"] = json!([{"path": path}]);
        },
        start: |guest, place| {
            let flush = [(REQUESTS, 4, false), (ANSWERS, 4, true)];
            guest
                .set_up_device(place, 0, 1, 8)
                .describe(QUEUE, &[&flush, &flush])
                .start_device(place)
        },
        work: |guest, place, _| {
            guest
                .print_long(IMAGE)
                .store_long(IMAGE, u32::from_le_bytes(*b"mine"))
                .store_long(ANSWERS, u32::MAX)
                .exchange(place, QUEUE, 1)
                .print_long(ANSWERS)
        },
        said: [b"pmem\0\0\0\0", b"mine\0\0\0\0"],
        has_worked: |stats| stats.devices[0].kicks > 0,
        ..ALONE
    });
}

#[test]
fn a_balloon() {
    // To inflate and deflate with, for statistics and for reports.
    const QUEUES: [Queue; 4] = [Queue(0), Queue(1), Queue(2), Queue(3)];
    // Pages that the guest gives up, and a block of which it tells that it is free.
    const PAGES: [u32; 2] = [0x60_0000 >> 12, 0x60_3000 >> 12];
    const FREE: (u32, u32, bool) = (0x80_0000, 0x20_0000, true);
    in_every_way(&Row {
        equip: |machine, _| machine.spec["balloon"] = json!({"target_mib": 1}),
        start: |guest, place| {
            let numbers = [(REQUESTS, 8, false)];
            // One that says nothing.
            let told = [(REQUESTS + 0x100, 10, false)];
            guest
                .set_up_device(place, 1 << 1 | 1 << 5, 4, 8)
                .store_long(REQUESTS, PAGES[0])
                .store_long(REQUESTS + 4, PAGES[1])
                .describe(QUEUES[0], &[&numbers, &numbers])
                .describe(QUEUES[1], &[&numbers, &numbers])
                .describe(QUEUES[2], &[&told])
                .describe(QUEUES[3], &[&[FREE], &[FREE]])
                .make_available(QUEUES[2], 1)
                .start_device(place)
        },
        work: |guest, place, _| {
            let [inflate, deflate, _, reports] = QUEUES;
            let used = [inflate, deflate, reports]
                .into_iter()
                .fold(guest, |guest, queue| guest.exchange(place, queue, 1));
            used.store_long(PAGES[0] << 12, 1).print("b")
        },
        said: [b"b"; 2],
        has_worked: |stats| {
            let balloon = stats.balloon.as_ref();
            balloon.unwrap().reported_bytes == u64::from(FREE.1)
        },
        ..ALONE
    });
}

#[test]
fn memory_that_is_plugged_in() {
    const START: u64 = 4 << 30;
    const BLOCK: u64 = 2 << 20;
    in_every_way(&Row {
        equip: |machine, _| {
            machine.spec["memory"]["max_mib"] = json!(32);
        },
        ask: |client| {
            let more = Request::Memory { size_mib: 20 };
            assert_eq!(client.ask(&more), Response::Done {});
        },
        start: |guest, place| {
            let request = [(REQUESTS, 24, false), (ANSWERS, 10, true)];
            // Two blocks are asked for, by the configuration's last number.
            guest
                .set_up_device(place, 0, 1, 8)
                .describe(QUEUE, &[&request, &request])
                .start_device(place)
                .wait_for(place.config() + 50, 4 << 4)
        },
        work: |guest, place, round| {
            let block = START + u64::from(round) * BLOCK;
            guest
                .store_long(ANSWERS, u32::MAX)
                .store_long(REQUESTS + 8, u32::try_from(block & 0xffff_ffff).unwrap())
                .store_long(REQUESTS + 12, u32::try_from(block >> 32).unwrap())
                .store_word(REQUESTS + 16, 1)
                .exchange(place, QUEUE, 1)
                .print_long(ANSWERS)
                .map(block)
                .store_far(block, u32::from_le_bytes(*b"more"))
                .print_far(block)
        },
        said: [b"\0\0\0\0more"; 2],
        has_worked: |stats| stats.mem.unwrap().plugged_bytes == BLOCK,
        ..ALONE
    });
}

#[test]
fn random_bytes() {
    in_every_way(&Row {
        equip: |machine, _| machine.spec["rng"] = json!(true),
        start: |guest, place| {
            let bytes = [(DATA, 64, true)];
            guest
                .set_up_device(place, 0, 1, 8)
                .describe(QUEUE, &[&bytes, &bytes])
                .start_device(place)
        },
        work: |guest, place, _| {
            guest
                .exchange(place, QUEUE, 1)
                .print_long(QUEUE.first_used_bytes())
        },
        said: [&[64, 0, 0, 0]; 2],
        has_worked: |stats| stats.rng.unwrap().bytes == 64,
        ..ALONE
    });
}
