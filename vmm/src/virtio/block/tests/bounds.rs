//! Drivers that ask for more than can be done at a time.

use super::super::engine::ROUND_BYTES;
use super::super::request::REQUEST_BYTES_MAX;
use super::*;

const DISK_BYTES: u64 = 64 << 20;
const REQUEST: u32 = 1 << 20;
const REQUESTS: usize = 80;

/// An empty disk that is larger than a driver's memory.
fn large(kind: Kind) -> Bench {
    let file = tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let mut block = block(kind, &file, BlockOptions::default());
    let driver = Driver::start(&mut block);
    Bench {
        block,
        driver,
        file,
    }
}

fn on_image() -> Bench {
    let file = image::qcow2(DISK_BYTES, None);
    image::bench(file, Vec::new())
}

fn engines() -> impl Iterator<Item = Bench> {
    ENGINES.into_iter().map(large).chain([on_image()])
}

/// The same memory again and again: what a guest has of it does not bound what it can ask for.
#[test]
fn what_is_moved_at_a_time_is_bounded_whatever_there_is_to_do() {
    for request in [READ, WRITE] {
        for mut bench in engines() {
            let mut data = bench.driver.writable(REQUEST);
            data.writable = request == READ;
            let statuses: Vec<Buffer> = (0..REQUESTS)
                .map(|_| bench.offer(request, 0, &[data]))
                .collect();
            let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
            let moved = |bench: &Bench| {
                let stats = bench.block.handle().stats();
                stats.read_bytes + stats.written_bytes
            };
            let first = moved(&bench);
            assert!(first <= ROUND_BYTES, "{first} in {:?}", bench.block.engine);
            assert_eq!(bench.block.held() as u64, {
                let done = first / u64::from(REQUEST);
                REQUESTS as u64 - done
            });
            bench.driver.wait_used(&mut bench.block, 0, REQUESTS);
            assert_eq!(moved(&bench), REQUESTS as u64 * u64::from(REQUEST));
            for status in statuses {
                assert_eq!(bench.driver.read(status.address, 1), [OK]);
            }
            assert_eq!(bench.block.held(), 0);
        }
    }
}

/// They move nothing, but a reset waits for those that are under way.
#[test]
fn few_flushes_are_under_way_at_a_time() {
    for mut bench in engines() {
        for _ in 0..REQUESTS {
            bench.offer(FLUSH, 0, &[]);
        }
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        let ended = bench.driver.used(0).len();
        assert!(bench.block.engine.begun() + ended <= 16);
        bench
            .driver
            .wait_used(&mut bench.block, 0, REQUESTS - ended);
        assert_eq!(bench.block.handle().stats().flushes, REQUESTS as u64);
    }
}

#[test]
fn what_waits_is_forgotten_at_a_reset_and_done_before_a_snapshot() {
    for mut bench in engines() {
        let data = bench.driver.writable(REQUEST);
        for _ in 0..REQUESTS {
            bench.offer(READ, 0, &[data]);
        }
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        bench.block.reset();
        assert_eq!(bench.block.held(), 0);
        let before = bench.block.handle().stats().reads;
        assert!(before < REQUESTS as u64);

        bench.driver = Driver::start(&mut bench.block);
        for _ in 0..REQUESTS {
            bench.offer(READ, 0, &[data]);
        }
        let Bench { block, driver, .. } = &mut bench;
        let _ = driver.kick(block, 0).unwrap();
        let _ = block.quiesce(&mut driver.queues, &driver.memory).unwrap();
        assert_eq!(bench.block.held(), 0);
        let done = bench.block.handle().stats().reads - before;
        assert_eq!(done, REQUESTS as u64);
    }
}

#[test]
fn the_longest_request_of_a_driver_that_keeps_to_the_configuration_is_done_and_a_longer_one_not() {
    for mut bench in engines() {
        let config = bench.block.config();
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        let (segment, segments) = (word(8), word(12));
        let longest = segment * segments;
        let data = bench.driver.writable(segment);
        let data = vec![data; segments as usize];
        assert_eq!(bench.request(READ, 0, &data), (OK, longest + 1));

        let most = u32::try_from(REQUEST_BYTES_MAX).unwrap();
        assert!(longest <= most);
        let mut data = bench.driver.writable(most);
        assert_eq!(bench.request(READ, 0, &[data]), (OK, most + 1));
        data.len += 512;
        assert_eq!(bench.request(READ, 0, &[data]), (FAILED, 1));
        data.writable = false;
        assert_eq!(bench.request(WRITE, 0, &[data]), (FAILED, 1));
    }
}

#[test]
fn a_range_of_an_image_that_is_zeroed_piece_by_piece_is_zeroed_whole() {
    for (request, flags) in [(DISCARD, 0), (WRITE_ZEROES, 1), (WRITE_ZEROES, 0)] {
        let mut bench = on_image();
        let end = DISK_BYTES / SECTOR_BYTES;
        for sector in [0, end / 2 - 1, end / 2, end - 1] {
            bench.write(sector, &[7; 512]);
        }
        let data = bench.driver.readable(&range(1, end as u32 - 2, flags));
        assert_eq!(bench.request(request, 0, &[data]), (OK, 1));
        for (sector, byte) in [(0, 7), (end / 2 - 1, 0), (end / 2, 0), (end - 1, 7)] {
            assert_eq!(bench.sectors(sector, 1), [byte; 512], "{request} {sector}");
        }
    }
}
