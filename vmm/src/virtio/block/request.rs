//! From a descriptor chain to what is to be done with the disk (virtio 1.2, section 5.2.6).

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::virtio::chain::{Chain, IoList};

/// The unit of all positions and lengths, whatever the disk's own block size is.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// The most sectors that one discard or write-zeroes may cover, so that none holds up a drain for
/// long: 1 GiB.
pub(crate) const RANGE_SECTORS_MAX: u32 = 1 << 21;

/// The most data of one request: no driver needs to go beyond it that keeps to what the configuration
/// says of segments.
pub(crate) const REQUEST_BYTES_MAX: u64 = 16 << 20;

/// The bytes that the answer to GET_ID has room for.
pub(crate) const SERIAL_BYTES_MAX: usize = 20;

/// type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// sector, number of sectors, flags: `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// How often the kernel may put an operation off before it counts as failed.
const RETRIES_MAX: u8 = 16;

/// What the driver is told of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Status {
    Done,
    Failed,
    Unsupported,
}

impl Status {
    pub(crate) fn code(self) -> u8 {
        let code = match self {
            Status::Done => VIRTIO_BLK_S_OK,
            Status::Failed => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        code.to_le_bytes()[0]
    }
}

/// A disk as requests see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
    /// The feature bits that the driver accepted.
    pub(crate) features: u64,
}

impl Geometry {
    fn accepts(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// The byte that `sector` begins at, if `bytes` from there on are within the disk.
    fn position(&self, sector: u64, bytes: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR_BYTES)?;
        let end = start.checked_add(bytes)?;
        (end <= self.sectors * SECTOR_BYTES).then_some(start)
    }
}

/// What a chain asks for.
#[derive(Debug)]
pub(crate) enum Request {
    /// Nothing that needs the disk: the answer is known.
    Answer(Chain, Status),
    /// The serial number.
    Identify(Chain),
    /// Work for an engine.
    Operate(Operation),
}

/// Work on the disk's file. It owns the chain, and so the memory that it reads or writes.
#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) chain: Chain,
    pub(crate) kind: Kind,
    /// Where in the file, in bytes.
    pub(crate) position: u64,
    /// Data to move, or the length of the range, in bytes.
    pub(crate) bytes: usize,
    /// How much of it has been moved.
    done: usize,
    retries: u8,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    Read,
    Write {
        /// The data must be on the medium before the request completes.
        stable: bool,
    },
    Flush,
    /// The range reads as zeroes afterwards.
    Zero {
        /// The space stays reserved.
        keep: bool,
    },
}

/// Where an operation stands after the kernel's answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Progress {
    /// What is left must be asked for.
    Again,
    Finished(Status),
}

impl Request {
    /// Reads the header once and checks the request against the disk.
    pub(crate) fn parse(chain: Chain, disk: &Geometry) -> Request {
        let mut header = [0; HEADER_BYTES];
        // The last writable byte is the status: without it there is nothing that may be written.
        if chain.writable_bytes() == 0 || chain.read(0, &mut header) < HEADER_BYTES {
            return Request::Answer(chain, Status::Failed);
        }
        let (kind, sector) = header.split_at(8);
        let kind = u32::from_le_bytes([kind[0], kind[1], kind[2], kind[3]]);
        let sector = u64::from_le_bytes(sector.try_into().unwrap_or_default());
        match kind {
            VIRTIO_BLK_T_IN => transfer(chain, Kind::Read, sector, disk),
            VIRTIO_BLK_T_OUT => {
                // A driver that does not flush expects every write to be stable
                // (virtio 1.2, 5.2.6.2).
                let stable = !disk.accepts(VIRTIO_BLK_F_FLUSH);
                transfer(chain, Kind::Write { stable }, sector, disk)
            }
            VIRTIO_BLK_T_FLUSH => Request::Operate(Operation::new(chain, Kind::Flush, 0, 0)),
            VIRTIO_BLK_T_GET_ID => Request::Identify(chain),
            VIRTIO_BLK_T_DISCARD if disk.accepts(VIRTIO_BLK_F_DISCARD) => range(chain, kind, disk),
            VIRTIO_BLK_T_WRITE_ZEROES if disk.accepts(VIRTIO_BLK_F_WRITE_ZEROES) => {
                range(chain, kind, disk)
            }
            _ => Request::Answer(chain, Status::Unsupported),
        }
    }
}

fn transfer(chain: Chain, kind: Kind, sector: u64, disk: &Geometry) -> Request {
    let bytes = match kind {
        Kind::Read => chain.writable_bytes() - 1,
        Kind::Write { .. } if disk.read_only => return Request::Answer(chain, Status::Failed),
        Kind::Write { .. } | Kind::Flush | Kind::Zero { .. } => {
            chain.readable_bytes() - HEADER_BYTES
        }
    };
    let length = bytes as u64;
    let possible = bytes > 0 && length.is_multiple_of(SECTOR_BYTES) && length <= REQUEST_BYTES_MAX;
    match disk.position(sector, length) {
        Some(position) if possible => {
            Request::Operate(Operation::new(chain, kind, position, bytes))
        }
        _ => Request::Answer(chain, Status::Failed),
    }
}

