//! Gives a group of cgroup v2 to the user of its container, who can then make groups below it.

use std::fs;
use std::io;
use std::os::unix::fs::lchown;
use std::path::Path;

use super::{Cgroup, CgroupError};

/// The files of a group that may be given away, as this kernel knows them.
const FILES: &str = "/sys/kernel/cgroup/delegate";
/// Those of kernels that do not say.
const FILES_DEFAULT: &str = "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n";

impl Cgroup {
    /// Makes `uid` the owner of the group and of the files through which it is managed, but not of its
    /// limits. Nothing is changed where v1 has controllers: there it would be no wall.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn give_to(&self, uid: u32) -> Result<(), CgroupError> {
        let Some(directory) = self.unified().filter(|_| self.legacy().next().is_none()) else {
            return Ok(());
        };
        let give = |path: &Path| match lchown(path, Some(uid), None) {
            // A kernel may know of more files than a group has.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|source| CgroupError::Io {
                action: "change the owner of",
                path: path.to_owned(),
                source,
            }),
        };
        give(&directory.path)?;
        let files = fs::read_to_string(FILES).unwrap_or_else(|_| FILES_DEFAULT.to_owned());
        let files = files.lines().filter(|name| !name.contains('/'));
        files
            .map(|name| directory.path.join(name))
            .try_for_each(|path| give(&path))
    }
}
