//! virtio-mem (virtio 1.2, section 5.15): memory that the guest plugs in and out, block by block, as
//! the host asks it to.
//!
//! Which blocks are plugged in is the device's to know; the memory of the others is given back to the
//! host. A guest that touches a block that it has not plugged in finds zeroes, and the host pays for
//! it: a guest that does not keep to the rules has as much memory as could be plugged in, and no more.

mod blocks;
mod handle;

use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use self::blocks::Blocks;
pub use self::handle::MemHandle;
use self::handle::Shared;
use super::chain::{Chain, answer_all};
use super::discard::discard_range;
use super::state::{self, DeviceState, StateError};
use super::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};
use crate::memory::HUGE_PAGE_BYTES;

/// Device type, virtio 1.2 section 5.
const ID: u32 = 24;

/// The driver promises not to touch what it has not plugged in.
const UNPLUGGED_INACCESSIBLE: u32 = 1;

/// Linux has one request at a time.
const QUEUE_SIZE: u16 = 16;

/// What is plugged in or out at once: a huge page, so that none is ever split.
pub const BLOCK_BYTES: u64 = HUGE_PAGE_BYTES;

/// Type, padding, address, number of blocks, padding.
const REQUEST_BYTES: usize = 24;
/// Type, padding, state.
const RESPONSE_BYTES: usize = 10;

/// Types of requests (section 5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What comes of a request (section 5.15.6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Response {
    Done,
    /// With which of [`PLUGGED`] and the like the blocks are.
    State(u16),
    /// More than the host has asked for.
    Refused,
    /// Not a request, or not one that could be.
    Error,
}

/// States of blocks.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// A request as it was read.
#[derive(Clone, Copy, Debug)]
struct Request {
    kind: u16,
    address: u64,
    blocks: u16,
}

/// The memory device.
#[derive(Debug)]
pub struct Mem {
    range: Range<u64>,
    blocks: Blocks,
    /// What the driver was told last, in bytes.
    requested: u64,
    shared: Arc<Shared>,
}

/// What a snapshot keeps of a memory device.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct MemState {
    start: u64,
    bytes: u64,
    requested_bytes: u64,
    /// A bit for each block, the first in the lowest bit of the first digit.
    plugged: String,
}

impl Mem {
    /// Memory at `range` of guest addresses, whole blocks, of which nothing is plugged in.
    pub fn new(range: Range<u64>) -> Result<Mem, Errno> {
        let bytes = range.end - range.start;
        Ok(Mem {
            blocks: Blocks::new(bytes / BLOCK_BYTES),
            requested: 0,
            shared: Arc::new(Shared::new(bytes)?),
            range,
        })
    }

    /// For asking the guest to plug memory in or out, from then on.
    pub fn handle(&self) -> MemHandle {
        MemHandle::new(Arc::clone(&self.shared))
    }

    fn answer(&mut self, request: Request, mem: &GuestMemoryMmap) -> Result<Response, DeviceError> {
        if request.kind == UNPLUG_ALL {
            let bytes = self.range.end - self.range.start;
            self.drop_memory(self.range.start, bytes, mem)?;
            self.blocks.clear();
            self.tell();
            return Ok(Response::Done);
        }
        let Some(blocks) = self.named(request) else {
            return Ok(Response::Error);
        };
        let plugged = self.blocks.plugged_in(&blocks);
        let count = blocks.end - blocks.start;
        match request.kind {
            PLUG if plugged > 0 => return Ok(Response::Error),
            PLUG if (self.blocks.plugged() + count) * BLOCK_BYTES > self.requested => {
                return Ok(Response::Refused);
            }
            PLUG => self.blocks.set(blocks, true),
            UNPLUG if plugged < count => return Ok(Response::Error),
            UNPLUG => {
                self.drop_memory(request.address, count * BLOCK_BYTES, mem)?;
                self.blocks.set(blocks, false);
            }
            STATE if plugged == count => return Ok(Response::State(PLUGGED)),
            STATE if plugged == 0 => return Ok(Response::State(UNPLUGGED)),
            STATE => return Ok(Response::State(MIXED)),
            _ => return Ok(Response::Error),
        }
        self.tell();
        Ok(Response::Done)
    }

