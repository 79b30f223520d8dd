//! Maps the owners of a bind mount's files (`mounts[].uidMappings`).
//!
//! The kernel takes a mapping from a user namespace, so one is made for each mapping, by a process that
//! does nothing else and ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use libc::MOUNT_ATTR_IDMAP;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::namespaces::write_maps;
use crate::plan::mounts::{IdMap, MountKind, MountPlan, Tree};
use crate::plan::namespaces::{Kind, NamespacePlan};
use crate::sys::{self, Cloned, MountAttributes, mount_setattr};

/// Why a mount could not be mapped.
#[derive(Debug, thiserror::Error)]
#[error("config.json: {field}: cannot map its users and groups")]
pub struct IdMapError {
    field: String,
    source: io::Error,
}

/// Maps the trees that want it, before they are attached anywhere. The caller has a single thread.
pub(crate) fn apply(mounts: &[MountPlan]) -> Result<(), IdMapError> {
    for mount in mounts {
        let (
            Some(map),
            MountKind::Bind {
                source: Tree::Detached(tree),
                ..
            },
        ) = (&mount.id_map, &mount.what)
        else {
            continue;
        };
        let attributes = MountAttributes {
            set: MOUNT_ATTR_IDMAP,
            ..MountAttributes::default()
        };
        user_namespace(map)
            .and_then(|namespace| {
                let namespace = Some(namespace.as_fd());
                mount_setattr(tree.as_fd(), attributes, map.recursive, namespace)
            })
            .map_err(|source| IdMapError {
                field: mount.field.clone(),
                source,
            })?;
    }
    Ok(())
}

/// A new user namespace with a mapping, held by nothing but the descriptor.
fn user_namespace(map: &IdMap) -> io::Result<OwnedFd> {
    let plan = NamespacePlan {
        new: Kind::USER.0,
        uid_map: map.uid_map.clone(),
        gid_map: map.gid_map.clone(),
        ..NamespacePlan::default()
    };
    let (wait, go) = pipe_with(PipeFlags::CLOEXEC)?;
    match sys::clone3(Kind::USER.0, None)? {
        Cloned::Child => {
            drop(go);
            // The end of the pipe comes when the parent has the namespace, or is dead.
            let _ = rustix::io::read(&wait, &mut [0; 1]);
            sys::exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => {
            let opened = write_maps(&plan, pid)
                .and_then(|()| std::fs::File::open(format!("/proc/{pid}/ns/user")));
            drop(go);
            waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
            Ok(opened?.into())
        }
    }
}
