//! Both engines from one table of cases, against files.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers are the tests' own, and small"
)]

mod bench;
mod bounds;
mod flush;
mod image;
mod limits;
mod snapshot;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use proptest::proptest;
use tempfile::{NamedTempFile, tempfile};
use vm_memory::{Bytes, GuestAddress};

use self::bench::{
    BYTES, Bench, DISCARD, ENGINES, FAILED, FLUSH, GET_ID, Kind, OK, READ, SECTORS, UNSUPPORTED,
    UNTOUCHED, WRITE, WRITE_ZEROES, block, header, pattern, range, sectors_of,
};
use super::*;
use crate::virtio::testing::{
    Buffer, Driver, PATIENCE, any_noise, assert_noise_is_survived,
    assert_tricks_are_the_guests_error, noise_config,
};

#[test]
fn data_is_read_into_however_many_buffers() {
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        for lens in [
            &[512][..],
            &[4096],
            &[512, 1024],
            &[1, 510, 1],
            &[100_000, 31_072],
        ] {
            let buffers: Vec<_> = lens.iter().map(|len| bench.driver.writable(*len)).collect();
            let total: u32 = lens.iter().sum();
            assert_eq!(
                bench.request(READ, 7, &buffers),
                (OK, total + 1),
                "{kind:?} {lens:?}"
            );
            let read: Vec<u8> = buffers
                .iter()
                .flat_map(|buffer| bench.driver.read(buffer.address, buffer.len as usize))
                .collect();
            assert_eq!(read, sectors_of(7, u64::from(total) / SECTOR_BYTES));
        }
    }
}

#[test]
fn data_is_written_from_however_many_buffers_and_nothing_else_is() {
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        let parts = [vec![1; 500], vec![2; 12], vec![3; 1024]];
        let buffers: Vec<_> = parts
            .iter()
            .map(|part| bench.driver.readable(part))
            .collect();
        assert_eq!(bench.request(WRITE, 9, &buffers), (OK, 1), "{kind:?}");
        assert_eq!(bench.content(9, 3), parts.concat());
        assert_eq!(bench.content(8, 1), sectors_of(8, 1));
        assert_eq!(bench.content(12, 1), sectors_of(12, 1));
        assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
        let stats = bench.block.handle().stats();
        let expected = BlockStats {
            writes: 1,
            written_bytes: 1536,
            flushes: 1,
            ..BlockStats::default()
        };
        assert_eq!(stats, expected);
    }
}

#[test]
fn a_driver_that_does_not_flush_gets_stable_writes() {
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        bench.block.activate(0).unwrap();
        let data = bench.driver.readable(&[5; 512]);
        let head = bench.offer(WRITE, 1, &[data]);
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        bench.driver.wait_used(&mut bench.block, 0, 1);
        assert_eq!(bench.driver.read(head.address, 1), [OK]);
        assert_eq!(bench.content(1, 1), [5; 512]);
    }
}

#[test]
fn a_full_queue_of_requests_is_served() {
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        let requests: Vec<_> = (0..85)
            .map(|at| {
                let data = bench.driver.writable(512);
                (at * 3, data, bench.offer(READ, at * 3, &[data]))
            })
            .collect();
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        bench.driver.wait_used(&mut bench.block, 0, requests.len());
        for (sector, data, status) in requests {
            assert_eq!(bench.driver.read(status.address, 1), [OK]);
            assert_eq!(bench.driver.read(data.address, 512), sectors_of(sector, 1));
        }
        assert_eq!(bench.block.engine.in_flight(), 0);
    }
}

