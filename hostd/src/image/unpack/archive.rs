//! Reads a tar stream entry by entry: ustar, GNU and PAX, with sparse files, in bounded memory.
//!
//! Header fields are decoded by the `tar` crate. Its own iterator is not used, since it reads an
//! extension header of any size into memory; the archive's author is hostile.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::pax::{
    SPARSE_SEGMENTS_MAX, Sparse, invalid, number, records, time, too_many_segments, without_nul,
};

/// Long names and PAX records of one entry: what Go's `archive/tar` accepts.
const EXTENSION_BYTES_MAX: u64 = 1024 * 1024;

/// Extended attributes of one entry.
const XATTRS_MAX: usize = 64;

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::image) enum Kind {
    Regular,
    HardLink,
    Symlink,
    Directory,
    Fifo,
    /// A character or block device.
    Device,
}

/// Seconds since the epoch and nanoseconds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(in crate::image) struct Time {
    pub(in crate::image) seconds: i64,
    pub(in crate::image) nanoseconds: u32,
}

/// A piece of a sparse file that holds data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::image) struct Segment {
    pub(in crate::image) offset: u64,
    pub(in crate::image) length: u64,
}

/// An entry as the archive has it: nothing in it has been checked but its form.
#[derive(Clone, Debug)]
pub(in crate::image) struct Entry {
    pub(in crate::image) path: Vec<u8>,
    pub(in crate::image) link: Vec<u8>,
    pub(in crate::image) kind: Kind,
    /// Permission bits, with setuid, setgid and sticky.
    pub(in crate::image) mode: u32,
    pub(in crate::image) uid: u64,
    pub(in crate::image) gid: u64,
    pub(in crate::image) modified: Time,
    /// The size of the file, holes included.
    pub(in crate::image) size: u64,
    pub(in crate::image) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The data of a sparse file, in order; the whole file if absent.
    pub(in crate::image) segments: Option<Vec<Segment>>,
}

/// Extension headers that come before an entry and speak of it.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Vec<(String, Vec<u8>)>,
}

/// The stream. After [`Self::next_entry`], reading gives the data of that entry.
pub(in crate::image) struct Archive<R> {
    stream: R,
    /// Bytes of the current entry's data that have not been read.
    data: u64,
    /// Bytes after the data up to the next block.
    padding: u64,
}

impl<R: Read> Archive<R> {
    pub(in crate::image) fn new(stream: R) -> Self {
        Self {
            stream,
            data: 0,
            padding: 0,
        }
    }

