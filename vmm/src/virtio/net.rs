//! virtio-net (virtio 1.2, section 5.1) on a tap: one pair of queues, checksum and segmentation
//! offloads, merged receive buffers. Frames move between the tap and guest memory without a copy.

mod batch;
mod handle;
mod offer;
mod sending;
mod state;
mod throttle;
pub mod vhost;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use nix::errno::Errno;
use serde_json::Value;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use self::handle::{Counters, count};
pub use self::handle::{NetHandle, NetStats};
use self::offer::{config_space, features, offloads, set_offloads};
use self::sending::Sending;
use self::throttle::{Lane, Throttle};
use super::chain::{Chain, IoList, give_back_together, take_all};
use super::state::{DeviceState, StateError};
use super::tap::{HEADER_BYTES, Tap};
use super::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};
use crate::spec::NetLimits;

/// Device type, virtio 1.2 section 5.
const ID: u32 = 1;

const QUEUE_SIZE: u16 = 256;

/// Queue numbers, virtio 1.2 section 5.1.2.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The largest segmented packet with its Ethernet header, a VLAN tag and the virtio header.
const FRAME_BYTES_MAX: usize = 65535 + 14 + 4 + HEADER_BYTES;

/// The smallest frame that makes sense: a virtio and an Ethernet header.
const FRAME_BYTES_MIN: usize = HEADER_BYTES + 14;

/// What is read for at first when no frame can be larger than the usual MTU. Larger ones spill.
const SMALL_FRAME_BYTES: usize = HEADER_BYTES + 14 + 4 + 1500;

/// How many frames are received per call, so that a flood leaves the other devices their turn.
const FRAMES_PER_CALL_MAX: usize = 64;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// The token of the tap; the others are the throttle's.
const TAP: u32 = 0;

/// The network device.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    mac: [u8; 6],
    mtu: Option<u16>,
    receiving: Receiving,
    sending: Sending,
    /// The interface is gone: the guest has a cable that leads nowhere.
    lost: bool,
    throttle: Throttle,
    /// The driver has read another address, and is still to be told to look again.
    moved: bool,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Receiving {
    /// Empty buffers of the driver.
    buffers: VecDeque<Chain>,
    /// A frame that is larger than the buffers there were.
    pending: Option<Pending>,
    /// What of a frame did not fit the guest's buffers.
    spill: Vec<u8>,
    /// A frame may be spread over several buffers.
    mergeable: bool,
    /// How much room to read into, if there is as much.
    room_wanted: usize,
    /// There may be frames to read that no event will tell of.
    starved: bool,
}

/// A frame whose beginning fills the first buffers, while the rest is in the spill.
#[derive(Clone, Copy, Debug)]
struct Pending {
    bytes: usize,
    /// How many bytes are in buffers.
    placed: usize,
}

/// What one attempt to receive came to.
enum Received {
    Frame,
    /// No buffers, or none that suffice.
    NoRoom,
    /// Nothing to read, or not now.
    Nothing,
}

impl Net {
    /// A network device whose cable is `tap`, without limits.
    ///
    /// # Errors
    ///
    /// If the host has no timer or event to give.
    pub fn new(tap: Tap, mac: [u8; 6]) -> Result<Net, Errno> {
        Ok(Net {
            tap,
            mac,
            mtu: None,
            receiving: Receiving {
                buffers: VecDeque::new(),
                pending: None,
                spill: vec![0; FRAME_BYTES_MAX],
                mergeable: false,
                room_wanted: SMALL_FRAME_BYTES,
                starved: false,
            },
            sending: Sending::new(),
            lost: false,
            throttle: Throttle::new(NetLimits::default())?,
            moved: false,
            counters: Arc::default(),
        })
    }

    /// The same, whose driver is told the largest packet that it is to send, if there is one.
    pub fn with_mtu(self, mtu: Option<u16>) -> Net {
        Net { mtu, ..self }
    }