#[test]
fn requests_that_make_no_sense_are_failed() {
    // (type, sector, bytes to write, bytes to read, status)
    let huge = u64::MAX / SECTOR_BYTES;
    let table = [
        (READ, 0, 0, 0, FAILED),
        (READ, 0, 0, 511, FAILED),
        (READ, 0, 0, 513, FAILED),
        (READ, SECTORS, 0, 512, FAILED),
        (READ, SECTORS - 1, 0, 1024, FAILED),
        (READ, u64::MAX, 0, 512, FAILED),
        (READ, huge, 0, 512, FAILED),
        (READ, huge + 1, 0, 512, FAILED),
        (WRITE, 0, 0, 0, FAILED),
        (WRITE, 0, 100, 0, FAILED),
        (WRITE, SECTORS, 512, 0, FAILED),
        (WRITE, u64::MAX - 1, 512, 0, FAILED),
        (DISCARD, 0, 0, 0, FAILED),
        (DISCARD, 0, 15, 0, FAILED),
        (WRITE_ZEROES, 0, 32, 0, FAILED),
        (2, 0, 0, 0, UNSUPPORTED),
        (u32::MAX, 0, 512, 512, UNSUPPORTED),
    ];
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        for (request, sector, readable, writable, status) in table {
            let mut data = Vec::new();
            if readable > 0 {
                data.push(bench.driver.readable(&vec![0; readable]));
            }
            if writable > 0 {
                data.push(bench.driver.writable(writable));
            }
            let case = format!("{kind:?} {request} {sector} {readable} {writable}");
            assert_eq!(bench.request(request, sector, &data), (status, 1), "{case}");
        }
        assert_eq!(bench.content(0, SECTORS), pattern());
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes_and_unmapped_ones_give_their_space_back() {
    // (type, flags, whether space comes back)
    let table = [
        (DISCARD, 0, true),
        (WRITE_ZEROES, 1, true),
        (WRITE_ZEROES, 0, false),
    ];
    for kind in ENGINES {
        for (request, flags, frees) in table {
            let mut bench = Bench::new(kind, BlockOptions::default());
            bench.file.sync_all().unwrap();
            let before = bench.file.metadata().unwrap().blocks();
            let data = bench.driver.readable(&range(1024, 2048, flags));
            let case = format!("{kind:?} {request} {flags}");
            assert_eq!(bench.request(request, 0, &[data]), (OK, 1), "{case}");
            assert!(
                bench.content(1024, 2048).iter().all(|byte| *byte == 0),
                "{case}"
            );
            assert_eq!(bench.content(1023, 1), sectors_of(1023, 1));
            assert_eq!(bench.content(3072, 1), sectors_of(3072, 1));
            assert_eq!(bench.file.metadata().unwrap().len(), BYTES);
            let after = bench.file.metadata().unwrap().blocks();
            assert!(
                !frees || after + 2048 <= before,
                "{case}: {before} blocks, then {after}"
            );
        }
    }
}

#[test]
fn ranges_that_cannot_be_zeroed_are_left_alone() {
    // (type, sector, sectors, flags, status)
    let table = [
        (DISCARD, 0, 8, 1, UNSUPPORTED),
        (DISCARD, 0, 8, 2, UNSUPPORTED),
        (WRITE_ZEROES, 0, 8, 4, UNSUPPORTED),
        (DISCARD, 0, 0, 0, FAILED),
        (DISCARD, SECTORS - 1, 2, 0, FAILED),
        (WRITE_ZEROES, u64::MAX, 1, 0, FAILED),
        (WRITE_ZEROES, 0, u32::MAX, 0, FAILED),
    ];
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        for (request, sector, sectors, flags, status) in table {
            let data = bench.driver.readable(&range(sector, sectors, flags));
            let case = format!("{kind:?} {request} {sector} {sectors} {flags}");
            assert_eq!(bench.request(request, 0, &[data]), (status, 1), "{case}");
        }
        assert_eq!(bench.content(0, SECTORS), pattern());
    }
}

#[test]
fn a_range_larger_than_promised_is_refused_on_a_disk_that_has_it() {
    let file = tempfile().unwrap();
    file.set_len(8 << 30).unwrap();
    let mut block = block(Kind::Ring, &file, BlockOptions::default());
    let driver = Driver::start(&mut block);
    let mut bench = Bench {
        block,
        driver,
        file,
    };
    let data = bench.driver.readable(&range(0, RANGE_SECTORS_MAX + 1, 0));
    assert_eq!(bench.request(DISCARD, 0, &[data]), (FAILED, 1));
    let data = bench.driver.readable(&range(0, RANGE_SECTORS_MAX, 0));
    assert_eq!(bench.request(DISCARD, 0, &[data]), (OK, 1));
}