    /// The next entry, or `None` at the end of the archive.
    ///
    /// # Errors
    /// Those of the stream, and `InvalidData` for what is not a tar archive.
    pub(in crate::image) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        loop {
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            let kind = match header.entry_type() {
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::Regular,
                EntryType::Link => Kind::HardLink,
                EntryType::Symlink => Kind::Symlink,
                EntryType::Directory => Kind::Directory,
                EntryType::Fifo => Kind::Fifo,
                EntryType::Char | EntryType::Block => Kind::Device,
                EntryType::GNULongName => {
                    extensions.path = Some(without_nul(self.extension()?));
                    continue;
                }
                EntryType::GNULongLink => {
                    extensions.link = Some(without_nul(self.extension()?));
                    continue;
                }
                EntryType::XHeader => {
                    extensions.pax = records(&self.extension()?)?;
                    continue;
                }
                // Comments such as git's commit; no writer of layers puts file attributes there.
                EntryType::XGlobalHeader => {
                    self.extension()?;
                    continue;
                }
                other => {
                    return Err(invalid(format!(
                        "unknown entry type {:#04x}",
                        other.as_byte()
                    )));
                }
            };
            return self.entry(&header, kind, extensions).map(Some);
        }
    }

    /// Reads up to the next header's start and that header. `None` at the end.
    fn next_header(&mut self) -> io::Result<Option<Header>> {
        let rest = self.data + self.padding;
        let skipped = io::copy(&mut self.stream.by_ref().take(rest), &mut io::sink())?;
        if skipped < rest {
            return Err(truncated());
        }
        (self.data, self.padding) = (0, 0);
        let mut block = [0; BLOCK];
        let length = read_block(&mut self.stream, &mut block)?;
        // A block of zeros ends an archive; some writers end it without.
        if length == 0 || block == [0; BLOCK] {
            return Ok(None);
        }
        if length < BLOCK {
            return Err(truncated());
        }
        let header = Header::from_byte_slice(&block);
        let sum: u32 = block[..148]
            .iter()
            .chain(&block[156..])
            .map(|&byte| u32::from(byte))
            .sum();
        if header.cksum()? != sum + 8 * u32::from(b' ') {
            return Err(invalid("a header's checksum is wrong"));
        }
        self.expect_data(header.entry_size()?)?;
        Ok(Some(header.clone()))
    }

    fn expect_data(&mut self, size: u64) -> io::Result<()> {
        let padded = size
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or_else(|| invalid("an entry's size is out of range"))?;
        (self.data, self.padding) = (size, padded - size);
        Ok(())
    }

    /// The whole data of an extension header.
    fn extension(&mut self) -> io::Result<Vec<u8>> {
        if self.data > EXTENSION_BYTES_MAX {
            return Err(invalid(format!(
                "an extension header exceeds {EXTENSION_BYTES_MAX} bytes"
            )));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn entry(&mut self, header: &Header, kind: Kind, extensions: Extensions) -> io::Result<Entry> {
        let old = header.as_old();
        let path = extensions
            .path
            .unwrap_or_else(|| header.path_bytes().into_owned());
        // A V7 archive has no type for directories but a slash.
        let old_directory = kind == Kind::Regular && path.ends_with(b"/");
        let mut entry = Entry {
            path,
            link: extensions
                .link
                .or_else(|| Some(header.link_name_bytes()?.into_owned()))
                .unwrap_or_default(),
            kind: if old_directory { Kind::Directory } else { kind },
            mode: u32::try_from(field(&old.mode, || header.mode().map(u64::from))? & 0o7777)
                .expect("twelve bits"),
            uid: field(&old.uid, || header.uid())?,
            gid: field(&old.gid, || header.gid())?,
            modified: Time {
                seconds: i64::try_from(field(&old.mtime, || header.mtime())?).unwrap_or(0),
                nanoseconds: 0,
            },
            size: self.data,
            xattrs: Vec::new(),
            segments: None,
        };
        let mut sparse = Sparse::default();
        for (key, value) in extensions.pax {
            if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                if entry.xattrs.len() == XATTRS_MAX {
                    return Err(invalid(format!(
                        "an entry has over {XATTRS_MAX} attributes"
                    )));
                }
                entry.xattrs.push((name.as_bytes().to_vec(), value));
            } else if let Some(name) = key.strip_prefix("GNU.sparse.") {
                sparse.record(name, value)?;
            } else {
                self.apply_pax(&mut entry, &key, value)?;
            }
        }
        if header.entry_type() == EntryType::GNUSparse {
            self.read_gnu_sparse(header, &mut entry)?;
        } else if sparse.is_present() && kind == Kind::Regular {
            self.read_pax_sparse(sparse, &mut entry)?;
        }
        if !matches!(entry.kind, Kind::Regular) {
            entry.size = 0;
        }
        Ok(entry)
    }

    fn apply_pax(&mut self, entry: &mut Entry, key: &str, value: Vec<u8>) -> io::Result<()> {
        match key {
            "path" => entry.path = without_nul(value),
            "linkpath" => entry.link = without_nul(value),
            "uid" => entry.uid = number(&value)?,
            "gid" => entry.gid = number(&value)?,
            "mtime" => entry.modified = time(&value)?,
            "size" => {
                entry.size = number(&value)?;
                self.expect_data(entry.size)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// The old GNU format: four segments in the header, more in blocks that follow it.
    fn read_gnu_sparse(&mut self, header: &Header, entry: &mut Entry) -> io::Result<()> {
        let gnu = header
            .as_gnu()
            .ok_or_else(|| invalid("a sparse file without a GNU header"))?;
        let mut segments = Vec::new();
        push_segments(&mut segments, &gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut extended = GnuExtSparseHeader::new();
            if read_block(&mut self.stream, extended.as_mut_bytes())? < BLOCK {
                return Err(truncated());
            }
            push_segments(&mut segments, extended.sparse())?;
            more = extended.is_extended();
        }
        self.set_sparse(entry, gnu.real_size()?, segments)
    }

    /// PAX formats 0.0, 0.1 (a map in the records) and 1.0 (a map before the data).
    fn read_pax_sparse(&mut self, sparse: Sparse, entry: &mut Entry) -> io::Result<()> {
        if let Some(name) = &sparse.name {
            entry.path.clone_from(name);
        }
        let size = sparse
            .size
            .ok_or_else(|| invalid("a sparse file without a size"))?;
        let segments = if sparse.map_in_data {
            self.read_sparse_map()?
        } else {
            sparse.segments()?
        };
        self.set_sparse(entry, size, segments)
    }

    fn read_sparse_map(&mut self) -> io::Result<Vec<Segment>> {
        let mut read = 0;
        let count = self.map_number(&mut read)?;
        if count > SPARSE_SEGMENTS_MAX as u64 {
            return Err(too_many_segments());
        }
        let mut segments = Vec::new();
        for _ in 0..count {
            let offset = self.map_number(&mut read)?;
            segments.push(Segment {
                offset,
                length: self.map_number(&mut read)?,
            });
        }
        // The data starts at the next block.
        let padding = read.next_multiple_of(BLOCK as u64) - read;
        let skipped = io::copy(&mut self.take(padding), &mut io::sink())?;
        if skipped < padding {
            Err(truncated())
        } else {
            Ok(segments)
        }
    }

    /// A decimal number on a line of its own.
    fn map_number(&mut self, read: &mut u64) -> io::Result<u64> {
        let mut digits = Vec::new();
        loop {
            let mut byte = [0];
            self.read_exact(&mut byte)?;
            *read += 1;
            match byte[0] {
                b'\n' => return number(&digits),
                _ if digits.len() > 20 => return Err(invalid("a sparse map is malformed")),
                digit => digits.push(digit),
            }
        }
    }

    /// Checks that the pieces are in order, inside the file, and as long as the data that is there.
    fn set_sparse(&self, entry: &mut Entry, size: u64, segments: Vec<Segment>) -> io::Result<()> {
        let (mut end, mut total) = (0, 0_u64);
        for segment in &segments {
            let next = segment.offset.checked_add(segment.length);
            match next {
                Some(next) if segment.offset >= end && next <= size => end = next,
                _ => return Err(invalid("the pieces of a sparse file overlap or exceed it")),
            }
            total += segment.length;
        }
        if total > self.data {
            return Err(invalid("a sparse file has less data than its map says"));
        }
        entry.size = size;
        entry.segments = Some(segments);
        Ok(())
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.data)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let read = self.stream.read(&mut buffer[..wanted])?;
        if read == 0 {
            return Err(truncated());
        }
        self.data -= read as u64;
        Ok(read)
    }
}

fn push_segments(segments: &mut Vec<Segment>, headers: &[GnuSparseHeader]) -> io::Result<()> {
    for header in headers.iter().filter(|header| !header.is_empty()) {
        if segments.len() == SPARSE_SEGMENTS_MAX {
            return Err(too_many_segments());
        }
        segments.push(Segment {
            offset: header.offset()?,
            length: header.length()?,
        });
    }
    Ok(())
}

/// A header's number; a field that was left blank is zero.
fn field(raw: &[u8], value: impl FnOnce() -> io::Result<u64>) -> io::Result<u64> {
    if raw.iter().all(|byte| matches!(byte, 0 | b' ')) {
        Ok(0)
    } else {
        value()
    }
}

/// Reads until `block` is full or the stream ends; returns how much was read.
fn read_block(stream: &mut impl Read, block: &mut [u8; BLOCK]) -> io::Result<usize> {
    let mut length = 0;
    while length < BLOCK {
        match stream.read(&mut block[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the archive ends in the middle of an entry",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: EntryType, path: &str, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_path(path).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        header
    }

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = body.len();
        while length != body.len() + length.to_string().len() {
            length = body.len() + length.to_string().len();
        }
        [length.to_string().as_bytes(), &body].concat()
    }

    fn padded(mut data: Vec<u8>) -> Vec<u8> {
        data.resize(data.len().next_multiple_of(BLOCK), 0);
        data
    }

    fn first(bytes: &[u8]) -> io::Result<(Entry, Vec<u8>)> {
        let mut archive = Archive::new(bytes);
        let entry = archive.next_entry()?.unwrap();
        let mut data = Vec::new();
        archive.read_to_end(&mut data)?;
        assert!(archive.next_entry()?.is_none());
        Ok((entry, data))
    }

    #[test]
    fn pax_records_override_the_header_and_may_hold_any_byte() {
        let long = format!("{}file", "long/".repeat(60));
        let pax = [
            record("path", long.as_bytes()),
            record("mtime", b"-1.25"),
            record("uid", b"70000000"),
            record("SCHILY.xattr.security.capability", b"\x01\0\0\x02\n=\n\0"),
        ]
        .concat();
        let bytes = [
            header(EntryType::XHeader, "x", pax.len() as u64)
                .as_bytes()
                .to_vec(),
            padded(pax),
            header(EntryType::Regular, "short", 3).as_bytes().to_vec(),
            padded(b"abc".to_vec()),
        ]
        .concat();
        let (entry, data) = first(&bytes).unwrap();
        assert_eq!(entry.path, long.as_bytes());
        assert_eq!(
            entry.modified,
            Time {
                seconds: -2,
                nanoseconds: 750_000_000
            }
        );
        assert_eq!(entry.uid, 70_000_000);
        let capability = (
            b"security.capability".to_vec(),
            b"\x01\0\0\x02\n=\n\0".to_vec(),
        );
        assert_eq!(entry.xattrs, [capability]);
        assert_eq!((entry.kind, data), (Kind::Regular, b"abc".to_vec()));
    }

    #[test]
    fn an_extension_header_costs_bounded_memory() {
        for kind in [
            EntryType::XHeader,
            EntryType::GNULongName,
            EntryType::XGlobalHeader,
        ] {
            let bytes = header(kind, "x", EXTENSION_BYTES_MAX + 1)
                .as_bytes()
                .to_vec();
            let error = Archive::new(&bytes[..]).next_entry().unwrap_err();
            assert!(error.to_string().contains("extension header"), "{error}");
        }
    }

    #[test]
    fn each_sparse_format_gives_the_same_file() {
        let mut old = header(EntryType::GNUSparse, "s", 5);
        let gnu = old.as_gnu_mut().unwrap();
        gnu.set_real_size(5000);
        for (slot, (offset, length)) in [(1000, 2), (4997, 3)].into_iter().enumerate() {
            gnu.sparse[slot].set_offset(offset);
            gnu.sparse[slot].set_length(length);
        }
        old.set_cksum();
        let old = [old.as_bytes().to_vec(), padded(b"abcde".to_vec())].concat();

        let with_pax = |pax: Vec<u8>, data: Vec<u8>| {
            [
                header(EntryType::XHeader, "x", pax.len() as u64)
                    .as_bytes()
                    .to_vec(),
                padded(pax),
                header(EntryType::Regular, "GNUSparseFile.0/s", data.len() as u64)
                    .as_bytes()
                    .to_vec(),
                padded(data),
            ]
            .concat()
        };
        let name = [
            record("GNU.sparse.name", b"s"),
            record("GNU.sparse.realsize", b"5000"),
        ]
        .concat();
        let map = record("GNU.sparse.map", b"1000,2,4997,3");
        let in_records = with_pax([name.clone(), map].concat(), b"abcde".to_vec());
        let version = [
            record("GNU.sparse.major", b"1"),
            record("GNU.sparse.minor", b"0"),
        ]
        .concat();
        let data = [padded(b"2\n1000\n2\n4997\n3\n".to_vec()), b"abcde".to_vec()].concat();
        let in_data = with_pax([name, version].concat(), data);

        for bytes in [old, in_records, in_data] {
            let (entry, data) = first(&bytes).unwrap();
            assert_eq!((entry.path.as_slice(), entry.size), (&b"s"[..], 5000));
            let segments = entry.segments.unwrap();
            assert_eq!(
                segments[1],
                Segment {
                    offset: 4997,
                    length: 3
                }
            );
            assert_eq!(data, b"abcde");
        }
    }

    #[test]
    fn what_is_not_an_archive_is_an_error() {
        let good = header(EntryType::Regular, "a", 600).as_bytes().to_vec();
        let mut bad_sum = good.clone();
        bad_sum[0] ^= 1;
        let garbage = vec![7; 1024];
        let unknown = header(EntryType::new(b'Z'), "a", 0).as_bytes().to_vec();
        let cut = [good, vec![1; 100]].concat();
        for bytes in [bad_sum, garbage, unknown, cut, vec![1; 100]] {
            first(&bytes).unwrap_err();
        }
    }
}
