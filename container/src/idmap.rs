//! Maps the owners of a bind mount's files (`mounts[].uidMappings`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::plan::mounts::{IdMap, MountKind, MountPlan, Tree};
use crate::users;

/// Why a mount could not be mapped.
#[derive(Debug, thiserror::Error)]
#[error("config.json: {field}: cannot map its users and groups")]
pub struct IdMapError {
    field: String,
    source: io::Error,
}

/// Maps the trees that want it, before they are attached anywhere.
pub(crate) fn apply(mounts: &[MountPlan]) -> Result<(), IdMapError> {
    // Most often the same for all.
    let mut made: Option<(&IdMap, OwnedFd)> = None;
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
        let failed = |source| IdMapError {
            field: mount.field.clone(),
            source,
        };
        let namespace = match made {
            Some((known, namespace)) if known.maps_like(map) => namespace,
            _ => users::with_maps(&map.uid_map, &map.gid_map).map_err(failed)?,
        };
        users::map_owners(tree, map.recursive, namespace.as_fd()).map_err(failed)?;
        made = Some((map, namespace));
    }
    Ok(())
}
