//! Disks in an image format, by the `imago` crate: reads and writes go through memory of our own, a
//! piece at a time, on the disk's own thread.
//!
//! A format is never guessed from what a file holds: what a guest writes to a raw disk would decide it.
//! And an image names no files: one that refers to another is opened only if that was given along.
//!
//! What an image says of itself may be made up to do harm. `imago` checks much of it and takes some of it for
//! granted: its panics are errors here, and an image that caused one is not used again.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::StorageOpenOptions;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::request::{Kind, Operation};
use crate::containment::contain;
use crate::spec::DiskFormat;

/// What is moved at a time.
const PIECE_BYTES: usize = 128 * 1024;

/// What is zeroed at a time: whole clusters, whatever their size.
const ZERO_PIECE_BYTES: u64 = 32 << 20;

type Storage = imago::file::File;

/// A file of which an image consists.
#[derive(Debug)]
pub struct Layer {
    pub file: File,
    pub format: DiskFormat,
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    /// What is written to, by its own descriptor.
    file: File,
    access: FormatAccess<Storage>,
    piece: Box<[u8]>,
    /// It made no sense.
    is_broken: Cell<bool>,
}

impl Image {
    /// The disk of `top`, which is open for writing if `write`, on the images that it refers to, of
    /// which each refers to the next.
    pub(crate) fn open(top: Layer, backing: Vec<Layer>, write: bool) -> io::Result<Image> {
        let file = top.file.try_clone()?;
        let mut below = None;
        for layer in backing.into_iter().rev() {
            below = Some(contain(|| open(layer, below, false)).unwrap_or_else(no_sense)?);
        }
        Ok(Image {
            file,
            access: contain(|| open(top, below, write)).unwrap_or_else(no_sense)?,
            piece: vec![0; PIECE_BYTES].into(),
            is_broken: Cell::new(false),
        })
    }

    /// The disk's size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.access.size()
    }

    /// Does a piece of `operation`; returns how many bytes it was.
    pub(crate) fn perform(&mut self, operation: &Operation) -> io::Result<usize> {
        if self.is_broken.get() {
            return no_sense();
        }
        let done = contain(|| self.perform_piece(operation));
        self.or_broken(done)
    }

    /// Writes to the file what is kept of the image's tables.
    pub(crate) fn write_back(&self) -> io::Result<()> {
        if self.is_broken.get() {
            return no_sense();
        }
        let done = contain(|| self.access.flush());
        self.or_broken(done)
    }

    fn or_broken<T>(&self, done: Option<io::Result<T>>) -> io::Result<T> {
        done.unwrap_or_else(|| {
            self.is_broken.set(true);
            no_sense()
        })
    }

    fn perform_piece(&mut self, operation: &Operation) -> io::Result<usize> {
        let position = operation.next_position();
        match operation.kind {
            Kind::Read => {
                let length = operation.left().min(PIECE_BYTES);
                let piece = &mut self.piece[..length];
                self.access.read(&mut *piece, position)?;
                Ok(operation.fill(piece))
            }
            Kind::Write { stable } => {
                let length = operation.gather(&mut self.piece);
                let piece = &self.piece[..length];
                self.access.write(piece, position)?;
                if stable && length == operation.left() {
                    self.flush()?;
                }
                Ok(length)
            }
            Kind::Flush => self.flush(),
            Kind::Zero { keep } => {
                let border = (position / ZERO_PIECE_BYTES + 1) * ZERO_PIECE_BYTES;
                let length = (operation.left() as u64).min(border - position);
                if keep {
                    self.access.write_zeroes(position, length)?;
                } else {
                    self.punch(position, length)?;
                    self.access.discard_to_zero(position, length)?;
                }
                usize::try_from(length).map_err(io::Error::other)
            }
        }
    }

    /// Gives back the space of the image's own data in this range. The image only notes that it may
    /// use the space for something else, so this comes first, while it is sure to be the range's.
    fn punch(&self, mut position: u64, length: u64) -> io::Result<()> {
        let end = position.saturating_add(length);
        while position < end {
            let (mapping, length) = self.access.get_mapping(position, end - position)?;
            // What is not writable belongs to another image, or to a snapshot in this one as well.
            if let Mapping::Raw {
                offset,
                writable: true,
                ..
            } = mapping
            {
                self.punch_file(offset, length)?;
            }
            if length == 0 {
                break;
            }
            position += length;
        }
        Ok(())
    }

    fn punch_file(&self, offset: u64, length: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let [offset, length] =
            [offset, length].map(|number| i64::try_from(number).unwrap_or(i64::MAX));
        match fallocate(self.file.as_fd(), mode, offset, length) {
            // The space stays with the image.
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// All is on the medium, the image's tables included.
    fn flush(&self) -> io::Result<usize> {
        self.access.flush()?;
        self.access.sync()?;
        Ok(0)
    }
}

fn no_sense<T>() -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "the image makes no sense",
    ))
}

fn open(
    layer: Layer,
    below: Option<FormatAccess<Storage>>,
    write: bool,
) -> io::Result<FormatAccess<Storage>> {
    let options = StorageOpenOptions::new().write(write);
    let storage = Storage::from_open_file(layer.file, options)?;
    let gate = DenyImplicitOpenGate::default();
    match layer.format {
        DiskFormat::Raw if below.is_some() => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a raw image refers to no other",
        )),
        DiskFormat::Raw => {
            let raw = Raw::builder(storage).write(write).open(gate)?;
            Ok(FormatAccess::new(raw))
        }
        DiskFormat::Qcow2 => {
            let given = below.is_some();
            let mut builder = Qcow2::<Storage>::builder(storage).write(write);
            if given {
                builder = builder.backing(below);
            }
            let image = builder.open(gate)?;
            if given && image.implicit_backing_file().is_none() {
                let message = "the image refers to no other, and one was given along";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            Ok(FormatAccess::new(image))
        }
    }
}
