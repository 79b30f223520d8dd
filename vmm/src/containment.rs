//! Panics that are no faults of the machine: those of a crate that reads what somebody hostile may have
//! written, and takes the wrong for impossible.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Whether somebody makes an error of a panic of this thread: then it is nothing for a panic hook.
pub fn is_contained() -> bool {
    CONTAINED.get()
}

/// What `act` returns, or nothing if it panicked. What it has worked on is then in no state to be used again.
pub(crate) fn contain<T>(act: impl FnOnce() -> T) -> Option<T> {
    let before = CONTAINED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(act));
    CONTAINED.set(before);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_known_to_be_contained() {
        assert!(!is_contained());
        assert_eq!(contain(is_contained), Some(true));
        let nothing: Option<()> = contain(|| panic!("expected in the output of this test"));
        assert_eq!(nothing, None);
        assert!(!is_contained());
    }
}
