//! The root file system of a container: layers of its image under what it has written.

use std::fs;
use std::path::{Path, PathBuf};

use super::user::{self, User};
use super::users::{self, Users};
use crate::driver::mounts::{self, Overlay};
use crate::driver::{DriverError, machine_id};

/// What a root is made of.
#[derive(Clone, Debug)]
pub(super) struct Root {
    /// Of the image, the lowest first.
    pub(super) layers: Vec<PathBuf>,
    /// The instance's directory, for the writable layer.
    pub(super) state: PathBuf,
    /// The directory of this run, for the root and what is mounted on the way there.
    pub(super) run: PathBuf,
    /// A directory with a short path.
    pub(super) short: PathBuf,
    /// The machine id of a clone.
    pub(super) machine_id: Option<String>,
    /// Who the workload is to be, as the image knows it.
    pub(super) user: Option<String>,
}

impl Root {
    /// Mounts the root, for `users` if the container has its own, and looks its user up there.
    pub(super) fn mount(&self, users: Option<&Users>) -> Result<User, DriverError> {
        let rootfs = self.run.join("bundle/rootfs");
        self.mount_layers(users, &rootfs)?;
        if let Some(machine_id) = &self.machine_id {
            machine_id::replace(&rootfs, machine_id)
                .map_err(DriverError::io("giving the clone a machine id of its own"))?;
        }
        let user = user::resolve(&rootfs, self.user.as_deref()).map_err(DriverError::Field)?;
        if users.is_some() {
            users::check(&user).map_err(DriverError::Field)?;
        }
        Ok(user)
    }

    fn mount_layers(&self, users: Option<&Users>, rootfs: &Path) -> Result<(), DriverError> {
        let (upper, work) = (self.state.join("upper"), self.state.join("work"));
        for directory in [&upper, &work] {
            fs::create_dir_all(directory).map_err(DriverError::io("making the writable layer"))?;
        }
        let overlay = Overlay {
            layers: &self.layers,
            upper: &upper,
            work: &work,
            short: &self.short,
        };
        let Some(users) = users else {
            return mounts::mount_overlay(&overlay, rootfs)
                .map_err(DriverError::io("mounting the root file system"));
        };
        let (root, map) = (users.range().first, |path: &Path| users.mapped(path));
        let place = self.run.join("mapped");
        mounts::mount_mapped_overlay(&overlay, rootfs, &place, root, map).map_err(DriverError::io(
            "mounting the root file system for a user namespace (this takes Linux 5.19 and a state \
             directory on ext4, XFS, Btrfs or the like; `user_namespace: host` does without)",
        ))
    }
}
