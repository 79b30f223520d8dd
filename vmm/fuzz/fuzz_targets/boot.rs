//! Kernels, which need not be any, and what else is put into a guest's memory before it starts.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::boot;

const MEMORY_BYTES: usize = 4 << 20;

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().expect("a file can be made");
    file.write_all_at(bytes, 0).expect("there is room");
    file
}

fuzz_target!(|kernel: &[u8]| {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
    let memory = memory.expect("a little memory can be had");
    // The end of the kernel serves as an archive, so that there are some of any length.
    let archive = &kernel[kernel.len() / 2..];
    // Both outcomes are fine.
    let _ = boot::load(&memory, &mut file(kernel), &mut [file(archive)], "quiet");
});
