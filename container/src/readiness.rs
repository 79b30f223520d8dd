//! Readiness (sd_notify(3)): a container's program tells the service manager behind `NOTIFY_SOCKET` that it
//! is ready, through this program.
//!
//! The container gets a socket of its own, in a directory that it sees read-only. Nothing that it sends goes
//! on: of all that may be in its messages one line is looked for, and what the manager then hears are
//! this program's own words. Whoever starts the container listens, and nobody else: a starter that dies
//! leaves nothing but the socket's name, which goes with the container's directory.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::CapabilitySet;

use crate::handshake::send_descriptor;
use crate::plan::capability;
use crate::plan::mounts::{MountKind, MountPlan, Tree};
use crate::plan::options::Options;
use crate::plan::process::ProcessPlan;
use crate::process::Process;
use crate::state::{Home, NOTIFY_DIRECTORY, StateError};

/// The variable that names the socket, here and in the container.
const VARIABLE: &str = "NOTIFY_SOCKET";
/// Where the container finds its directory, and the name of the socket in it: as with runc.
const DIRECTORY_INSIDE: &str = "/run/notify";
const SOCKET: &str = "notify.sock";

/// systemd reads no longer messages, either (`NOTIFY_BUFFER_MAX`).
const MESSAGE_BYTES_MAX: usize = 4096;
/// So many are read before anything else has its turn: the longest queue that systemd sets for a socket.
const MESSAGES_AT_ONCE_MAX: usize = 512;
/// How long the manager may take to read, and to say that it has; it does not have to.
const MANAGER_SECONDS_MAX: u64 = 30;

const READY: &[u8] = b"READY=1";

/// Why the service manager cannot be told of a container.
#[derive(Debug, thiserror::Error)]
pub enum ReadinessError {
    #[error(
        "NOTIFY_SOCKET: `{}`: it must be an absolute path, or `@` and a name",
        value.escape_debug()
    )]
    Address { value: String },
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    State(#[from] StateError),
}

fn step<T, E: Into<io::Error>>(
    step: &'static str,
    result: Result<T, E>,
) -> Result<T, ReadinessError> {
    result.map_err(|error| ReadinessError::Step {
        step,
        source: error.into(),
    })
}

/// The service manager that this program runs under, by the address of its socket.
#[derive(Clone, Debug)]
pub struct ServiceManager(SocketAddr);

impl ServiceManager {
    /// The one that `NOTIFY_SOCKET` names, if any.
    ///
    /// # Errors
    /// [`ReadinessError::Address`].
    pub fn from_environment() -> Result<Option<Self>, ReadinessError> {
        match std::env::var_os(VARIABLE) {
            Some(value) if !value.is_empty() => Self::at(&value).map(Some),
            _ => Ok(None),
        }
    }

    fn at(value: &OsStr) -> Result<Self, ReadinessError> {
        let address = match value.as_bytes() {
            [b'@', name @ ..] if !name.is_empty() => SocketAddr::from_abstract_name(name).ok(),
            [b'/', ..] => SocketAddr::from_pathname(value).ok(),
            _ => None,
        };
        address.map(Self).ok_or_else(|| ReadinessError::Address {
            value: value.to_string_lossy().into_owned(),
        })
    }

    /// Says that the service is ready; and which process it is from now on, if it is another than the one
    /// that the manager knows. Returns what tells that the manager has read it.
    fn tell(&self, main: Option<i32>) -> io::Result<OwnedFd> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(Duration::from_secs(MANAGER_SECONDS_MAX)))?;
        socket.connect_addr(&self.0)?;
        socket.send(READY)?;
        if let Some(pid) = main {
            socket.send(format!("MAINPID={pid}").as_bytes())?;
        }
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        send_descriptor(socket.as_fd(), b"BARRIER=1", writer.as_fd())?;
        Ok(reader)
    }
}

/// Makes the container's directory, and adds to the plan that the container sees it. Nobody listens there yet.
pub(crate) fn prepare(
    home: &Home,
    mounts: &mut Vec<MountPlan>,
    process: &mut ProcessPlan,
) -> Result<(), ReadinessError> {
    let mode = Mode::from_raw_mode(0o755);
    let make = || -> io::Result<Tree> {
        fs::mkdirat(home, NOTIFY_DIRECTORY, mode)?;
        // Whoever the container's user is.
        fs::chmodat(home, NOTIFY_DIRECTORY, mode, AtFlags::empty())?;
        let path = std::path::absolute(home.path().join(NOTIFY_DIRECTORY))?;
        let privileged = capability::available().contains(CapabilitySet::SYS_ADMIN);
        Tree::new(&path, false, privileged)
    };
    let source = step(
        "make the directory of the container's NOTIFY_SOCKET",
        make(),
    )?;
    mounts.push(MountPlan {
        field: VARIABLE.to_owned(),
        destination: PathBuf::from(DIRECTORY_INSIDE),
        what: MountKind::Bind {
            source,
            recursive: false,
            directory: true,
        },
        options: Options::parse(["bind", "nosuid", "nodev", "noexec", "ro"].into_iter()),
        id_map: None,
        read_only_last: false,
    });
    let variable = format!("{VARIABLE}={DIRECTORY_INSIDE}/{SOCKET}");
    process.env.extend(CString::new(variable));
    Ok(())
}

