//! A terminal at the console of a machine: what `hostd-vmm --console` does.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::control::{Request, Response};
use crate::snapshot::client::{ClientError, send, unexpected};
use crate::terminal::RawTerminal;

/// What ends the session when it is typed: control and `]`, as with telnet.
const ESCAPE: u8 = 0x1d;

/// Why a session ends otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the terminal cannot be used")]
    Terminal(#[source] io::Error),
}

/// Shows the console of the machine behind `control` on `screen`, and types what comes from `keys` if
/// there are any, until one side ends. At a terminal, control and `]` do so as well.
pub fn attach(
    control: &UnixStream,
    keys: Option<File>,
    mut screen: impl Write,
) -> Result<(), ConsoleError> {
    let input = keys.is_some();
    send(control, &Request::Console { input }, &[])?;
    let early = begun(control)?;
    let terminal = keys.as_ref().map(RawTerminal::new).transpose();
    let terminal = terminal.map_err(ConsoleError::Terminal)?.flatten();
    let keys = keys.map(|keys| Keys {
        from: keys,
        escape: terminal.is_some(),
    });
    show(&mut screen, &early)
        .and_then(|()| relay(control, keys, &mut screen))
        .map_err(ConsoleError::Terminal)
}

/// Waits for the answer. Returns the output that has come behind it already.
fn begun(control: &UnixStream) -> Result<Vec<u8>, ClientError> {
    let mut line = String::new();
    let mut control = BufReader::new(control);
    control.read_line(&mut line).map_err(ClientError::Speak)?;
    match serde_json::from_str(&line) {
        Ok(Response::Console {}) => Ok(control.buffer().to_vec()),
        Ok(Response::Error { message }) => Err(ClientError::Refused(message)),
        Ok(response) => Err(unexpected(&response)),
        Err(_) => Err(ClientError::Answer(line)),
    }
}

/// What is typed.
struct Keys {
    from: File,
    /// There is somebody who may press [`ESCAPE`].
    escape: bool,
}

/// What a look at the keys has shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Typed {
    More,
    Nothing,
    Escape,
}

fn relay(
    mut control: &UnixStream,
    mut keys: Option<Keys>,
    screen: &mut impl Write,
) -> io::Result<()> {
    let mut bytes = [0; 4096];
    loop {
        let (output, input) = wait(control, keys.as_ref())?;
        if output {
            match control.read(&mut bytes)? {
                0 => return Ok(()),
                count => show(screen, &bytes[..count])?,
            }
        }
        if let (true, Some(from)) = (input, &mut keys) {
            match from.pass_on(control)? {
                Typed::More => {}
                Typed::Escape => return Ok(()),
                Typed::Nothing => {
                    control.shutdown(std::net::Shutdown::Write)?;
                    keys = None;
                }
            }
        }
    }
}

/// Waits for output or keys; which there are.
fn wait(control: &UnixStream, keys: Option<&Keys>) -> io::Result<(bool, bool)> {
    let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = vec![watch(control.as_fd())];
    fds.extend(keys.map(|keys| watch(keys.from.as_fd())));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or_default();
    Ok((ready(fds.first()), ready(fds.get(1))))
}

impl Keys {
    fn pass_on(&mut self, mut control: &UnixStream) -> io::Result<Typed> {
        let mut bytes = [0; 256];
        let count = self.from.read(&mut bytes)?;
        let typed = &bytes[..count];
        let escape = typed.iter().position(|byte| self.escape && *byte == ESCAPE);
        control.write_all(&typed[..escape.unwrap_or(count)])?;
        Ok(match (escape, count) {
            (Some(_), _) => Typed::Escape,
            (None, 0) => Typed::Nothing,
            (None, _) => Typed::More,
        })
    }
}

fn show(screen: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    screen.write_all(bytes)?;
    screen.flush()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::pty::openpty;
    use nix::unistd::pipe;

    use super::*;

    /// A machine that answers the request with `answer`, and gives the request and all that is typed back.
    fn machine(answer: &'static str) -> (UnixStream, thread::JoinHandle<String>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let machine = thread::spawn(move || {
            let mut said = String::new();
            let mut from = BufReader::new(&theirs);
            from.read_line(&mut said).unwrap();
            (&theirs).write_all(answer.as_bytes()).unwrap();
            from.read_to_string(&mut said).unwrap();
            said
        });
        (ours, machine)
    }

    #[test]
    fn output_is_shown_and_input_typed_up_to_its_end() {
        let (control, machine) = machine("{\"result\":\"console\"}\nhello ");
        let (keys, mut typist) = pipe().map(|(r, w)| (File::from(r), File::from(w))).unwrap();
        // Nobody is at a pipe who could mean that as an order.
        typist.write_all(b"ls\x1d").unwrap();
        drop(typist);
        let mut screen = Vec::new();
        attach(&control, Some(keys), &mut screen).unwrap();
        drop(control);
        assert_eq!(screen, b"hello ");
        let said = machine.join().unwrap();
        assert_eq!(said, "{\"action\":\"console\",\"input\":true}\nls\x1d");
    }

    #[test]
    fn one_who_only_looks_on_types_nothing_and_a_refusal_is_told() {
        let (control, machine) = machine("{\"result\":\"error\",\"message\":\"busy\"}\n");
        let error = attach(&control, None, Vec::new()).unwrap_err();
        drop(control);
        assert!(error.to_string().contains("busy"), "{error}");
        let said = machine.join().unwrap();
        assert_eq!(said, "{\"action\":\"console\",\"input\":false}\n");
    }

    #[test]
    fn a_terminal_is_left_by_the_escape_key() {
        let (control, machine) = machine("{\"result\":\"console\"}\n");
        let pty = openpty(None, None).unwrap();
        nix::unistd::write(&pty.master, b"keys\x1dmore").unwrap();
        // What was typed before the terminal was raw waits for the end of the line.
        nix::unistd::write(&pty.master, b"\n").unwrap();
        attach(&control, Some(File::from(pty.slave)), Vec::new()).unwrap();
        drop(control);
        let said = machine.join().unwrap();
        assert!(said.ends_with("}\nkeys"), "{said:?}");
    }
}
