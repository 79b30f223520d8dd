//! A unix socket to listen on, and its name in the file system as long as it is in use.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listener. Dropping it removes the name that it was bound to.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: Option<PathBuf>,
}

impl Listener {
    /// Listens at `path`. A socket there that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
                fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            result => result,
        };
        Ok(Self {
            socket: socket?,
            path: Some(path.to_owned()),
        })
    }

    /// Takes over a socket that listens already; its name is its maker's.
    pub fn inherited(socket: UnixListener) -> Self {
        Self { socket, path: None }
    }

    /// The name that it was bound to, if it was not inherited.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The socket.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Someone may have tidied up already.
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether `path` is a socket that nobody listens on.
fn is_dead(path: &Path) -> bool {
    // A file that is no socket refuses connections too.
    let socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let refused = UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    socket && refused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let first = Listener::bind(&path).unwrap();
        assert_eq!(
            Listener::bind(&path).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        drop(first);
        assert!(!path.exists());

        fs::write(&path, "a file").unwrap();
        Listener::bind(&path).unwrap_err();
        assert!(path.exists());
    }
}