/// Discard and write-zeroes: one range, as `max_discard_seg` and `max_write_zeroes_seg` say.
fn range(chain: Chain, kind: u32, disk: &Geometry) -> Request {
    let mut range = [0; RANGE_BYTES];
    if chain.readable_bytes() != HEADER_BYTES + RANGE_BYTES
        || chain.read(HEADER_BYTES, &mut range) < RANGE_BYTES
        || disk.read_only
    {
        return Request::Answer(chain, Status::Failed);
    }
    let word =
        |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
    let sector = u64::from(word(4)) << 32 | u64::from(word(0));
    let (sectors, flags) = (word(8), word(12));
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
        return Request::Answer(chain, Status::Unsupported);
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    match (disk.position(sector, bytes), usize::try_from(bytes)) {
        (Some(position), Ok(bytes)) if bytes > 0 && sectors <= RANGE_SECTORS_MAX => {
            let keep = !discard && !unmap;
            Request::Operate(Operation::new(chain, Kind::Zero { keep }, position, bytes))
        }
        _ => Request::Answer(chain, Status::Failed),
    }
}

impl Operation {
    fn new(chain: Chain, kind: Kind, position: u64, bytes: usize) -> Operation {
        Operation {
            chain,
            kind,
            position,
            bytes,
            done: 0,
            retries: 0,
        }
    }

    /// What the operation costs of the bytes that a limit allows. Zeroing and flushing move none.
    pub(crate) fn charge(&self) -> u64 {
        match self.kind {
            Kind::Read | Kind::Write { .. } => self.bytes as u64,
            Kind::Flush | Kind::Zero { .. } => 0,
        }
    }

    /// Where in the file what is left begins, in bytes.
    pub(crate) fn next_position(&self) -> u64 {
        self.position + self.done as u64
    }

    /// Data that is still to be moved, in bytes.
    pub(crate) fn left(&self) -> usize {
        self.bytes - self.done
    }

    /// Copies what was read to where it is to go next; returns how much that was.
    pub(crate) fn fill(&self, data: &[u8]) -> usize {
        self.chain.write(self.done, data)
    }

    /// Copies what is to be written next, as much as there is room for; returns how much that was.
    pub(crate) fn gather(&self, data: &mut [u8]) -> usize {
        let length = self.left().min(data.len());
        self.chain
            .read(HEADER_BYTES + self.done, &mut data[..length])
    }

    /// The guest memory that is still to be filled or written out.
    pub(crate) fn io_list(&self) -> IoList<'_> {
        let mut list = IoList::new();
        let rest = self.bytes - self.done;
        match self.kind {
            Kind::Read => list.push_writable(&self.chain, self.done, rest),
            Kind::Write { .. } => list.push_readable(&self.chain, HEADER_BYTES + self.done, rest),
            Kind::Flush | Kind::Zero { .. } => {}
        }
        list
    }

    /// The flags of `pwritev2`.
    pub(crate) fn write_flags(&self) -> i32 {
        match self.kind {
            Kind::Write { stable: true } => libc::RWF_DSYNC,
            Kind::Write { stable: false } | Kind::Read | Kind::Flush | Kind::Zero { .. } => 0,
        }
    }

    /// The mode of `fallocate`.
    pub(crate) fn allocation_mode(&self) -> i32 {
        let mode = match self.kind {
            Kind::Zero { keep: true } => libc::FALLOC_FL_ZERO_RANGE,
            Kind::Zero { keep: false } | Kind::Read | Kind::Write { .. } | Kind::Flush => {
                libc::FALLOC_FL_PUNCH_HOLE
            }
        };
        mode | libc::FALLOC_FL_KEEP_SIZE
    }

    /// Takes the kernel's answer to the last call into account.
    pub(crate) fn advance(&mut self, result: &io::Result<usize>) -> Progress {
        let moved = match result {
            Ok(moved) => *moved,
            Err(error) => return self.failed(error),
        };
        match self.kind {
            // Images are zeroed a piece at a time, files at once.
            Kind::Zero { .. } if moved > 0 && self.done + moved < self.bytes => {
                self.done += moved;
                Progress::Again
            }
            Kind::Flush | Kind::Zero { .. } => Progress::Finished(Status::Done),
            // The file is shorter than it was, or full: there is no more to come.
            Kind::Read | Kind::Write { .. } if moved == 0 => Progress::Finished(Status::Failed),
            Kind::Read | Kind::Write { .. } => {
                self.done = (self.done + moved).min(self.bytes);
                if self.done == self.bytes {
                    Progress::Finished(Status::Done)
                } else {
                    Progress::Again
                }
            }
        }
    }

    fn failed(&mut self, error: &io::Error) -> Progress {
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                Progress::Again
            }
            Some(libc::EOPNOTSUPP) if self.kind == (Kind::Zero { keep: true }) => {
                // Not every file system can zero a range without giving the space back.
                self.kind = Kind::Zero { keep: false };
                Progress::Again
            }
            Some(libc::EOPNOTSUPP) => Progress::Finished(Status::Unsupported),
            _ => Progress::Finished(Status::Failed),
        }
    }

    /// The bytes of the chain that were written, the status byte included.
    pub(crate) fn written_bytes(&self, status: Status) -> usize {
        match (self.kind, status) {
            (Kind::Read, Status::Done) => self.bytes + 1,
            _ => 1,
        }
    }
}
