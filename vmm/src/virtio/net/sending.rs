//! Frames on their way from the guest to the tap.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use smallvec::SmallVec;

use super::batch::{Batch, FRAMES_MAX, Outcomes};
use super::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use crate::virtio::chain::{Chain, IoList};
use crate::virtio::tap::HEADER_BYTES;

/// From how many frames on a ring costs less than a call for each.
const RING_FRAMES_MIN: usize = 4;

/// Frames that the tap has not taken yet, and how they get there.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) frames: VecDeque<Chain>,
    /// The tap takes no frame at the moment.
    pub(super) blocked: bool,
    /// None where io_uring is disabled, filtered or unknown.
    batch: Option<Batch>,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// The chains to be given back, as the used ring has them.
    pub(super) used: SmallVec<[(u16, u32); FRAMES_MAX]>,
    pub(super) frames: usize,
    /// Without virtio headers.
    pub(super) bytes: usize,
    /// Frames that were malformed, or that the tap refused.
    pub(super) dropped: usize,
}

impl Sending {
    pub(super) fn new() -> Sending {
        Sending {
            batch: Batch::new().ok(),
            ..Sending::without_ring()
        }
    }

    /// One that makes a system call for each frame.
    pub(super) fn without_ring() -> Sending {
        Sending {
            frames: VecDeque::new(),
            blocked: false,
            batch: None,
        }
    }

    /// The frame that would be number `index` of the next batch, if it may be so long.
    pub(super) fn next_of_batch(&self, index: usize) -> Option<&Chain> {
        self.frames.get(index).filter(|_| index < FRAMES_MAX)
    }

