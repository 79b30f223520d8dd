//! The options of a mount (`mounts[].options`): which of them are attributes of the mount, which are
//! flags of the file system, and which are handed to the file system as they are.

use libc::{
    MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_RELATIME, MOUNT_ATTR_STRICTATIME, MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE,
};

use crate::sys::MountAttributes;

/// The parsed options of one mount.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Options {
    /// `bind` or `rbind`.
    pub(crate) bind: Option<Bind>,
    /// `remount`: changes what is mounted at the destination.
    pub(crate) remount: bool,
    /// Of the mount itself.
    pub(crate) attributes: MountAttributes,
    /// Of the mount and all below it (`rro` and its like).
    pub(crate) recursive: MountAttributes,
    /// How mounts spread, as an `MS_` bit, and whether this holds for all mounts below.
    pub(crate) propagation: Option<(u64, bool)>,
    /// `tmpcopyup`: what the root file system has there is copied into the new tmpfs.
    pub(crate) copy_up: bool,
    /// `idmap`, `ridmap`: the mount's owners are mapped (recursively).
    pub(crate) id_map: Option<bool>,
    /// Flags and key-value pairs for the file system.
    pub(crate) data: Vec<(String, Option<String>)>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Bind {
    Single,
    Recursive,
}

/// Options that set (true) or clear (false) a bit of the mount. With `r` before the name they do so
/// for all mounts below as well.
const ATTRIBUTES: &[(&str, bool, u64)] = &[
    ("ro", true, MOUNT_ATTR_RDONLY),
    ("rw", false, MOUNT_ATTR_RDONLY),
    ("nosuid", true, MOUNT_ATTR_NOSUID),
    ("suid", false, MOUNT_ATTR_NOSUID),
    ("nodev", true, MOUNT_ATTR_NODEV),
    ("dev", false, MOUNT_ATTR_NODEV),
    ("noexec", true, MOUNT_ATTR_NOEXEC),
    ("exec", false, MOUNT_ATTR_NOEXEC),
    ("nodiratime", true, MOUNT_ATTR_NODIRATIME),
    ("diratime", false, MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", true, MOUNT_ATTR_NOSYMFOLLOW),
    ("symfollow", false, MOUNT_ATTR_NOSYMFOLLOW),
];

/// Options of the access time, which is a field of its own and not a bit.
const ACCESS_TIMES: &[(&str, u64)] = &[
    ("relatime", MOUNT_ATTR_RELATIME),
    // As mount(8) and runc have it: without any of these the kernel's own choice is `relatime`.
    ("norelatime", MOUNT_ATTR_RELATIME),
    ("noatime", MOUNT_ATTR_NOATIME),
    ("atime", MOUNT_ATTR_RELATIME),
    ("strictatime", MOUNT_ATTR_STRICTATIME),
    ("nostrictatime", MOUNT_ATTR_RELATIME),
];

const PROPAGATIONS: &[(&str, u64)] = &[
    ("shared", MS_SHARED),
    ("slave", MS_SLAVE),
    ("private", MS_PRIVATE),
    ("unbindable", MS_UNBINDABLE),
];

/// Options that the file system as a whole gets, and those that need nothing done: they are the default, or
/// about the kernel's log, which does not hear of mounts that are made by descriptor.
const FILE_SYSTEM_FLAGS: &[&str] = &["sync", "dirsync", "lazytime", "mand"];
const DEFAULTS: &[&str] = &[
    "defaults",
    "async",
    "nolazytime",
    "nomand",
    "loud",
    "silent",
    "noiversion",
];

impl Options {
    pub(crate) fn parse<'a>(options: impl Iterator<Item = &'a str>) -> Options {
        let mut parsed = Options::default();
        for option in options {
            parsed.take(option);
        }
        parsed
    }

    fn take(&mut self, option: &str) {
        match option {
            "bind" => self.bind = Some(Bind::Single),
            "rbind" => self.bind = Some(Bind::Recursive),
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.id_map = Some(false),
            "ridmap" => self.id_map = Some(true),
            _ if DEFAULTS.contains(&option) => {}
            _ if FILE_SYSTEM_FLAGS.contains(&option) => self.data.push((option.to_owned(), None)),
            _ => {
                if !self.take_attribute(option) {
                    self.data.push(match option.split_once('=') {
                        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                        None => (option.to_owned(), None),
                    });
                }
            }
        }
    }

    /// An option that only some file system could have, as it was given.
    pub(crate) fn for_file_system(&self) -> Option<String> {
        let (key, value) = self.data.first()?;
        Some(match value {
            Some(value) => format!("{key}={value}"),
            None => key.clone(),
        })
    }

    fn take_attribute(&mut self, option: &str) -> bool {
        if let Some(propagation) = parse_propagation(option) {
            self.propagation = Some(propagation);
            return true;
        }
        if apply(&mut self.attributes, option) {
            return true;
        }
        // No name of the tables begins with `r` and is another one's with `r` before it, but for
        // `relatime`, which was found above.
        option
            .strip_prefix('r')
            .is_some_and(|name| apply(&mut self.recursive, name))
    }
}

