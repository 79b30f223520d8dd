//! virtio-vsock (virtio 1.2, section 5.10): stream connections between the guest and unix sockets
//! or inherited descriptors of the host.
//!
//! The device only moves packets between queues and the [`Muxer`](muxer::Muxer), which has the
//! connections.

mod connection;
mod endpoint;
mod listener;
mod muxer;
mod packet;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;

use virtio_queue::{Error, Queue};
use vm_memory::GuestMemoryMmap;

use self::endpoint::Stream;
pub use self::listener::VsockHost;
use self::muxer::Muxer;
use self::packet::HEADER_BYTES;
use super::chain::{Chain, take_all};
use super::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};
use crate::spec::StreamDirection;

/// Device type, virtio 1.2 section 5.
const ID: u32 = 19;

const QUEUE_SIZE: u16 = 256;

/// Queue numbers, virtio 1.2 section 5.10.2.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

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
    /// Buffers for events, of which there are none yet.
    event_buffers: VecDeque<Chain>,
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
        })
    }

    /// Sends the guest what there is for it and room for; whether buffers were used.
    fn send(&mut self, queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        let mut any = false;
        while self.muxer.has_outgoing() {
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

    fn send_and_signal(
        &mut self,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let Some(queue) = queues.get_mut(RECEIVE) else {
            return Ok(Signal::NONE);
        };
        let sent = self.send(queue, mem)?;
        Ok(if sent {
            Signal::queue(RECEIVE)
        } else {
            Signal::NONE
        })
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
                take_all(index, queue, mem, events.len(), |chain| {
                    events.push_back(chain);
                })?;
            }
        }
        self.send_and_signal(queues, mem)
            .map(|sent| signal.and(sent))
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest {
            token: MUXER,
            fd: self.muxer.fd(),
            readable: true,
            writable: false,
        }]
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

    fn reset(&mut self) {
        self.muxer.reset();
        self.buffers.clear();
        self.event_buffers.clear();
    }
}

#[cfg(test)]
mod tests;
