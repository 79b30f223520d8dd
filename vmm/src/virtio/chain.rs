//! Descriptor chains, read once and checked, and the only place where devices touch guest memory.
//!
//! A [`Chain`] is what the rest of a device may believe: complete, device-readable buffers before
//! device-writable ones, every range inside guest memory, a bounded number of pieces. What the
//! buffers hold stays the guest's to change at any time.
//!
//! UNSAFETY: the guest and the kernel (io_uring, readv) write to this memory while we hold it, so no
//! Rust reference to it may exist; it is named by raw pointers, and only copied volatilely or handed
//! to the kernel. A chain shares the ownership of the mapping that its pointers lie in.
#![expect(
    unsafe_code,
    reason = "guest memory is reached through raw pointers, by us and by the kernel"
)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use smallvec::SmallVec;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice,
};

use super::discard::discard;
use super::{DeviceError, Signal};
use crate::dirty;

/// The most pieces a chain may have. Drivers stay within the queue size (virtio 1.2, 2.7.5.3.1);
/// an indirect table could hold 65535. With a few iovecs of our own it fits the kernel's limit of
/// 1024 for one call.
const PIECES_MAX: usize = 1000;

/// The most iovecs that one call of the kernel takes (UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;

/// flags, idx (virtio 1.2, 2.7.8).
const USED_RING_HEADER_BYTES: u64 = 4;

/// id, len.
const USED_ELEMENT_BYTES: u64 = 8;

/// Guest memory that chains can share.
pub(crate) type Memory = Arc<GuestMemoryMmap>;

/// A contiguous range of guest memory, as this process sees it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: *mut u8,
    len: usize,
}

// SAFETY: a piece is an address; what it points to is shared with the guest anyway, and is never
// accessed but through volatile copies and the kernel.
unsafe impl Send for Piece {}

/// A chain that the driver made available, until it is given back through the used ring.
#[derive(Debug)]
pub(crate) struct Chain {
    head: u16,
    pieces: SmallVec<[Piece; 4]>,
    /// How many of the pieces are device-readable; the rest are device-writable.
    readable_pieces: usize,
    readable_bytes: usize,
    writable_bytes: usize,
    /// Keeps the mapping alive that `pieces` point into.
    _memory: Memory,
}

/// Takes every chain that is available now and hands it to `each`; returns how many there were.
///
/// `held` is how many chains of this queue the device has not given back yet. A driver that offers
/// more buffers than the queue has, counting those, is broken (it offers one twice).
pub(crate) fn take_all(
    index: usize,
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    held: usize,
    mut each: impl FnMut(Chain),
) -> Result<usize, DeviceError> {
    let guest = |source| DeviceError::Guest { index, source };
    let free = usize::from(queue.size()).saturating_sub(held);
    let shared: Memory = Arc::new(memory.clone());
    let mut taken = 0;
    for descriptors in queue.iter(memory).map_err(guest)? {
        if taken == free {
            return Err(guest(Error::InvalidAvailRingIndex));
        }
        each(Chain::parse(descriptors, &shared).map_err(guest)?);
        taken += 1;
    }
    Ok(taken)
}

/// Hands every chain that is available now to `each`, which returns how many bytes of it were
/// written, and gives it back.
pub(crate) fn answer_all(
    index: usize,
    queues: &mut [Queue],
    memory: &GuestMemoryMmap,
    mut each: impl FnMut(&Chain) -> Result<usize, DeviceError>,
) -> Result<Signal, DeviceError> {
    let Some(queue) = queues.get_mut(index) else {
        return Ok(Signal::NONE);
    };
    let mut chains = Vec::new();
    take_all(index, queue, memory, 0, |chain| chains.push(chain))?;
    for chain in &chains {
        let written = each(chain)?;
        chain.give_back(index, queue, memory, written)?;
    }
    Ok(Signal::queue_if(index, !chains.is_empty()))
}

impl Chain {
    /// Follows the descriptors once and checks all that can be checked without knowing the device.
    fn parse(
        descriptors: DescriptorChain<&GuestMemoryMmap>,
        memory: &Memory,
    ) -> Result<Chain, Error> {
        let mut chain = Chain {
            head: descriptors.head_index(),
            pieces: SmallVec::new(),
            readable_pieces: 0,
            readable_bytes: 0,
            writable_bytes: 0,
            _memory: Arc::clone(memory),
        };
        // The iterator just ends at a bad index, a loop, a nested indirect table or a sum beyond
        // 4 GiB; it shows in that the last descriptor it gave announced another.
        let mut complete = false;
        for descriptor in descriptors {
            complete = !descriptor.has_next();
            let writable = descriptor.is_write_only();
            if !writable && chain.writable_bytes > 0 {
                return Err(Error::InvalidChain);
            }
            let access = if writable {
                Permissions::Write
            } else {
                Permissions::Read
            };
            let len = descriptor.len() as usize;
            let slices = GuestMemory::get_slices(memory.as_ref(), descriptor.addr(), len, access)
                .map_err(Error::GuestMemory)?;
            for slice in slices {
                let slice = slice.map_err(Error::GuestMemory)?;
                if chain.pieces.len() == PIECES_MAX {
                    return Err(Error::InvalidChain);
                }
                chain.pieces.push(Piece {
                    start: slice.ptr_guard_mut().as_ptr(),
                    len: slice.len(),
                });
            }
            if writable {
                chain.writable_bytes += len;
            } else {
                chain.readable_bytes += len;
                chain.readable_pieces = chain.pieces.len();
            }
        }
        if complete {
            Ok(chain)
        } else {
            Err(Error::InvalidChain)
        }
    }

