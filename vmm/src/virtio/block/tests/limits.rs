//! Limits on operations and bytes.

use super::*;

#[test]
fn a_throttled_disk_reaches_its_rate_and_no_more() {
    // (limits, requests, bytes each, write): each takes half a second beyond the burst.
    let table = [
        (
            DiskLimits {
                read_iops: Some(40),
                ..DiskLimits::default()
            },
            25,
            512,
            false,
        ),
        (
            DiskLimits {
                write_iops: Some(40),
                ..DiskLimits::default()
            },
            25,
            512,
            true,
        ),
        (
            DiskLimits {
                read_bps: Some(400_000),
                ..DiskLimits::default()
            },
            62,
            4096,
            false,
        ),
        (
            DiskLimits {
                write_bps: Some(400_000),
                ..DiskLimits::default()
            },
            62,
            4096,
            true,
        ),
    ];
    for kind in ENGINES {
        for (limits, requests, bytes, write) in table {
            let mut bench = Bench::limited(kind, limits);
            let start = Instant::now();
            for _ in 0..requests {
                let (request, data) = if write {
                    (WRITE, bench.driver.readable(&vec![0; bytes]))
                } else {
                    (READ, bench.driver.writable(bytes as u32))
                };
                bench.offer(request, 0, &[data]);
            }
            let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
            bench.driver.wait_used(&mut bench.block, 0, requests);
            let took = start.elapsed();
            assert!(
                took >= Duration::from_millis(480),
                "{kind:?} {limits:?}: {took:?}"
            );
            assert!(took < PATIENCE / 2, "{kind:?} {limits:?}: {took:?}");
            assert!(bench.block.handle().stats().throttled > 0);
        }
    }
}

#[test]
fn flushes_count_as_operations_that_write() {
    for kind in ENGINES {
        let limits = DiskLimits {
            write_iops: Some(1),
            ..DiskLimits::default()
        };
        let mut bench = Bench::limited(kind, limits);
        for _ in 0..50 {
            bench.offer(FLUSH, 0, &[]);
        }
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        bench.driver.wait_used(&mut bench.block, 0, 1);
        let stats = bench.block.handle().stats();
        assert_eq!((stats.flushes, stats.throttled), (1, 49), "{kind:?}");
        bench.block.handle().set_limits(DiskLimits::default());
        bench.driver.wait_used(&mut bench.block, 0, 49);
        assert_eq!(bench.block.handle().stats().flushes, 50);
    }
}

#[test]
fn a_limit_on_one_direction_does_not_hold_up_the_other_and_can_be_lifted_while_requests_wait() {
    for kind in ENGINES {
        let limits = DiskLimits {
            write_bps: Some(1),
            ..DiskLimits::default()
        };
        let mut bench = Bench::limited(kind, limits);
        let handle = bench.block.handle();
        let data = bench.driver.readable(&[9; 512]);
        assert_eq!(bench.request(WRITE, 0, &[data]), (OK, 1));
        let parked = [bench.offer(WRITE, 1, &[data]), bench.offer(FLUSH, 0, &[])];
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        let into = bench.driver.writable(512);
        assert_eq!(bench.request(READ, 2, &[into]), (OK, 513));
        for status in parked {
            assert_eq!(bench.driver.read(status.address, 1), [UNTOUCHED]);
        }
        handle.set_limits(DiskLimits::default());
        bench.driver.wait_used(&mut bench.block, 0, 2);
        for status in parked {
            assert_eq!(bench.driver.read(status.address, 1), [OK]);
        }
        assert_eq!(bench.content(1, 1), [9; 512]);
    }
}
