//! Model-specific registers: as firmware leaves them, and in snapshots.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{ArchError, refused};

/// IA32_TIME_STAMP_COUNTER.
pub(super) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MISC_ENABLE, and its bit 0: fast string instructions.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE: enabled, and write-back where no range says otherwise.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// What a snapshot keeps, of what the kernel knows. Not here: what is among the system registers or
/// the local APIC's, performance counters and machine checks, which guests do not have, and what
/// other hypervisors' guests use.
const SAVED: &[RangeInclusive<u32>] = &[
    TSC..=TSC,
    0x3b..=0x3b,               // TSC_ADJUST
    0x48..=0x48,               // SPEC_CTRL
    0x122..=0x122,             // TSX_CTRL
    0x140..=0x140,             // MISC_FEATURES_ENABLES
    0x174..=0x176,             // SYSENTER_CS, _ESP, _EIP
    MISC_ENABLE..=MISC_ENABLE, //
    0x1c4..=0x1c5,             // XFD, XFD_ERR
    0x200..=0x20f,             // MTRR_PHYSBASE0 to MTRR_PHYSMASK7
    0x250..=0x250,             // MTRR_FIX64K_00000
    0x258..=0x259,             // MTRR_FIX16K
    0x268..=0x26f,             // MTRR_FIX4K
    0x277..=0x277,             // PAT
    MTRR_DEF_TYPE..=MTRR_DEF_TYPE,
    0x6a0..=0x6a0, // U_CET
    0x6a2..=0x6a2, // S_CET
    0x6a4..=0x6a8, // PL0_SSP to INT_SSP_TAB
    TSC_DEADLINE..=TSC_DEADLINE,
    0xda0..=0xda0,             // XSS
    0x4b56_4d00..=0x4b56_4dff, // KVM's own: clocks, stolen time, page faults
    0xc000_0081..=0xc000_0084, // STAR, LSTAR, CSTAR, SYSCALL_MASK
    0xc000_0102..=0xc000_0103, // KERNEL_GS_BASE, TSC_AUX
    0xc001_011f..=0xc001_011f, // VIRT_SPEC_CTRL
];

/// Sets what differs from the reset state.
pub(super) fn set_boot_values(vcpu: &VcpuFd) -> Result<(), ArchError> {
    write(
        vcpu,
        &[(MISC_ENABLE, FAST_STRING), (MTRR_DEF_TYPE, MTRR_WRITE_BACK)],
    )
}

/// Those of `known` that a snapshot keeps.
pub(super) fn saved(known: &[u32]) -> Vec<u32> {
    known
        .iter()
        .copied()
        .filter(|index| is_saved(*index))
        .collect()
}

/// The values of registers; those that this processor does not have are left out.
pub(super) fn read(vcpu: &VcpuFd, mut indices: &[u32]) -> Result<Vec<(u32, u64)>, ArchError> {
    let mut values = Vec::with_capacity(indices.len());
    while !indices.is_empty() {
        let asked = &indices[..indices.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = asked.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("fewer than the kernel's limit");
        let count = vcpu
            .get_msrs(&mut msrs)
            .map_err(refused("read model-specific registers"))?;
        let read = msrs.as_slice().iter().take(count);
        values.extend(read.map(|entry| (entry.index, entry.data)));
        // The kernel stops at the first that it refuses.
        let skip = if count < asked.len() {
            count + 1
        } else {
            count
        };
        indices = &indices[skip..];
    }
    Ok(values)
}

/// Sets registers in the order given.
pub(super) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), ArchError> {
    for part in values.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = part
            .iter()
            .map(|(index, data)| entry(*index, *data))
            .collect();
        let msrs = Msrs::from_entries(&entries).expect("fewer than the kernel's limit");
        let set = vcpu
            .set_msrs(&msrs)
            .map_err(refused("set model-specific registers"))?;
        if let Some((index, _)) = part.get(set) {
            return Err(ArchError::Msr { index: *index });
        }
    }
    Ok(())
}

/// Those of the saved `values` that a host can set which has the registers `known`. A register that a
/// host lacks holds zero to all that it knows: many are saved for features that the guest does not see.
///
/// # Errors
///
/// If the guest has used a register that the host lacks.
pub(super) fn settable(values: &[(u32, u64)], known: &[u32]) -> Result<Vec<(u32, u64)>, ArchError> {
    let mut settable = Vec::with_capacity(values.len());
    for (index, value) in values.iter().copied() {
        if known.contains(&index) {
            settable.push((index, value));
        } else if value != 0 {
            return Err(ArchError::LackingMsr { index, value });
        }
    }
    Ok(settable)
}

/// The saved `values`, as a processor goes on with them: the time-stamp counter `ticks` later, and
/// the deadline of its timer last, since it is set against the counter.
pub(super) fn resumed(values: &[(u32, u64)], ticks: u64) -> Vec<(u32, u64)> {
    let mut counter = 0;
    let mut deadline = None;
    let mut resumed = Vec::with_capacity(values.len());
    for (index, value) in values.iter().filter(|(index, _)| is_saved(*index)) {
        match *index {
            TSC => {
                counter = value.wrapping_add(ticks);
                resumed.push((TSC, counter));
            }
            TSC_DEADLINE => deadline = Some(*value),
            _ => resumed.push((*index, *value)),
        }
    }
    if let Some(deadline) = deadline {
        // A timer that has run out reads as zero even if its interrupt is still under way; one that
        // runs out now is at worst one interrupt too many.
        let deadline = if deadline == 0 { counter } else { deadline };
        resumed.push((TSC_DEADLINE, deadline));
    }
    resumed
}

/// A snapshot sets what a snapshot may hold.
fn is_saved(index: u32) -> bool {
    SAVED.iter().any(|range| range.contains(&index))
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_does_not_know_or_a_snapshot_does_not_keep_is_left_out() {
        assert_eq!(
            saved(&[0x10, 0x11, 0xc1, 0x4b56_4d01, 0x4000_0000]),
            [0x10, 0x4b56_4d01]
        );
    }

    #[test]
    fn a_register_that_the_host_lacks_is_left_out_if_it_is_zero_and_else_refused() {
        let values = [(TSC, 7), (0x6a0, 0), (0x277, 0)];
        let settable_here = |values: &[_]| settable(values, &[TSC, 0x277]);
        assert_eq!(settable_here(&values).unwrap(), [(TSC, 7), (0x277, 0)]);
        let error = settable_here(&[(0x6a0, 3)]).unwrap_err().to_string();
        assert!(error.contains("0x6a0") && error.contains("0x3"), "{error}");
    }

    #[test]
    fn the_deadline_of_a_timer_comes_last_and_one_that_has_passed_is_now() {
        for (deadline, want) in [(0, 150), (7, 7), (1000, 1000)] {
            let values = [(TSC_DEADLINE, deadline), (TSC, 100), (0x277, 5), (0x8b, 1)];
            assert_eq!(
                resumed(&values, 50),
                [(TSC, 150), (0x277, 5), (TSC_DEADLINE, want)]
            );
        }
    }
}