    /// The index that names the chain in the used ring.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// The bytes that the device may read. At most 4 GiB.
    pub(crate) fn readable_bytes(&self) -> usize {
        self.readable_bytes
    }

    /// The bytes that the device may write. At most 4 GiB.
    pub(crate) fn writable_bytes(&self) -> usize {
        self.writable_bytes
    }

    /// Copies the device-readable bytes from `offset` on; returns how many there were.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in ranges(&self.pieces[..self.readable_pieces], offset, bytes.len()) {
            done += piece.as_slice().copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Copies to the device-writable bytes from `offset` on; returns how many fitted.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in ranges(&self.pieces[self.readable_pieces..], offset, bytes.len()) {
            piece.as_slice().copy_from(&bytes[done..done + piece.len]);
            dirty::mark(piece.start, piece.len);
            done += piece.len;
        }
        done
    }

    /// Gives the memory of the device-writable part back to the host: it holds nothing any more.
    /// Returns how many bytes that were.
    pub(crate) fn discard(&self) -> io::Result<usize> {
        let mut bytes = 0;
        for piece in &self.pieces[self.readable_pieces..] {
            bytes += discard(&piece.as_slice())?;
        }
        Ok(bytes)
    }

    /// Gives the chain back to the driver, with `written` bytes of it written.
    pub(crate) fn give_back(
        &self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        written: usize,
    ) -> Result<(), DeviceError> {
        for piece in ranges(&self.pieces[self.readable_pieces..], 0, written) {
            dirty::mark(piece.start, piece.len);
        }
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        queue
            .add_used(memory, self.head, written)
            .map_err(|source| DeviceError::Guest { index, source })
    }
}

impl Piece {
    fn as_slice(&self) -> VolatileSlice<'_> {
        // SAFETY: pieces are made in `Chain::parse` only, from slices of a mapping that the chain
        // keeps alive, and are made smaller, never larger.
        unsafe { VolatileSlice::new(self.start, self.len) }
    }

    fn as_iovec(self) -> libc::iovec {
        libc::iovec {
            iov_base: self.start.cast(),
            iov_len: self.len,
        }
    }
}

/// The parts of `pieces` that hold the `len` bytes from `offset` on, or as many as there are.
fn ranges(pieces: &[Piece], mut offset: usize, mut len: usize) -> impl Iterator<Item = Piece> {
    pieces.iter().filter_map(move |piece| {
        let skip = offset.min(piece.len);
        offset -= skip;
        let part = (piece.len - skip).min(len);
        len -= part;
        (part > 0).then(|| Piece {
            // In bounds: `skip` is at most the length.
            start: piece.start.wrapping_add(skip),
            len: part,
        })
    })
}

/// A list of memory ranges for one vectored call of the kernel, borrowed from chains and buffers.
pub(crate) struct IoList<'a> {
    entries: SmallVec<[libc::iovec; 8]>,
    bytes: usize,
    borrowed: PhantomData<&'a ()>,
}

