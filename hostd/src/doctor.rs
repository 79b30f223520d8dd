//! Says in plain words what this host can do for instances, and what to do about the rest.
//!
//! `probe` looks, `judge` decides; only the former touches the host. Nothing is changed, except that
//! opening a device may make the kernel load its module.

mod judge;
mod probe;

use std::path::Path;

use crate::api::types::Finding;

/// Where the guest's kernel and initramfs are, unless hostd was told another place.
pub const GUEST_DIR: &str = "/usr/lib/hostd/guest";

/// Where hostd keeps its state, unless it was told another place.
pub const STATE_DIR: &str = "/var/lib/hostd";

/// Every check of this host. Reads files and runs `nft`, so it may take some milliseconds: not for a
/// thread of the async runtime.
pub fn findings() -> Vec<Finding> {
    findings_for(Path::new(GUEST_DIR), Path::new(STATE_DIR))
}

/// As [`findings`], with the guest's kernel and initramfs in `guest_dir`, and the state in `state_dir`.
pub fn findings_for(guest_dir: &Path, state_dir: &Path) -> Vec<Finding> {
    judge::all(&probe::look(guest_dir, state_dir))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_check_has_one_finding_with_a_sentence() {
        let findings = findings();
        let checks: HashSet<&str> = findings
            .iter()
            .map(|finding| finding.check.as_str())
            .collect();
        assert_eq!(checks.len(), findings.len());
        for expected in ["kvm", "cgroup", "overlayfs", "nftables", "kernel"] {
            assert!(checks.contains(expected), "{expected}");
        }
        for finding in &findings {
            assert!(finding.detail.ends_with('.'), "{finding:?}");
        }
    }
}
