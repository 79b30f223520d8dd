//! Answers the control socket, on the event loop: nothing here waits.
//!
//! A client that does not read its answers is not read from either, so each costs a bounded amount
//! of memory.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::console::{Attached, Console};
use super::controls::{Answer, Controls};
use super::{CLIENTS_MAX, DESCRIPTORS_MAX, REQUEST_BYTES_MAX, Response};
use crate::console::RECENT_BYTES;
use crate::events::{Poller, Readiness, Source};
use crate::exit::chain;
use crate::hotplug::{Hotplug, Outcome};
use crate::listen::Listener;
use crate::snapshot::thread::SnapshotThread;

/// Answers that a client has not read yet, in bytes; with more, its requests wait.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Tokens: the listener, the guest's readiness, snapshots that were taken, devices that have come or
/// gone, output of the guest's, and clients from here up.
const LISTENER: u32 = 0;
const READY: u32 = 1;
const TAKEN: u32 = 2;
const PLUGGED: u32 = 3;
const OUTPUT: u32 = 4;
const FIRST_CLIENT: u32 = 5;

/// The server.
pub struct Server {
    listener: Listener,
    controls: Controls,
    poller: Arc<Poller>,
    source: u32,
    clients: Mutex<Clients>,
}

opaque_debug!(Server);

struct Clients {
    next: u32,
    by_token: BTreeMap<u32, Client>,
}

/// One connection.
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// For requests to come.
    descriptors: Vec<OwnedFd>,
    output: Vec<u8>,
    /// What the next answer waits for.
    waiting: Option<Wait>,
    /// It has become the guest's console.
    console: Option<Attached>,
    /// It will send no more.
    finished: bool,
    /// What the event loop waits for.
    watched: Readiness,
}

/// What an answer may have to wait for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wait {
    Ready,
    Snapshot,
    Attached,
    /// By its ticket.
    Detached(u64),
}

/// What a client is to be.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Fate {
    Keep,
    Close,
}

impl Server {
    /// Serves clients of `listener` as `source` of the event loop.
    pub fn new(
        listener: Listener,
        controls: Controls,
        poller: Arc<Poller>,
        source: u32,
    ) -> io::Result<Self> {
        let socket = listener.socket();
        socket.set_nonblocking(true)?;
        let ready = controls.readiness.wake_fd();
        poller.add(source, LISTENER, socket.as_raw_fd(), Readiness::READABLE)?;
        poller.add(source, READY, ready, Readiness::READABLE)?;
        if let Some(snapshots) = &controls.snapshots {
            poller.add(source, TAKEN, snapshots.done_fd(), Readiness::READABLE)?;
        }
        if let Some(hotplug) = &controls.hotplug {
            poller.add(source, PLUGGED, hotplug.done_fd(), Readiness::READABLE)?;
        }
        if let Some(console) = &controls.console {
            let news = console.feed.news_fd();
            poller.add(source, OUTPUT, news, Readiness::READABLE)?;
        }
        Ok(Self {
            listener,
            controls,
            poller,
            source,
            clients: Mutex::new(Clients {
                next: FIRST_CLIENT,
                by_token: BTreeMap::new(),
            }),
        })
    }

    fn accept(&self, clients: &mut Clients) {
        // A client that is gone before it is accepted is none.
        let Ok((stream, _)) = self.listener.socket().accept() else {
            return;
        };
        if clients.by_token.len() >= CLIENTS_MAX || stream.set_nonblocking(true).is_err() {
            return;
        }
        let token = clients.next;
        clients.next = clients.next.checked_add(1).unwrap_or(FIRST_CLIENT);
        let client = Client {
            stream,
            input: Vec::new(),
            descriptors: Vec::new(),
            output: Vec::new(),
            waiting: None,
            console: None,
            finished: false,
            watched: Readiness::READABLE,
        };
        let fd = client.stream.as_raw_fd();
        let added = self.poller.add(self.source, token, fd, Readiness::READABLE);
        if added.is_ok() {
            clients.by_token.insert(token, client);
        }
    }

