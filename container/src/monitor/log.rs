//! The log: the workload's output as lines of JSON, in a file that is renamed when it is full.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::Serialize;

use super::protocol::LogSpec;

/// A longer line is logged in parts of this size.
const TEXT_BYTES_MAX: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

#[derive(Serialize)]
struct Line<'a> {
    at: Timestamp,
    stream: Stream,
    text: &'a str,
}

#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    bytes_max: u64,
    file: File,
    /// What is in the file.
    size: u64,
    /// Lines that are not in the file yet; empty between calls.
    batch: Vec<u8>,
    /// What went wrong in the present call.
    error: Option<io::Error>,
    /// Beginnings of lines, of standard output and of standard error.
    begun: [Vec<u8>; 2],
}

impl Log {
    /// Opens the log, to add to what is there.
    pub(super) fn open(spec: &LogSpec) -> io::Result<Log> {
        let file = open(&spec.path)?;
        Ok(Log {
            path: spec.path.clone(),
            bytes_max: spec.bytes_max,
            size: file.metadata()?.len(),
            file,
            batch: Vec::new(),
            error: None,
            begun: [Vec::new(), Vec::new()],
        })
    }

    /// Logs the lines that `bytes` complete.
    ///
    /// # Errors
    ///
    /// If the file cannot be written, as on a full disk. These lines are lost, later ones are tried
    /// again: a workload is not stopped for want of a log.
    pub(super) fn append(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let at = Timestamp::now();
        let mut begun = std::mem::take(&mut self.begun[stream as usize]);
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            begun.extend_from_slice(part);
            while begun.len() > TEXT_BYTES_MAX {
                let end = boundary(&begun, TEXT_BYTES_MAX);
                self.add(at, stream, &begun[..end]);
                begun.drain(..end);
            }
            if begun.ends_with(b"\n") {
                self.add(at, stream, &begun);
                begun.clear();
            }
        }
        self.begun[stream as usize] = begun;
        self.write();
        self.error.take().map_or(Ok(()), Err)
    }

    /// Logs what has no line end.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        let at = Timestamp::now();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let begun = std::mem::take(&mut self.begun[stream as usize]);
            if !begun.is_empty() {
                self.add(at, stream, &begun);
            }
        }
        self.write();
        self.error.take().map_or(Ok(()), Err)
    }

    /// Adds a line to the batch. If the file would then be too large, the batch is written before,
    /// and a new file begun.
    fn add(&mut self, at: Timestamp, stream: Stream, text: &[u8]) {
        let before = self.batch.len();
        let line = Line {
            at,
            stream,
            text: &String::from_utf8_lossy(text),
        };
        // Writing into memory does not fail, and neither does making JSON of this.
        serde_json::to_writer(&mut self.batch, &line).ok();
        self.batch.push(b'\n');
        let present = self.size + before as u64;
        if present > 0 && self.size + self.batch.len() as u64 > self.bytes_max {
            let line = self.batch.split_off(before);
            self.write();
            self.rotate();
            self.batch = line;
        }
    }

    fn write(&mut self) {
        let written = self.file.write_all(&self.batch);
        match written {
            Ok(()) => self.size += self.batch.len() as u64,
            Err(error) => {
                // A part of a line would spoil the next one.
                self.file.set_len(self.size).ok();
                self.error = Some(error);
            }
        }
        self.batch.clear();
    }

    fn rotate(&mut self) {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        match fs::rename(&self.path, old).and_then(|()| open(&self.path)) {
            Ok(file) => {
                self.file = file;
                self.size = 0;
            }
            Err(error) => {
                // Better a log with a hole than a disk that is full.
                if self.file.set_len(0).is_ok() {
                    self.size = 0;
                }
                self.error = Some(error);
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// The last place at or before `end` that does not cut a character of UTF-8 in two.
fn boundary(bytes: &[u8], end: usize) -> usize {
    /// All but the first byte of a character; there are at most three.
    fn continues(byte: u8) -> bool {
        byte & 0xc0 == 0x80
    }
    let start = end.saturating_sub(3);
    (start..=end)
        .rev()
        .find(|&at| !continues(bytes[at]))
        .unwrap_or(end)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Read {
        stream: String,
        text: String,
        #[expect(dead_code, reason = "it must be there and be a time")]
        at: Timestamp,
    }

    fn log(directory: &Path, bytes_max: u64) -> Log {
        let path = directory.join("log");
        Log::open(&LogSpec { path, bytes_max }).unwrap()
    }

    fn read(path: &Path) -> Vec<Read> {
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn lines_come_together_from_pieces_and_streams_do_not_mix() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = log(directory.path(), 1 << 20);
        log.append(Stream::Stdout, b"one\ntw").unwrap();
        log.append(Stream::Stderr, b"bad \xff\n").unwrap();
        log.append(Stream::Stdout, b"o\n\nno end").unwrap();
        log.finish().unwrap();
        let lines = read(&directory.path().join("log"));
        let lines: Vec<_> = lines
            .iter()
            .map(|line| (line.stream.as_str(), line.text.as_str()))
            .collect();
        assert_eq!(
            lines,
            [
                ("stdout", "one\n"),
                ("stderr", "bad \u{fffd}\n"),
                ("stdout", "two\n"),
                ("stdout", "\n"),
                ("stdout", "no end"),
            ]
        );
    }

    #[test]
    fn a_huge_line_is_parted_between_characters_and_nothing_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = log(directory.path(), 1 << 30);
        let text = format!("x{}\n", "é€😀".repeat(10_000));
        for piece in text.as_bytes().chunks(5000) {
            log.append(Stream::Stdout, piece).unwrap();
        }
        log.finish().unwrap();
        let lines = read(&directory.path().join("log"));
        assert!(lines.len() > 5 && lines.iter().all(|line| line.text.len() <= TEXT_BYTES_MAX));
        let whole: String = lines.into_iter().map(|line| line.text).collect();
        assert_eq!(whole, text);
        // Bytes that are no text at all must not be held for ever either.
        log.append(Stream::Stdout, &[0x80; 3 * TEXT_BYTES_MAX])
            .unwrap();
        assert!(log.begun[0].len() <= TEXT_BYTES_MAX);
    }

    #[test]
    fn a_full_log_is_renamed_and_two_files_are_all_there_ever_is() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = log(directory.path(), 1000);
        for number in 0..100 {
            log.append(Stream::Stdout, format!("line {number}\n").as_bytes())
                .unwrap();
        }
        let (old, new) = (directory.path().join("log.1"), directory.path().join("log"));
        for path in [&old, &new] {
            assert!(fs::metadata(path).unwrap().len() <= 1000);
        }
        let mut lines = read(&old);
        lines.extend(read(&new));
        let last: Vec<_> = (100 - lines.len()..100)
            .map(|n| format!("line {n}\n"))
            .collect();
        assert_eq!(
            lines.into_iter().map(|line| line.text).collect::<Vec<_>>(),
            last
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
