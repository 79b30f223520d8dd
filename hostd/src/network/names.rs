//! The names of the interfaces that belong to an instance.
//!
//! An interface name has at most 15 bytes and an instance name up to 63, so the former is a hash of
//! the latter; the interface's alias holds the whole name. Nothing else on a host starts with
//! [`PREFIX`], which is how leftovers of a crash are found.

use sha2::{Digest, Sha256};

/// What every interface of an instance starts with. The bridge's name must not start with it.
pub(super) const PREFIX: &str = "hostd-";

/// Lower-case base 32 (RFC 4648): a hash of 40 bits is eight of them.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const HASH_CHARS: usize = 8;

/// The interfaces of one instance.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Names {
    /// The host's end of a container's veth pair.
    pub(super) veth: String,
    /// A VM's tap.
    pub(super) tap: String,
    /// The intermediate device that shapes what the instance sends.
    pub(super) ifb: String,
}

impl Names {
    pub(super) fn of(instance: &str) -> Names {
        let hash = hash(instance);
        Names {
            veth: format!("{PREFIX}v{hash}"),
            tap: format!("{PREFIX}t{hash}"),
            ifb: format!("{PREFIX}i{hash}"),
        }
    }

    pub(super) fn all(&self) -> [&str; 3] {
        [&self.veth, &self.tap, &self.ifb]
    }
}

fn hash(instance: &str) -> String {
    let digest = Sha256::digest(instance.as_bytes());
    let bits = digest
        .iter()
        .take(5)
        .fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
    (0..HASH_CHARS)
        .map(|index| {
            let five = bits >> (5 * index) & 31;
            char::from(ALPHABET[usize::try_from(five).expect("five bits")])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_63_bytes_gives_interface_names_that_linux_takes() {
        let names = Names::of(&"a".repeat(63));
        for name in names.all() {
            assert_eq!(name.len(), 15, "{name}");
            assert!(name.starts_with(PREFIX));
        }
    }

    #[test]
    fn the_names_are_stable_and_differ_between_instances() {
        assert_eq!(Names::of("web"), Names::of("web"));
        assert_ne!(Names::of("web").veth, Names::of("web-2").veth);
        assert_ne!(Names::of("web").veth, Names::of("web").tap);
    }
}
