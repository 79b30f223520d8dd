//! Hands the listener of a seccomp filter to the agent that decides about the container's system calls.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

use crate::handshake::send_descriptor;
use crate::state::{Record, Status};
use crate::verbs::state::oci_state;

/// Sends the "container process state" of the specification, with the descriptor, to
/// `linux.seccomp.listenerPath`.
pub(crate) fn hand_over(
    seccomp: &LinuxSeccomp,
    record: &Record,
    status: Status,
    pid: i32,
    listener: &OwnedFd,
) -> io::Result<()> {
    let path = seccomp.listener_path().as_ref();
    let path = path.ok_or_else(|| io::Error::other("linux.seccomp.listenerPath is needed"))?;
    let state: Value = serde_json::from_str(&oci_state(record, status, record.pid))?;
    let message = json!({
        "ociVersion": record.oci_version,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": seccomp.listener_metadata().clone().unwrap_or_default(),
        "state": state,
    });
    let socket = UnixStream::connect(path).map_err(|error| {
        let text = format!("failed to connect with seccomp agent {}", path.display());
        io::Error::new(error.kind(), format!("{text}: {error}"))
    })?;
    send_descriptor(
        socket.as_fd(),
        message.to_string().as_bytes(),
        listener.as_fd(),
    )
}
