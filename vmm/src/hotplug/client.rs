//! Attaches devices to a running machine, and detaches them, through its control socket: what
//! `hostd-vmm --attach-disk` does, and whoever else can open files where the machine cannot.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use crate::control::{Request, Response};
use crate::plan::{DiskPlan, NetPlan, PlanError, TapPlan};
use crate::snapshot::client::{ClientError, answer, done, send, unexpected};
use crate::spec::{Disk, Net};
use crate::virtio::tap::{Tap, TapError};

/// Why a device is not attached, or not detached.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Opens what `disk` names and hands it to the machine behind `control`. Returns the disk's name there.
pub fn attach_disk(control: &UnixStream, disk: Disk) -> Result<String, HotplugError> {
    let plan = DiskPlan::open(&disk)?;
    let layers = std::iter::once(&plan.top).chain(&plan.backing);
    let files: Vec<_> = layers.map(|layer| layer.file.as_fd()).collect();
    attach(control, &Request::AttachDisk { disk }, &files)
}

/// Opens the tap that `net` names and hands it to the machine behind `control`. Returns the network
/// interface's name there.
pub fn attach_net(control: &UnixStream, net: Net) -> Result<String, HotplugError> {
    let tap = match NetPlan::open(&net)?.tap {
        TapPlan::Name(name) => Tap::open(&name)?,
        TapPlan::Open(descriptor) => Tap::from_fd(descriptor)?,
    };
    attach(control, &Request::AttachNet { net }, &[tap.as_fd()])
}

fn attach(
    control: &UnixStream,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
) -> Result<String, HotplugError> {
    send(control, request, descriptors)?;
    let response = answer(control)?;
    let Response::Attached { name } = response else {
        return Err(unexpected(&response).into());
    };
    Ok(name)
}

/// Has the guest let go of the disk or network interface `name`, or with `force` takes it away. Returns
/// when it is gone, which without force may be never.
pub fn detach(control: &UnixStream, name: String, force: bool) -> Result<(), HotplugError> {
    send(control, &Request::Detach { name, force }, &[])?;
    Ok(done(&answer(control)?)?)
}
