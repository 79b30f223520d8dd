//! Devices that are not virtio: one file each.

pub mod boot_timer;
pub mod generation;
pub mod guest_status;
pub mod ioapic;
pub mod keyboard;
pub mod power;
pub mod serial;
