//! The image store against real tools and hostile registries. As root, on loopback only.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;
mod hostile_registry;
mod import;
mod keep;
mod mounts;
mod registry;
