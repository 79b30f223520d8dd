//! The users of a container: a user namespace of its own, unless it is to have the host's.
//!
//! What is on the disk knows nothing of it. Layers, the writable layer and mounts hold the owners that
//! the container sees; mounts that map owners lie between (`mount_setattr(2)`, `MOUNT_ATTR_IDMAP`). So a
//! range can be another's in the next run, and snapshots and volumes pass from one instance to another.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process;

use container::users::{IdRange, UserNamespace};
use nix::errno::Errno;

use super::user::User;
use crate::api::types::{InstanceSpec, NetworkMode, UserNamespaceMode};
use crate::driver::DriverError;
use crate::validate::FieldError;

/// What distributions hand out, `nobody` included.
const COUNT: u32 = 65536;

/// The first range begins where no tool hands out users of the host: neither shadow's subordinate ids nor
/// systemd's users and containers, nor the ids that directories are mapped to, reach so far.
const FIRST: u32 = 1 << 31;

/// What to do where a user namespace cannot be had.
const HOST_HINT: &str = "or set `user_namespace` to `host` for a container that is trusted";

/// The users of one container.
#[derive(Debug)]
pub(super) struct Users {
    namespace: UserNamespace,
    range: IdRange,
}

impl Users {
    /// Makes the namespace that `spec` asks for, and with it, if it is to be on a network, a network
    /// namespace. `index` is the instance's own, and `sources` are the host's directories for its mounts.
    pub(super) fn make(
        spec: &InstanceSpec,
        index: u32,
        sources: &[PathBuf],
    ) -> Result<(Option<Self>, Option<OwnedFd>), DriverError> {
        if spec.user_namespace == Some(UserNamespaceMode::Host) {
            return Ok((None, None));
        }
        let range = range(index)
            .ok_or_else(|| refused("all ranges of users are taken", "remove other instances"))?;
        let made = match spec.network.mode {
            NetworkMode::Bridge => UserNamespace::with_network(range)
                .map(|(namespace, network)| (namespace, Some(network))),
            NetworkMode::None => UserNamespace::new(range).map(|namespace| (namespace, None)),
        };
        match made {
            Ok((namespace, network)) => {
                let users = Self { namespace, range };
                users.check_sources(sources).map_err(DriverError::Field)?;
                Ok((Some(users), network))
            }
            Err(error) if error.raw_os_error() == Some(Errno::ENOSPC as i32) => Err(refused(
                "this host makes no more user namespaces",
                "raise the sysctl user.max_user_namespaces",
            )),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(refused(
                &format!("hostd itself has no right to the host's users from {FIRST} on"),
                "run it as root outside of any user namespace",
            )),
            Err(error) => Err(DriverError::io("making a user namespace")(error)),
        }
    }

    pub(super) fn range(&self) -> IdRange {
        self.range
    }

    /// A path of the namespace that is there for as long as this value.
    pub(super) fn path(&self) -> PathBuf {
        let number = self.namespace.as_fd().as_raw_fd();
        PathBuf::from(format!("/proc/{}/fd/{number}", process::id()))
    }

    /// A copy of the mount at `path` in which the owners of files are the container's users.
    pub(super) fn mapped(&self, path: &Path) -> io::Result<OwnedFd> {
        self.namespace.mapped_tree(path, false)
    }

    /// Whether the mounts at all of `sources` can be mapped. The index of a source is that of its mount.
    fn check_sources(&self, sources: &[PathBuf]) -> Result<(), FieldError> {
        for (index, source) in sources.iter().enumerate() {
            self.namespace.mapped_tree(source, true).map_err(|error| {
                let source = source.display();
                let detail = format!(
                    "`{source}`, or what is mounted below, is on a file system whose files cannot be \
                     given to the users of the container: {error}"
                );
                FieldError::new(format!("/mounts/{index}/source"), detail)
                    .hint(format!("put it on another file system, {HOST_HINT}"))
            })?;
        }
        Ok(())
    }
}

/// Whether a container with users of its own has this one.
pub(super) fn check(user: &User) -> Result<(), FieldError> {
    let ids = [user.uid, user.gid].into_iter();
    match ids.chain(user.groups.iter().copied()).max() {
        Some(id) if id >= COUNT => Err(FieldError::new(
            "/user",
            format!(
                "the container has users and groups up to {}, not {id}",
                COUNT - 1
            ),
        )
        .hint(format!("choose another, {HOST_HINT}"))),
        _ => Ok(()),
    }
}

fn range(index: u32) -> Option<IdRange> {
    let first = index.checked_mul(COUNT)?.checked_add(FIRST)?;
    // The last id of all means that there is none.
    let end = first.checked_add(COUNT)?;
    Some(IdRange {
        first,
        count: end - first,
    })
}

fn refused(detail: &str, hint: &str) -> DriverError {
    DriverError::Field(
        FieldError::new("/user_namespace", detail).hint(format!("{hint}, {HOST_HINT}")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_apart_and_end_before_the_last_id() {
        let ranges: Vec<IdRange> = (0..=u32::from(u16::MAX)).map_while(range).collect();
        assert_eq!(ranges.len(), 32767);
        assert_eq!(ranges[0].first, 1 << 31);
        assert!(
            ranges
                .windows(2)
                .all(|pair| pair[0].first + COUNT == pair[1].first)
        );
        assert!(
            ranges
                .iter()
                .all(|range| range.first.checked_add(range.count).is_some())
        );
        assert_eq!(range(u32::MAX), None);
    }

    #[test]
    fn a_user_who_is_not_in_the_range_is_refused() {
        let user = |uid, gid, group| User {
            uid,
            gid,
            groups: vec![group],
            home: "/".to_owned(),
        };
        check(&user(65535, 65535, 65535)).unwrap();
        for user in [user(65536, 0, 0), user(0, 65536, 0), user(0, 0, 65536)] {
            assert_eq!(check(&user).unwrap_err().field, "/user");
        }
    }
}