    /// Sends the first `count` frames, at most [`FRAMES_MAX`], to a non-blocking tap; without one they are
    /// lost. Those that the tap has no room for stay, and [`blocked`](Self::blocked) says so.
    pub(super) fn send(&mut self, count: usize, tap: Option<BorrowedFd<'_>>) -> Sent {
        let mut outcomes = self.write(count, tap).into_iter();
        let mut sent = Sent::default();
        let mut stays: SmallVec<[bool; FRAMES_MAX]> = SmallVec::new();
        for chain in self.frames.iter().take(count) {
            let outcome = outcomes
                .next()
                .unwrap_or_else(|| Err(io::ErrorKind::Other.into()));
            let kind = outcome.as_ref().err().map(io::Error::kind);
            self.blocked |= kind == Some(io::ErrorKind::WouldBlock);
            stays.push(matches!(
                kind,
                Some(io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
            ));
            if stays.last() == Some(&true) {
                continue;
            }
            sent.used.push((chain.head(), 0));
            match outcome {
                Ok(bytes) => {
                    sent.frames += 1;
                    sent.bytes += bytes.saturating_sub(HEADER_BYTES);
                }
                Err(_) => sent.dropped += 1,
            }
        }
        if stays.contains(&true) {
            // Only a tap whose buffer somebody has bounded is ever full. Frames that found room after
            // one that did not overtake it, as they may on any network.
            let mut stays = stays.into_iter();
            self.frames.retain(|_| stays.next().unwrap_or(true));
        } else {
            self.frames.drain(..count);
        }
        sent
    }

    /// Forgets all frames.
    pub(super) fn forget(&mut self) {
        self.frames.clear();
        self.blocked = false;
    }

    /// What became of the first `count` frames, in their order; nothing is known of those that are
    /// missing at the end.
    fn write(&mut self, count: usize, tap: Option<BorrowedFd<'_>>) -> Outcomes {
        let Some(tap) = tap else {
            return Outcomes::new();
        };
        let frames = self.frames.iter().take(count);
        if let Some(batch) = &mut self.batch
            && count >= RING_FRAMES_MIN
            && frames.clone().all(is_well_formed)
        {
            match batch.write(tap, frames.clone()) {
                Ok(outcomes) => return outcomes,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => self.batch = None,
                Err(_) => {
                    self.batch = None;
                    return Outcomes::new();
                }
            }
        }
        let write = |frame| {
            if !is_well_formed(frame) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut list = IoList::new();
            list.push_readable(frame, 0, FRAME_BYTES_MAX);
            list.write_to(tap)
        };
        frames.map(write).collect()
    }
}

fn is_well_formed(frame: &Chain) -> bool {
    (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame.readable_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::unistd::{pipe2, read};

    use super::*;
    use crate::virtio::chain::take_all;
    use crate::virtio::testing::Driver;

    const CAPACITY: usize = 4096;

    /// Stands in for a tap whose buffer is bounded.
    fn pipe() -> (OwnedFd, OwnedFd) {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let capacity = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        assert_eq!(usize::try_from(capacity).unwrap(), CAPACITY);
        (reader, writer)
    }

    /// Both ways of sending.
    fn ways() -> [Sending; 2] {
        let sending = Sending::new();
        assert!(
            sending.batch.is_some(),
            "this test needs a host that allows io_uring"
        );
        [sending, Sending::without_ring()]
    }

    /// Frames of these lengths, each filled with its number and in two pieces; their heads.
    fn offer(sending: &mut Sending, driver: &mut Driver, lengths: &[usize]) -> Vec<u16> {
        let mut heads = Vec::new();
        for (number, length) in (0u8..).zip(lengths) {
            let frame = vec![number; *length];
            let (header, rest) = frame.split_at(HEADER_BYTES.min(*length));
            let pieces = [driver.readable(header), driver.readable(rest)];
            heads.push(driver.offer(0, &pieces));
        }
        take_all(0, &mut driver.queues[0], &driver.memory, 0, |chain| {
            sending.frames.push_back(chain);
        })
        .unwrap();
        heads
    }

    fn received(reader: &OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; 2 * CAPACITY];
        let length = read(reader, &mut bytes).unwrap();
        bytes.truncate(length);
        bytes
    }

    fn used(sent: &Sent) -> Vec<u16> {
        sent.used.iter().map(|(head, _)| *head).collect()
    }

    #[test]
    fn frames_arrive_in_their_order_and_malformed_ones_are_dropped() {
        for lengths in [[40, 50, 60, 70, 80], [40, 50, FRAME_BYTES_MIN - 1, 70, 80]] {
            for mut sending in ways() {
                let mut driver = Driver::new(&[32]);
                let (reader, writer) = pipe();
                let heads = offer(&mut sending, &mut driver, &lengths);
                let sent = sending.send(lengths.len(), Some(writer.as_fd()));
                assert_eq!(used(&sent), heads);
                let expected: Vec<_> = (0u8..)
                    .zip(lengths)
                    .filter(|(_, length)| *length >= FRAME_BYTES_MIN)
                    .flat_map(|(number, length)| vec![number; length])
                    .collect();
                assert_eq!(received(&reader), expected);
                let dropped = lengths
                    .iter()
                    .filter(|length| **length < FRAME_BYTES_MIN)
                    .count();
                assert_eq!(sent.dropped, dropped);
                assert_eq!(sent.frames, lengths.len() - dropped);
                assert_eq!(sent.bytes, expected.len() - sent.frames * HEADER_BYTES);
                assert!(sending.frames.is_empty() && !sending.blocked);
            }
        }
    }

    #[test]
    fn frames_stay_that_the_tap_has_no_room_for() {
        for mut sending in ways() {
            let mut driver = Driver::new(&[32]);
            let (reader, writer) = pipe();
            let heads = offer(&mut sending, &mut driver, &[1500, 1500, 1600, 1000, 1700]);
            let sent = sending.send(5, Some(writer.as_fd()));
            assert_eq!(used(&sent), [heads[0], heads[1], heads[3]]);
            assert!(sending.blocked);
            assert_eq!(received(&reader).len(), 4000);

            sending.blocked = false;
            let sent = sending.send(2, Some(writer.as_fd()));
            assert_eq!(used(&sent), [heads[2], heads[4]]);
            assert_eq!(received(&reader), [vec![2; 1600], vec![4; 1700]].concat());
            assert!(sending.frames.is_empty() && !sending.blocked);
        }
    }

    #[test]
    fn frames_are_lost_without_a_tap_and_with_one_that_is_gone() {
        for mut sending in ways() {
            let mut driver = Driver::new(&[32]);
            let heads = offer(&mut sending, &mut driver, &[100; 10]);
            let sent = sending.send(5, None);
            assert_eq!((used(&sent), sent.dropped), (heads[..5].to_vec(), 5));

            let (_, writer) = pipe();
            let sent = sending.send(5, Some(writer.as_fd()));
            assert_eq!((used(&sent), sent.dropped), (heads[5..].to_vec(), 5));
            assert!(sending.frames.is_empty() && !sending.blocked);
        }
    }
}
