//! The console of a VM: what its guest writes to the serial port, and what is typed there.
//!
//! The machine passes both on, on a connection to its control socket that becomes that. It keeps the
//! last of the output, so that one who comes late sees something, and lets one client at a time type.

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use agent::protocol::{FRAME_DATA_BYTES_MAX, Frame};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tokio::io::AsyncReadExt;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::mpsc;
use vmm::control::{BUSY, CLIENTS_MAX, Request, Response};

use super::control;
use crate::driver::stdin::Stdin;
use crate::driver::{DriverError, SESSION_FRAMES_MAX, Session};

/// Clients that a console has at a time. They are clients of the machine's control socket, where hostd
/// itself must find room, too.
const CONSOLES_MAX: usize = CLIENTS_MAX / 2;

/// How many clients the console of each VM has, by its name.
#[derive(Clone, Debug, Default)]
pub(super) struct Consoles(Arc<Mutex<BTreeMap<String, usize>>>);

impl Consoles {
    /// A place at the console, if there is one.
    fn sit(&self, name: &str) -> Option<Place> {
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = clients.entry(name.to_owned()).or_default();
        (*count < CONSOLES_MAX).then(|| {
            *count += 1;
            Place {
                consoles: self.clone(),
                name: name.to_owned(),
            }
        })
    }
}

/// A client's place, until this is dropped.
struct Place {
    consoles: Consoles,
    name: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let clients = self.consoles.0.lock();
        let mut clients = clients.unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.name);
            }
        }
    }
}

/// Goes to the console of the machine behind `socket`, and with `input` to its keyboard.
pub(super) async fn open(
    consoles: &Consoles,
    name: &str,
    socket: &Path,
    input: bool,
) -> Result<Session, DriverError> {
    let place = consoles
        .sit(name)
        .ok_or(DriverError::ConsolesFull { most: CONSOLES_MAX })?;
    let request = Request::Console { input };
    let connection = match control::converse(socket, &request).await {
        Ok((connection, Response::Console {})) => connection,
        Ok((_, Response::Error { message })) if message.starts_with(BUSY) => {
            return Err(DriverError::ConsoleTaken);
        }
        Ok((_, Response::Error { message })) => return Err(control::refused(&message)),
        Ok((_, response)) => return Err(control::unexpected(&response)),
        Err(DriverError::Io { source, .. }) if is_absent(&source) => {
            return Err(DriverError::NotRunning);
        }
        Err(error) => return Err(error),
    };
    // What has come behind the answer already.
    let parts = connection.into_parts();
    let (output, keys) = parts.io.into_split();
    let (sender, towards) = mpsc::channel(SESSION_FRAMES_MAX);
    let (from, receiver) = mpsc::channel(SESSION_FRAMES_MAX);
    let keys = Keys {
        sink: Stdin::new(Box::new(keys), false),
        input,
    };
    let screen = Screen {
        _place: place,
        output,
        early: parts.read_buf.to_vec(),
    };
    tokio::spawn(async move {
        let last = tokio::select! {
            shown = screen.show(&from) => shown.then_some(ended(None)),
            signal = keys.type_in(towards) => Some(ended(Some(signal))),
        };
        if let Some(frame) = last {
            // A client that has gone needs no word of the end.
            let _ = from.send(frame).await;
        }
    });
    Ok(Session {
        input: sender,
        output: receiver,
    })
}

/// Nobody listens any more, or not yet.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn ended(signal: Option<i32>) -> Frame {
    Frame::Exit {
        code: signal.is_none().then_some(0),
        signal,
        oom: false,
    }
}

/// What the guest writes.
struct Screen {
    /// Free before the connection is closed: who sees that finds room.
    _place: Place,
    output: OwnedReadHalf,
    early: Vec<u8>,
}

impl Screen {
    /// Shows it to the client until the machine ends, which it tells, or the client goes.
    async fn show(mut self, from: &mpsc::Sender<Frame>) -> bool {
        let mut buffer = vec![0; FRAME_DATA_BYTES_MAX];
        for early in self.early.chunks(FRAME_DATA_BYTES_MAX) {
            if from.send(stdout(early)).await.is_err() {
                return false;
            }
        }
        loop {
            let read = tokio::select! {
                read = self.output.read(&mut buffer) => read,
                () = from.closed() => return false,
            };
            match read {
                Ok(count @ 1..) => {
                    if from.send(stdout(&buffer[..count])).await.is_err() {
                        return false;
                    }
                }
                Ok(0) | Err(_) => return true,
            }
        }
    }
}

fn stdout(bytes: &[u8]) -> Frame {
    Frame::Stdout(BASE64_STANDARD.encode(bytes))
}

/// What the client types.
struct Keys {
    sink: Stdin,
    /// It may.
    input: bool,
}

