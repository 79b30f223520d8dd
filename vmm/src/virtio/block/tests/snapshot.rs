//! A disk on its way into a snapshot and out of it.

use super::*;

#[test]
fn all_requests_have_ended_when_a_disk_is_saved_even_those_that_waited_for_a_limit() {
    for kind in ENGINES {
        let limits = DiskLimits {
            write_iops: Some(1),
            ..DiskLimits::default()
        };
        let mut bench = Bench::limited(kind, limits);
        let statuses: Vec<Buffer> = (0..8)
            .map(|sector| {
                let data = bench.driver.readable(&[0xaa; 512]);
                bench.offer(WRITE, sector, &[data])
            })
            .collect();
        let _ = bench.driver.kick(&mut bench.block, 0).unwrap();
        let Driver { queues, memory, .. } = &mut bench.driver;
        let signal = bench.block.quiesce(queues, memory).unwrap();
        assert_eq!(signal, Signal::queue(0));
        assert_eq!(bench.block.held(), 0);
        assert_eq!(bench.driver.used(0).len(), 8, "{kind:?}");
        for status in statuses {
            assert_eq!(bench.driver.read(status.address, 1), [OK]);
        }
        assert_eq!(bench.content(0, 8), [0xaa; 8 * 512]);
        let state = bench.block.save().unwrap();
        assert_eq!(state.held, [0; 0]);
    }
}

#[test]
fn a_restored_disk_has_the_limits_and_the_serial_number_of_the_saved_one() {
    let file = tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    let options = BlockOptions {
        serial: Some("saved".to_owned()),
        ..BlockOptions::default()
    };
    let saved = block(Kind::Ring, &file, options);
    let limits = DiskLimits {
        read_bps: Some(1 << 20),
        ..DiskLimits::default()
    };
    saved.handle().set_limits(limits);
    let state = saved.save().unwrap();

    let mut other = block(Kind::Ring, &file, BlockOptions::default());
    other.restore(&state.own).unwrap();
    assert_eq!(other.save().unwrap(), state);
    let _driver = Driver::start(&mut other);
    assert!(!other.reads.limiter.is_unlimited());
}

#[test]
fn another_disk_than_the_saved_one_is_refused() {
    let file = tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    let saved = block(Kind::Ring, &file, BlockOptions::default());
    let own = saved.save().unwrap().own;

    file.set_len(BYTES - SECTOR_BYTES).unwrap();
    let mut smaller = block(Kind::Ring, &file, BlockOptions::default());
    let error = smaller.restore(&own).unwrap_err().to_string();
    assert!(error.contains("number of sectors is 4096"), "{error}");
    smaller.restore(&Value::Null).unwrap_err();
}
