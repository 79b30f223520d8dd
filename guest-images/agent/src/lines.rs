//! JSON values, one a line, on a stream: the form of everything that is said on vsock.

use std::io::{self, Read, Write};
use std::sync::{Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::protocol::{FRAME_DATA_BYTES_MAX, LINE_BYTES_MAX};

/// The most that one read takes from a stream.
const READ_BYTES_MAX: usize = 64 * 1024;

/// What is wrong with what the other side says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineError {
    #[error("A line is longer than {LINE_BYTES_MAX} bytes")]
    TooLong,
    #[error("A line is not what the protocol knows: {reason}")]
    Malformed { reason: String },
    #[error("A frame's data is not base64")]
    Base64(#[source] base64::DecodeError),
    #[error("A frame holds more than {FRAME_DATA_BYTES_MAX} bytes")]
    TooMuchData,
    #[error("The connection ended within a line or before the first")]
    Ended,
    #[error("The connection failed")]
    Stream(#[source] io::Error),
}

impl LineError {
    /// Whether the other side has gone, rather than said something wrong.
    pub(crate) fn is_disconnect(&self) -> bool {
        matches!(self, Self::Ended | Self::Stream(_))
    }
}

/// What has been read of a stream and not been taken yet: less than a line and a read.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    bytes: Vec<u8>,
    /// So many bytes are known to hold no line end.
    scanned: usize,
}

impl Lines {
    /// Reads once. False at the end of the stream.
    pub(crate) fn fill(&mut self, mut stream: impl Read) -> io::Result<bool> {
        let start = self.bytes.len();
        self.bytes.resize(start + READ_BYTES_MAX, 0);
        let result = stream.read(&mut self.bytes[start..]);
        let count = *result.as_ref().unwrap_or(&0);
        self.bytes.truncate(start + count);
        result.map(|count| count > 0)
    }

    /// Takes the next whole line, if it is there.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, LineError> {
        let unscanned = &self.bytes[self.scanned..];
        let Some(offset) = unscanned.iter().position(|byte| *byte == b'\n') else {
            self.scanned = self.bytes.len();
            if self.scanned > LINE_BYTES_MAX {
                return Err(LineError::TooLong);
            }
            return Ok(None);
        };
        let end = self.scanned + offset;
        if end > LINE_BYTES_MAX {
            return Err(LineError::TooLong);
        }
        let value = serde_json::from_slice(&self.bytes[..end]);
        self.bytes.drain(..=end);
        self.scanned = 0;
        value.map(Some).map_err(|error| LineError::Malformed {
            reason: error.to_string(),
        })
    }

    /// Reads until there is a whole line and takes it.
    pub(crate) fn wait<T: DeserializeOwned>(
        &mut self,
        mut stream: impl Read,
    ) -> Result<T, LineError> {
        loop {
            if let Some(value) = self.next()? {
                return Ok(value);
            }
            if !self.fill(&mut stream).map_err(LineError::Stream)? {
                return Err(LineError::Ended);
            }
        }
    }
}

/// Writes lines from several threads to one stream.
#[derive(Debug)]
pub(crate) struct LineWriter<W> {
    stream: Mutex<W>,
}

impl<W: Write> LineWriter<W> {
    pub(crate) fn new(stream: W) -> Self {
        Self {
            stream: Mutex::new(stream),
        }
    }

    /// Blocks until the stream has taken the line.
    pub(crate) fn send(&self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&line)
    }
}

/// A frame's data as text.
pub(crate) fn encode(data: &[u8]) -> String {
    STANDARD.encode(data)
}

/// A frame's text as data.
pub(crate) fn decode(text: &str) -> Result<Vec<u8>, LineError> {
    let data = STANDARD.decode(text).map_err(LineError::Base64)?;
    if data.len() > FRAME_DATA_BYTES_MAX {
        return Err(LineError::TooMuchData);
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Frame, Process, Request};

    /// Gives a stream's bytes one or a few at a time.
    struct Dribble<'a>(&'a [u8], usize);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(self.0.len()).min(buffer.len());
            let (now, later) = self.0.split_at(count);
            buffer[..count].copy_from_slice(now);
            self.0 = later;
            Ok(count)
        }
    }

    fn first<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, LineError> {
        Lines::default().wait(bytes)
    }

    #[test]
    fn lines_are_whole_however_they_are_cut_in_transit() {
        let frames = [
            Frame::Stdin(encode(&[0, 255, 10])),
            Frame::Resize { rows: 24, cols: 80 },
            Frame::Signal(15),
            Frame::Stdin(String::new()),
        ];
        let writer = LineWriter::new(Vec::new());
        for frame in &frames {
            writer.send(frame).unwrap();
        }
        let bytes = writer.stream.into_inner().unwrap();
        for step in [1, 2, 7, 1000] {
            let mut stream = Dribble(&bytes, step);
            let mut lines = Lines::default();
            for want in &frames {
                let frame: Frame = lines.wait(&mut stream).unwrap();
                assert_eq!(&frame, want, "{step} bytes at a time");
            }
            let end = lines.wait::<Frame>(&mut stream);
            assert!(matches!(end, Err(LineError::Ended)));
        }
    }

    #[test]
    fn an_endless_line_is_refused_before_it_is_held() {
        let mut lines = Lines::default();
        let error = lines.wait::<Request>(io::repeat(b'x')).unwrap_err();
        assert!(matches!(error, LineError::TooLong));
        assert!(lines.bytes.len() <= LINE_BYTES_MAX + READ_BYTES_MAX);

        let mut whole = vec![b' '; LINE_BYTES_MAX + 1];
        whole.push(b'\n');
        let error = first::<Request>(&whole).unwrap_err();
        assert!(matches!(error, LineError::TooLong));
    }

    #[test]
    fn what_the_protocol_does_not_know_is_refused() {
        let table: [&[u8]; 9] = [
            b"\n",
            b"{}\n",
            b"null\n",
            b"\"ping\"\n",
            b"{\"reboot\":{}}\n",
            b"{\"ping\":{\"extra\":1}}\n",
            b"{\"exec\":{\"args\":[\"sh\"],\"privileged\":true}}\n",
            b"{\"signal\":{\"signal\":\"TERM\"}}\n",
            b"\xff\xfe{}\n",
        ];
        for line in table {
            let error = first::<Request>(line).unwrap_err();
            let text = String::from_utf8_lossy(line);
            assert!(matches!(error, LineError::Malformed { .. }), "{text}");
        }
        let exec: Request = first(b"{\"exec\":{\"args\":[\"sh\"]}}\n").unwrap();
        let process = Process {
            args: vec!["sh".into()],
            ..Process::default()
        };
        assert_eq!(exec, Request::Exec(process));
    }

    #[test]
    fn data_is_base64_of_a_bounded_size() {
        assert_eq!(decode(&encode(b"any\0bytes")).unwrap(), b"any\0bytes");
        assert!(matches!(decode("no base64!"), Err(LineError::Base64(_))));
        let most = encode(&vec![0; FRAME_DATA_BYTES_MAX]);
        assert!(most.len() < LINE_BYTES_MAX);
        assert_eq!(decode(&most).unwrap().len(), FRAME_DATA_BYTES_MAX);
        let more = encode(&vec![0; FRAME_DATA_BYTES_MAX + 1]);
        assert!(matches!(decode(&more), Err(LineError::TooMuchData)));
    }
}
