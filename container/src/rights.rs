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

/// The number of this program's user outside of the user namespace that it runs in, as a session knows it.
pub(crate) fn user_outside() -> u32 {
    let own = rustix::process::getuid().as_raw();
    let map = std::fs::read_to_string(Path::new("/proc/self/uid_map")).unwrap_or_default();
    outside(&map, own).unwrap_or(own)
}

/// Who `inside` is outside, by a text of /proc/PID/uid_map or gid_map: lines of INSIDE OUTSIDE COUNT.
/// Nothing for who is not mapped.
pub(crate) fn outside(map: &str, inside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let [first, outside, count] = std::array::from_fn(|_| numbers.next()?.ok());
        let offset = inside.checked_sub(first?)?;
        (offset < count?).then(|| outside?.checked_add(offset))?
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
    fn a_session_is_known_by_the_number_outside() {
        let map = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(
            [0, 1, 65536].map(|it| outside(map, it)),
            [Some(1000), Some(100_000), Some(165_535)]
        );
        assert_eq!(outside(map, 65537), None);
        assert_eq!(outside("0 0 4294967295\n", 1000), Some(1000));
        assert_eq!(outside("0 4294967295 2\n", 1), None);
        assert_eq!(outside("0 x 1\n", 0), None);
    }

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
