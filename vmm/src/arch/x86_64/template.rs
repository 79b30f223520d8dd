//! Processors by a name, for machines that move between hosts: of what a host offers, a guest sees what
//! every host of that level has, as the levels of the x86-64 psABI define it, with what operating
//! systems use at that level. Model numbers, caches, KVM's own features and what guests need against
//! speculation stay the host's.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use self::Register::{Ebx, Ecx, Edx};
use crate::spec::{CpuTemplate, Cpus};

/// A register of a leaf.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// A feature of a level.
#[derive(Debug)]
struct Feature {
    leaf: u32,
    register: Register,
    bit: u8,
    name: &'static str,
    /// The first level that has it.
    level: u8,
}

const fn feature(leaf: u32, register: Register, bit: u8, name: &'static str, level: u8) -> Feature {
    Feature {
        leaf,
        register,
        bit,
        name,
        level,
    }
}

/// Beyond what all 64-bit processors have, which is in [`KEPT`].
const FEATURES: &[Feature] = &[
    feature(1, Ecx, 0, "sse3", 2),
    feature(1, Ecx, 9, "ssse3", 2),
    feature(1, Ecx, 13, "cx16", 2),
    feature(1, Ecx, 19, "sse4_1", 2),
    feature(1, Ecx, 20, "sse4_2", 2),
    feature(1, Ecx, 23, "popcnt", 2),
    feature(0x8000_0001, Ecx, 0, "lahf_lm", 2),
    feature(0x8000_0001, Edx, 27, "rdtscp", 2),
    feature(1, Ecx, 1, "pclmulqdq", 3),
    feature(1, Ecx, 12, "fma", 3),
    feature(1, Ecx, 22, "movbe", 3),
    feature(1, Ecx, 25, "aes", 3),
    feature(1, Ecx, 26, "xsave", 3),
    feature(1, Ecx, 28, "avx", 3),
    feature(1, Ecx, 29, "f16c", 3),
    feature(1, Ecx, 30, "rdrand", 3),
    feature(7, Ebx, 0, "fsgsbase", 3),
    feature(7, Ebx, 3, "bmi1", 3),
    feature(7, Ebx, 5, "avx2", 3),
    feature(7, Ebx, 7, "smep", 3),
    feature(7, Ebx, 8, "bmi2", 3),
    feature(7, Ebx, 9, "erms", 3),
    feature(7, Ebx, 20, "smap", 3),
    feature(0x8000_0001, Ecx, 5, "lzcnt", 3),
    feature(0x8000_0001, Edx, 26, "pdpe1gb", 3),
];

/// What stays as the host has it, at every level.
const KEPT: &[(u32, Register, u32)] = &[
    // All that came before 64-bit processors but for debugging, temperature and snooping; threads.
    (1, Edx, 0x078b_fbff | 1 << 28),
    // x2APIC, the timer's deadline and the hypervisor bit, all of which are KVM's.
    (1, Ecx, 1 << 21 | 1 << 24 | 1 << 31),
    // Against speculation: MD_CLEAR, SPEC_CTRL, STIBP, FLUSH_L1D, ARCH_CAPABILITIES, SSBD.
    (7, Edx, 1 << 10 | 0xf << 26 | 1 << 31),
    // The same of AMD: IBPB, IBRS, STIBP and their preferences, SSBD, PSFD, BTC_NO, IBPB_RET.
    (0x8000_0008, Ebx, 0x770f_d000),
    // SYSCALL, NX, long mode, and AMD's copies of leaf 1.
    (0x8000_0001, Edx, 1 << 11 | 1 << 20 | 1 << 29 | 0x0183_f3ff),
    // AMD's topology, which is valid if this machine says so.
    (0x8000_0001, Ecx, 1 << 22),
];

/// Leaves of which the content is not features, or KVM's.
const PLAIN_LEAVES: [u32; 9] = [
    0,
    2,
    4,
    0xb,
    0x8000_0000,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_001d,
];

