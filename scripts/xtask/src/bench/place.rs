//! Namespaces to measure in, so that peers meet the same host and leave nothing on it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::step::{command, run};

/// Where hybrid hosts mount the hierarchy of cgroup v2 that has no controllers.
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// Takes a mount namespace in which crun runs on a hybrid host too: it refuses v1 controllers beside a
/// v2 hierarchy, so that is taken away, from all alike. Mounts of containers stay in here.
pub(crate) fn enter_own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("Cannot make a mount namespace")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount::<str, str, str, str>(None, "/", None, private, None)
        .context("Cannot keep mounts to ourselves")?;
    let unified = Path::new(UNIFIED);
    let is_v2 = statfs(unified).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if is_v2 && fs::symlink_metadata(unified).is_ok_and(|found| found.is_dir()) {
        umount2(unified, MntFlags::MNT_DETACH).context("Cannot take the unified hierarchy away")?;
    }
    Ok(())
}

/// Takes a network namespace, in which bridges, addresses and rules of engines stay.
pub(crate) fn enter_own_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("Cannot make a network namespace")?;
    run(&mut command("ip", ["link", "set", "lo", "up"])).map(|_| ())
}