/// Listens to one container, and speaks to the service manager.
#[derive(Debug)]
pub struct Proxy {
    manager: ServiceManager,
    socket: UnixDatagram,
    /// The process that the service is from then on, if it is not this one.
    main: Option<i32>,
    /// Once the manager was told: what tells that it has read it.
    told: Option<OwnedFd>,
    /// Another starter of the container would listen in this one's place.
    _lock: OwnedFd,
}

impl Proxy {
    /// Listens where the container will send to; nothing if nobody wants to know, or it was not prepared for
    /// that.
    pub(crate) fn listen(
        home: &Home,
        manager: Option<&ServiceManager>,
    ) -> Result<Option<Self>, ReadinessError> {
        let Some(manager) = manager else {
            return Ok(None);
        };
        if !home.has(NOTIFY_DIRECTORY)? {
            return Ok(None);
        }
        let lock = home.lock_start()?;
        let socket = step("listen at the container's NOTIFY_SOCKET", bind(home))?;
        Ok(Some(Self {
            manager: manager.clone(),
            socket,
            main: None,
            told: None,
            _lock: lock,
        }))
    }

    /// Waits until the container is ready, or has ended, and tells the manager that the service is this
    /// process now. Warns if the manager cannot be told: the container runs all the same.
    pub(crate) fn conduct(self, process: &Process) {
        self.try_conduct(process)
            .unwrap_or_else(|error| warn(&error));
    }

    fn try_conduct(mut self, process: &Process) -> io::Result<()> {
        self.main = Some(process.pid());
        while self.told.is_none() {
            let mut fds = [
                PollFd::new(process, PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let ended = !fds[0].revents().is_empty();
            // Also what it sent before it ended.
            self.turn()?;
            if ended {
                break;
            }
        }
        self.finish()
    }

    /// What to poll for reading.
    pub(crate) fn socket(&self) -> &UnixDatagram {
        &self.socket
    }

    /// Reads what there is, and tells the manager if the container is ready, once. What comes later is read,
    /// too: the socket's queue is short, and who sends to a full one waits.
    pub(crate) fn turn(&mut self) -> io::Result<()> {
        let mut message = [0; MESSAGE_BYTES_MAX + 1];
        for _ in 0..MESSAGES_AT_ONCE_MAX {
            let length = match self.socket.recv(&mut message) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if self.told.is_none() && says_ready(&message[..length]) {
                self.told = Some(self.manager.tell(self.main)?);
            }
        }
        Ok(())
    }

    /// Waits until the manager has read what it was told: it looks up who sent it, who must be there then.
    pub(crate) fn finish(self) -> io::Result<()> {
        let Some(told) = &self.told else {
            return Ok(());
        };
        let patience = Timespec {
            tv_sec: MANAGER_SECONDS_MAX.cast_signed(),
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(told, PollFlags::IN)];
        match poll(&mut fds, Some(&patience)) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it has not said for {MANAGER_SECONDS_MAX} s that it has read the message"),
            )),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A socket that everybody may send to who sees its directory.
fn bind(home: &Home) -> io::Result<UnixDatagram> {
    let name = format!("{NOTIFY_DIRECTORY}/{SOCKET}");
    match fs::unlinkat(home, name.as_str(), AtFlags::empty()) {
        // That of a starter that died.
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let socket = UnixDatagram::bind(home.socket_path(&name))?;
    socket.set_nonblocking(true)?;
    // The umask had a say in the mode. Nobody but the container could have put anything else there.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = fs::openat(home, name.as_str(), flags, Mode::empty())?;
    let everybody = Mode::from_raw_mode(0o777);
    fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), everybody)?;
    Ok(socket)
}

fn says_ready(message: &[u8]) -> bool {
    let mut lines = message.split(|byte| *byte == b'\n');
    message.len() <= MESSAGE_BYTES_MAX && lines.any(|line| line == READY)
}

/// Warns that the manager could not be told: the container runs all the same.
pub(crate) fn warn(error: &io::Error) {
    crate::log::warn(&format!(
        "NOTIFY_SOCKET: cannot tell the service manager: {}",
        crate::error::chain(error)
    ));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_service_manager_has_a_path_or_an_abstract_name() {
        let at = |value: &str| ServiceManager::at(OsStr::new(value)).map(|manager| manager.0);
        let path = at("/run/systemd/notify").unwrap();
        assert_eq!(path.as_pathname(), Some(Path::new("/run/systemd/notify")));
        let name = at("@one").unwrap();
        assert_eq!(name.as_abstract_name(), Some(&b"one"[..]));
        let long = format!("/{}", "a".repeat(108));
        for bad in ["@", "run/notify", "vsock:2:1", &long] {
            let words = at(bad).unwrap_err().to_string();
            assert!(words.contains(bad), "{words}");
        }
    }

    #[test]
    fn readiness_is_one_line_of_a_message_that_is_not_too_long() {
        let long = |bytes: usize| [&b"READY=1\n"[..], &vec![b'a'; bytes - 8]].concat();
        for ready in [
            &b"READY=1"[..],
            b"READY=1\n",
            b"STATUS=up\nREADY=1\nMAINPID=1",
            &long(MESSAGE_BYTES_MAX),
        ] {
            assert!(says_ready(ready));
        }
        for other in [
            &b""[..],
            b"READY=0",
            b"READY=1 ",
            b"STATUS=READY=1",
            b"ready=1",
            b"READY=1\0",
            &long(MESSAGE_BYTES_MAX + 1),
        ] {
            assert!(!says_ready(other));
        }
    }
}