#[test]
fn a_read_only_disk_is_never_changed() {
    let options = BlockOptions {
        read_only: true,
        ..BlockOptions::default()
    };
    for kind in ENGINES {
        let mut bench = Bench::new(kind, options.clone());
        let features = bench.block.info().features;
        assert_eq!(features & (1 << VIRTIO_BLK_F_RO), 1 << VIRTIO_BLK_F_RO);
        // A driver that accepts what was not offered.
        bench.block.activate(u64::MAX).unwrap();
        let data = bench.driver.readable(&[1; 512]);
        assert_eq!(bench.request(WRITE, 0, &[data]), (FAILED, 1), "{kind:?}");
        let data = bench.driver.readable(&range(0, 8, 0));
        for request in [DISCARD, WRITE_ZEROES] {
            assert_eq!(bench.request(request, 0, &[data]), (FAILED, 1), "{kind:?}");
        }
        let data = bench.driver.writable(512);
        assert_eq!(bench.request(READ, 5, &[data]), (OK, 513));
        assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(bench.content(0, SECTORS), pattern());
    }
}

#[test]
fn the_serial_number_is_told_as_far_as_there_is_room() {
    let options = BlockOptions {
        serial: Some("disk-0001".into()),
        ..BlockOptions::default()
    };
    let mut bench = Bench::new(Kind::Ring, options);
    for (room, told) in [(20, 20), (4, 4), (100, 20)] {
        let data = bench.driver.writable(room);
        assert_eq!(bench.request(GET_ID, 0, &[data]), (OK, told + 1));
        let mut expected = b"disk-0001".to_vec();
        expected.resize(told as usize, 0);
        assert_eq!(bench.driver.read(data.address, told as usize), expected);
    }
    assert_eq!(bench.request(GET_ID, 0, &[]), (OK, 1));
}

#[test]
fn chains_that_are_too_short_are_given_back() {
    let mut bench = Bench::new(Kind::Ring, BlockOptions::default());
    let short = bench.driver.readable(&[0; 15]);
    let status = bench.driver.writable(1);
    // A header that is too short, one without a status, nothing but a status.
    for (chain, code, written) in [
        (&[short, status][..], FAILED, 1),
        (&[short], UNTOUCHED, 0),
        (&[status], FAILED, 1),
    ] {
        bench.driver.write(status.address, &[UNTOUCHED]);
        let head = bench.driver.offer(0, chain);
        assert_eq!(
            bench.driver.kick(&mut bench.block, 0).unwrap(),
            Signal::queue(0)
        );
        assert_eq!(bench.driver.used(0), [(head, written)]);
        assert_eq!(bench.driver.read(status.address, 1), [code]);
    }
}

#[test]
fn a_disk_that_has_shrunk_fails_what_is_gone() {
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        bench.file.set_len(BYTES / 2).unwrap();
        let data = bench.driver.writable(1024);
        assert_eq!(
            bench.request(READ, SECTORS / 2 - 1, &[data]),
            (FAILED, 1),
            "{kind:?}"
        );
        assert_eq!(bench.block.handle().stats().failures, 1);
    }
}

#[test]
fn after_a_reset_no_request_touches_memory_and_the_next_driver_is_served() {
    for kind in ENGINES {
        let limits = DiskLimits {
            read_iops: Some(20),
            ..DiskLimits::default()
        };
        let mut bench = Bench::limited(kind, limits);
        for _ in 0..60 {
            let data = bench.driver.writable(512);
            bench.offer(READ, 1, &[data]);
        }
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        bench.block.reset();
        assert_eq!(bench.block.held(), 0);
        bench.block.handle().set_limits(DiskLimits::default());
        bench.driver = Driver::start(&mut bench.block);
        let data = bench.driver.writable(512);
        assert_eq!(bench.request(READ, 1, &[data]), (OK, 513));
    }
}

