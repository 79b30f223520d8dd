//! The first serial port: a 16550A whose output goes to a file or to standard output, and whose
//! input is standard input. Clients of the control socket may look on, and one of them may type where
//! standard input does not.
//!
//! A guest may write as much as it likes, so a file takes a bounded amount, and a reader that does
//! not read costs the guest a bounded wait.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::console::Feed;
use crate::control::CONSOLE_BYTES_MAX;
use crate::events::{Poller, Readiness, Source};
use crate::snapshot::hex::Bytes;
use crate::virtio::state::StateError;

/// How long a byte waits for a reader that does not read, in milliseconds. After one such wait
/// bytes are dropped until there is room again.
const STALL_MS: u16 = 100;

/// What a full console file ends with.
const FULL: &[u8] = b"\n[the console file is full]\n";

/// Where the guest's output goes.
#[derive(Debug)]
pub enum Output {
    /// Nowhere.
    Discard,
    /// To the end of a file, as long as it has room.
    File(Bounded),
    /// To a stream with a reader.
    Stream(Patient),
}

/// A file and the bytes that still go in.
#[derive(Debug)]
pub struct Bounded {
    file: File,
    left: u64,
}

impl Bounded {
    /// At the end of `file`, which counts what it holds already.
    pub fn new(file: File) -> io::Result<Self> {
        let left = CONSOLE_BYTES_MAX.saturating_sub(file.metadata()?.len());
        Ok(Self { file, left })
    }
}

/// A stream, and whether its reader made us wait.
#[derive(Debug)]
pub struct Patient {
    stream: File,
    stalled: bool,
}

impl Patient {
    /// Of `stream`.
    pub fn new(stream: File) -> Self {
        Self {
            stream,
            stalled: false,
        }
    }
}

impl Write for Output {
    /// Never fails and never blocks for long: the guest cannot do anything about it.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Output::Discard => {}
            Output::File(bounded) => bounded.append(bytes),
            Output::Stream(patient) => patient.push(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Bounded {
    fn append(&mut self, bytes: &[u8]) {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.left == 0 {
            return;
        }
        self.left = self.left.saturating_sub(length);
        let bytes = if self.left == 0 { FULL } else { bytes };
        // A full disk loses the guest's output, not the guest.
        let _ = self.file.write_all(bytes);
    }
}

impl Patient {
    fn push(&mut self, bytes: &[u8]) {
        let patience = if self.stalled { 0 } else { STALL_MS };
        let mut waiting = [PollFd::new(self.stream.as_fd(), PollFlags::POLLOUT)];
        let ready = poll(&mut waiting, PollTimeout::from(patience));
        self.stalled = !matches!(ready, Ok(1));
        if !self.stalled {
            // Whoever closed the other end does not want to read it.
            let _ = self.stream.write_all(bytes);
        }
    }
}

/// Output, and those that look on.
#[derive(Debug)]
struct Shown {
    output: Output,
    feed: Option<Arc<Feed>>,
}

impl Write for Shown {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(feed) = &self.feed {
            feed.push(bytes);
        }
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Tells the guest of input and of room for output.
#[derive(Debug)]
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port in a snapshot: its registers, and what it has received.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SerialPortState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub received: Bytes,
}

/// The port.
pub struct SerialPort {
    uart: Serial<Line, NoEvents, Shown>,
    input: Option<Input>,
    /// How many inputs there have been.
    inputs: u64,
}

opaque_debug!(SerialPort);

/// Where keys come from, which is waited for only while the port has room.
struct Input {
    number: u64,
    file: File,
    poller: Arc<Poller>,
    source: u32,
    watched: bool,
}

impl SerialPort {
    /// A port that writes to `output` and raises `interrupt`.
    pub fn new(interrupt: EventFd, output: Output) -> Self {
        let shown = Shown { output, feed: None };
        Self {
            uart: Serial::new(Line(interrupt), shown),
            input: None,
            inputs: 0,
        }
    }

    /// A port as it was saved; what it still owes the guest in interrupts is raised.
    pub fn restored(
        interrupt: EventFd,
        output: Output,
        state: &SerialPortState,
    ) -> Result<Self, StateError> {
        let registers = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.0.clone(),
        };
        let shown = Shown { output, feed: None };
        let uart = Serial::from_state(&registers, Line(interrupt), NoEvents, shown);
        let too_much = |_| StateError::Mismatch {
            what: "input",
            found: format!("{} bytes", state.received.0.len()),
            wanted: "what the receiver has room for".to_owned(),
        };
        Ok(Self {
            uart: uart.map_err(too_much)?,
            input: None,
            inputs: 0,
        })
    }

    /// What [`restored`](Self::restored) takes.
    pub fn save(&self) -> SerialPortState {
        let registers = self.uart.state();
        SerialPortState {
            baud_divisor_low: registers.baud_divisor_low,
            baud_divisor_high: registers.baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            received: Bytes(registers.in_buffer),
        }
    }

    /// What the guest writes is shown there as well, from now on.
    pub fn show(&mut self, feed: Arc<Feed>) {
        self.uart.writer_mut().feed = Some(feed);
    }

    /// Joins `file` to the port's receiver, unless somebody is joined to it. The event loop is to hand
    /// readiness of `source` back. Returns a number for [`disconnect`](Self::disconnect).
    ///
    /// What cannot be waited for (/dev/null, a regular file) is no one to talk to: it is left alone.
    pub fn connect(
        &mut self,
        file: File,
        poller: Arc<Poller>,
        source: u32,
    ) -> io::Result<Option<u64>> {
        if self.input.is_some() {
            return Ok(None);
        }
        self.inputs += 1;
        let mut input = Input {
            number: self.inputs,
            file,
            poller,
            source,
            watched: false,
        };
        match input.watch(true) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
            result => {
                result?;
                self.input = Some(input);
                Ok(Some(self.inputs))
            }
        }
    }

