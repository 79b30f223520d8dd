//! A transport in a snapshot: what a driver has negotiated, and how far its queues are.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_queue::{Queue, QueueT};

use super::Transport;
use super::setup::{QueueSetup, configure};
use crate::snapshot::bounded;
use crate::virtio::registers::{self as register, status};
use crate::virtio::state::{QueueState, StateError, expect};
use crate::virtio::{DeviceError, Signal};

/// A transport and its device as they were saved.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Device type, virtio 1.2 section 5.
    pub device_id: u32,
    pub status: u32,
    pub driver_features: u64,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    pub queue_select: u32,
    pub interrupt_status: u32,
    pub config_generation: u32,
    pub queues: Vec<QueueState>,
    /// The device's own.
    #[serde(deserialize_with = "bounded::part")]
    pub device: Value,
}

/// What a driver's progress may be (section 3.1.1).
const STAGES: [u32; 5] = [
    0,
    status::HAS_ACKNOWLEDGE,
    status::HAS_DRIVER,
    status::HAS_FEATURES,
    status::HAS_FEATURES | status::DRIVER_OK,
];

impl Transport {
    /// Ends what the host does for the guest, and tells the driver what has come of it. A driver that
    /// has to reset its device is told nothing more; what was under way for it ends all the same. No
    /// processor runs.
    pub fn quiesce(&mut self) {
        if self.active() {
            let outcome = self.device.quiesce(&mut self.queues, &self.memory);
            self.settle(outcome);
        }
        // Also if that is what has shown that the driver broke the rules.
        if self.has(status::DRIVER_OK) && self.has(status::NEEDS_RESET) {
            self.device.reset();
        }
    }

    /// What [`restore`](Self::restore) takes. Changes nothing. To be called after
    /// [`quiesce`](Self::quiesce).
    ///
    /// # Errors
    ///
    /// If the device has something to remember that cannot be written.
    pub fn save(&self) -> Result<TransportState, StateError> {
        let device = self.device.save()?;
        let held = device.held.into_iter().chain(std::iter::repeat(0));
        let queues = self.queues.iter().zip(&self.setups).zip(held);
        Ok(TransportState {
            device_id: self.info.id,
            status: self.status,
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: queues
                .map(|((queue, setup), held)| save_queue(queue, *setup, held))
                .collect(),
            device: device.own,
        })
    }

    /// A transport that no driver has spoken to becomes the one that was saved. A driver that is
    /// there is interrupted and all its queues are kicked, since what was under way in the host has
    /// been lost.
    ///
    /// # Errors
    ///
    /// If the state is not one of this device, or impossible. The transport is of no use then.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), StateError> {
        expect("device type", &state.device_id, &self.info.id)?;
        expect("number of queues", &state.queues.len(), &self.queues.len())?;
        let stage = state.status & !(status::NEEDS_RESET | status::FAILED);
        if !STAGES.contains(&stage) {
            return Err(impossible("status", state.status));
        }
        self.driver_features = state.driver_features;
        if stage & status::FEATURES_OK != 0 && !self.features_acceptable() {
            return Err(impossible("set of features", state.driver_features));
        }
        for (index, saved) in state.queues.iter().enumerate() {
            if saved.ready && stage & status::FEATURES_OK == 0 {
                return Err(impossible("early queue", saved.size));
            }
            self.restore_queue(index, saved)?;
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.interrupt_status =
            state.interrupt_status & (register::INTERRUPT_USED | register::INTERRUPT_CONFIG);
        self.config_generation = state.config_generation;
        self.device.restore(&state.device)?;
        if self.active() {
            self.go_on()?;
        }
        Ok(())
    }

    fn restore_queue(&mut self, index: usize, saved: &QueueState) -> Result<(), StateError> {
        let setup = QueueSetup {
            size: saved.size,
            descriptors: saved.descriptors,
            available: saved.available,
            used: saved.used,
        };
        self.setups[index] = setup;
        let queue = &mut self.queues[index];
        if saved.ready && !configure(queue, setup, &self.memory) {
            return Err(impossible("queue", saved.descriptors));
        }
        queue.set_next_avail(saved.next_available);
        queue.set_next_used(saved.next_used);
        Ok(())
    }