    /// The blocks that a request is about, if they are blocks of this device.
    fn named(&self, request: Request) -> Option<Range<u64>> {
        let offset = request.address.checked_sub(self.range.start)?;
        let first = offset / BLOCK_BYTES;
        let end = first + u64::from(request.blocks);
        let known = end <= self.blocks.count() && request.blocks > 0;
        (known && offset % BLOCK_BYTES == 0).then_some(first..end)
    }

    fn drop_memory(
        &self,
        start: u64,
        bytes: u64,
        mem: &GuestMemoryMmap,
    ) -> Result<(), DeviceError> {
        match discard_range(mem, GuestAddress(start), bytes) {
            Ok(_) => Ok(()),
            Err(source) => Err(DeviceError::Host {
                action: "give memory back",
                source,
            }),
        }
    }

    fn tell(&self) {
        self.shared.set_plugged(self.blocks.plugged() * BLOCK_BYTES);
    }
}

impl Request {
    fn read(chain: &Chain) -> Option<Request> {
        let mut bytes = [0; REQUEST_BYTES];
        if chain.read(0, &mut bytes) < bytes.len() {
            return None;
        }
        let [a, b, _, _, _, _, _, _, address @ .., c, d, _, _, _, _, _, _] = bytes;
        Some(Request {
            kind: u16::from_le_bytes([a, b]),
            address: u64::from_le_bytes(address),
            blocks: u16::from_le_bytes([c, d]),
        })
    }
}

impl Response {
    fn bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Response::Done => (0, 0),
            Response::State(state) => (0, state),
            Response::Refused => (1, 0),
            Response::Error => (3, 0),
        };
        let [kind, state] = [kind, state].map(u16::to_le_bytes);
        let mut bytes = [0; RESPONSE_BYTES];
        bytes[..2].copy_from_slice(&kind);
        bytes[8..].copy_from_slice(&state);
        bytes
    }
}

impl VirtioDevice for Mem {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: ID,
            features: 1 << UNPLUGGED_INACCESSIBLE,
            queue_sizes: vec![QUEUE_SIZE],
        }
    }

    /// `struct virtio_mem_config`: all of the memory is usable at any time, on no node in particular.
    fn config(&self) -> Vec<u8> {
        let bytes = self.range.end - self.range.start;
        let plugged = self.blocks.plugged() * BLOCK_BYTES;
        [
            BLOCK_BYTES,
            0,
            self.range.start,
            bytes,
            bytes,
            plugged,
            self.requested,
        ]
        .map(u64::to_le_bytes)
        .concat()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        self.requested = self.shared.requested();
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        answer_all(index, queues, mem, |chain| {
            let response = match Request::read(chain) {
                Some(request) => self.answer(request, mem)?,
                None => Response::Error,
            };
            Ok(chain.write(0, &response.bytes()))
        })
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::readable(0, self.shared.fd())]
    }

    /// Somebody has asked for another size.
    fn on_ready(
        &mut self,
        _token: u32,
        _queues: &mut [Queue],
        _mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let config = self.requested != self.shared.take_requested();
        self.requested = self.shared.requested();
        Ok(Signal {
            config,
            ..Signal::NONE
        })
    }

    /// What is plugged in stays so: a driver that starts anew asks for it to be taken out.
    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&MemState {
            start: self.range.start,
            bytes: self.range.end - self.range.start,
            requested_bytes: self.shared.requested(),
            plugged: self.blocks.to_text(),
        })
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        let saved: MemState = state::read(own)?;
        let bytes = self.range.end - self.range.start;
        state::expect("address", &saved.start, &self.range.start)?;
        state::expect("size", &saved.bytes, &bytes)?;
        self.blocks = Blocks::from_text(&saved.plugged, bytes / BLOCK_BYTES).ok_or_else(|| {
            StateError::Mismatch {
                what: "list of plugged blocks",
                found: saved.plugged.chars().take(16).collect(),
                wanted: "a hexadecimal digit for each four blocks".to_owned(),
            }
        })?;
        self.shared.set_requested(saved.requested_bytes.min(bytes));
        self.tell();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