    /// For counters and limits, from then on.
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            counters: Arc::clone(&self.counters),
            limits: Arc::clone(self.throttle.shared()),
        }
    }

    /// Receives frames while there are some and there is room; whether buffers were used.
    fn receive(&mut self, queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        let mut any = false;
        for _ in 0..FRAMES_PER_CALL_MAX {
            match self.receive_one(queue, mem)? {
                Received::Frame => any = true,
                Received::Nothing => {
                    self.receiving.starved = false;
                    break;
                }
                Received::NoRoom => {
                    self.receiving.starved = true;
                    break;
                }
            }
        }
        Ok(any)
    }

    fn receive_one(
        &mut self,
        queue: &mut Queue,
        mem: &GuestMemoryMmap,
    ) -> Result<Received, DeviceError> {
        if let Some(pending) = self.receiving.pending {
            return self.place(pending, queue, mem);
        }
        if self.receiving.buffers.is_empty() || self.lost {
            return Ok(Received::NoRoom);
        }
        if !self.throttle.opens(Lane::Receive).map_err(timer)? {
            return Ok(Received::Nothing);
        }
        let (bytes, room) = match self.receiving.read(&self.tap) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Received::Nothing);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Received::Frame),
            // The interface was deleted: the guest runs on, and nothing may poll the tap again.
            Err(_) => {
                self.lost = true;
                return Ok(Received::Nothing);
            }
        };
        if bytes < FRAME_BYTES_MIN {
            return Ok(Received::Frame);
        }
        self.throttle.charge(Lane::Receive, bytes - HEADER_BYTES);
        let placed = bytes.min(room);
        self.place(Pending { bytes, placed }, queue, mem)
    }

    /// Gives the driver a frame, or keeps it until there is room, or drops it if there can be none.
    fn place(
        &mut self,
        frame: Pending,
        queue: &mut Queue,
        mem: &GuestMemoryMmap,
    ) -> Result<Received, DeviceError> {
        let receiving = &mut self.receiving;
        let Some(buffers) = receiving.buffers_for(frame.bytes) else {
            let all = receiving.buffers.len() >= usize::from(queue.size());
            if receiving.mergeable && !all {
                receiving.pending = Some(frame);
                return Ok(Received::NoRoom);
            }
            receiving.pending = None;
            count(&self.counters.received_dropped, 1);
            return Ok(Received::Frame);
        };
        receiving.pending = None;
        receiving.unspill(frame, buffers);
        let used = receiving.finish(frame.bytes, buffers);
        give_back_together(RECEIVE, queue, mem, &used)?;
        count(&self.counters.received_frames, 1);
        count(&self.counters.received_bytes, frame.bytes - HEADER_BYTES);
        Ok(Received::Frame)
    }

    /// Sends frames while the tap takes them and the limits let them pass; whether buffers were used.
    fn send(&mut self, queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        let mut any = false;
        self.sending.blocked = false;
        while !self.sending.blocked {
            let mut frames = 0;
            while let Some(frame) = self.sending.next_of_batch(frames)
                && self.throttle.opens(Lane::Send).map_err(timer)?
            {
                let bytes = frame.readable_bytes().saturating_sub(HEADER_BYTES);
                self.throttle.charge(Lane::Send, bytes);
                frames += 1;
            }
            if frames == 0 {
                break;
            }
            let tap = (!self.lost).then_some(self.tap.as_fd());
            let sent = self.sending.send(frames, tap);
            count(&self.counters.sent_frames, sent.frames);
            count(&self.counters.sent_bytes, sent.bytes);
            count(&self.counters.sent_dropped, sent.dropped);
            give_back_together(TRANSMIT, queue, mem, &sent.used)?;
            any |= !sent.used.is_empty();
        }
        Ok(any)
    }
}

impl Receiving {
    /// Reads a frame into the buffers and, past their end, the spill. Returns the frame's length
    /// and the buffers' room.
    fn read(&mut self, tap: &Tap) -> io::Result<(usize, usize)> {
        let mut list = IoList::new();
        for chain in &self.buffers {
            if !list.has_room_for(chain) {
                break;
            }
            list.push_writable(chain, 0, FRAME_BYTES_MAX);
            if !self.mergeable || list.bytes() >= self.room_wanted {
                break;
            }
        }
        let room = list.bytes();
        // A frame that is cut off could not be told from one that just fits.
        list.push_buffer(&mut self.spill);
        Ok((list.read_from(tap.as_fd())?, room))
    }

    /// How many buffers a frame takes, if there are as many.
    fn buffers_for(&self, bytes: usize) -> Option<usize> {
        let limit = if self.mergeable { usize::MAX } else { 1 };
        let mut room = 0;
        let needed = self.buffers.iter().take(limit).position(|chain| {
            room += chain.writable_bytes();
            room >= bytes
        });
        needed.map(|last| last + 1)
    }

