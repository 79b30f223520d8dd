//! Random numbers for names. Not for secrets.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A number that differs from call to call and from run to run.
pub fn number() -> u64 {
    // Each state has keys of its own, which the standard library takes from the kernel's generator.
    RandomState::new().build_hasher().finish()
}