/// The brand's name, and which core it is, are the host's and this machine's.
fn is_plain(leaf: u32) -> bool {
    PLAIN_LEAVES.contains(&leaf)
        || (0x4000_0000..0x4000_0100).contains(&leaf)
        || (0x8000_0002..=0x8000_0004).contains(&leaf)
        || leaf == 0x8000_001e
}

/// The last basic leaf that a guest sees.
const LAST_LEAF: u32 = 0xd;
/// Leaf 6, EAX: the timer never stops, since it is KVM's.
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
/// Extended states, and those that a guest has: x87, SSE, AVX, and how many bytes they take.
const STATES_LEAF: u32 = 0xd;
const STATES: u32 = 7;
const STATES_BYTES: u32 = 576 + 256;
/// Leaf 0xd, index 1: states are saved only if they were changed.
const XSAVEOPT: u32 = 1;

/// Virtualization: leaf 1, ECX (Intel); leaf 0x80000001, ECX, and a leaf of its own (AMD).
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const SVM_LEAF: u32 = 0x8000_000a;
/// Control-flow enforcement: leaf 7, ECX and EDX; its index 1, EDX; leaf 0xd, index 1, ECX, where the
/// states of users and supervisors are numbers 11 and 12.
const SHADOW_STACKS: u32 = 1 << 7;
const BRANCH_TRACKING: u32 = 1 << 20;
const SUPERVISOR_SHADOW_STACKS: u32 = 1 << 18;
const CONTROL_FLOW_STATES: u32 = 0b11 << 11;

/// What a guest sees, and which features of the template the host does not have.
#[derive(Debug)]
pub(super) struct Masked {
    pub(super) features: CpuId,
    pub(super) missing: Vec<&'static str>,
}

/// Takes from `supported` what `cpus` do not ask for.
pub(super) fn apply(cpus: &Cpus, supported: &CpuId) -> Masked {
    let level = match cpus.template {
        CpuTemplate::Host => {
            let entries = supported.as_slice().iter();
            let entries: Vec<_> = entries.filter_map(|entry| savable(cpus, *entry)).collect();
            return Masked {
                features: CpuId::from_entries(&entries).expect("no more than there were"),
                missing: Vec::new(),
            };
        }
        CpuTemplate::V2 => 2,
        CpuTemplate::V3 => 3,
    };
    let entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter_map(|entry| masked(level, *entry))
        .collect();
    let missing = FEATURES
        .iter()
        .filter(|feature| {
            feature.level <= level && !entries.iter().any(|entry| feature.is_in(entry))
        })
        .map(|feature| feature.name)
        .collect();
    Masked {
        features: CpuId::from_entries(&entries).expect("no more than there were"),
        missing,
    }
}

impl Feature {
    fn is_in(&self, entry: &kvm_cpuid_entry2) -> bool {
        let value = match self.register {
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        };
        (entry.function, entry.index) == (self.leaf, 0) && value & 1 << self.bit != 0
    }
}

/// A leaf without features that have a state which snapshots do not have: shadow stacks, of which KVM
/// keeps a pointer among registers of another kind, what processors do with them, and, unless it is
/// asked for, nested virtualization.
fn savable(cpus: &Cpus, mut entry: kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    match (entry.function, entry.index) {
        (1, _) if !cpus.nested => entry.ecx &= !VMX,
        (0x8000_0001, _) if !cpus.nested => entry.ecx &= !SVM,
        (SVM_LEAF, _) if !cpus.nested => return None,
        (7, 0) => {
            entry.ecx &= !SHADOW_STACKS;
            entry.edx &= !BRANCH_TRACKING;
        }
        (7, 1) => entry.edx &= !SUPERVISOR_SHADOW_STACKS,
        (STATES_LEAF, 1) => entry.ecx &= !CONTROL_FLOW_STATES,
        (STATES_LEAF, 11 | 12) => return None,
        _ => {}
    }
    Some(entry)
}

