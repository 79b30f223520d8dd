//! Devices of descriptors that a client has handed over to a machine that runs.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::opener::{Opener, check_net, examine, lock};
use super::{DiskPlan, NetPlan, PlanError, TapPlan, disk, range};
use crate::spec::{Disk, DiskFormat, Net};
use crate::virtio::block::Layer;

impl DiskPlan {
    /// A disk that goes by `name`, of its file and those that it refers to, in their order. What `disk`
    /// calls them is for the record.
    pub fn handed(
        name: String,
        disk: &Disk,
        descriptors: Vec<OwnedFd>,
    ) -> Result<DiskPlan, PlanError> {
        disk::check("/disk", disk)?;
        let wanted = 1 + disk.backing.len();
        let mut files = expect("/disk", descriptors, wanted)?.into_iter();
        let mut layer = |field: &str, format: DiskFormat, read_only: bool| {
            let file = File::from(files.next().expect("they were counted"));
            check_access(field, &file, read_only)?;
            lock(field, &file, read_only)?;
            Ok(Layer { file, format })
        };
        let top = layer("/disk/path", disk.format, disk.read_only)?;
        let backing = disk.backing.iter().enumerate().map(|(index, backing)| {
            let field = format!("/disk/backing/{index}/path");
            layer(&field, backing.format, true)
        });
        Ok(DiskPlan {
            name,
            top,
            backing: backing.collect::<Result<_, PlanError>>()?,
            read_only: disk.read_only,
            serial: disk.serial.clone(),
            limits: disk.limits,
        })
    }
}

impl NetPlan {
    /// Network interface number `number`, of an open tap. What `net` calls that is for the record.
    pub fn handed(number: u16, net: &Net, descriptors: Vec<OwnedFd>) -> Result<NetPlan, PlanError> {
        let mac = check_net("/net", number, net)?;
        if net.vhost.is_some() {
            let wanted = "absent for an interface that comes while the machine runs";
            return Err(range("/net/vhost", "set".to_owned(), wanted));
        }
        let mut descriptors = expect("/net", descriptors, 1)?;
        Ok(NetPlan {
            name: format!("net{number}"),
            tap: TapPlan::Open(descriptors.remove(0)),
            mac,
            mtu: net.mtu,
            vhost: None,
            limits: net.limits,
        })
    }

    /// The address as specifications have it.
    pub fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }

    /// The interface of a client: with the tap open, to be handed over.
    pub fn open(net: &Net) -> Result<NetPlan, PlanError> {
        Opener::default().net("/net", 0, net)
    }
}

impl DiskPlan {
    /// The disk of a client: with all files open, to be handed over.
    pub fn open(disk: &Disk) -> Result<DiskPlan, PlanError> {
        Opener::default().disk("/disk", 0, disk)
    }
}

fn expect(
    field: &str,
    descriptors: Vec<OwnedFd>,
    wanted: usize,
) -> Result<Vec<OwnedFd>, PlanError> {
    if descriptors.len() == wanted {
        return Ok(descriptors);
    }
    let found = format!("handed over with {} descriptors", descriptors.len());
    Err(range(field, found, format!("with {wanted}")))
}

/// Refuses a file that could not be read, or not be written although the disk is to be.
fn check_access(field: &str, file: &File, read_only: bool) -> Result<(), PlanError> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| examine(field)(errno.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    let access = flags & OFlag::O_ACCMODE;
    let enough = access == OFlag::O_RDWR || access == OFlag::O_RDONLY && read_only;
    if enough && !flags.contains(OFlag::O_PATH) {
        return Ok(());
    }
    let wanted = if read_only {
        "open for reading"
    } else {
        "open for reading and writing, or the disk read_only"
    };
    Err(range(field, format!("open with {flags:?}"), wanted))
}
