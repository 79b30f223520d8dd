//! The machine: one KVM virtual machine in one process. Knows nothing of containers or hostd.

pub mod control;
pub mod guest_status;
pub mod rate_limit;
pub mod spec;
pub mod virtio;
