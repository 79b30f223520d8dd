//! A network device in a snapshot.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Net;
use crate::spec::NetLimits;
use crate::virtio::state::{self, DeviceState, StateError};

/// What a snapshot keeps of a network device.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetState {
    pub(super) mac: [u8; 6],
    #[serde(default)]
    pub(super) mtu: Option<u16>,
    /// Since format 4.
    #[serde(default)]
    pub(super) limits: NetLimits,
}

impl NetState {
    /// A saved state. A driver reads its address and its MTU once, so that it goes on with those that it
    /// has. The MTU cannot be another now; of another address it is to be told, and finds it when it
    /// looks again.
    pub(super) fn read(own: &Value, mtu: Option<u16>) -> Result<NetState, StateError> {
        let found: NetState = state::read(own)?;
        state::expect("MTU", &found.mtu.unwrap_or(0), &mtu.unwrap_or(0))?;
        Ok(found)
    }
}

impl Net {
    /// A frame that waits for buffers, or for the tap, is the network's to lose.
    pub(super) fn save_state(&self) -> Result<DeviceState, StateError> {
        let state = DeviceState::new(&NetState {
            mac: self.mac,
            mtu: self.mtu,
            limits: self.throttle.shared().get(),
        })?;
        Ok(state.holding([self.receiving.buffers.len(), self.sending.frames.len()]))
    }

    pub(super) fn restore_state(&mut self, own: &Value) -> Result<(), StateError> {
        let saved = NetState::read(own, self.mtu)?;
        self.moved = saved.mac != self.mac;
        self.handle().set_limits(saved.limits);
        Ok(())
    }
}
