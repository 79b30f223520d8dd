//! virtio-blk (virtio 1.2, section 5.2) on a file, a block device or an image: one queue, flush, discard,
//! write-zeroes, a serial number, and limits on operations and bytes.

mod answer;
mod direction;
mod engine;
mod handle;
mod image;
mod patience;
mod request;
mod ring;
mod state;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use self::answer::Answer;
use self::direction::Direction;
use self::engine::{Completed, Engine};
pub use self::handle::{BlockHandle, BlockStats};
use self::handle::{Shared, count, event};
use self::image::Image;
pub use self::image::Layer;
use self::request::{
    Geometry, Kind, RANGE_SECTORS_MAX, Request, SECTOR_BYTES, SERIAL_BYTES_MAX, Status,
};
use super::chain::{Chain, take_all};
use super::state::{DeviceState, StateError};
use super::{DeviceError, DeviceInfo, Interest, Signal, VirtioDevice};
use crate::spec::{DiskFormat, DiskLimits};

/// Device type, virtio 1.2 section 5.
const ID: u32 = 2;

/// Also the most requests in flight.
const QUEUE_SIZE: u16 = 256;

/// Data segments of a request: what a queue without indirect descriptors has room for beside the
/// header and the status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// The most bytes of a data segment, so that all together are less than [`REQUEST_BYTES_MAX`]. Linux
/// takes the same where a disk says nothing.
const SEGMENT_BYTES_MAX: u32 = 64 * 1024;

/// What discards should be aligned to for space to come back: the usual block of a file system, in
/// sectors.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;

/// Tokens of [`Interest`].
const COMPLETIONS: u32 = 0;
const TIMER: u32 = 1;
const LIMITS: u32 = 2;
const AGAIN: u32 = 3;

