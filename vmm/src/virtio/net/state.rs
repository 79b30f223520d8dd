//! A network device in a snapshot.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Net;
use crate::virtio::state::{self, DeviceState, StateError};

/// What a snapshot keeps of a network device.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetState {
    pub(super) mac: [u8; 6],
    #[serde(default)]
    pub(super) mtu: Option<u16>,
}

impl NetState {
    /// Checks a saved state. A driver reads its address and its MTU once, so that they cannot be
    /// others now.
    pub(super) fn check(own: &Value, mac: [u8; 6], mtu: Option<u16>) -> Result<(), StateError> {
        let found: NetState = state::read(own)?;
        let text = |mac| format!("{mac:02x?}");
        state::expect("address", &text(found.mac), &text(mac))?;
        state::expect("MTU", &found.mtu.unwrap_or(0), &mtu.unwrap_or(0))
    }
}

impl Net {
    /// A frame that waits for buffers, or for the tap, is the network's to lose.
    pub(super) fn save_state(&self) -> Result<DeviceState, StateError> {
        let state = DeviceState::new(&NetState {
            mac: self.mac,
            mtu: self.mtu,
        })?;
        Ok(state.holding([self.receiving.buffers.len(), self.sending.len()]))
    }

    pub(super) fn restore_state(&mut self, own: &Value) -> Result<(), StateError> {
        NetState::check(own, self.mac, self.mtu)
    }
}
