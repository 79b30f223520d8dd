//! A lock that nobody can keep by taking it again and again.

use std::sync::{Mutex, MutexGuard, TryLockError};

/// A value that threads take turns with: one that gives it back while another waits, and wants it again
/// at once, has it after that other one. A plain mutex is as a rule faster to take than a thread is to
/// wake, and so may stay with a busy thread for as long as that likes.
#[derive(Debug, Default)]
pub struct FairMutex<T: ?Sized> {
    /// Whoever is to have the value next.
    next: Mutex<()>,
    value: Mutex<T>,
}

impl<T> FairMutex<T> {
    pub fn new(value: T) -> FairMutex<T> {
        FairMutex {
            next: Mutex::new(()),
            value: Mutex::new(value),
        }
    }
}

impl<T: ?Sized> FairMutex<T> {
    /// Waits for one's turn.
    ///
    /// # Panics
    ///
    /// If one who had the value has panicked.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let _next = self.next.lock().expect("nobody panics while waiting");
        self.value.lock().expect(PANICKED)
    }

    /// The value, if nobody has it or waits for it.
    ///
    /// # Panics
    ///
    /// As [`lock`](Self::lock).
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let _next = self.next.try_lock().ok()?;
        match self.value.try_lock() {
            Ok(value) => Some(value),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Poisoned(_)) => panic!("{PANICKED}"),
        }
    }
}

const PANICKED: &str = "whoever had the value did not panic";

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn one_who_waits_has_it_before_one_who_takes_it_again() {
        for _ in 0..200 {
            let mutex = FairMutex::new(Vec::new());
            thread::scope(|scope| {
                let mut mine = mutex.lock();
                scope.spawn(|| mutex.lock().push("the other"));
                while mutex.next.try_lock().is_ok() {
                    thread::yield_now();
                }
                assert!(mutex.try_lock().is_none());
                mine.push("mine");
                drop(mine);
                mutex.lock().push("mine again");
            });
            assert_eq!(*mutex.lock(), ["mine", "the other", "mine again"]);
        }
    }
}
