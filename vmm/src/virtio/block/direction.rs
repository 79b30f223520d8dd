//! Requests that wait for a limit.

use std::collections::VecDeque;
use std::time::Instant;

use super::request::Operation;
use crate::rate_limit::Limiter;

/// Reads or writes: their limits, and the requests that wait for them in the order they came.
#[derive(Debug)]
pub(super) struct Direction {
    pub(super) limiter: Limiter,
    pub(super) parked: VecDeque<Operation>,
}

impl Direction {
    pub(super) fn new(operations: Option<u64>, bytes: Option<u64>) -> Direction {
        Direction {
            limiter: Limiter::new(operations, bytes),
            parked: VecDeque::new(),
        }
    }

    /// The operation, if it may start now. The clock is read once a batch, and not at all where
    /// there is no limit.
    pub(super) fn admit_or_park(
        &mut self,
        operation: Operation,
        now: &mut Option<Instant>,
    ) -> Option<Operation> {
        if self.parked.is_empty()
            && (self.limiter.is_unlimited()
                || self
                    .limiter
                    .admit(*now.get_or_insert_with(Instant::now), operation.charge())
                    .is_ok())
        {
            return Some(operation);
        }
        self.parked.push_back(operation);
        None
    }
}
