//! A network device in a snapshot.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Net;
use crate::virtio::state::{self, DeviceState, StateError};

/// What a snapshot keeps of a network device.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct NetState {
    mac: [u8; 6],
    #[serde(default)]
    mtu: Option<u16>,
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

    /// A driver reads its address and its MTU once, so that they cannot be others now.
    pub(super) fn restore_state(&mut self, own: &Value) -> Result<(), StateError> {
        let NetState { mac, mtu } = state::read(own)?;
        let text = |mac| format!("{mac:02x?}");
        state::expect("address", &text(mac), &text(self.mac))?;
        state::expect("MTU", &mtu.unwrap_or(0), &self.mtu.unwrap_or(0))
    }
}