    /// The input of that number is over, if it is not already.
    pub fn disconnect(&mut self, number: u64) {
        if let Some(mut input) = self.input.take_if(|input| input.number == number) {
            // Whoever unwatches a descriptor that is watched cannot fail.
            let _ = input.watch(false);
        }
    }

    /// Takes what the receiver has room for.
    fn receive(&mut self) {
        let Some(input) = &mut self.input else { return };
        let mut bytes = [0; 64];
        let room = self.uart.fifo_capacity().min(bytes.len());
        let count = match room {
            0 => {
                // Whoever unwatches a descriptor that is watched cannot fail.
                let _ = input.watch(false);
                return;
            }
            _ => match input.file.read(&mut bytes[..room]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                result => result.unwrap_or(0),
            },
        };
        if count == 0 {
            let _ = input.watch(false);
            self.input = None;
            return;
        }
        // The count fits, and an interrupt that cannot be raised is one that is pending.
        let _ = self.uart.enqueue_raw_bytes(&bytes[..count]);
    }
}

impl Input {
    fn watch(&mut self, readable: bool) -> io::Result<()> {
        if self.watched == readable {
            return Ok(());
        }
        self.watched = readable;
        let fd: RawFd = self.file.as_raw_fd();
        if readable {
            self.poller.add(self.source, 0, fd, Readiness::READABLE)
        } else {
            self.poller.remove(fd)
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let offset = register(offset);
        for byte in data.iter_mut() {
            *byte = self.uart.read(offset);
        }
        if let Some(input) = &mut self.input
            && self.uart.fifo_capacity() > 0
        {
            // Only memory exhaustion fails it; then input stops.
            let _ = input.watch(true);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for byte in data {
            // What cannot be delivered is lost, as on a line that nobody listens to.
            let _ = self.uart.write(register(offset), *byte);
        }
    }
}

fn register(offset: u64) -> u8 {
    (offset & 7).to_le_bytes()[0]
}

impl Source for Mutex<SerialPort> {
    fn on_ready(&self, _token: u32, _readiness: Readiness) {
        self.lock().expect("no device panics").receive();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;
    use crate::events::event;

    #[test]
    fn a_console_file_takes_a_bounded_amount_and_says_when_it_is_full() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(CONSOLE_BYTES_MAX - 3).unwrap();
        file.seek(io::SeekFrom::End(0)).unwrap();
        let output = Output::File(Bounded::new(file.try_clone().unwrap()).unwrap());
        let mut port = SerialPort::new(event().unwrap(), output);
        for _ in 0..1000 {
            port.write(0, b"x");
        }
        let mut tail = Vec::new();
        file.seek(io::SeekFrom::Start(CONSOLE_BYTES_MAX - 3))
            .unwrap();
        file.read_to_end(&mut tail).unwrap();
        assert_eq!(tail, [b"xx", FULL].concat());
    }

    #[test]
    fn a_reader_that_does_not_read_holds_the_guest_up_only_once() {
        let (_reader, writer) = nix::unistd::pipe().unwrap();
        let output = Output::Stream(Patient::new(File::from(writer)));
        let mut port = SerialPort::new(event().unwrap(), output);
        let start = std::time::Instant::now();
        for _ in 0..100_000 {
            port.write(0, b"x");
        }
        assert!(start.elapsed().as_millis() < u128::from(STALL_MS) * 50);
    }
}
