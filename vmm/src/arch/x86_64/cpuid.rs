//! What a guest learns of its processor: what the host's KVM offers, made consistent for this
//! machine. One package, one thread in each core.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::ArchError;

/// Leaf 1, ECX: the guest may set a deadline for its timer; KVM always can.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: performance capabilities, which would need a counter unit.
const PERFORMANCE_CAPABILITIES: u32 = 1 << 15;
/// Leaf 1, EDX: the number of logical processors is valid.
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 6, EAX bit 1: turbo boost; ECX bit 3: energy bias.
const TURBO: u32 = 1 << 1;
const ENERGY_BIAS: u32 = 1 << 3;
/// Leaf 7, ECX: user-mode wait instructions, which would hold a processor without an exit.
const WAIT_PACKAGE: u32 = 1 << 5;
/// Leaf 0x80000001, ECX: leaves 0x8000001d and 0x8000001e are valid.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// The core and node that a processor belongs to (AMD).
const CORE_LEAF: u32 = 0x8000_001e;

/// Levels of leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Leaf 1, ECX bit 27, and leaf 7, ECX bit 4: what the guest itself has switched on, not features.
const OS_XSAVE: u32 = 1 << 27;
const OS_PROTECTION_KEYS: u32 = 1 << 4;

/// Registers whose every bit is a feature: leaf, index, and masks of eax, ebx, ecx, edx.
const FEATURES: [(u32, u32, [u32; 4]); 10] = [
    (1, 0, [0, 0, !OS_XSAVE, u32::MAX]),
    (7, 0, [0, u32::MAX, !OS_PROTECTION_KEYS, u32::MAX]),
    (7, 1, [u32::MAX; 4]),
    (7, 2, [0, 0, 0, u32::MAX]),
    (0xd, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0xd, 1, [u32::MAX, 0, 0, 0]),
    // What KVM does for its guests.
    (0x4000_0001, 0, [u32::MAX, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
    // Against speculation, of AMD.
    (0x8000_0008, 0, [0, u32::MAX, 0, 0]),
    (0x8000_0021, 0, [u32::MAX, 0, u32::MAX, 0]),
];

/// Checks that a guest which has seen the features `saved` finds them on the `host`. Whose make the
/// processor is counts too, if the guest has seen that.
pub(super) fn check(
    saved: &[kvm_cpuid_entry2],
    host: &[kvm_cpuid_entry2],
) -> Result<(), ArchError> {
    let find = |entries: &[kvm_cpuid_entry2], leaf, index| {
        let mut entries = entries.iter();
        let found = entries.find(|entry| (entry.function, entry.index) == (leaf, index));
        found.map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    };
    if let (Some([_, saved @ ..]), Some([_, host @ ..])) = (find(saved, 0, 0), find(host, 0, 0))
        && saved != host
    {
        return Err(ArchError::Make);
    }
    for (leaf, index, masks) in FEATURES {
        let Some(wanted) = find(saved, leaf, index) else {
            continue;
        };
        let there = find(host, leaf, index).unwrap_or_default();
        for (register, name) in ["eax", "ebx", "ecx", "edx"].iter().enumerate() {
            let missing = wanted[register] & masks[register] & !there[register];
            if missing != 0 {
                return Err(ArchError::Lacking {
                    leaf,
                    index,
                    register: name,
                    missing,
                });
            }
        }
    }
    Ok(())
}

/// The features of processor `id` of `count`.
pub(super) fn normalise(supported: &CpuId, id: u8, count: u8) -> CpuId {
    let amd = supported.as_slice().iter().any(is_amd);
    let supports = |leaf| {
        supported
            .as_slice()
            .iter()
            .any(|entry| entry.function == leaf)
    };
    let topology = Topology::new(id, count, amd);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !Topology::LEAVES.contains(&entry.function))
        .copied()
        .collect();
    // Older processors of AMD, and all of Intel, do not know the leaves that this bit promises.
    let amd_topology = amd && supports(CORE_LEAF);
    for entry in &mut entries {
        topology.apply(entry);
        match entry.function {
            1 => {
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.ecx &= !PERFORMANCE_CAPABILITIES;
            }
            6 => {
                entry.eax &= !TURBO;
                entry.ecx &= !ENERGY_BIAS;
            }
            7 if entry.index == 0 => entry.ecx &= !WAIT_PACKAGE,
            // No performance counters are promised.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 if amd_topology => entry.ecx |= TOPOLOGY_EXTENSIONS,
            _ => {}
        }
    }
    let highest = entries.iter().find(|entry| entry.function == 0);
    let highest = highest.map_or(0, |entry| entry.eax);
    for leaf in Topology::LEAVES {
        if leaf <= highest {
            entries.extend(topology.levels(leaf));
        }
    }
    CpuId::from_entries(&entries).expect("fewer than the kernel's limit")
}

/// "AuthenticAMD", or Hygon's descendants of it.
fn is_amd(entry: &kvm_cpuid_entry2) -> bool {
    let name = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
    entry.function == 0 && matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
}

/// Where a processor stands among the others.
struct Topology {
    id: u32,
    count: u32,
    /// Bits of an APIC number that tell cores apart.
    core_bits: u32,
    amd: bool,
}

impl Topology {
    /// Extended topology enumeration, rewritten as a whole.
    const LEAVES: [u32; 2] = [0xb, 0x1f];

    fn new(id: u8, count: u8, amd: bool) -> Self {
        let count = u32::from(count.max(1));
        Self {
            id: id.into(),
            count,
            core_bits: count.next_power_of_two().trailing_zeros(),
            amd,
        }
    }

    fn apply(&self, entry: &mut kvm_cpuid_entry2) {
        match entry.function {
            1 => {
                entry.ebx &= 0x0000_ffff;
                entry.ebx |= self.id << 24 | self.count << 16;
                entry.edx &= !HYPER_THREADING;
                if self.count > 1 {
                    entry.edx |= HYPER_THREADING;
                }
            }
            // Caches: who shares each, and the number of cores (Intel).
            4 if entry.eax & 0x1f != 0 => {
                entry.eax &= 0x0000_3fff;
                entry.eax |= (self.count - 1) << 26 | self.sharers(entry.eax) << 14;
            }
            // The number of cores and the width of their numbers (AMD; reserved elsewhere).
            0x8000_0008 if self.amd => {
                entry.ecx &= !0xf0ff;
                entry.ecx |= self.core_bits << 12 | (self.count - 1);
            }
            // Caches (AMD).
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax &= 0x0000_3fff;
                entry.eax |= self.sharers(entry.eax) << 14;
            }
            // The core's number; one thread in it; one node.
            CORE_LEAF => {
                entry.eax = self.id;
                entry.ebx = self.id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    /// The number of processors that share a cache of this kind, less one: the third level is the
    /// package's, the others are each core's own.
    fn sharers(&self, eax: u32) -> u32 {
        let level = eax >> 5 & 7;
        if level >= 3 { self.count - 1 } else { 0 }
    }

    /// Threads, cores, and the end of the list.
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        [
            (0, 0, 1, LEVEL_THREAD),
            (1, self.core_bits, self.count, LEVEL_CORE),
            (2, 0, 0, 0),
        ]
        .map(|(index, shift, processors, level)| kvm_cpuid_entry2 {
            function,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: level << 8 | index,
            edx: self.id,
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn a_host_that_lacks_what_the_guest_has_seen_is_refused() {
        let host = [
            entry(0, [9, 1, 2, 3]),
            entry(1, [0, 0, 0b11, 0b11]),
            entry(7, [0, 0b1, 0, 0]),
            entry(0x4000_0001, [0b1, 0, 0, 0]),
            entry(0x8000_0008, [0, 0b1, 0, 0]),
            entry(0x8000_0021, [0b1, 0, 0b1, 0]),
        ];
        let subleaf = |index, registers| kvm_cpuid_entry2 {
            index,
            ..entry(7, registers)
        };
        for (saved, want) in [
            (entry(1, [5, 5, 0b10, 0b1]), None),
            (entry(1, [0, 0, OS_XSAVE, 0]), None),
            (entry(0, [1, 1, 2, 3]), None),
            (entry(6, [1, 1, 2, 3]), None),
            (entry(0, [9, 1, 2, 4]), Some("make")),
            (entry(1, [0, 0, 0b100, 0]), Some("leaf 0x1.0, ecx: 0x4")),
            (entry(7, [0, 0b10, 0, 0]), Some("leaf 0x7.0, ebx: 0x2")),
            (
                entry(0x8000_0001, [0, 0, 0, 8]),
                Some("0x80000001.0, edx: 0x8"),
            ),
            (subleaf(1, [0, 0, 1 << 5, 0]), Some("0x7.1, ecx: 0x20")),
            (subleaf(2, [0, 0, 0, 1 << 4]), Some("0x7.2, edx: 0x10")),
            (entry(0x4000_0001, [1, 0, 0, 1]), None),
            (
                entry(0x4000_0001, [0b11, 0, 0, 0]),
                Some("0x40000001.0, eax: 0x2"),
            ),
            (entry(0x8000_0008, [0x3030, 1, 0x7f, 0]), None),
            (
                entry(0x8000_0008, [0, 1 << 12 | 1, 0, 0]),
                Some("0x80000008.0, ebx: 0x1000"),
            ),
            (entry(0x8000_0021, [1, 0xfff, 1, 0]), None),
            (
                entry(0x8000_0021, [0b1001, 0, 0, 0]),
                Some("0x80000021.0, eax: 0x8"),
            ),
            (
                entry(0x8000_0021, [0, 0, 0b11, 0]),
                Some("0x80000021.0, ecx: 0x2"),
            ),
        ] {
            let said = check(&[saved], &host).err().map(|error| error.to_string());
            match (said, want) {
                (None, None) => {}
                (Some(said), Some(want)) => assert!(said.contains(want), "{said}"),
                (said, want) => panic!("{said:?} {want:?}"),
            }
        }
    }

    fn normalised(function: u32, index: u32, id: u8, count: u8) -> [u32; 4] {
        let name = [b"Auth", b"enti", b"cAMD"].map(|part| u32::from_le_bytes(*part));
        let host = [
            entry(0, [0x10, name[0], name[2], name[1]]),
            entry(1, [0x1234, 0xaabb_ccdd, PERFORMANCE_CAPABILITIES, 0]),
            entry(0xb, [9, 9, 9, 9]),
            entry(0x8000_0001, [0; 4]),
            entry(0x8000_0008, [0x3030, 0, 0x70ff, 0]),
            entry(0x8000_001e, [99, 0x0199, 7, 0]),
        ];
        let all = normalise(&CpuId::from_entries(&host).unwrap(), id, count);
        let found: Vec<_> = all
            .as_slice()
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index))
            .map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        found[0]
    }

    #[test]
    fn a_processor_knows_its_place_and_not_the_hosts() {
        let both = TSC_DEADLINE | HYPERVISOR;
        for (leaf, index, id, count, want) in [
            (1, 0, 0, 1, [0x1234, 0x0001_ccdd, both, 0]),
            (1, 0, 3, 6, [0x1234, 0x0306_ccdd, both, HYPER_THREADING]),
            (0xb, 0, 3, 6, [0, 1, 0x100, 3]),
            (0xb, 1, 3, 6, [3, 6, 0x201, 3]),
            (0xb, 2, 3, 6, [0, 0, 2, 3]),
            (0xb, 1, 0, 1, [0, 1, 0x201, 0]),
            (0x8000_0001, 0, 0, 1, [0, 0, TOPOLOGY_EXTENSIONS, 0]),
            (0x8000_0008, 0, 3, 6, [0x3030, 0, 0x3005, 0]),
            (0x8000_001e, 0, 3, 6, [3, 3, 0, 0]),
        ] {
            assert_eq!(
                normalised(leaf, index, id, count),
                want,
                "{leaf:#x} {index}"
            );
        }
    }
}
