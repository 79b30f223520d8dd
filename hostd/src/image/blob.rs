//! Content on its way into the store: checked against its descriptor while it passes.

use std::io::{self, Read, Write};

use bytes::{Buf, Bytes};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::error::ImageError;
use super::layout::Digest;
use super::manifest::Content;

/// How much passes between two reports of progress.
const PROGRESS_STEP_BYTES: u64 = 1024 * 1024;

/// Reads content, and meanwhile digests, measures, and perhaps copies it.
///
/// What goes wrong is kept and told by [`Self::verify`], since the reader's caller, a decompressor,
/// can only pass on that something did.
pub(super) struct Intake<R> {
    source: R,
    content: Content,
    copy: Option<NamedTempFile>,
    hasher: Sha256,
    done: u64,
    reported: u64,
    progress: Box<dyn FnMut(u64) + Send>,
    stop: CancellationToken,
    failure: Option<ImageError>,
}

impl<R: Read> Intake<R> {
    /// Reads `content` from `source` until `stop`. `progress` hears how many bytes have passed.
    pub(super) fn new(
        source: R,
        content: Content,
        copy: Option<NamedTempFile>,
        progress: Box<dyn FnMut(u64) + Send>,
        stop: CancellationToken,
    ) -> Self {
        let hasher = Sha256::new();
        let (done, reported, failure) = (0, 0, None);
        Self {
            source,
            content,
            copy,
            hasher,
            done,
            reported,
            progress,
            stop,
            failure,
        }
    }

    /// Reads the rest, and says whether all of it is what it should be.
    pub(super) fn verify(&mut self) -> Result<(), ImageError> {
        let drained = io::copy(self, &mut io::sink());
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        drained.map_err(ImageError::io("read", self.content.digest.to_string()))?;
        let actual = Digest::finish(self.hasher.clone());
        if actual == self.content.digest {
            Ok(())
        } else {
            Err(ImageError::DigestMismatch {
                expected: self.content.digest.to_string(),
                actual: actual.to_string(),
            })
        }
    }

    /// The copy, after [`Self::verify`].
    pub(super) fn into_copy(self) -> Option<NamedTempFile> {
        self.copy
    }

    fn pass(&mut self, buffer: &mut [u8]) -> Result<usize, ImageError> {
        if self.stop.is_cancelled() {
            return Err(ImageError::Cancelled);
        }
        let read = loop {
            match self.source.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.explain(error)),
                Ok(read) => break read,
            }
        };
        self.done += read as u64;
        if self.done > self.content.size {
            return Err(self.wrong_size("longer"));
        }
        if read == 0 && self.done < self.content.size {
            let stopped = self.stop.is_cancelled();
            return Err(if stopped {
                ImageError::Cancelled
            } else {
                self.wrong_size("shorter")
            });
        }
        self.hasher.update(&buffer[..read]);
        if let Some(copy) = &mut self.copy {
            copy.write_all(&buffer[..read])
                .map_err(ImageError::io("write", copy.path()))?;
        }
        let finished = self.done == self.content.size;
        if self.done - self.reported >= PROGRESS_STEP_BYTES || (finished && read > 0) {
            self.reported = self.done;
            (self.progress)(self.done);
        }
        Ok(read)
    }

    fn explain(&self, error: io::Error) -> ImageError {
        let action = ImageError::io("read", self.content.digest.to_string());
        error.downcast::<ImageError>().unwrap_or_else(action)
    }

    fn wrong_size(&self, problem: &'static str) -> ImageError {
        let Content { digest, size } = &self.content;
        ImageError::SizeMismatch {
            digest: digest.to_string(),
            expected: *size,
            problem,
        }
    }
}

impl<R: Read> Read for Intake<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.failure.is_some() {
            return Err(io::Error::other("the transfer has failed"));
        }
        self.pass(buffer).map_err(|failure| {
            self.failure = Some(failure);
            io::Error::other("the transfer has failed")
        })
    }
}

/// The thread's end of a channel of chunks that a task receives from the network.
pub(super) struct ChunkReader {
    chunks: mpsc::Receiver<Result<Bytes, ImageError>>,
    current: Bytes,
}

impl ChunkReader {
    pub(super) fn new(chunks: mpsc::Receiver<Result<Bytes, ImageError>>) -> Self {
        Self {
            chunks,
            current: Bytes::new(),
        }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(Ok(chunk)) => self.current = chunk,
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => return Ok(0),
            }
        }
        let length = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intake(claimed: &[u8], size: u64, actual: &'static [u8]) -> Intake<&'static [u8]> {
        let content = Content {
            digest: Digest::of(claimed),
            size,
        };
        let copy = Some(NamedTempFile::new().unwrap());
        Intake::new(
            actual,
            content,
            copy,
            Box::new(|_| ()),
            CancellationToken::new(),
        )
    }

    #[test]
    fn content_that_is_what_it_claims_is_copied() {
        let mut intake = intake(b"content", 7, b"content");
        intake.verify().unwrap();
        let copy = intake.into_copy().unwrap();
        assert_eq!(std::fs::read(copy.path()).unwrap(), b"content");
    }

    #[test]
    fn content_that_is_not_what_it_claims_is_refused() {
        let mut other = intake(b"content", 7, b"c0ntent");
        assert!(matches!(
            other.verify(),
            Err(ImageError::DigestMismatch { .. })
        ));
        for size in [6, 8] {
            let mut lie = intake(b"content", size, b"content");
            assert!(matches!(lie.verify(), Err(ImageError::SizeMismatch { .. })));
        }
    }

    #[test]
    fn an_endless_source_is_left_at_the_size_that_was_given() {
        let content = Content {
            digest: Digest::of(b""),
            size: 1000,
        };
        let token = CancellationToken::new();
        let mut endless = Intake::new(io::repeat(0), content, None, Box::new(|_| ()), token);
        assert!(matches!(
            endless.verify(),
            Err(ImageError::SizeMismatch { .. })
        ));
        assert!(
            endless.done <= 1000 + 64 * 1024,
            "read {} bytes",
            endless.done
        );
    }

    #[test]
    fn a_source_that_breaks_says_why() {
        let (sender, receiver) = mpsc::channel(2);
        sender
            .blocking_send(Ok(Bytes::from_static(b"con")))
            .unwrap();
        let gone = ImageError::NotFound {
            reference: "gone".to_owned(),
        };
        sender.blocking_send(Err(gone)).unwrap();
        let content = Content {
            digest: Digest::of(b"content"),
            size: 7,
        };
        let token = CancellationToken::new();
        let reader = ChunkReader::new(receiver);
        let mut intake = Intake::new(reader, content, None, Box::new(|_| ()), token);
        assert!(matches!(intake.verify(), Err(ImageError::NotFound { .. })));
    }
}