impl<'a> IoList<'a> {
    /// Nothing yet.
    pub(crate) fn new() -> IoList<'a> {
        IoList {
            entries: SmallVec::new(),
            bytes: 0,
            borrowed: PhantomData,
        }
    }

    /// Adds up to `len` device-readable bytes of `chain` from `offset` on.
    pub(crate) fn push_readable(&mut self, chain: &'a Chain, offset: usize, len: usize) {
        self.push(&chain.pieces[..chain.readable_pieces], offset, len);
    }

    /// Adds up to `len` device-writable bytes of `chain` from `offset` on.
    pub(crate) fn push_writable(&mut self, chain: &'a Chain, offset: usize, len: usize) {
        self.push(&chain.pieces[chain.readable_pieces..], offset, len);
    }

    /// Adds memory of our own to read into.
    pub(crate) fn push_buffer(&mut self, buffer: &'a mut [u8]) {
        self.bytes += buffer.len();
        self.entries.push(libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        });
    }

    fn push(&mut self, pieces: &[Piece], offset: usize, len: usize) {
        for piece in ranges(pieces, offset, len) {
            self.bytes += piece.len;
            self.entries.push(piece.as_iovec());
        }
    }

    /// The sum of all lengths.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether `chain` and one range more fit what the kernel takes.
    pub(crate) fn has_room_for(&self, chain: &Chain) -> bool {
        self.entries.len() + chain.pieces.len() < IOVECS_MAX
    }

    /// The ranges as the kernel takes them.
    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.entries
    }

    /// `readv`.
    pub(crate) fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: each range is memory that lives as long as `self`, and that Rust does not look at
        // but through volatile copies, or that `self` borrows mutably.
        let result = unsafe { libc::readv(fd.as_raw_fd(), self.entries.as_ptr(), self.count()) };
        self.filled(result)
    }

    /// `writev`, or `write`, which is cheaper, if there is one range only.
    pub(crate) fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let fd = fd.as_raw_fd();
        let result = if let [one] = self.entries[..] {
            // SAFETY: the range is memory that lives as long as `self`.
            unsafe { libc::write(fd, one.iov_base, one.iov_len) }
        } else {
            // SAFETY: each range is memory that lives as long as `self`.
            unsafe { libc::writev(fd, self.entries.as_ptr(), self.count()) }
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// `preadv`, `offset` bytes into the file.
    pub(crate) fn read_at(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let offset = file_offset(offset)?;
        // SAFETY: as in `read_from`.
        let result =
            unsafe { libc::preadv(fd.as_raw_fd(), self.entries.as_ptr(), self.count(), offset) };
        self.filled(result)
    }

    /// `pwritev2`, `offset` bytes into the file, with RWF flags.
    pub(crate) fn write_at(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        flags: i32,
    ) -> io::Result<usize> {
        let offset = file_offset(offset)?;
        let (entries, count) = (self.entries.as_ptr(), self.count());
        // SAFETY: as in `write_to`.
        let result = unsafe { libc::pwritev2(fd.as_raw_fd(), entries, count, offset, flags) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// `sendmsg` that neither blocks nor raises SIGPIPE, whatever the socket's flags are.
    pub(crate) fn send_to(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the header is complete and names memory that lives as long as `self`.
        let result = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// `recvmsg` that does not block, whatever the socket's flags are.
    pub(crate) fn receive_from(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.message();
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: as in `read_from`; the header is complete.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
        self.filled(result)
    }

    /// What a call that reads into the ranges has returned.
    fn filled(&self, result: isize) -> io::Result<usize> {
        let bytes = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        let mut left = bytes;
        for entry in &self.entries {
            let part = left.min(entry.iov_len);
            dirty::mark(entry.iov_base.cast_const().cast(), part);
            left -= part;
        }
        Ok(bytes)
    }

    fn message(&self) -> libc::msghdr {
        libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: self.entries.as_ptr().cast_mut(),
            msg_iovlen: self.entries.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }

    /// Lists are kept within IOVECS_MAX; a longer one is refused by the kernel.
    fn count(&self) -> i32 {
        i32::try_from(self.entries.len()).unwrap_or(i32::MAX)
    }
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

/// Gives several chains back so that the driver sees them all at once or not yet: a frame that is
/// spread over merged buffers must not be seen in part (virtio 1.2, 5.1.6.4.2).
///
/// Each entry is a chain's head and how many bytes of it were written.
pub(crate) fn give_back_together(
    index: usize,
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    used: &[(u16, u32)],
) -> Result<(), DeviceError> {
    let guest = |source| DeviceError::Guest { index, source };
    let Some(((last, last_written), before)) = used.split_last() else {
        return Ok(());
    };
    let first = queue.next_used();
    let mut position = first;
    for (head, written) in before {
        let slot = u64::from(position % queue.size());
        let [id, len] = [u32::from(*head), *written].map(u32::to_le_bytes);
        // The ring was checked when the driver enabled the queue; the offset is below 300 KiB.
        let address = GuestAddress(queue.used_ring())
            .checked_add(USED_RING_HEADER_BYTES + slot * USED_ELEMENT_BYTES)
            .ok_or_else(|| guest(Error::AddressOverflow))?;
        memory
            .write_slice(&[id, len].concat(), address)
            .map_err(|source| guest(Error::GuestMemory(source)))?;
        position = position.wrapping_add(1);
    }
    // The first round publishes all of them. The others write what is there already, and only make
    // the queue count as many additions as there were, which the suppression of notifications
    // depends on.
    for _ in used {
        queue.set_next_used(position);
        queue
            .add_used(memory, *last, *last_written)
            .map_err(guest)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{
        Driver, INDIRECT, NEXT, REGION_BORDER, TRICKS, WRITE, descriptor,
    };

    fn take(driver: &mut Driver) -> Result<Vec<Chain>, DeviceError> {
        let mut chains = Vec::new();
        take_all(0, &mut driver.queues[0], &driver.memory, 0, |chain| {
            chains.push(chain);
        })?;
        Ok(chains)
    }

    #[test]
    fn a_chain_is_read_and_written_across_its_buffers() {
        let mut driver = Driver::new(&[16]);
        let buffers = [
            driver.readable(b"hel"),
            driver.readable(b""),
            driver.readable(b"lo"),
            driver.writable(2),
            driver.writable(4),
        ];
        let head = driver.offer(0, &buffers);
        let [chain] = &take(&mut driver).unwrap()[..] else {
            panic!("one chain was offered");
        };
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (5, 6));
        let mut bytes = [0; 8];
        assert_eq!(chain.read(1, &mut bytes), 4);
        assert_eq!(&bytes, b"ello\0\0\0\0");
        assert_eq!(chain.read(5, &mut bytes), 0);
        assert_eq!(chain.write(1, b"world!"), 5);
        let written = [
            driver.read(buffers[3].address, 2),
            driver.read(buffers[4].address, 4),
        ];
        assert_eq!(written.concat(), b"\0world");
        chain
            .give_back(0, &mut driver.queues[0], &driver.memory, 6)
            .unwrap();
        assert_eq!(driver.used(0), [(head, 6)]);
    }

    #[test]
    fn a_buffer_may_lie_in_two_regions_of_memory() {
        let mut driver = Driver::new(&[16]);
        driver.describe(0, 0, (REGION_BORDER - 3, 6), WRITE, 0);
        driver.make_available(0, 0);
        let chains = take(&mut driver).unwrap();
        assert_eq!(chains[0].write(0, b"abcdef"), 6);
        assert_eq!(driver.read(REGION_BORDER - 3, 6), b"abcdef");
    }

    #[test]
    fn an_indirect_table_is_followed_and_may_be_longer_than_the_queue() {
        let mut driver = Driver::new(&[4]);
        let table = driver.allocate(16 * 100, false).address;
        let data = driver.readable(&[7; 100]).address;
        for index in 0..100u16 {
            let flags = if index < 99 { NEXT } else { 0 };
            let at = table + 16 * u64::from(index);
            driver.write(
                at,
                &descriptor(data + u64::from(index), 1, flags, index + 1),
            );
        }
        driver.describe(0, 0, (table, 1600), INDIRECT, 0);
        driver.make_available(0, 0);
        let chains = take(&mut driver).unwrap();
        let mut bytes = [0; 200];
        assert_eq!(chains[0].read(0, &mut bytes), 100);
        assert_eq!(bytes[..100], [7; 100]);
    }

    #[test]
    fn an_indirect_table_with_more_pieces_than_one_call_takes_is_refused() {
        let mut driver = Driver::new(&[4]);
        let count = u16::try_from(PIECES_MAX).unwrap() + 1;
        let table = driver.allocate(16 * u32::from(count), false).address;
        for index in 0..count {
            let flags = if index < count - 1 { NEXT } else { 0 };
            driver.write(
                table + 16 * u64::from(index),
                &descriptor(table, 1, flags, index + 1),
            );
        }
        driver.describe(0, 0, (table, 16 * u32::from(count)), INDIRECT, 0);
        driver.make_available(0, 0);
        assert!(matches!(
            take(&mut driver),
            Err(DeviceError::Guest { index: 0, .. })
        ));
    }

    #[test]
    fn tricks_are_the_guests_error() {
        for (name, trick) in TRICKS {
            let mut driver = Driver::new(&[16]);
            trick(&mut driver, 0);
            let result = take(&mut driver);
            assert!(
                matches!(result, Err(DeviceError::Guest { index: 0, .. })),
                "{name}"
            );
        }
    }

    #[test]
    fn chains_given_back_together_are_published_together_and_counted_one_by_one() {
        let mut driver = Driver::new(&[4]);
        driver.queues[0].set_event_idx(true);
        // Twice around the ring, so that the elements wrap.
        for round in 0..4 {
            let buffers: Vec<_> = (0..3).map(|_| driver.writable(8)).collect();
            let heads: Vec<u16> = buffers.iter().map(|one| driver.offer(0, &[*one])).collect();
            let chains = take(&mut driver).unwrap();
            let used: Vec<_> = (1..)
                .zip(&chains)
                .map(|(len, chain)| (chain.head(), len))
                .collect();
            give_back_together(0, &mut driver.queues[0], &driver.memory, &used).unwrap();
            assert_eq!(
                driver.used(0),
                [(heads[0], 1), (heads[1], 2), (heads[2], 3)]
            );
            // The driver asked to hear of the first of the three.
            driver.set_used_event(0, 3 * round);
            assert!(driver.queues[0].needs_notification(&driver.memory).unwrap());
        }
    }
}