    /// The guest has said that it is ready.
    fn on_guest_ready(&self, clients: &mut Clients) {
        self.controls.readiness.acknowledge();
        self.answer_all(clients, Wait::Ready, &Response::Done {});
    }

    /// A snapshot has been taken, or not.
    fn on_taken(&self, clients: &mut Clients) {
        let snapshots = self.controls.snapshots.as_ref();
        let response = match snapshots.and_then(SnapshotThread::take_result) {
            None => return,
            Some(Ok(snapshot)) => Response::Snapshot { snapshot },
            Some(Err(error)) => Response::Error {
                message: chain(&error),
            },
        };
        // One at most; none if it is gone.
        self.answer_all(clients, Wait::Snapshot, &response);
    }

    /// Devices have come or gone, or not.
    fn on_plugged(&self, clients: &mut Clients) {
        let hotplug = self.controls.hotplug.as_ref();
        for outcome in hotplug.map(Hotplug::take_outcomes).unwrap_or_default() {
            let (wait, response) = match outcome {
                Outcome::Attached(Ok(name)) => (Wait::Attached, Response::Attached { name }),
                Outcome::Attached(Err(error)) => {
                    let message = chain(&error);
                    (Wait::Attached, Response::Error { message })
                }
                Outcome::Detached(ticket) => (Wait::Detached(ticket), Response::Done {}),
            };
            self.answer_all(clients, wait, &response);
        }
    }

    /// The guest has written something.
    fn on_output(&self, clients: &mut Clients) {
        let Some(console) = &self.controls.console else {
            return;
        };
        console.feed.take_news();
        let all = clients.by_token.iter();
        let attached = all.filter(|(_, client)| client.console.is_some());
        let attached: Vec<u32> = attached.map(|(token, _)| *token).collect();
        for token in attached {
            self.serve(clients, token, false);
        }
    }

    /// Answers those that wait for that, and goes on with them.
    fn answer_all(&self, clients: &mut Clients, wait: Wait, response: &Response) {
        let mut answered = Vec::new();
        for (token, client) in &mut clients.by_token {
            if client.waiting == Some(wait) {
                client.waiting = None;
                client.send(response);
                answered.push(*token);
            }
        }
        for token in answered {
            self.serve(clients, token, false);
        }
    }

    /// Goes on with a client as far as that is possible.
    fn serve(&self, clients: &mut Clients, token: u32, readable: bool) {
        let Some(client) = clients.by_token.get_mut(&token) else {
            return; // It was closed in the same round.
        };
        let fate = client.go_on(&self.controls, readable);
        if fate == Fate::Close || self.rewatch(token, client).is_err() {
            clients.by_token.remove(&token);
        }
    }

    fn rewatch(&self, token: u32, client: &mut Client) -> io::Result<()> {
        let wanted = Readiness {
            readable: client.wants_input(),
            writable: !client.output.is_empty(),
        };
        if wanted != client.watched {
            let fd = client.stream.as_raw_fd();
            self.poller.modify(self.source, token, fd, wanted)?;
            client.watched = wanted;
        }
        Ok(())
    }
}

impl Source for Server {
    fn on_ready(&self, token: u32, readiness: Readiness) {
        let mut clients = self.clients.lock().expect("nothing panics in here");
        match token {
            LISTENER => self.accept(&mut clients),
            READY => self.on_guest_ready(&mut clients),
            TAKEN => self.on_taken(&mut clients),
            PLUGGED => self.on_plugged(&mut clients),
            OUTPUT => self.on_output(&mut clients),
            token => self.serve(&mut clients, token, readiness.readable),
        }
    }
}

impl Client {
    fn wants_input(&self) -> bool {
        self.waiting.is_none()
            && self.console.is_none()
            && !self.finished
            && self.output.len() < ANSWER_BYTES_MAX
    }