    /// What follows DRIVER_OK, where a driver is in the middle of its work.
    fn go_on(&mut self) -> Result<(), StateError> {
        self.use_features();
        let host = |action| move |source| StateError::Host { action, source };
        self.watch_kicks().map_err(host("watch for kicks"))?;
        let outcome = self.device.activate(self.driver_features);
        if let Err(DeviceError::Host { action, source }) = outcome {
            return Err(StateError::Host { action, source });
        }
        self.settle(outcome.map(|()| Signal::NONE));
        for index in 0..self.queues.len() {
            self.poke(index).map_err(host("make a kick"))?;
        }
        let queues = (0..self.queues.len()).map(Signal::queue);
        self.interrupt(queues.fold(Signal::NONE, Signal::and));
        Ok(())
    }
}

fn save_queue(queue: &Queue, setup: QueueSetup, held: u16) -> QueueState {
    QueueState {
        ready: queue.ready(),
        size: setup.size,
        descriptors: setup.descriptors,
        available: setup.available,
        used: setup.used,
        next_available: queue.next_avail().wrapping_sub(held),
        next_used: queue.next_used(),
    }
}

fn impossible(what: &'static str, found: impl Into<u64>) -> StateError {
    StateError::Mismatch {
        what,
        found: format!("{:#x}", found.into()),
        wanted: "one that a driver can bring about".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::transport::testing::{
        DESCRIPTORS, Driver, EVENT_IDX, QUEUE_SIZE, VERSION_1,
    };

    /// The same guest, with another device that became the one that was saved.
    fn restored(driver: &Driver, state: &TransportState) -> Result<Driver, StateError> {
        let mut other = Driver::over(driver.memory.clone());
        other.available = driver.available;
        other.transport.restore(state)?;
        Ok(other)
    }

    #[test]
    fn a_driver_goes_on_with_a_restored_device() {
        for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
            let mut driver = Driver::active(features);
            driver.add_buffer();
            driver.kick();
            driver.transport.quiesce();
            let state = driver.transport.save().unwrap();
            let text = serde_json::to_string(&state).unwrap();
            let state: TransportState = serde_json::from_str(&text).unwrap();

            let mut other = restored(&driver, &state).unwrap();
            assert_eq!(other.transport.save().unwrap(), state);
            // What may have been lost is made up for: a kick of each queue, and an interrupt.
            assert_eq!(other.platform.0.lock().unwrap().postponed, 2);
            assert_eq!(other.interrupts(), 1);
            assert_eq!(other.read(register::STATUS), 15);
            other.add_buffer();
            other.kick();
            assert_eq!(other.used(), 2);
        }
    }

    #[test]
    fn a_driver_in_the_middle_of_its_start_goes_on_with_it() {
        let mut driver = Driver::new();
        driver.negotiate(VERSION_1);
        let state = driver.transport.save().unwrap();
        let mut other = restored(&driver, &state).unwrap();
        other.set_up_queue(QUEUE_SIZE.into(), DESCRIPTORS);
        other.write(register::STATUS, 15);
        other.add_buffer();
        other.kick();
        assert_eq!((other.used(), other.interrupts()), (1, 1));
    }

    #[test]
    fn a_device_that_needs_a_reset_still_does_when_it_is_restored() {
        let mut driver = Driver::active(VERSION_1);
        driver.transport.need_reset();
        let state = driver.transport.save().unwrap();
        let mut other = restored(&driver, &state).unwrap();
        assert!(other.needs_reset());
        assert_eq!(other.interrupts(), 0);
        other.write(register::STATUS, 0);
        assert_eq!(other.read(register::STATUS), 0);
    }

    #[test]
    fn a_state_that_no_driver_can_bring_about_is_refused() {
        type Change = fn(&mut TransportState);
        let changes: [(&str, Change); 9] = [
            ("device type", |state| state.device_id = 1),
            ("number of queues", |state| state.queues.truncate(1)),
            ("status", |state| state.status = 5),
            ("status", |state| state.status = 0x115),
            ("set of features", |state| state.driver_features = 0),
            ("set of features", |state| {
                state.driver_features = VERSION_1 | 1 << 63;
            }),
            ("early queue", |state| state.status = 3),
            ("queue", |state| state.queues[0].used = 1 << 40),
            ("not of a form", |state| state.device = Value::Null),
        ];
        let driver = Driver::active(VERSION_1);
        let state = driver.transport.save().unwrap();
        for (want, change) in changes {
            let mut wrong = state.clone();
            change(&mut wrong);
            let Err(error) = restored(&driver, &wrong) else {
                panic!("accepted in spite of its {want}");
            };
            assert!(error.to_string().contains(want), "{want}: {error}");
        }
    }
}
