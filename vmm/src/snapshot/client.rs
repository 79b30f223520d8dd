//! Asks a running machine for a snapshot, through its control socket: what `hostd-vmm --snapshot`
//! does, and whoever else can open files where the machine cannot.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::file::Kind;
use super::{MEMORY_FILE, STATE_FILE};
use crate::control::{DESCRIPTORS_MAX, MachineState, Request, Response, SnapshotReport};

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot make {path}")]
    Create { path: String, source: io::Error },
    #[error("cannot speak with the machine")]
    Speak(#[source] io::Error),
    #[error("the machine refuses: {0}")]
    Refused(String),
    #[error("the machine's answer makes no sense here: {0}")]
    Answer(String),
    #[error("the snapshot cannot be made durable")]
    Sync(#[source] io::Error),
}

/// Takes a snapshot of the machine behind `control`, into `folder`, which is made. The machine is
/// paused for as long as that takes, and runs on if it ran before; the files are on the disk when
/// this returns.
pub fn snapshot(
    control: &UnixStream,
    folder: &Path,
    kind: Kind,
) -> Result<SnapshotReport, ClientError> {
    let files = Files::create(folder)?;
    let result = files.fill(control, kind).and_then(|report| {
        files.sync()?;
        Ok(report)
    });
    files.keep(folder, result)
}

/// Takes a snapshot of a machine that the caller has paused, into `folder`, which is made. It stays
/// paused, and the caller makes the files durable: whoever has more to copy before the machine may run
/// on does that once for all.
pub fn snapshot_paused(
    control: &UnixStream,
    folder: &Path,
    kind: Kind,
) -> Result<SnapshotReport, ClientError> {
    let files = Files::create(folder)?;
    let result = files.take(control, kind).and_then(report);
    files.keep(folder, result)
}

struct Files {
    state: File,
    memory: File,
}

impl Files {
    fn create(folder: &Path) -> Result<Files, ClientError> {
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |source| ClientError::Create { path, source }
        };
        let made = DirBuilder::new().mode(0o700).create(folder);
        made.map_err(failed(folder))?;
        let create = |name| {
            let path = folder.join(name);
            // A guest's memory is full of secrets.
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create_new(true).mode(0o600);
            options.open(&path).map_err(failed(&path))
        };
        Ok(Files {
            state: create(STATE_FILE)?,
            memory: create(MEMORY_FILE)?,
        })
    }

    fn fill(&self, control: &UnixStream, kind: Kind) -> Result<SnapshotReport, ClientError> {
        let response = ask(control, &Request::State {})?;
        let Response::State { state, .. } = response else {
            return Err(unexpected(&response));
        };
        let running = state == MachineState::Running;
        if running {
            done(&ask(control, &Request::Pause {})?)?;
        }
        let taken = self.take(control, kind);
        if running {
            done(&ask(control, &Request::Resume {})?)?;
        }
        report(taken?)
    }

    fn take(&self, control: &UnixStream, kind: Kind) -> Result<Response, ClientError> {
        let request = Request::Snapshot { kind };
        send(
            control,
            &request,
            &[self.state.as_fd(), self.memory.as_fd()],
        )?;
        answer(control)
    }

    fn sync(&self) -> Result<(), ClientError> {
        [&self.memory, &self.state]
            .into_iter()
            .try_for_each(|file| file.sync_all().map_err(ClientError::Sync))
    }

    /// Passes `result` on; if it is a failure, without the files, which are empty, or worse.
    fn keep<T>(&self, folder: &Path, result: Result<T, ClientError>) -> Result<T, ClientError> {
        if result.is_err() {
            self.remove(folder);
        }
        result
    }

    /// Nobody else knows of them, so who is in the way has a reason.
    fn remove(&self, folder: &Path) {
        for name in [STATE_FILE, MEMORY_FILE] {
            let _ = fs::remove_file(folder.join(name));
        }
        let _ = fs::remove_dir(folder);
    }
}

fn report(response: Response) -> Result<SnapshotReport, ClientError> {
    let Response::Snapshot { snapshot } = response else {
        return Err(unexpected(&response));
    };
    Ok(snapshot)
}

fn ask(control: &UnixStream, request: &Request) -> Result<Response, ClientError> {
    send(control, request, &[])?;
    answer(control)
}

pub(crate) fn send(
    control: &UnixStream,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ClientError> {
    let mut line = serde_json::to_vec(request).map_err(|error| ClientError::Speak(error.into()))?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let parts = [IoSlice::new(&line)];
    let sent = sendmsg(control, &parts, &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(|error| ClientError::Speak(error.into()))?;
    if sent == line.len() {
        return Ok(());
    }
    // A request is shorter than any socket's buffer.
    Err(ClientError::Speak(io::ErrorKind::WriteZero.into()))
}

pub(crate) fn answer(control: &UnixStream) -> Result<Response, ClientError> {
    let mut line = String::new();
    // One answer is all that is on its way, so nothing is lost with the buffer.
    let count = BufReader::new(control).read_line(&mut line);
    if count.map_err(ClientError::Speak)? == 0 {
        return Err(ClientError::Speak(io::ErrorKind::UnexpectedEof.into()));
    }
    match serde_json::from_str(&line) {
        Ok(Response::Error { message }) => Err(ClientError::Refused(message)),
        Ok(response) => Ok(response),
        Err(_) => Err(ClientError::Answer(line)),
    }
}

pub(crate) fn done(response: &Response) -> Result<(), ClientError> {
    if *response == (Response::Done {}) {
        Ok(())
    } else {
        Err(unexpected(response))
    }
}

pub(crate) fn unexpected(response: &Response) -> ClientError {
    ClientError::Answer(format!("{response:?}"))
}
