//! virtio-vsock (virtio 1.2, section 5.10): stream connections between the guest and unix sockets
//! or inherited descriptors of the host.
//!
//! The device only moves packets between queues and the [`Muxer`](muxer::Muxer), which has the
//! connections.

mod connection;
mod counters;
mod endpoint;
mod listener;
mod muxer;
mod packet;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_queue::{Error, Queue};
use vm_memory::GuestMemoryMmap;

pub use self::counters::VsockCounters;
use self::endpoint::Stream;
pub use self::listener::VsockHost;
use self::muxer::Muxer;
use self::packet::HEADER_BYTES;
use super::chain::{Chain, take_all};
use super::state::{self, DeviceState, StateError};
use super::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};
use crate::devices::guest_status::Reports;
use crate::spec::StreamDirection;

/// Device type, virtio 1.2 section 5.
const ID: u32 = 19;

const QUEUE_SIZE: u16 = 256;

/// Queue numbers, virtio 1.2 section 5.10.2.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

/// `struct virtio_vsock_event` of VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, virtio 1.2 section 5.10.6.7:
/// all connections are gone, and the context id may be another.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// The one token of [`Interest`].
const MUXER: u32 = 0;

/// A guest's connections to `port` of the host end at `file`, one at a time.
#[derive(Debug)]
pub struct HostStream {
    pub port: u32,
    pub direction: StreamDirection,
    /// A socket, pipe, terminal or file, open for the direction.
    pub file: File,
}

/// Why a vsock device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error("The stream of port {port} cannot be used")]
    Stream { port: u32, source: io::Error },
    #[error("Port {port} has two streams")]
    Ambiguous { port: u32 },
    #[error("The vsock's descriptors cannot be polled")]
    Poll(#[source] io::Error),
}

/// The vsock device.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    muxer: Muxer,
    /// Empty buffers of the driver.
    buffers: VecDeque<Chain>,
    /// Buffers for events.
    event_buffers: VecDeque<Chain>,
    reset: Reset,
}

/// What a guest that was restored knows of its connections, which are gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Reset {
    /// All that there is to know.
    Known,
    /// It is to be told.
    Owed,
    /// It has been told, and what it is sent now it might take for the end of a new connection. It
    /// has understood when it gives the event's buffer back.
    Told,
}

/// What a snapshot keeps of a vsock device.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct VsockState {
    next_port: u32,
}

impl Vsock {
    /// A device for a guest with context id `cid`.
    pub fn new(cid: u32, host: VsockHost, streams: Vec<HostStream>) -> Result<Vsock, VsockError> {
        let mut by_port = HashMap::new();
        for HostStream {
            port,
            direction,
            file,
        } in streams
        {
            let stream = Stream::new(file, direction)
                .map_err(|source| VsockError::Stream { port, source })?;
            if by_port.insert(port, Some(stream)).is_some() {
                return Err(VsockError::Ambiguous { port });
            }
        }
        Ok(Vsock {
            cid,
            muxer: Muxer::new(cid.into(), host, by_port).map_err(VsockError::Poll)?,
            buffers: VecDeque::new(),
            event_buffers: VecDeque::new(),
            reset: Reset::Known,
        })
    }

    /// To be read from then on.
    pub fn counters(&self) -> Arc<VsockCounters> {
        self.muxer.counters.clone()
    }

    /// Takes the guest's reports, too, at the port for them.
    #[must_use]
    pub fn with_reports(mut self, reports: Reports) -> Vsock {
        self.muxer.reports = Some(reports);
        self
    }

    /// Sends the guest what there is for it and room for; whether buffers were used.
    fn send(&mut self, queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        let mut any = false;
        while self.reset != Reset::Told && self.muxer.has_outgoing() {
            let Some(chain) = self.buffers.front() else {
                break;
            };
            let Some(bytes) = self.muxer.send(chain) else {
                break;
            };
            chain.give_back(RECEIVE, queue, mem, bytes)?;
            self.buffers.pop_front();
            any = true;
        }
        Ok(any)
    }

