//! A disk on its way into a snapshot and out of it.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::{Block, SERIAL_BYTES_MAX, host};
use crate::spec::DiskLimits;
use crate::virtio::DeviceError;
use crate::virtio::state::{self, DeviceState, StateError};

/// What a snapshot keeps of a disk.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct BlockState {
    sectors: u64,
    read_only: bool,
    serial: [u8; SERIAL_BYTES_MAX],
    limits: DiskLimits,
}

impl Block {
    /// Waits until no request is in flight; whether buffers were used. Requests that wait for a
    /// limit are not made to: what they cost is owed by those to come.
    pub(super) fn finish_all(
        &mut self,
        queue: &mut Queue,
        mem: &GuestMemoryMmap,
    ) -> Result<bool, DeviceError> {
        let now = Instant::now();
        for direction in [&mut self.reads, &mut self.writes] {
            for operation in direction.parked.drain(..) {
                direction.limiter.charge(now, operation.charge());
                self.engine.start(operation);
            }
        }
        let mut any = self.settle(queue, mem)?;
        while self.engine.in_flight() > 0 {
            self.engine.wait().map_err(host("wait for io_uring"))?;
            any |= self.settle(queue, mem)?;
        }
        self.engine
            .write_back()
            .map_err(host("write the tables of an image"))?;
        Ok(any)
    }

    pub(super) fn save_state(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&BlockState {
            sectors: self.geometry.sectors,
            read_only: self.geometry.read_only,
            serial: self.serial,
            limits: self.shared.limits(),
        })
    }

    /// What the driver has been told, it will be told again.
    pub(super) fn restore_state(&mut self, own: &Value) -> Result<(), StateError> {
        let saved: BlockState = state::read(own)?;
        let geometry = &self.geometry;
        state::expect("number of sectors", &saved.sectors, &geometry.sectors)?;
        state::expect("read_only", &saved.read_only, &geometry.read_only)?;
        self.serial = saved.serial;
        self.handle().set_limits(saved.limits);
        Ok(())
    }
}
