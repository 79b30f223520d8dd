//! virtio-blk against a hostile driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::block::{Block, BlockOptions};
use vmm_fuzz::{Script, run};

fuzz_target!(|script: Script| {
    let file = tempfile::tempfile().expect("a file can be made");
    file.set_len(1 << 20).expect("a file can be made larger");
    let mut block = Block::new(file, BlockOptions::default()).expect("a file can be a disk");
    run(&mut block, script);
});