/// Every option that is understood here, in alphabetical order.
pub(crate) fn names() -> Vec<String> {
    let mut names: Vec<String> = ["bind", "rbind", "remount", "tmpcopyup", "idmap", "ridmap"]
        .into_iter()
        .chain(FILE_SYSTEM_FLAGS.iter().copied())
        .chain(DEFAULTS.iter().copied())
        .map(str::to_owned)
        .collect();
    let attributes = ATTRIBUTES.iter().map(|(name, ..)| *name);
    let attributes = attributes.chain(ACCESS_TIMES.iter().map(|(name, _)| *name));
    for name in attributes.chain(PROPAGATIONS.iter().map(|(name, _)| *name)) {
        names.extend([name.to_owned(), format!("r{name}")]);
    }
    names.sort();
    names
}

/// `shared`, `rslave` and their like, as in `linux.rootfsPropagation`: the `MS_` bit, and whether it
/// holds for all mounts below.
pub(crate) fn parse_propagation(option: &str) -> Option<(u64, bool)> {
    let find = |name: &str| PROPAGATIONS.iter().find(|(known, _)| *known == name);
    if let Some((_, bit)) = find(option) {
        return Some((*bit, false));
    }
    find(option.strip_prefix('r')?).map(|(_, bit)| (*bit, true))
}

/// A later option wins over an earlier one.
fn apply(attributes: &mut MountAttributes, name: &str) -> bool {
    if let Some((_, set, bit)) = ATTRIBUTES.iter().find(|(known, ..)| *known == name) {
        if *set {
            attributes.set |= bit;
            attributes.clear &= !bit;
        } else {
            attributes.clear |= bit;
            attributes.set &= !bit;
        }
        return true;
    }
    if let Some((_, value)) = ACCESS_TIMES.iter().find(|(known, _)| *known == name) {
        attributes.set = (attributes.set & !MOUNT_ATTR__ATIME) | value;
        // The kernel changes the field only if all of it is cleared first.
        attributes.clear |= MOUNT_ATTR__ATIME;
        return true;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> Options {
        Options::parse(options.split(','))
    }

    #[test]
    fn options_go_where_they_belong() {
        let options = parse("rbind,nosuid,ro,rw,rro,rslave,mode=755,size=65536k,sync,defaults");
        assert_eq!(options.bind, Some(Bind::Recursive));
        assert_eq!(options.attributes.set, MOUNT_ATTR_NOSUID);
        assert_eq!(options.attributes.clear, MOUNT_ATTR_RDONLY);
        assert_eq!(options.recursive.set, MOUNT_ATTR_RDONLY);
        assert_eq!(options.propagation, Some((MS_SLAVE, true)));
        assert_eq!(
            options.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned())),
                ("sync".to_owned(), None),
            ]
        );
    }

    #[test]
    fn the_access_time_is_one_field() {
        let options = parse("noatime,strictatime,rnoatime");
        assert_eq!(options.attributes.set, MOUNT_ATTR_STRICTATIME);
        assert_eq!(options.attributes.clear, MOUNT_ATTR__ATIME);
        assert_eq!(options.recursive.set, MOUNT_ATTR_NOATIME);
        assert!(parse("relatime").recursive.is_empty());
    }
}
