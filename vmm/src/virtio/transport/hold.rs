//! A transport that stands still, without anybody waiting for it: while a snapshot of a paused
//! machine is written, its guest's memory stays as it is.

use std::io;

use virtio_queue::QueueT;

use super::{Kick, Transport};
use crate::virtio::Signal;

impl Transport {
    /// Ends what the host does for the guest, and touches the guest's memory no more until
    /// [`release`](Self::release). No processor runs as long as that is.
    ///
    /// What comes in between stays where it is: frames in the tap, clients at the socket.
    pub fn hold(&mut self) {
        self.quiesce();
        for index in 0..self.queues.len() {
            let looked_after = self.busy_queues & 1 << index != 0;
            if looked_after && self.active() && self.queues[index].ready() {
                // What is there is seen to after the release.
                self.rearm(index);
            }
        }
        self.busy_queues = 0;
        self.held = true;
        // From here on nothing is waited for.
        self.settle(Ok(Signal::NONE));
    }

    /// Goes on where [`hold`](Self::hold) has stopped.
    pub fn release(&mut self) {
        self.held = false;
        if !self.settle(Ok(Signal::NONE)) {
            return; // There is no driver.
        }
        for index in 0..self.queues.len() {
            // A kick that came in between was taken, and nothing done.
            if let Err(error) = self.poke(index) {
                return self.host_failure("make a kick", error);
            }
        }
    }

    /// Has a queue served soon, as if it had been kicked.
    pub(super) fn poke(&mut self, index: usize) -> io::Result<()> {
        if self.is_served_elsewhere {
            self.process(index);
            return Ok(());
        }
        self.platform.kick(index, Kick::Make)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::testing::{Driver, EVENT_IDX, VERSION_1};
    use crate::virtio::registers::STATUS;

    #[test]
    fn a_device_that_is_held_does_nothing_and_goes_on_when_it_is_released() {
        for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
            let mut driver = Driver::active(features);
            driver.add_buffer();
            assert!(driver.transport.serve(0), "it is looked after");
            driver.transport.hold();
            assert!(driver.platform.0.lock().unwrap().watched.is_empty());

            driver.add_buffer();
            driver.kick();
            driver.transport.on_device_ready(7);
            assert!(!driver.transport.poll() && !driver.transport.rest());
            assert_eq!(driver.used(), 1);

            driver.transport.release();
            let world = driver.platform.0.lock().unwrap();
            assert_eq!((world.watched.len(), world.postponed), (1, 2));
            drop(world);
            driver.kick();
            assert_eq!(driver.used(), 2);
        }
    }

    #[test]
    fn a_device_without_a_driver_can_be_held_and_starts_afterwards() {
        let mut driver = Driver::new();
        driver.transport.hold();
        driver.transport.release();
        assert_eq!(driver.platform.0.lock().unwrap().postponed, 0);
        assert_eq!(driver.read(STATUS), 0);
    }

    #[test]
    fn what_was_under_way_in_a_device_that_needs_a_reset_ends_before_it_is_held() {
        let mut driver = Driver::active(VERSION_1);
        driver.transport.need_reset();
        assert!(driver.device_active.load(Ordering::Relaxed));
        driver.transport.hold();
        assert!(!driver.device_active.load(Ordering::Relaxed));
        driver.transport.release();
        assert!(driver.needs_reset());
        driver.write(STATUS, 0);
        assert_eq!(driver.read(STATUS), 0);
    }
}
