//! What a guest has written to its serial port of late, for those that look on.
//!
//! The guest never waits for them. One who reads too slowly misses something, and is told how much.

pub mod client;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use crate::events::event;

/// What is kept.
pub const RECENT_BYTES: usize = 32 * 1024;

/// The last output, and who wants to hear of more.
#[derive(Debug)]
pub struct Feed {
    recent: Mutex<Recent>,
    /// Readable when there is more than the readers were told of.
    news: EventFd,
}

#[derive(Debug, Default)]
struct Recent {
    bytes: VecDeque<u8>,
    /// All that was ever written, in bytes; the last of them are there.
    end: u64,
    readers: usize,
    /// `news` is readable already.
    told: bool,
}

impl Recent {
    /// How many bytes were written before those that are there.
    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }
}

impl Feed {
    /// Nothing yet.
    pub fn new() -> io::Result<Arc<Feed>> {
        Ok(Arc::new(Feed {
            recent: Mutex::default(),
            news: event()?,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().expect("nothing panics in here")
    }

    /// The guest has written something.
    pub fn push(&self, bytes: &[u8]) {
        let mut recent = self.lock();
        recent.end += bytes.len() as u64;
        let kept = &bytes[bytes.len().saturating_sub(RECENT_BYTES)..];
        let excess = (recent.bytes.len() + kept.len()).saturating_sub(RECENT_BYTES);
        recent.bytes.drain(..excess);
        recent.bytes.extend(kept);
        if recent.readers > 0 && !recent.told {
            recent.told = true;
            // A full counter wakes as well as a written one.
            let _ = self.news.write(1);
        }
    }

    /// Readable when readers have something to read, until [`take_news`](Self::take_news).
    pub fn news_fd(&self) -> RawFd {
        self.news.as_raw_fd()
    }

    /// All readers are about to read.
    pub fn take_news(&self) {
        let mut recent = self.lock();
        recent.told = false;
        // Readable or not: it is only being made unreadable.
        let _ = self.news.read();
    }

    /// One more who looks on, from the oldest byte on that there is.
    pub fn reader(self: &Arc<Self>) -> Reader {
        let mut recent = self.lock();
        recent.readers += 1;
        Reader {
            seen: recent.start(),
            feed: self.clone(),
        }
    }
}

/// One who looks on.
#[derive(Debug)]
pub struct Reader {
    feed: Arc<Feed>,
    /// How much of all that was ever written.
    seen: u64,
}

impl Reader {
    /// Adds to `output` what is new, at most `room` bytes and what it takes to tell of a loss. Returns
    /// whether there was something.
    pub fn read(&mut self, output: &mut Vec<u8>, room: usize) -> bool {
        let recent = self.feed.lock();
        if room == 0 || self.seen == recent.end {
            return false;
        }
        let start = recent.start();
        if self.seen < start {
            let lost = start - self.seen;
            output.extend(format!("\r\n[{lost} bytes of output were missed]\r\n").bytes());
            self.seen = start;
        }
        let from = usize::try_from(self.seen - start).expect("it is there");
        let count = room.min(recent.bytes.len() - from);
        output.extend(recent.bytes.range(from..from + count));
        self.seen += count as u64;
        true
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.feed.lock().readers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(reader: &mut Reader, room: usize) -> String {
        let mut output = Vec::new();
        reader.read(&mut output, room);
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn one_who_comes_late_sees_the_last_output_and_then_all_of_it() {
        let feed = Feed::new().unwrap();
        feed.push(b"early ");
        let mut first = feed.reader();
        feed.push(b"late");
        assert_eq!(read(&mut first, 7), "early l");
        assert_eq!(read(&mut first, 7), "ate");
        assert_eq!(read(&mut first, 7), "");
        assert_eq!(read(&mut feed.reader(), 100), "early late");
    }

    #[test]
    fn one_who_reads_too_slowly_is_told_what_is_missing_and_holds_up_nobody() {
        let feed = Feed::new().unwrap();
        let (mut slow, mut quick) = (feed.reader(), feed.reader());
        feed.push(b"lost");
        assert_eq!(read(&mut quick, 100), "lost");
        for _ in 0..RECENT_BYTES {
            feed.push(b"x");
        }
        assert_eq!(
            read(&mut slow, 3),
            "\r\n[4 bytes of output were missed]\r\nxxx"
        );
        assert_eq!(read(&mut quick, RECENT_BYTES), "x".repeat(RECENT_BYTES));
        // More at once than is kept.
        feed.push(&[b'y'; RECENT_BYTES + 5]);
        let tail = "y".repeat(RECENT_BYTES);
        let missed = "\r\n[5 bytes of output were missed]\r\n";
        assert_eq!(read(&mut quick, RECENT_BYTES), format!("{missed}{tail}"));
    }

    #[test]
    fn readers_are_told_once_until_they_look_and_nobody_is_if_there_are_none() {
        let feed = Feed::new().unwrap();
        feed.push(b"x");
        feed.news.read().unwrap_err();
        let reader = feed.reader();
        feed.push(b"x");
        feed.push(b"x");
        assert_eq!(feed.news.read().unwrap(), 1);
        feed.take_news();
        feed.push(b"x");
        assert_eq!(feed.news.read().unwrap(), 1);
        drop(reader);
        feed.take_news();
        feed.push(b"x");
        feed.news.read().unwrap_err();
    }
}
