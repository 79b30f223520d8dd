//! The guest that `scripts/bench` measures virtual machine monitors with, as the file that they load.
//! What it does is said in `guest/main.rs`.

/// An ELF kernel with a PVH entry.
pub const KERNEL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernel"));
