//! The machine: one KVM virtual machine in one process. Knows nothing of containers or hostd.

pub mod spec;
pub mod virtio;
