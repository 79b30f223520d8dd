//! The terminal of a container: a pair from the container's own devpts, so that its programs can name
//! it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Mode, OFlags, fchmod, fchown, fstatfs};
use rustix::process::{Gid, Uid, ioctl_tiocsctty};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

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

/// Connects to an engine's console socket and hands it the master.
pub(crate) fn hand_over(socket: &UnixStream, master: &OwnedFd) -> io::Result<()> {
    // The name is what runc sends: engines do not look at it.
    send_descriptor(socket.as_fd(), b"/dev/ptmx", master.as_fd())
}