    /// The driver has made a buffer for events available. Returns whether it is used.
    fn tell_of_reset(
        &mut self,
        queue: &mut Queue,
        mem: &GuestMemoryMmap,
    ) -> Result<bool, DeviceError> {
        match self.reset {
            Reset::Known => Ok(false),
            Reset::Told => {
                self.reset = Reset::Known;
                Ok(false)
            }
            Reset::Owed => {
                let Some(chain) = self.event_buffers.pop_front() else {
                    return Ok(false);
                };
                let written = chain.write(0, &TRANSPORT_RESET);
                chain.give_back(EVENT, queue, mem, written)?;
                self.reset = Reset::Told;
                Ok(true)
            }
        }
    }

    fn send_and_signal(
        &mut self,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let Some(queue) = queues.get_mut(RECEIVE) else {
            return Ok(Signal::NONE);
        };
        let sent = self.send(queue, mem)?;
        Ok(Signal::queue_if(RECEIVE, sent))
    }
}

impl VirtioDevice for Vsock {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: ID,
            // Without a feature bit there are stream sockets, which is all that there are.
            features: 0,
            queue_sizes: vec![QUEUE_SIZE; 3],
        }
    }

    /// `struct virtio_vsock_config`: the guest's context id.
    fn config(&self) -> Vec<u8> {
        u64::from(self.cid).to_le_bytes().to_vec()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let Some(queue) = queues.get_mut(index) else {
            return Ok(Signal::NONE);
        };
        let mut signal = Signal::NONE;
        match index {
            RECEIVE => {
                let buffers = &mut self.buffers;
                let mut too_small = false;
                take_all(index, queue, mem, buffers.len(), |chain| {
                    too_small |= chain.writable_bytes() <= HEADER_BYTES;
                    buffers.push_back(chain);
                })?;
                if too_small {
                    let source = Error::InvalidChain;
                    return Err(DeviceError::Guest { index, source });
                }
            }
            TRANSMIT => {
                let mut packets = Vec::new();
                if take_all(index, queue, mem, 0, |chain| packets.push(chain))? > 0 {
                    signal = Signal::queue(TRANSMIT);
                }
                for packet in packets {
                    self.muxer.receive(&packet);
                    packet.give_back(index, queue, mem, 0)?;
                }
            }
            _ => {
                let events = &mut self.event_buffers;
                let taken = take_all(index, queue, mem, events.len(), |chain| {
                    events.push_back(chain);
                })?;
                if taken > 0 && self.tell_of_reset(queue, mem)? {
                    signal = Signal::queue(index);
                }
            }
        }
        self.send_and_signal(queues, mem)
            .map(|sent| signal.and(sent))
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest::readable(MUXER, self.muxer.fd())]
    }

    fn on_ready(
        &mut self,
        _token: u32,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        self.muxer.poll().map_err(|source| DeviceError::Host {
            action: "poll the vsock's connections",
            source,
        })?;
        self.send_and_signal(queues, mem)
    }

    /// Clients of the host are not kept waiting for a guest that does not listen.
    fn interests_without_driver(&self) -> Vec<Interest> {
        self.interests()
    }

    fn on_ready_without_driver(&mut self) -> Result<(), DeviceError> {
        self.muxer.turn_away().map_err(|source| DeviceError::Host {
            action: "poll the vsock's socket",
            source,
        })
    }

    fn reset(&mut self) {
        self.muxer.reset();
        self.buffers.clear();
        self.event_buffers.clear();
        self.reset = Reset::Known;
    }

    /// Connections stay behind: their other ends are sockets of this process.
    fn save(&self) -> Result<DeviceState, StateError> {
        let next_port = self.muxer.next_port();
        let state = DeviceState::new(&VsockState { next_port })?;
        Ok(state.holding([self.buffers.len(), 0, self.event_buffers.len()]))
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        let VsockState { next_port } = state::read(own)?;
        if !self.muxer.set_next_port(next_port) {
            return Err(StateError::Mismatch {
                what: "next port",
                found: next_port.to_string(),
                wanted: "one for clients".to_owned(),
            });
        }
        self.reset = Reset::Owed;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
