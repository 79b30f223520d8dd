//! The five capability sets of a process, and the numbers behind the names.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxCapabilities};
use rustix::thread::{CapabilitySet, capabilities};

use super::namespaces::{Kind, NamespacePlan};

/// The names in the kernel's order: the index is the number.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// How many capabilities there are.
pub(crate) const COUNT: u32 = 41;

/// What a process may do. The default is nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Capabilities {
    pub(crate) bounding: CapabilitySet,
    pub(crate) effective: CapabilitySet,
    pub(crate) permitted: CapabilitySet,
    pub(crate) inheritable: CapabilitySet,
    pub(crate) ambient: CapabilitySet,
}

impl Default for Capabilities {
    fn default() -> Self {
        let none = CapabilitySet::empty();
        Self {
            bounding: none,
            effective: none,
            permitted: none,
            inheritable: none,
            ambient: none,
        }
    }
}

impl Capabilities {
    /// The sets of the configuration, without what `available` lacks: asking for more than the caller
    /// has is not an error in the other runtimes either, since one configuration serves many hosts.
    pub(crate) fn new(asked: Option<&LinuxCapabilities>, available: CapabilitySet) -> Self {
        let Some(asked) = asked else {
            return Self::default();
        };
        let set = |names: &Option<HashSet<Capability>>| {
            names
                .iter()
                .flatten()
                .map(|name| bit(*name))
                .collect::<CapabilitySet>()
                & available
        };
        Self {
            bounding: set(asked.bounding()),
            effective: set(asked.effective()),
            permitted: set(asked.permitted()),
            inheritable: set(asked.inheritable()),
            ambient: set(asked.ambient()),
        }
    }

    /// Adds a capability as runc's `exec --cap` does: to all sets but the inheritable one, and to the
    /// ambient one only if there are inheritable ones at all.
    pub(crate) fn add(&mut self, name: &str) -> bool {
        let name = name.to_ascii_uppercase();
        let name = name.strip_prefix("CAP_").unwrap_or(&name);
        let Some(index) = NAMES.iter().position(|known| *known == name) else {
            return false;
        };
        let bit = CapabilitySet::from_bits_retain(1 << index);
        self.bounding |= bit;
        self.effective |= bit;
        self.permitted |= bit;
        if !self.inheritable.is_empty() {
            self.ambient |= bit;
        }
        true
    }
}

/// The capabilities that are asked for and that `available` lacks, as a warning: the specification wants
/// them to be warned of, and not to be an error.
pub(crate) fn withheld(
    asked: Option<&LinuxCapabilities>,
    available: CapabilitySet,
) -> Option<String> {
    let asked = Capabilities::new(asked, CapabilitySet::all());
    let lacking = (asked.bounding | asked.effective | asked.permitted | asked.inheritable)
        .union(asked.ambient)
        .difference(available);
    let names: Vec<String> = (0..COUNT)
        .zip(names())
        .filter(|(index, _)| lacking.bits() & (1 << index) != 0)
        .map(|(_, name)| name)
        .collect();
    let warning = || {
        format!(
            "ignoring unavailable capabilities: {}: this process does not have them to give",
            names.join(", ")
        )
    };
    (!names.is_empty()).then(warning)
}

/// What the calling process itself may do: it cannot give more.
pub(crate) fn available() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted)
}

/// What a process in these namespaces may be given: in a user namespace it may have what its creator
/// lacks.
pub(crate) fn available_in(namespaces: &NamespacePlan) -> CapabilitySet {
    if namespaces.has(Kind::USER) {
        return CapabilitySet::from_bits_retain(u64::MAX);
    }
    available()
}

/// All names, as `CAP_CHOWN`.
pub(crate) fn names() -> impl Iterator<Item = String> {
    NAMES.iter().map(|name| format!("CAP_{name}"))
}

fn bit(capability: Capability) -> CapabilitySet {
    let name = capability.to_string();
    let index = NAMES.iter().position(|known| *known == name);
    index.map_or(CapabilitySet::empty(), |index| {
        CapabilitySet::from_bits_retain(1 << index)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_the_specification_has_its_number() {
        for (index, name) in names().enumerate() {
            let capability: Capability =
                serde_json::from_value(serde_json::Value::String(name)).unwrap();
            assert_eq!(bit(capability).bits(), 1 << index);
        }
        assert_eq!(NAMES.len(), COUNT as usize);
    }

    #[test]
    fn a_capability_that_the_caller_lacks_is_not_given() {
        let asked: LinuxCapabilities =
            serde_json::from_str(r#"{"bounding":["CAP_KILL","CAP_SYS_ADMIN"]}"#).unwrap();
        let sets = Capabilities::new(Some(&asked), CapabilitySet::KILL);
        assert_eq!(sets.bounding, CapabilitySet::KILL);
        let warning = withheld(Some(&asked), CapabilitySet::KILL).unwrap();
        assert!(
            warning.contains("capabilities: CAP_SYS_ADMIN:"),
            "{warning}"
        );
        assert_eq!(withheld(Some(&asked), CapabilitySet::all()), None);
        assert_eq!(withheld(None, CapabilitySet::empty()), None);
    }

    #[test]
    fn a_name_may_lack_its_prefix_and_be_in_small_letters() {
        let mut sets = Capabilities::default();
        assert!(sets.add("cap_kill"));
        assert!(sets.add("NET_ADMIN"));
        assert!(!sets.add("CAP_FLY"));
        assert_eq!(
            sets.effective,
            CapabilitySet::KILL | CapabilitySet::NET_ADMIN
        );
    }
}
