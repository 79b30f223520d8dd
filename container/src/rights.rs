//! Whether this program has the rights of the host's root.

use std::path::Path;
use std::sync::OnceLock;

/// The mapping of a process that is in no user namespace but the host's.
const HOST_UID_MAP: [&str; 3] = ["0", "0", "4294967295"];

/// Whether this program was root when it first asked, and no user namespace was between it and the host:
/// what a container's root may not do, as making groups wherever it likes, is not tried elsewhere.
pub(crate) fn is_host_root() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| rustix::process::geteuid().is_root() && !in_user_namespace())
}

/// Whether this program runs in a user namespace that is not the host's.
pub(crate) fn in_user_namespace() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let map = std::fs::read_to_string(Path::new("/proc/self/uid_map")).unwrap_or_default();
        is_other_map(&map)
    })
}

/// A kernel without user namespaces has no file.
fn is_other_map(map: &str) -> bool {
    !map.is_empty() && map.split_whitespace().ne(HOST_UID_MAP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_known_by_its_mapping() {
        assert!(!is_other_map("         0          0 4294967295\n"));
        assert!(!is_other_map(""));
        for other in [
            "         0       1000          1\n",
            "         0     100000      65536\n",
            "         0          0      65536\n     65536      65536 4294901759\n",
        ] {
            assert!(is_other_map(other), "{other}");
        }
    }
}