    fn go_on(&mut self, controls: &Controls, readable: bool) -> Fate {
        if readable && !self.wants_input() && (self.output.is_empty() || self.console.is_some()) {
            // Nothing was waited for, so this is the end of both directions.
            return Fate::Close;
        }
        if readable && self.wants_input() && self.read().is_err() {
            return Fate::Close;
        }
        loop {
            while self.wants_answer() {
                match self.next_line() {
                    Some(line) => self.answer(controls, &line),
                    None if self.input.len() >= REQUEST_BYTES_MAX => return Fate::Close,
                    None => break,
                }
            }
            if self.write().is_err() {
                return Fate::Close;
            }
            // Requests that had to wait for room are there already: nothing more need come for them.
            if !self.wants_answer() || !self.input.contains(&b'\n') {
                break;
            }
        }
        if self.console.is_some() {
            return self.show();
        }
        let done = self.finished && self.output.is_empty() && self.waiting.is_none();
        if done { Fate::Close } else { Fate::Keep }
    }

    /// Shows what the guest has written, as far as the client reads it.
    fn show(&mut self) -> Fate {
        if let Some(console) = &mut self.console
            && self.output.is_empty()
        {
            // All that there is: of what comes later, the feed tells.
            console.reader.read(&mut self.output, RECENT_BYTES);
        }
        match self.write() {
            Ok(()) => Fate::Keep,
            Err(_) => Fate::Close,
        }
    }

    /// From here on the connection is the guest's console.
    fn attach(&mut self, console: Option<&Console>, input: bool) {
        let attached = match console {
            _ if !self.input.is_empty() => {
                Err("send nothing behind this request before it is answered".to_owned())
            }
            None => Err("there is no machine".to_owned()),
            Some(console) => console
                .attach(&self.stream, input)
                .map_err(|error| chain(&error)),
        };
        match attached {
            Ok(attached) => {
                self.send(&Response::Console {});
                self.console = Some(attached);
            }
            Err(message) => self.send(&Response::Error { message }),
        }
    }

    /// Whether the next request may be looked at.
    fn wants_answer(&self) -> bool {
        self.waiting.is_none() && self.console.is_none() && self.output.len() < ANSWER_BYTES_MAX
    }

    /// Takes what is there, at most the rest of one longest request.
    fn read(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let room = (REQUEST_BYTES_MAX - self.input.len()).min(bytes.len());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut place = [IoSliceMut::new(&mut bytes[..room])];
        let count = match recvmsg(&self.stream, &mut place, &mut ancillary, flags) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                let room = DESCRIPTORS_MAX - self.descriptors.len();
                self.descriptors.extend(descriptors.take(room));
            }
        }
        if count == 0 {
            self.finished = true;
        }
        self.input.extend(&bytes[..count]);
        Ok(())
    }

    fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.input.iter().position(|byte| *byte == b'\n')?;
        let rest = self.input.split_off(end + 1);
        Some(std::mem::replace(&mut self.input, rest))
    }

    fn answer(&mut self, controls: &Controls, line: &[u8]) {
        let answer = match serde_json::from_slice(line) {
            Ok(request) => controls.answer(&request, &mut self.descriptors),
            Err(error) => Answer::now(Response::Error {
                message: format!("not a request: {error}"),
            }),
        };
        match answer {
            Answer::Now(response) => self.send(&response),
            Answer::WhenReady => self.waiting = Some(Wait::Ready),
            Answer::WhenTaken => self.waiting = Some(Wait::Snapshot),
            Answer::WhenAttached => self.waiting = Some(Wait::Attached),
            Answer::WhenDetached(ticket) => self.waiting = Some(Wait::Detached(ticket)),
            Answer::Console { input } => self.attach(controls.console.as_ref(), input),
        }
    }

    fn send(&mut self, response: &Response) {
        let text = serde_json::to_vec(response).expect("plain data");
        self.output.extend(text);
        self.output.push(b'\n');
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
