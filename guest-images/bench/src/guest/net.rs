//! A driver that sends frames (virtio 1.2, section 5.1).

use crate::machine::{memory, ticks};
use crate::mmio::Device;
use crate::queue::{Queue, Writer};
use crate::words::Fields;
use crate::{Failure, Measured};

const ID: u32 = 1;
const TRANSMIT: u32 = 1;
const ENTRIES: u16 = 256;

/// The header of a frame that needs nothing done to it: zeroes.
const HEADER_BYTES: u32 = 12;
/// From and to addresses that nobody has, and a type for experiments (IEEE 802, 0x88b5).
const ETHERNET: [u8; 14] = [2, 0, 0, 0, 0xbe, 1, 2, 0, 0, 0, 0xbe, 2, 0x88, 0xb5];
const FRAME_BYTES_MAX: u64 = 2000;

/// Frames, a page for each.
const FRAMES: usize = 8 << 20;
const PAGE_BYTES: usize = 4096;

/// What is sent.
pub(crate) struct Load {
    bytes: u32,
    depth: u16,
    count: u64,
}

impl Load {
    /// From `BYTES:DEPTH:COUNT`.
    pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<Load, Failure> {
        let bytes = fields.number()?;
        let depth = fields.number()?;
        if !(14..=FRAME_BYTES_MAX).contains(&bytes) || !(1..=ENTRIES.into()).contains(&depth) {
            return Err(Failure::Word);
        }
        Ok(Load {
            bytes: u32::try_from(bytes).unwrap_or_default(),
            depth: u16::try_from(depth).unwrap_or_default(),
            count: fields.number()?,
        })
    }
}

/// Sends through the first network device: a tenth to warm up, then all.
pub(crate) fn run(command_line: &[u8], load: &Load) -> Result<Measured, Failure> {
    let device = Device::find(command_line, ID)?;
    device.negotiate(0)?;
    // The receiving queue must be there, but it may be empty.
    device.queue(0, ENTRIES)?;
    let mut queue = device.queue(TRANSMIT, ENTRIES)?;
    device.start();
    prepare(&queue, load);
    send(&mut queue, load.depth, load.count / 10);
    let start = ticks();
    send(&mut queue, load.depth, load.count);
    let ticks = ticks().wrapping_sub(start);
    device.stop();
    Ok(Measured {
        count: load.count,
        ticks,
    })
}

fn prepare(queue: &Queue, load: &Load) {
    let bytes = load.bytes.wrapping_add(HEADER_BYTES);
    for slot in 0..load.depth {
        let frame = FRAMES.wrapping_add(usize::from(slot).wrapping_mul(PAGE_BYTES));
        // Somebody else may have used the memory.
        let header = [0; HEADER_BYTES as usize];
        let mut at = frame;
        for byte in header.into_iter().chain(ETHERNET) {
            memory::store(at, byte);
            at = at.wrapping_add(1);
        }
        queue.describe(slot, (frame, bytes), Writer::Driver, None);
    }
}

fn send(queue: &mut Queue, depth: u16, count: u64) {
    let mut started = 0;
    for slot in 0..depth {
        if started < count {
            queue.offer(slot);
            started = started.wrapping_add(1);
        }
    }
    queue.publish();
    let mut done = 0;
    while done < count {
        let ready = queue.ready();
        let before = started;
        for _ in 0..ready {
            let slot = queue.take();
            done = done.wrapping_add(1);
            if started < count {
                queue.offer(slot);
                started = started.wrapping_add(1);
            }
        }
        if ready > 0 {
            queue.postpone_interrupts();
        }
        if started != before {
            queue.publish();
        }
    }
}
