//! Network namespaces: made on a thread of their own and kept by a bind mount.
//!
//! `unshare` moves the calling thread, so it must never happen on a thread of the async runtime,
//! where another task would find itself in the wrong network.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;

use super::error::NetworkError;
use super::links::{self, Inside};

/// The calling thread's namespaces. Not `/proc/self`, which is the main thread's.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// Sets up a network namespace at `path` that holds a loopback and one end of a veth
/// pair with its address and default route. The other end is in the caller's namespace.
///
/// The namespace is `made`, which is as new, or one that is made here.
pub(super) async fn create(
    path: PathBuf,
    made: Option<OwnedFd>,
    inside: Inside,
) -> Result<(), NetworkError> {
    let (answer, result) = oneshot::channel();
    thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            // The caller may have gone; then nobody needs to know.
            let _ = answer.send(create_here(&path, made, &inside));
        })
        .map_err(|source| NetworkError::Host {
            action: "start a thread",
            source,
        })?;
    result.await.unwrap_or_else(|_| {
        let source = io::Error::other("the thread panicked");
        Err(NetworkError::Host {
            action: "make a network namespace",
            source,
        })
    })
}

fn create_here(path: &Path, made: Option<OwnedFd>, inside: &Inside) -> Result<(), NetworkError> {
    let host = |action| move |source| NetworkError::Host { action, source };
    let at = |action| {
        move |source| NetworkError::Path {
            action,
            path: path.into(),
            source,
        }
    };

    let outside = File::open(OWN_NETNS).map_err(host("open the host's network namespace"))?;
    let entered = match made {
        Some(made) => setns(made, CloneFlags::CLONE_NEWNET),
        None => unshare(CloneFlags::CLONE_NEWNET),
    };
    entered
        .map_err(io::Error::from)
        .map_err(host("make a network namespace"))?;
    File::create(path).map_err(at("create"))?;
    mount(
        Some(OWN_NETNS),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(io::Error::from)
    .map_err(at("mount a network namespace at"))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(host("start a runtime"))?;
    runtime.block_on(links::set_up_inside(inside, outside.as_raw_fd()))
}

/// Removes the namespace file at `path`; it is no error if there is none.
///
/// The namespace itself goes with its last process.
pub(super) fn remove(path: &Path) -> Result<(), NetworkError> {
    let at = |action| {
        move |source| NetworkError::Path {
            action,
            path: path.into(),
            source,
        }
    };
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: a file, but not a mount; a crash came between the two.
        Ok(()) | Err(nix::Error::EINVAL) => {}
        Err(nix::Error::ENOENT) => return Ok(()),
        Err(errno) => return Err(at("unmount")(errno.into())),
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(at("remove")(source)),
        _ => Ok(()),
    }
}
