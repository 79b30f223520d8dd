//! A driver for disks (virtio 1.2, section 5.2), and the loads that it puts on them.

use crate::machine::{memory, ticks};
use crate::mmio::Device;
use crate::queue::{Queue, Writer};
use crate::words::Fields;
use crate::{Failure, Measured};

const ID: u32 = 2;
const FLUSH: u64 = 1 << 9;
const ENTRIES: u16 = 256;

const SECTOR_BYTES: u64 = 512;
const READ: u32 = 0;
const WRITE: u32 = 1;

/// A request has a header, data and a status.
const SLOTS: u16 = 3;
const DEPTH_MAX: u16 = ENTRIES / SLOTS;
const HEADER_BYTES: u32 = 16;

/// Headers and statuses are in one page, data behind it.
const HEADERS: usize = 8 << 20;
const STATUSES: usize = HEADERS + 0x2000;
const DATA: usize = HEADERS + 0x4000;
const DATA_END: usize = 30 << 20;

/// What is asked of a disk.
pub(crate) struct Load {
    write: bool,
    random: bool,
    bytes: u32,
    depth: u16,
    count: u64,
}

impl Load {
    /// From `KIND:BYTES:DEPTH:COUNT`.
    pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<Load, Failure> {
        let (write, random) = match fields.name() {
            b"read" => (false, false),
            b"write" => (true, false),
            b"random-read" => (false, true),
            b"random-write" => (true, true),
            _ => return Err(Failure::Word),
        };
        let load = Load {
            write,
            random,
            bytes: u32::try_from(fields.number()?).map_err(|_| Failure::Word)?,
            depth: u16::try_from(fields.number()?).map_err(|_| Failure::Word)?,
            count: fields.number()?,
        };
        let room = (DATA_END - DATA) as u64;
        let fits = u64::from(load.bytes).wrapping_mul(load.depth.into()) <= room;
        if load.depth == 0 || load.depth > DEPTH_MAX || load.bytes == 0 || !fits {
            return Err(Failure::Word);
        }
        Ok(load)
    }
}

/// A disk under load.
struct Disk<'a> {
    queue: Queue,
    load: &'a Load,
    /// Requests of this size that the disk has room for.
    places: u64,
    /// The next place is anywhere, not behind the last one.
    random: bool,
    next: u64,
}

/// Puts the load on the first disk, after some of it to warm up. Before random writes that is every
/// place once: what a file system does when a page becomes dirty is not what is measured.
pub(crate) fn run(command_line: &[u8], load: &Load) -> Result<Measured, Failure> {
    let device = Device::find(command_line, ID)?;
    device.negotiate(FLUSH)?;
    let queue = device.queue(0, ENTRIES)?;
    let places = device.config(0) / (u64::from(load.bytes) / SECTOR_BYTES).max(1);
    if places == 0 {
        return Err(Failure::Refused);
    }
    device.start();
    let mut disk = Disk {
        queue,
        load,
        places,
        random: false,
        next: 1,
    };
    disk.prepare();
    let places_first = load.write && load.random;
    disk.requests(if places_first { places } else { load.count / 10 })?;
    disk.random = load.random;
    let start = ticks();
    disk.requests(load.count)?;
    let ticks = ticks().wrapping_sub(start);
    device.stop();
    Ok(Measured {
        count: load.count,
        ticks,
    })
}

impl Disk<'_> {
    /// Lays out all chains; only the place on the disk changes from request to request.
    fn prepare(&self) {
        let bytes = usize::try_from(self.load.bytes).unwrap_or_default();
        let kind = if self.load.write { WRITE } else { READ };
        let writer = if self.load.write {
            Writer::Driver
        } else {
            Writer::Device
        };
        for request in 0..self.load.depth {
            let first = request.wrapping_mul(SLOTS);
            let [data_slot, status_slot] = [1, 2].map(|more| first.wrapping_add(more));
            let data = DATA.wrapping_add(bytes.wrapping_mul(request.into()));
            memory::store(header(request), u64::from(kind));
            let (queue, length) = (&self.queue, self.load.bytes);
            let header = (header(request), HEADER_BYTES);
            queue.describe(first, header, Writer::Driver, Some(data_slot));
            queue.describe(data_slot, (data, length), writer, Some(status_slot));
            queue.describe(status_slot, (status(request), 1), Writer::Device, None);
        }
    }

    /// Does `count` requests, as many at a time as the load says.
    fn requests(&mut self, count: u64) -> Result<(), Failure> {
        let mut started = 0;
        for request in 0..self.load.depth {
            if started < count {
                self.start(request);
                started = started.wrapping_add(1);
            }
        }
        self.queue.publish();
        let mut done = 0;
        while done < count {
            let ready = self.queue.ready();
            let before = started;
            for _ in 0..ready {
                let request = self.queue.take() / SLOTS;
                if memory::load::<u8>(status(request)) != 0 {
                    return Err(Failure::Request);
                }
                done = done.wrapping_add(1);
                if started < count {
                    self.start(request);
                    started = started.wrapping_add(1);
                }
            }
            if ready > 0 {
                self.queue.postpone_interrupts();
            }
            if started != before {
                self.queue.publish();
            }
        }
        Ok(())
    }

    fn start(&mut self, request: u16) {
        let sector = self
            .place()
            .wrapping_mul(u64::from(self.load.bytes) / SECTOR_BYTES);
        memory::store(header(request).wrapping_add(8), sector);
        memory::store(status(request), 0xff_u8);
        self.queue.offer(request.wrapping_mul(SLOTS));
    }

    fn place(&mut self) -> u64 {
        if self.random {
            // Marsaglia's xorshift.
            self.next ^= self.next << 13;
            self.next ^= self.next >> 7;
            self.next ^= self.next << 17;
        } else {
            self.next = self.next.wrapping_add(1);
        }
        self.next % self.places
    }
}

fn header(request: u16) -> usize {
    HEADERS.wrapping_add(usize::from(request).wrapping_mul(16))
}

fn status(request: u16) -> usize {
    STATUSES.wrapping_add(request.into())
}
