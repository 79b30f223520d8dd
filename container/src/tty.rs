//! The terminal of a container: a pair from the container's own devpts, so that its programs can name
//! it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Mode, OFlags, fchmod, fchown, fstatfs};
use rustix::process::{Gid, Uid, ioctl_tiocsctty};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{
    OptionalActions, OutputModes, Winsize, isatty, tcgetattr, tcsetattr, tcsetwinsize,
};

use crate::handshake::send_descriptor;
use crate::plan::mounts::clone_tree;
use crate::root::Root;
use crate::rootfs::attach_at;

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Both sides of a new terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// The engine's side.
    pub(crate) master: OwnedFd,
    /// The container's side.
    pub(crate) slave: OwnedFd,
}

impl Terminal {
    /// Opens a new pair from the devpts at /dev/pts of the container, owned by `uid`.
    pub(crate) fn open(root: &Root, size: Winsize, uid: u32) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let master = root.open(Path::new("/dev/pts/ptmx"), flags)?;
        if fstatfs(&master)?.f_type != DEVPTS_SUPER_MAGIC {
            return Err(io::Error::other(
                "/dev/pts/ptmx is not of a devpts file system",
            ));
        }
        unlockpt(&master)?;
        // By the master, not by a path: a path could lead elsewhere (CVE-2025-52565).
        let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, peer)?;
        fchown(&slave, Some(Uid::from_raw(uid)), None::<Gid>)?;
        fchmod(&slave, Mode::from_raw_mode(0o620))?;
        if size.ws_row != 0 || size.ws_col != 0 {
            tcsetwinsize(&master, size)?;
        }
        Ok(Self { master, slave })
    }

    /// Binds the container's side on /dev/console.
    pub(crate) fn bind_console(&self, root: &Root) -> io::Result<()> {
        let target = root.make_file(Path::new("/dev/console"))?;
        let tree = clone_tree(&self.slave, Path::new(""), false)?;
        attach_at(tree.as_fd(), target, Path::new(""))
    }
}

/// Makes the slave the standard streams and the controlling terminal. The caller leads a session.
pub(crate) fn take_on(slave: BorrowedFd<'_>) -> io::Result<()> {
    ioctl_tiocsctty(slave)?;
    rustix::stdio::dup2_stdin(slave)?;
    rustix::stdio::dup2_stdout(slave)?;
    rustix::stdio::dup2_stderr(slave)?;
    Ok(())
}

/// Hands the master to the engine that listens at `socket`; without one, it is what
/// [`Relay`](crate::relay::Relay) gets.
pub(crate) fn hand_on(socket: Option<&UnixStream>, master: OwnedFd) -> io::Result<Option<OwnedFd>> {
    let Some(socket) = socket else {
        if !isatty(rustix::stdio::stdout()) {
            keep_line_ends(&master)?;
        }
        return Ok(Some(master));
    };
    hand_over(socket, &master).map(|()| None)
}

/// Has a terminal write the ends of lines as they are, as with runc: whoever reads them in a pipe or a file
/// expects those of the program, and not a carriage return before each. Where the output goes to a terminal
/// the container's does as any other, so that programs that use the whole screen look right.
fn keep_line_ends(terminal: &OwnedFd) -> io::Result<()> {
    let mut modes = tcgetattr(terminal)?;
    modes.output_modes.remove(OutputModes::ONLCR);
    Ok(tcsetattr(terminal, OptionalActions::Now, &modes)?)
}

/// Connects to an engine's console socket and hands it the master.
pub(crate) fn hand_over(socket: &UnixStream, master: &OwnedFd) -> io::Result<()> {
    // The name is what runc sends: engines do not look at it.
    send_descriptor(socket.as_fd(), b"/dev/ptmx", master.as_fd())
}
