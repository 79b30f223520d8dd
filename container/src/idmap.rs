//! Maps the owners of a bind mount's files (`mounts[].uidMappings`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::plan::mounts::{MountKind, MountPlan, Owners, Tree};
use crate::plan::namespaces::{Kind, NamespacePlan};
use crate::users;

/// Why a mount could not be mapped.
#[derive(Debug, thiserror::Error)]
#[error("config.json: {field}: cannot map its users and groups")]
pub struct IdMapError {
    field: String,
    source: io::Error,
}

/// Maps the trees that want it, before they are attached anywhere.
pub(crate) fn apply(mounts: &[MountPlan], namespaces: &NamespacePlan) -> Result<(), IdMapError> {
    // Most often the same for all.
    let mut made: Option<(&Owners, OwnedFd)> = None;
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
            Some((known, namespace)) if *known == map.owners => namespace,
            _ => namespace_of(&map.owners, namespaces).map_err(failed)?,
        };
        users::map_owners(tree, map.recursive, namespace.as_fd()).map_err(failed)?;
        made = Some((&map.owners, namespace));
    }
    Ok(())
}

/// A user namespace that has the mapping.
fn namespace_of(owners: &Owners, namespaces: &NamespacePlan) -> io::Result<OwnedFd> {
    match owners {
        Owners::Mapped { uid_map, gid_map } => users::with_maps(uid_map, gid_map),
        Owners::OfJoined => match namespaces.joined(Kind::USER) {
            Some(joined) => joined.try_clone(),
            None => Err(io::Error::other("no user namespace is joined")),
        },
    }
}