    /// Copies what of the frame was spilt to where it belongs.
    fn unspill(&mut self, frame: Pending, buffers: usize) {
        let mut skip = frame.placed;
        let mut spilt = &self.spill[..frame.bytes - frame.placed];
        for chain in self.buffers.iter().take(buffers) {
            if spilt.is_empty() {
                break;
            }
            let offset = skip.min(chain.writable_bytes());
            skip -= offset;
            spilt = &spilt[chain.write(offset, spilt)..];
        }
    }

    /// Takes the buffers that a frame fills and completes its header; what goes to the used ring.
    fn finish(&mut self, bytes: usize, buffers: usize) -> Vec<(u16, u32)> {
        if let Some(first) = self.buffers.front() {
            // The tap leaves this field alone.
            let buffers = u16::try_from(buffers).unwrap_or(u16::MAX);
            first.write(NUM_BUFFERS, &buffers.to_le_bytes());
        }
        let mut left = bytes;
        self.buffers
            .drain(..buffers)
            .map(|chain| {
                let part = left.min(chain.writable_bytes());
                left -= part;
                (chain.head(), u32::try_from(part).unwrap_or(u32::MAX))
            })
            .collect()
    }
}

impl VirtioDevice for Net {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: ID,
            features: features(self.mtu),
            queue_sizes: vec![QUEUE_SIZE, QUEUE_SIZE],
        }
    }

    fn config(&self) -> Vec<u8> {
        config_space(self.mac, self.mtu)
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        let has = |feature: u32| features & (1 << feature) != 0;
        let offloads = offloads(features);
        self.receiving.mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        let large = offloads & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) != 0;
        self.receiving.room_wanted = if large {
            FRAME_BYTES_MAX
        } else {
            SMALL_FRAME_BYTES
        };
        set_offloads(&self.tap, offloads)
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
        let used = if index == RECEIVE {
            let buffers = &mut self.receiving.buffers;
            let mut too_small = false;
            take_all(index, queue, mem, buffers.len(), |chain| {
                too_small |= chain.writable_bytes() < HEADER_BYTES;
                buffers.push_back(chain);
            })?;
            if too_small {
                let source = Error::InvalidChain;
                return Err(DeviceError::Guest { index, source });
            }
            self.receiving.starved && self.receive(queue, mem)?
        } else {
            let held = self.sending.frames.len();
            take_all(index, queue, mem, held, |chain| {
                self.sending.frames.push_back(chain);
            })?;
            self.send(queue, mem)?
        };
        let signal = Signal::queue_if(index, used);
        Ok(if std::mem::take(&mut self.moved) {
            signal.and(Signal::CONFIG)
        } else {
            signal
        })
    }

    fn is_fast(&self) -> bool {
        true
    }

    fn interests(&self) -> Vec<Interest> {
        let receiving = &self.receiving;
        let room = !receiving.buffers.is_empty() && receiving.pending.is_none();
        let readable = room && !self.throttle.closed(Lane::Receive);
        let writable = self.sending.blocked;
        if self.lost {
            return Vec::new();
        }
        let mut interests = self.throttle.interests();
        if readable || writable {
            interests.push(Interest {
                token: TAP,
                fd: self.tap.as_raw_fd(),
                readable,
                writable,
            });
        }
        interests
    }

    fn on_ready(
        &mut self,
        token: u32,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let [receive, transmit, ..] = queues else {
            return Ok(Signal::NONE);
        };
        if token != TAP {
            self.throttle.retry(token).map_err(timer)?;
        }
        let received = self.receive(receive, mem)?;
        let waits = self.sending.blocked || self.throttle.closed(Lane::Send);
        let sent = waits && self.send(transmit, mem)?;
        Ok(Signal::queue_if(RECEIVE, received).and(Signal::queue_if(TRANSMIT, sent)))
    }

    fn reset(&mut self) {
        self.receiving.buffers.clear();
        self.receiving.pending = None;
        self.receiving.starved = false;
        self.sending.forget();
        self.throttle.forget();
        self.moved = false;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        self.save_state()
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        self.restore_state(own)
    }
}

fn timer(source: io::Error) -> DeviceError {
    let action = "set a network interface's timer";
    DeviceError::Host { action, source }
}

#[cfg(test)]
mod tests;
