//! The network of instances, observed by traffic.
//!
//! Each test has a network of its own: a "host" that is a network namespace, and around it an
//! "outside". Nothing is sent on the machine's real interfaces. Needs root, `ip` and `nft`.
//!
//! UNSAFETY: a test plays the VMM, which opens its tap by one ioctl.
#![expect(unsafe_code, reason = "taps are opened by ioctl")]
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

#[path = "network/lifecycle.rs"]
mod lifecycle;
#[path = "network/limits.rs"]
mod limits;
#[path = "network/traffic.rs"]
mod traffic;
#[path = "network/world.rs"]
mod world;
