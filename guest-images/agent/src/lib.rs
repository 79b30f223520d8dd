//! The first process of a virtual machine that was started from an OCI image.

pub mod initramfs;
pub mod protocol;
