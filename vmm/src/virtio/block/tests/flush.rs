//! What has to be on the medium is there: by what the kernel says, not by what the disk counts.
//!
//! UNSAFETY: the kernel is asked what of a file is still to be written, for which no crate has a function.
#![expect(
    unsafe_code,
    clippy::print_stderr,
    reason = "the kernel is asked by a bare system call; a test says what was left out"
)]

use std::thread;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::image::{bench as bench_of_image, qcow2};
use super::*;

/// The number of `cachestat`, which libc has no name for here.
const CACHESTAT: c_long = 451;

/// A file that nobody can synchronize: proc has no operation for that, and the kernel says so to whoever
/// asks, by a system call or through a ring.
fn unstable() -> File {
    let file = File::open("/proc/self/status").unwrap();
    let refused = file.sync_data().unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    file
}

#[test]
fn a_flush_is_the_kernels_to_do_and_fails_where_it_cannot() {
    for kind in ENGINES {
        let engine = match kind {
            Kind::Ring => Engine::new(unstable(), QUEUE_SIZE),
            Kind::Synchronous => Engine::without_ring(unstable()),
        };
        assert_eq!(engine.fd().is_some(), matches!(kind, Kind::Ring));
        let mut block = Block::with_size(BYTES, BlockOptions::default(), engine).unwrap();
        let driver = Driver::start(&mut block);
        let mut bench = Bench {
            block,
            driver,
            file: tempfile().unwrap(),
        };
        assert_eq!(bench.request(FLUSH, 0, &[]), (FAILED, 1), "{kind:?}");
        let stats = bench.block.handle().stats();
        assert_eq!((stats.flushes, stats.failures), (0, 1), "{kind:?}");
    }
}

/// Runs `test` on a thread for which these calls fail, if their arguments fit.
fn where_fail(calls: &[c_long], condition: Option<SeccompCondition>, test: impl FnOnce() + Send) {
    let condition = condition.map(|one| SeccompRule::new(vec![one]).unwrap());
    let rules = |call: &c_long| (*call, condition.iter().cloned().collect());
    let filter = SeccompFilter::new(
        calls.iter().map(rules).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EIO.unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    thread::scope(|scope| {
        let test = || {
            seccompiler::apply_filter(&program).unwrap();
            test();
        };
        scope.spawn(test).join().unwrap();
    });
}

#[test]
fn flushes_and_stable_writes_of_an_image_fail_where_its_file_cannot_be_synchronized() {
    where_fail(&[libc::SYS_fdatasync, libc::SYS_fsync], None, || {
        let mut bench = bench_of_image(qcow2(BYTES, None), Vec::new());
        let data = bench.driver.readable(&[5; 512]);
        assert_eq!(bench.request(WRITE, 1, &[data]), (OK, 1));
        assert_eq!(bench.request(FLUSH, 0, &[]), (FAILED, 1));
        bench.block.activate(0).unwrap();
        assert_eq!(bench.request(WRITE, 1, &[data]), (FAILED, 1));
    });
}

#[test]
fn a_driver_that_does_not_flush_has_calls_write_through() {
    let flag = libc::RWF_DSYNC.unsigned_abs().into();
    let through = SeccompCmpOp::MaskedEq(flag);
    // Of the last argument.
    let through = SeccompCondition::new(5, SeccompCmpArgLen::Dword, through, flag).unwrap();
    where_fail(&[libc::SYS_pwritev2], Some(through), || {
        let mut bench = Bench::new(Kind::Synchronous, BlockOptions::default());
        let data = bench.driver.readable(&[5; 512]);
        assert_eq!(bench.request(WRITE, 1, &[data]), (OK, 1));
        bench.block.activate(0).unwrap();
        assert_eq!(bench.request(WRITE, 1, &[data]), (FAILED, 1));
    });
}

/// How many pages of a file's first part are still to be written to the medium, where the kernel can tell:
/// Linux 6.5, of file systems that have a medium.
fn unwritten(file: &File, bytes: u64) -> io::Result<u64> {
    let range = [0_u64, bytes];
    // In the page cache, to be written, being written, evicted, evicted of late.
    let mut pages = [0_u64; 5];
    // SAFETY: the call reads two numbers and writes five.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            range.as_ptr(),
            pages.as_mut_ptr(),
            0,
        )
    };
    if result == 0 {
        Ok(pages[1] + pages[2])
    } else {
        Err(io::Error::last_os_error())
    }
}

#[test]
fn what_was_written_is_on_the_medium_after_a_flush_and_after_each_stable_write() {
    let file = tempfile().unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_all().unwrap();
    match unwritten(&file, 4096) {
        Ok(0) => {}
        other => {
            eprintln!("left out: the kernel does not say what is on the medium: {other:?}");
            return;
        }
    }
    for kind in ENGINES {
        let mut bench = Bench::new(kind, BlockOptions::default());
        assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(unwritten(&bench.file, BYTES).unwrap(), 0, "{kind:?}");
        bench.block.activate(0).unwrap();
        for sector in [0, 9, SECTORS - 1] {
            let data = bench.driver.readable(&[5; 512]);
            assert_eq!(bench.request(WRITE, sector, &[data]), (OK, 1));
            assert_eq!(unwritten(&bench.file, BYTES).unwrap(), 0, "{kind:?}");
        }
    }
}