/// A leaf as guests see it, if they do.
fn masked(level: u8, mut entry: kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    match (entry.function, entry.index) {
        (0, _) => entry.eax = entry.eax.min(LAST_LEAF),
        (leaf, _) if is_plain(leaf) => {}
        (1 | 0x8000_0001 | 0x8000_0008, _) => keep(level, &mut entry),
        (6, _) => {
            entry.eax &= ALWAYS_RUNNING_TIMER;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        (7, 0) => {
            entry.eax = 0; // There is no other index.
            keep(level, &mut entry);
        }
        (STATES_LEAF, index) if level >= 3 => match index {
            0 => {
                (entry.eax, entry.edx) = (entry.eax & STATES, 0);
                (entry.ebx, entry.ecx) = (STATES_BYTES, STATES_BYTES);
            }
            1 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & XSAVEOPT, 0, 0, 0),
            2 => {}
            _ => return None,
        },
        _ => return None,
    }
    Some(entry)
}

/// Leaves the features that the level has, and [`KEPT`].
fn keep(level: u8, entry: &mut kvm_cpuid_entry2) {
    let mask = |register| {
        let features = FEATURES.iter().filter(|feature| {
            (feature.leaf, feature.register) == (entry.function, register) && feature.level <= level
        });
        let kept = KEPT
            .iter()
            .filter(|(leaf, of, _)| (*leaf, *of) == (entry.function, register));
        features
            .map(|feature| 1 << feature.bit)
            .fold(0, |sum, bit: u32| sum | bit)
            | kept.fold(0, |sum, (_, _, bits)| sum | bits)
    };
    let [ebx, ecx, edx] = [Ebx, Ecx, Edx].map(mask);
    // Leaf 1, EBX: numbers of this processor. Leaf 0x80000008, ECX and EDX: numbers, too.
    if entry.function != 1 {
        entry.ebx &= ebx;
    }
    if entry.function != 0x8000_0008 {
        entry.ecx &= ecx;
        entry.edx &= edx;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that has everything.
    fn host() -> CpuId {
        let leaves = [
            0,
            1,
            2,
            4,
            6,
            7,
            0xd,
            0x14,
            0x1d,
            0x1f,
            0x4000_0001,
            0x8000_0001,
            0x8000_0008,
            0x8000_000a,
        ];
        let mut entries = Vec::new();
        for function in leaves {
            for index in 0..4 {
                entries.push(kvm_cpuid_entry2 {
                    function,
                    index,
                    eax: u32::MAX,
                    ebx: u32::MAX,
                    ecx: u32::MAX,
                    edx: u32::MAX,
                    ..Default::default()
                });
            }
        }
        CpuId::from_entries(&entries).unwrap()
    }

    fn cpus(template: CpuTemplate) -> Cpus {
        Cpus {
            template,
            ..Cpus::default()
        }
    }

    fn registers(features: &CpuId, leaf: u32, index: u32) -> Option<[u32; 4]> {
        let mut entries = features.as_slice().iter();
        let entry = entries.find(|entry| (entry.function, entry.index) == (leaf, index))?;
        Some([entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    #[test]
    fn a_guest_sees_what_its_level_has_and_no_more() {
        const ALL: u32 = u32::MAX;
        let kvm = 1 << 21 | 1 << 24 | 1 << 31;
        let v2 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23 | kvm;
        let v3 = v2 | 1 << 1 | 1 << 12 | 1 << 22 | 0x1f << 25 & !(1 << 27) | 1 << 30;
        for (template, leaf, index, want) in [
            (CpuTemplate::V2, 0, 0, Some([0xd, ALL, ALL, ALL])),
            (CpuTemplate::V2, 1, 0, Some([ALL, ALL, v2, 0x178b_fbff])),
            (CpuTemplate::V3, 1, 0, Some([ALL, ALL, v3, 0x178b_fbff])),
            (CpuTemplate::V2, 6, 0, Some([4, 0, 0, 0])),
            (CpuTemplate::V2, 7, 0, Some([0, 0, 0, 0xbc00_0400])),
            (
                CpuTemplate::V3,
                7,
                0,
                Some([0, 0x0010_03a9, 0, 0xbc00_0400]),
            ),
            (CpuTemplate::V3, 7, 1, None),
            (CpuTemplate::V2, 0xd, 0, None),
            (CpuTemplate::V3, 0xd, 0, Some([7, 832, 832, 0])),
            (CpuTemplate::V3, 0xd, 1, Some([1, 0, 0, 0])),
            (CpuTemplate::V3, 0xd, 2, Some([ALL; 4])),
            (CpuTemplate::V3, 0xd, 3, None),
            (CpuTemplate::V3, 0x14, 0, None),
            (CpuTemplate::V3, 0x4000_0001, 0, Some([ALL; 4])),
            (CpuTemplate::V3, 0x8000_000a, 0, None),
            (CpuTemplate::Host, 0x1d, 3, Some([ALL; 4])),
        ] {
            let masked = apply(&cpus(template), &host());
            let found = registers(&masked.features, leaf, index);
            assert_eq!(found, want, "{template:?} {leaf:#x} {index}");
            assert_eq!(masked.missing, [""; 0], "{template:?}");
        }
    }

    #[test]
    fn a_guest_sees_nothing_whose_state_a_snapshot_would_lose() {
        const ALL: u32 = u32::MAX;
        let nested = Cpus {
            nested: true,
            ..Cpus::default()
        };
        let [plain, nested] = [Cpus::default(), nested].map(|cpus| apply(&cpus, &host()).features);
        for (leaf, index, want, want_nested) in [
            (1, 0, Some([ALL, ALL, ALL & !VMX, ALL]), Some([ALL; 4])),
            (
                0x8000_0001,
                0,
                Some([ALL, ALL, ALL & !SVM, ALL]),
                Some([ALL; 4]),
            ),
            (SVM_LEAF, 0, None, Some([ALL; 4])),
            (0x14, 0, Some([ALL; 4]), Some([ALL; 4])),
        ] {
            assert_eq!(registers(&plain, leaf, index), want, "{leaf:#x}");
            assert_eq!(registers(&nested, leaf, index), want_nested, "{leaf:#x}");
        }
        for (leaf, index, want) in [
            (7, 0, [ALL, ALL, !SHADOW_STACKS, !BRANCH_TRACKING]),
            (7, 1, [ALL, ALL, ALL, !SUPERVISOR_SHADOW_STACKS]),
            (0xd, 1, [ALL, ALL, !CONTROL_FLOW_STATES, ALL]),
        ] {
            for features in [&plain, &nested] {
                assert_eq!(registers(features, leaf, index), Some(want), "{leaf:#x}");
            }
        }
        let states = [11, 12].map(|index| kvm_cpuid_entry2 {
            function: STATES_LEAF,
            index,
            ..Default::default()
        });
        let masked = apply(&Cpus::default(), &CpuId::from_entries(&states).unwrap());
        assert_eq!(masked.features.as_slice().len(), 0);
    }

    #[test]
    fn what_the_host_lacks_is_named() {
        let mut host = host();
        for entry in host.as_mut_slice() {
            match entry.function {
                1 => entry.ecx &= !(1 << 25 | 1 << 23),
                7 => entry.ebx = 0,
                _ => {}
            }
        }
        assert_eq!(apply(&cpus(CpuTemplate::V2), &host).missing, ["popcnt"]);
        let missing = apply(&cpus(CpuTemplate::V3), &host).missing;
        let leaf7 = ["fsgsbase", "bmi1", "avx2", "smep", "bmi2", "erms", "smap"];
        assert_eq!(missing, [&["popcnt", "aes"][..], &leaf7].concat());
        assert_eq!(apply(&cpus(CpuTemplate::Host), &host).missing, [""; 0]);
    }
}