impl Keys {
    /// Types what the client sends. Done when it sends a signal, which is meant for the session: the
    /// guest's processes are not behind the console, and a serial port has no size.
    async fn type_in(mut self, mut towards: mpsc::Receiver<Frame>) -> i32 {
        let mut listening = true;
        loop {
            tokio::select! {
                () = self.sink.write(), if self.sink.is_pending() => {}
                frame = towards.recv(), if listening && self.sink.has_room() => match frame {
                    Some(Frame::Stdin(data)) if self.input => self.sink.add(&data),
                    Some(Frame::Signal(signal)) => return signal,
                    Some(_) => {}
                    None => listening = false,
                },
                else => pending::<()>().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    /// A machine that listens at a socket of its own.
    struct Machine {
        dir: TempDir,
        listener: UnixListener,
    }

    impl Machine {
        fn new() -> Machine {
            let dir = TempDir::new().unwrap();
            let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
            Machine { dir, listener }
        }

        /// Answers the next client, and returns what it asked.
        async fn answer(&self, answer: &str) -> (String, BufReader<UnixStream>) {
            let (stream, _) = self.listener.accept().await.unwrap();
            let mut client = BufReader::new(stream);
            let mut asked = String::new();
            client.read_line(&mut asked).await.unwrap();
            client.write_all(answer.as_bytes()).await.unwrap();
            (asked, client)
        }

        async fn open(&self, consoles: &Consoles, input: bool) -> Result<Session, DriverError> {
            open(consoles, "box", &self.dir.path().join("socket"), input).await
        }
    }

    const GRANTED: &str = "{\"result\":\"console\"}\n";

    async fn shown(session: &mut Session) -> String {
        match session.output.recv().await {
            Some(Frame::Stdout(data)) => {
                String::from_utf8(BASE64_STANDARD.decode(data).unwrap()).unwrap()
            }
            other => panic!("not output: {other:?}"),
        }
    }

    #[tokio::test]
    async fn what_the_guest_writes_is_shown_and_what_the_client_types_arrives() {
        let (machine, consoles) = (Machine::new(), Consoles::default());
        let answer = GRANTED.to_owned() + "login: ";
        let (session, (asked, mut guest)) =
            tokio::join!(machine.open(&consoles, true), machine.answer(&answer));
        let mut session = session.unwrap();
        assert_eq!(asked, "{\"action\":\"console\",\"input\":true}\n");
        assert_eq!(shown(&mut session).await, "login: ");
        let typed = Frame::Stdin(BASE64_STANDARD.encode("root\n"));
        session.input.send(typed).await.unwrap();
        session
            .input
            .send(Frame::Resize { rows: 24, cols: 80 })
            .await
            .unwrap();
        let mut line = String::new();
        guest.read_line(&mut line).await.unwrap();
        assert_eq!(line, "root\n");
        // The end of what is typed is not that of what is shown.
        session
            .input
            .send(Frame::Stdin(String::new()))
            .await
            .unwrap();
        assert_eq!(guest.read_line(&mut line).await.unwrap(), 0);
        guest.write_all(b"bye").await.unwrap();
        assert_eq!(shown(&mut session).await, "bye");
        drop(guest);
        assert_eq!(session.output.recv().await, Some(ended(None)));
    }

    #[tokio::test]
    async fn a_signal_ends_the_session_and_the_machine_loses_its_client() {
        let (machine, consoles) = (Machine::new(), Consoles::default());
        let (session, (asked, mut guest)) =
            tokio::join!(machine.open(&consoles, false), machine.answer(GRANTED));
        let mut session = session.unwrap();
        assert_eq!(asked, "{\"action\":\"console\",\"input\":false}\n");
        // One who only watches types nothing.
        let typed = Frame::Stdin(BASE64_STANDARD.encode("x"));
        session.input.send(typed).await.unwrap();
        session.input.send(Frame::Signal(15)).await.unwrap();
        assert_eq!(session.output.recv().await, Some(ended(Some(15))));
        let mut typed = Vec::new();
        guest.read_to_end(&mut typed).await.unwrap();
        assert_eq!(typed, b"");
    }

    #[tokio::test]
    async fn refusals_say_what_is_the_matter() {
        let (machine, consoles) = (Machine::new(), Consoles::default());
        let refuse = async |message: &str| {
            let answer = format!("{{\"result\":\"error\",\"message\":\"{message}\"}}\n");
            let (session, _) = tokio::join!(machine.open(&consoles, true), machine.answer(&answer));
            session.unwrap_err()
        };
        let taken = refuse("busy: somebody else types").await;
        assert!(matches!(taken, DriverError::ConsoleTaken), "{taken}");
        // A machine that has been taken over may say anything, but not to a terminal.
        let other = refuse("no\\u001b[2J").await.to_string();
        assert_eq!(other, "asking the VMM failed: no [2J");
        let nowhere = machine.dir.path().join("none");
        let absent = open(&consoles, "box", &nowhere, true).await.unwrap_err();
        assert!(matches!(absent, DriverError::NotRunning), "{absent}");
    }

    #[tokio::test]
    async fn a_console_has_room_for_so_many_and_for_another_when_one_goes() {
        let (machine, consoles) = (Machine::new(), Consoles::default());
        let mut sessions = Vec::new();
        for _ in 0..CONSOLES_MAX {
            let (session, guest) =
                tokio::join!(machine.open(&consoles, false), machine.answer(GRANTED));
            sessions.push((session.unwrap(), guest));
        }
        let full = machine.open(&consoles, false).await.unwrap_err();
        assert!(matches!(full, DriverError::ConsolesFull { .. }), "{full}");
        let (left, (_, mut guest)) = sessions.remove(0);
        drop(left);
        // Its place is free once the machine has lost it.
        guest.read_to_end(&mut Vec::new()).await.unwrap();
        let (session, _guest) =
            tokio::join!(machine.open(&consoles, false), machine.answer(GRANTED));
        session.unwrap();
    }
}
