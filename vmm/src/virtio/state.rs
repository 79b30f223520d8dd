//! What a device puts into a snapshot and takes out of one again.
//!
//! To take part, a device implements three methods of [`VirtioDevice`](super::VirtioDevice), which
//! are called while no processor runs:
//!
//! 1. [`quiesce`](super::VirtioDevice::quiesce) brings the host's work for the guest to an end. The
//!    default does nothing, which is right for a device that answers at once. A device whose chains
//!    come back in another order than they were taken in (a disk) finishes all of them here.
//! 2. [`save`](super::VirtioDevice::save) returns a [`DeviceState`] and changes nothing, since the
//!    machine may run on. Chains that the device holds (empty receive buffers, say) are not saved: it
//!    tells how many it [holds](DeviceState::holding) of each queue, which must be the last that it
//!    took, and they will be available to the restored device once more. All else goes into a
//!    `#[derive(Deserialize, Serialize)] #[serde(deny_unknown_fields)]` struct of its own, or nothing
//!    does. What a file or an option of the host decides (a disk's size) goes in as well, so that
//!    `restore` can refuse another.
//! 3. [`restore`](super::VirtioDevice::restore) takes what `save` returned, on a device that was just
//!    made. The state is anybody's input: everything in it is checked, nothing panics. Then
//!    [`activate`](super::VirtioDevice::activate) follows if a driver had the device, and once the
//!    machine runs, a kick of each queue. Interrupts are raised by the transport.
//!
//! Queues, features, status and interrupts are the transport's
//! ([`transport::TransportState`](super::transport::TransportState)).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Why a device cannot become what was saved.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("its state is not of a form that this program knows")]
    Form(#[from] serde_json::Error),
    #[error("its {what} is {found}; that must be {wanted}")]
    Mismatch {
        /// The part of the state.
        what: &'static str,
        found: String,
        wanted: String,
    },
    #[error("the host cannot {action}")]
    Host {
        /// What was attempted.
        action: &'static str,
        source: std::io::Error,
    },
}

/// Refuses a state whose `what` is not what it must be.
pub fn expect<T: PartialEq + ToString>(
    what: &'static str,
    found: &T,
    wanted: &T,
) -> Result<(), StateError> {
    if found == wanted {
        return Ok(());
    }
    Err(StateError::Mismatch {
        what,
        found: found.to_string(),
        wanted: wanted.to_string(),
    })
}

/// A device as it was saved.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DeviceState {
    /// For each queue, how many of the chains that were taken last have not been given back. Queues
    /// beyond the end hold none.
    pub held: Vec<u16>,
    /// The device's own.
    pub own: Value,
}

impl DeviceState {
    /// Of a device that holds no chains and has nothing to remember.
    pub fn empty() -> DeviceState {
        DeviceState::default()
    }

    /// Of a device that remembers `own` and holds no chains.
    ///
    /// # Errors
    ///
    /// If `own` cannot be written as JSON, as a map with keys that are not strings.
    pub fn new(own: &impl Serialize) -> Result<DeviceState, StateError> {
        Ok(DeviceState {
            held: Vec::new(),
            own: serde_json::to_value(own)?,
        })
    }

    /// The same, holding as many of the chains that were taken last from each queue.
    pub fn holding(self, held: impl IntoIterator<Item = usize>) -> DeviceState {
        let held = held.into_iter();
        DeviceState {
            // Nobody holds more than a queue has, which is at most 32768.
            held: held
                .map(|count| u16::try_from(count).unwrap_or(u16::MAX))
                .collect(),
            ..self
        }
    }
}

/// What a device had written with [`DeviceState::new`].
pub fn read<T: DeserializeOwned>(own: &Value) -> Result<T, StateError> {
    Ok(T::deserialize(own)?)
}

/// Checks that a device without a state of its own is given none.
pub fn read_nothing(own: &Value) -> Result<(), StateError> {
    expect("state", own, &Value::Null)
}

/// A queue as it was saved (virtio 1.2, section 2.6).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    pub ready: bool,
    /// In descriptors, as the driver wrote it.
    pub size: u32,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// The next entry of the available ring that the device looks at.
    pub next_available: u16,
    /// The next entry of the used ring that the device writes.
    pub next_used: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Own {
        level: u8,
    }

    #[test]
    fn what_a_device_wrote_is_read_back_and_nothing_else_is() {
        let state = DeviceState::new(&Own { level: 3 }).unwrap().holding([7, 0]);
        assert_eq!(state.held, [7, 0]);
        assert_eq!(read::<Own>(&state.own).unwrap(), Own { level: 3 });
        for wrong in [
            r#"{"level":300}"#,
            r#"{"level":3,"x":1}"#,
            "{}",
            "null",
            "7",
        ] {
            let wrong: Value = serde_json::from_str(wrong).unwrap();
            assert!(read::<Own>(&wrong).is_err(), "{wrong}");
        }
        read_nothing(&DeviceState::empty().own).unwrap();
        read_nothing(&state.own).unwrap_err();
    }
}