/// How a disk is presented.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct BlockOptions {
    pub read_only: bool,
    /// At most 20 bytes.
    pub serial: Option<String>,
    pub limits: DiskLimits,
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("The disk is neither a regular file nor a block device")]
    FileType,
    #[error("The disk's size cannot be found out")]
    Size(#[source] io::Error),
    #[error("The disk is no image of the format that was named, on the images that were named")]
    Image(#[source] io::Error),
    #[error("The disk's serial number has {len} bytes, and there is room for 20")]
    Serial { len: usize },
    #[error("The disk's timer or event cannot be made")]
    Descriptor(#[source] Errno),
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    engine: Engine,
    geometry: Geometry,
    serial: [u8; SERIAL_BYTES_MAX],
    reads: Direction,
    writes: Direction,
    /// Runs while requests are parked.
    timer: TimerFd,
    /// Readable when there is more to do than was done at a time.
    again: EventFd,
    shared: Arc<Shared>,
}

impl Block {
    /// A disk on `file`, which is open for writing unless the disk is read-only. Its size is
    /// rounded down to sectors of 512 bytes.
    ///
    /// Uses io_uring where the host allows it, and otherwise reads and writes synchronously.
    pub fn new(file: File, options: BlockOptions) -> Result<Block, BlockError> {
        Block::with_engine(file, options, |file| Engine::new(file, QUEUE_SIZE))
    }

    /// A disk on `top`, which is open for writing unless the disk is read-only, and, if that is an
    /// image, on those that it refers to, of which each refers to the next.
    pub fn open(
        top: Layer,
        backing: Vec<Layer>,
        options: BlockOptions,
    ) -> Result<Block, BlockError> {
        if top.format == DiskFormat::Raw {
            return Block::new(top.file, options);
        }
        let image = Image::open(top, backing, !options.read_only).map_err(BlockError::Image)?;
        Block::with_size(image.bytes(), options, Engine::on_image(image))
    }

    fn with_engine(
        file: File,
        options: BlockOptions,
        engine: impl FnOnce(File) -> Engine,
    ) -> Result<Block, BlockError> {
        let bytes = size_of_disk(&file)?;
        Block::with_size(bytes, options, engine(file))
    }

    fn with_size(bytes: u64, options: BlockOptions, engine: Engine) -> Result<Block, BlockError> {
        let text = options.serial.unwrap_or_default();
        let mut serial = [0; SERIAL_BYTES_MAX];
        serial
            .get_mut(..text.len())
            .ok_or(BlockError::Serial { len: text.len() })?
            .copy_from_slice(text.as_bytes());
        let limits = options.limits;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )
        .map_err(BlockError::Descriptor)?;
        let again = event().map_err(BlockError::Descriptor)?;
        let shared = Shared::new(limits).map_err(BlockError::Descriptor)?;
        Ok(Block {
            engine,
            geometry: Geometry {
                sectors: bytes / SECTOR_BYTES,
                read_only: options.read_only,
                features: 0,
            },
            serial,
            reads: Direction::new(limits.read_iops, limits.read_bps),
            writes: Direction::new(limits.write_iops, limits.write_bps),
            timer,
            again,
            shared: Arc::new(shared),
        })
    }

    /// For counters and limits, from then on.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Chains that were taken from the queue and not given back.
    fn held(&self) -> usize {
        self.engine.in_flight() + self.reads.parked.len() + self.writes.parked.len()
    }

    /// Answers what needs no disk, starts what its limit admits, parks the rest.
    fn take_on(&mut self, chain: Chain, now: &mut Option<Instant>) -> Option<Answer> {
        match Request::parse(chain, &self.geometry) {
            Request::Answer(chain, status) => {
                if status == Status::Failed {
                    count(&self.shared.counters.failures, 1);
                }
                Some(Answer::new(chain, status, 1))
            }
            Request::Identify(chain) => {
                let room = chain.writable_bytes() - 1;
                let bytes = &self.serial[..room.min(SERIAL_BYTES_MAX)];
                let written = chain.write(0, bytes);
                Some(Answer::new(chain, Status::Done, written + 1))
            }
            Request::Operate(operation) => {
                let direction = match operation.kind {
                    Kind::Read => &mut self.reads,
                    Kind::Write { .. } | Kind::Zero { .. } | Kind::Flush => &mut self.writes,
                };
                if let Some(admitted) = direction.admit_or_park(operation, now) {
                    self.engine.start(admitted);
                } else {
                    count(&self.shared.counters.throttled, 1);
                }
                None
            }
        }
    }

    /// Starts what was parked and is admitted by now, and sets the timer for the rest.
    fn release(&mut self) -> Result<(), DeviceError> {
        if self.reads.parked.is_empty() && self.writes.parked.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let mut next = None;
        for direction in [&mut self.reads, &mut self.writes] {
            while let Some(operation) = direction.parked.pop_front() {
                match direction.limiter.admit(now, operation.charge()) {
                    Ok(()) => self.engine.start(operation),
                    Err(wait) => {
                        direction.parked.push_front(operation);
                        next = Some(next.map_or(wait, |other| wait.min(other)));
                        break;
                    }
                }
            }
        }
        let Some(wait) = next else { return Ok(()) };
        let wait = Expiration::OneShot(TimeSpec::from_duration(wait));
        self.timer
            .set(wait, TimerSetTimeFlags::empty())
            .map_err(|error| host("set a disk's timer")(error.into()))
    }

    /// Begins what was started, as much as is done at a time, and gives back what has completed.
    fn settle(&mut self, queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        self.engine.begin();
        let any = self.complete(queue, mem)?;
        if self.engine.can_begin() {
            // It fails only if the counter is full, and then the descriptor is readable as it is.
            let _ = self.again.write(1);
        }
        Ok(any)
    }

    /// Submits what was begun, and gives back what has completed.
    fn complete(&mut self, queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        let mut any = false;
        loop {
            self.engine.submit().map_err(host("submit to io_uring"))?;
            let mut progress = false;
            while let Some(completed) = self.engine.completed() {
                self.count(&completed);
                let Completed { operation, status } = completed;
                let written = operation.written_bytes(status);
                Answer::new(operation.chain, status, written).give(queue, mem)?;
                progress = true;
            }
            any |= progress;
            // Operations that were cut short are started again by `completed`.
            if !self.engine.has_unsubmitted() {
                return Ok(any);
            }
        }
    }

    fn count(&self, completed: &Completed) {
        let counters = &self.shared.counters;
        let bytes = completed.operation.bytes as u64;
        match (completed.status, completed.operation.kind) {
            (Status::Done, Kind::Read) => {
                count(&counters.reads, 1);
                count(&counters.read_bytes, bytes);
            }
            (Status::Done, Kind::Write { .. }) => {
                count(&counters.writes, 1);
                count(&counters.written_bytes, bytes);
            }
            (Status::Done, Kind::Flush) => count(&counters.flushes, 1),
            (Status::Done, Kind::Zero { .. }) => count(&counters.zeroes, 1),
            (Status::Failed | Status::Unsupported, _) => count(&counters.failures, 1),
        }
    }

    /// Adopts the limits that a handle has set.
    fn adopt_limits(&mut self) {
        let limits = self.shared.take_limits();
        let now = Instant::now();
        self.reads
            .limiter
            .set(now, limits.read_iops, limits.read_bps);
        self.writes
            .limiter
            .set(now, limits.write_iops, limits.write_bps);
    }
}

impl VirtioDevice for Block {
    fn info(&self) -> DeviceInfo {
        let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        features |= if self.geometry.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        DeviceInfo {
            id: ID,
            features,
            queue_sizes: vec![QUEUE_SIZE],
        }
    }

    /// `struct virtio_blk_config`, up to and with `write_zeroes_may_unmap`.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.geometry.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &512u32.to_le_bytes()); // blk_size
        put(34, &1u16.to_le_bytes()); // num_queues
        if !self.geometry.read_only {
            put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
            put(40, &1u32.to_le_bytes()); // max_discard_seg
            put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
            put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
            put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
            put(56, &[1]); // write_zeroes_may_unmap
        }
        config
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.geometry.features = features;
        self.adopt_limits();
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
        let mut answers = Vec::new();
        let mut now = None;
        let held = self.held();
        take_all(index, queue, mem, held, |chain| {
            answers.extend(self.take_on(chain, &mut now));
        })?;
        let answered = !answers.is_empty();
        for answer in answers {
            answer.give(queue, mem)?;
        }
        self.release()?;
        let settled = self.settle(queue, mem)?;
        Ok(signal(answered || settled))
    }

    fn is_fast(&self) -> bool {
        true
    }

    fn interests(&self) -> Vec<Interest> {
        // Always: changing the set costs as much as a small read.
        let mut interests = vec![
            Interest::readable(LIMITS, self.shared.fd()),
            Interest::readable(AGAIN, self.again.as_fd().as_raw_fd()),
        ];
        if !self.reads.parked.is_empty() || !self.writes.parked.is_empty() {
            interests.push(Interest::readable(TIMER, self.timer.as_fd().as_raw_fd()));
        }
        // It is readable only when there are completions.
        interests.extend(
            self.engine
                .fd()
                .map(|fd| Interest::readable(COMPLETIONS, fd)),
        );
        interests
    }

    fn on_ready(
        &mut self,
        token: u32,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        let Some(queue) = queues.first_mut() else {
            return Ok(Signal::NONE);
        };
        match token {
            LIMITS => self.adopt_limits(),
            TIMER => {
                // Setting the timer anew makes it unreadable too, but all may be released.
                self.timer
                    .unset()
                    .map_err(|error| host("stop a disk's timer")(error.into()))?;
            }
            AGAIN => {
                // Readable or not: it is only being made unreadable.
                let _ = self.again.read();
            }
            _ => {}
        }
        self.release()?;
        self.settle(queue, mem).map(signal)
    }

    fn reset(&mut self) {
        self.reads.parked.clear();
        self.writes.parked.clear();
        self.engine.drain();
        self.geometry.features = 0;
    }

    fn quiesce(
        &mut self,
        queues: &mut [Queue],
        mem: &GuestMemoryMmap,
    ) -> Result<Signal, DeviceError> {
        match queues.first_mut() {
            Some(queue) => self.finish_all(queue, mem).map(signal),
            None => Ok(Signal::NONE),
        }
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        self.save_state()
    }

    fn restore(&mut self, own: &Value) -> Result<(), StateError> {
        self.restore_state(own)
    }
}

fn size_of_disk(file: &File) -> Result<u64, BlockError> {
    let metadata = file.metadata().map_err(BlockError::Size)?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    if !metadata.file_type().is_block_device() {
        return Err(BlockError::FileType);
    }
    let mut file = file;
    file.seek(SeekFrom::End(0)).map_err(BlockError::Size)
}

/// The one queue has used buffers, or there is nothing to tell.
fn signal(used: bool) -> Signal {
    Signal::queue_if(0, used)
}

fn host(action: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Host { action, source }
}

#[cfg(test)]
mod tests;