/// CVE-2026-45782 (Cloud Hypervisor): a request that completed after the reset of its device wrote to
/// memory that was somebody else's by then.
#[test]
fn requests_that_are_in_flight_at_a_reset_are_over_when_it_returns() {
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        let data: Vec<Buffer> = (0..40).map(|_| bench.driver.writable(0x1_0000)).collect();
        for buffer in &data {
            bench.offer(READ, 1, &[*buffer]);
        }
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        bench.block.reset();
        assert_eq!(bench.block.held(), 0);
        for buffer in &data {
            bench.driver.write(buffer.address, &[0x5a; 0x1_0000]);
        }
        // The next driver's requests are served behind whatever might be left of the old ones.
        let memory = bench.driver.memory.clone();
        bench.driver = Driver::start(&mut bench.block);
        let fresh = bench.driver.writable(512);
        assert_eq!(bench.request(READ, 1, &[fresh]), (OK, 513));
        for buffer in &data {
            let mut bytes = vec![0; 0x1_0000];
            memory
                .read_slice(&mut bytes, GuestAddress(buffer.address))
                .unwrap();
            assert_eq!(bytes, [0x5a; 0x1_0000], "{kind:?}");
        }
    }
}

#[test]
fn dropping_a_disk_with_requests_in_flight_waits_for_them() {
    let mut bench = Bench::new(Kind::Ring, BlockOptions::default());
    for _ in 0..50 {
        let data = bench.driver.readable(&[1; 65536]);
        bench.offer(WRITE, 0, &[data]);
        bench.offer(FLUSH, 0, &[]);
    }
    let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
    drop(bench.block);
    drop(bench.driver);
    let mut bytes = vec![0; 65536];
    bench.file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 65536]);
}

#[test]
fn the_configuration_says_what_the_disk_can_do() {
    let named = NamedTempFile::new().unwrap();
    // A size that is not whole sectors is rounded down.
    named.as_file().set_len(BYTES + 511).unwrap();
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(named.path())
        .unwrap();
    let config = block(Kind::Ring, &file, BlockOptions::default()).config();
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[8..12], 65_536u32.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[36..40], RANGE_SECTORS_MAX.to_le_bytes());
    assert_eq!(config.len(), 60);
    let options = BlockOptions {
        read_only: true,
        ..BlockOptions::default()
    };
    let config = block(Kind::Ring, &file, options).config();
    assert_eq!(config[36..], [0; 24]);
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(
        Block::new(null, BlockOptions::default()),
        Err(BlockError::FileType)
    ));
    let options = BlockOptions {
        serial: Some("x".repeat(21)),
        ..BlockOptions::default()
    };
    assert!(matches!(
        Block::new(tempfile().unwrap(), options),
        Err(BlockError::Serial { len: 21 })
    ));
}

#[test]
fn tricks_are_the_guests_error_and_no_more_chains_are_held_than_the_queue_has() {
    for kind in ENGINES {
        let limits = DiskLimits {
            read_iops: Some(1),
            ..DiskLimits::default()
        };
        let options = BlockOptions {
            limits,
            ..BlockOptions::default()
        };
        let file = tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        let mut block = block(kind, &file, options);
        assert_tricks_are_the_guests_error(&mut block);
        // The limit lets one read through, and must not make the device pile up the others.
        let mut driver = Driver::start(&mut block);
        let head = driver.readable(&header(READ, 0));
        let data = driver.writable(513);
        for _ in 0..2 {
            driver.offer(0, &[head, data]);
        }
        let _ = driver.kick(&mut block, 0).unwrap();
        driver.wait_used(&mut block, 0, 1);
        let again = driver.offer(0, &[head, data]);
        for _ in 0..254 {
            driver.make_available(0, again);
        }
        let _ = driver.kick(&mut block, 0).unwrap();
        driver.make_available(0, again);
        assert!(matches!(
            driver.kick(&mut block, 0),
            Err(DeviceError::Guest { index: 0, .. })
        ));
        block.reset();
    }
}

proptest! {
    #![proptest_config(noise_config())]

    #[test]
    fn noise_is_survived(noise in any_noise(1), synchronous in proptest::bool::ANY) {
        let file = tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        let kind = if synchronous { Kind::Synchronous } else { Kind::Ring };
        assert_noise_is_survived(&mut block(kind, &file, BlockOptions::default()), &noise);
    }
}
