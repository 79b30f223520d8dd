//! virtio-mem against a hostile driver, of which all memory but the rings can be plugged out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::mem::{BLOCK_BYTES, Mem};
use vmm_fuzz::{Script, run};

fuzz_target!(|input: (u8, Script)| {
    let (blocks, script) = input;
    let mut mem = Mem::new(0..8 * BLOCK_BYTES).expect("an event can be made");
    mem.handle().request(u64::from(blocks % 16) * BLOCK_BYTES);
    run(&mut mem, script);
});
