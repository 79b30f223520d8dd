//! A transport on the event loop: kicks, and queues that are looked after so that their drivers need
//! not kick.

use std::sync::atomic::Ordering;

use virtio_queue::QueueT;

use super::{KICK_TOKEN, Kick, Transport};
use crate::events::{Readiness, Source};
use crate::fair_mutex::FairMutex;
use crate::virtio::DeviceError;
use crate::virtio::counters::count;

impl Transport {
    /// From now on queue `index` is looked at again and again, and its driver need not kick.
    pub(super) fn look_after(&mut self, index: usize) {
        if self.busy_queues & 1 << index == 0 {
            self.busy_queues |= 1 << index;
            let disabled = self.queues[index].disable_notification(&self.memory);
            self.check(index, disabled);
        }
    }

    /// Does what is in the queue now, without asking for a kick when there is more. Returns whether
    /// there was something.
    pub(super) fn serve(&mut self, index: usize) -> bool {
        if !self.active() || !self.queues.get(index).is_some_and(QueueT::ready) {
            return false;
        }
        self.look_after(index);
        let before = self.queues[index].next_avail();
        let outcome = self.device.process(index, &mut self.queues, &self.memory);
        self.settle(outcome) && before != self.queues[index].next_avail()
    }

    /// Serves those queues that are looked after and have something.
    pub(super) fn poll(&mut self) -> bool {
        let mut worked = false;
        for index in 0..self.queues.len() {
            if self.active() && self.busy_queues & 1 << index != 0 && self.has_buffers(index) {
                worked |= self.serve(index);
            }
        }
        worked
    }

    fn has_buffers(&mut self, index: usize) -> bool {
        let queue = &self.queues[index];
        let available = queue.avail_idx(&self.memory, Ordering::Acquire);
        let next = queue.next_avail();
        self.check(index, available)
            .is_some_and(|available| available.0 != next)
    }

    /// Asks for kicks again. Queues that have got buffers in between are served, and still looked
    /// after.
    pub(super) fn rest(&mut self) -> bool {
        let mut worked = false;
        for index in 0..self.queues.len() {
            let bit = 1 << index;
            if self.busy_queues & bit == 0 {
                continue;
            }
            self.busy_queues &= !bit;
            if self.active() && self.queues[index].ready() && self.rearm(index) {
                if self.serve(index) {
                    worked = true;
                } else {
                    // The device leaves them for later, and the driver is to kick all the same.
                    self.busy_queues &= !bit;
                    self.rearm(index);
                }
            }
        }
        worked
    }

    /// What a look at a ring gave; if it could not be looked at, that is the driver's fault.
    fn check<T>(&mut self, index: usize, result: Result<T, virtio_queue::Error>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(source) => {
                self.settle(Err(DeviceError::Guest { index, source }));
                None
            }
        }
    }
}

impl Source for FairMutex<Transport> {
    fn on_ready(&self, token: u32, _readiness: Readiness) {
        let mut transport = self.lock();
        match token.checked_sub(KICK_TOKEN) {
            None => transport.on_device_ready(token),
            Some(queue) => {
                let index = usize::try_from(queue).expect("u32 fits");
                // A kick that was taken before, or whose queue is gone, is none.
                if transport.platform.kick(index, Kick::Take).is_err() {
                    return;
                }
                if transport.device.is_fast() {
                    count(&transport.counters.kicks);
                    transport.serve(index);
                } else {
                    transport.on_kick(index);
                }
            }
        }
    }

    fn busy(&self) -> bool {
        self.lock().busy_queues != 0
    }

    fn poll(&self) -> bool {
        // Whoever has it now is a processor, and soon done.
        self.try_lock()
            .is_some_and(|mut transport| transport.poll())
    }

    fn rest(&self) -> bool {
        self.lock().rest()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::{DECLINE, Driver, EVENT_IDX, USED, VERSION_1};

    #[test]
    fn a_queue_that_is_looked_after_needs_no_kicks_until_it_rests() {
        for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
            let mut driver = Driver::active(features);
            let event_idx = features & EVENT_IDX != 0;
            // Whether the driver would kick when it adds the buffer with this number.
            let asks = |driver: &Driver, number: u16| {
                let flags: u16 = driver.memory.read_obj(GuestAddress(USED)).unwrap();
                if event_idx {
                    driver.available_event() == number
                } else {
                    flags == 0
                }
            };
            assert!(asks(&driver, 0));
            driver.add_buffer();
            assert!(driver.transport.serve(0));
            assert!(!asks(&driver, 1));
            assert!(!driver.transport.poll());
            driver.add_buffer();
            assert!(driver.transport.poll());
            assert_eq!(driver.used(), 2);

            // One comes just before it rests.
            driver.add_buffer();
            assert!(driver.transport.rest());
            assert_eq!(driver.used(), 3);
            assert!(!asks(&driver, 3));
            assert!(!driver.transport.rest());
            assert!(asks(&driver, 3));
            assert!(!driver.transport.poll());
            assert_eq!(driver.transport.busy_queues, 0);
        }
    }

    #[test]
    fn buffers_that_a_device_leaves_alone_keep_nobody_busy() {
        let mut driver = Driver::active(VERSION_1 | EVENT_IDX);
        driver.order(DECLINE);
        driver.add_buffer();
        assert!(!driver.transport.serve(0));
        assert!(!driver.transport.poll());
        assert!(!driver.transport.rest());
        assert_eq!(driver.transport.busy_queues, 0);
    }

    #[test]
    fn a_malformed_queue_is_not_looked_after_any_more() {
        let mut driver = Driver::active(VERSION_1 | EVENT_IDX);
        driver.add_buffer();
        assert!(driver.transport.serve(0));
        driver.available = 100;
        driver.add_buffer();
        assert!(!driver.transport.poll());
        assert!(driver.needs_reset());
        assert!(!driver.transport.rest());
        assert_eq!(driver.transport.busy_queues, 0);
    }
}
