//! A processor in a snapshot.
//!
//! The order of calls is the kernel's: each may change what others tell or take (see `save` and
//! `restore`).

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::{ArchError, cpuid, msrs, refused};
use crate::kvm;
use crate::snapshot::hex::{Bytes, Raw};

/// Clocks that differ by less than this are the same (parts per million), as for the kernel.
const TSC_TOLERANCE_PPM: u64 = 250;

const NS_PER_MS: u128 = 1_000_000;

/// A processor as it was saved.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessorState {
    /// Features: function, index, flags, eax, ebx, ecx, edx.
    pub cpuid: Vec<[u32; 7]>,
    /// Runs, is halted, or waits to be started.
    pub mp_state: u32,
    pub registers: Raw<kvm_regs>,
    pub special_registers: Raw<kvm_sregs>,
    /// Floating point and vectors, with the header that says what there is.
    pub extended: Bytes,
    /// Absent where the host does not know extended state.
    pub extended_control: Option<Raw<kvm_xcrs>>,
    pub debug_registers: Raw<kvm_debugregs>,
    pub local_apic: Raw<kvm_lapic_state>,
    /// How fast the time-stamp counter runs, where the host can tell.
    pub tsc_khz: Option<u32>,
    /// Model-specific registers, by number.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions and interrupts that are on their way.
    pub events: Raw<kvm_vcpu_events>,
}

/// What of the host is needed to save processors.
#[derive(Clone, Debug)]
pub struct Saver {
    /// What each processor was given: the kernel may tell of what it has become.
    features: Vec<CpuId>,
    msrs: Vec<u32>,
    extended_bytes: usize,
    extended_control: bool,
}

impl Saver {
    /// For processors of `kvm` that were given these features.
    pub fn new(kvm: &Kvm, features: Vec<CpuId>) -> Result<Saver, ArchError> {
        Ok(Saver {
            features,
            msrs: msrs::saved(&known_msrs(kvm)?),
            extended_bytes: extended_bytes(kvm),
            extended_control: kvm.check_extension(Cap::Xcrs),
        })
    }

    /// The state of `vcpu`, which is number `id` and does not run.
    pub fn save(&self, id: usize, vcpu: &VcpuFd) -> Result<ProcessorState, ArchError> {
        // First, since it makes the local APIC take in what has been sent to it.
        let mp_state = vcpu.get_mp_state().map_err(refused("read a run state"))?;
        let registers = vcpu.get_regs().map_err(refused("read registers"))?;
        let special = vcpu.get_sregs();
        let special_registers = special.map_err(refused("read system registers"))?;
        let extended = kvm::extended_state(vcpu, self.extended_bytes)
            .map_err(refused("read extended state"))?;
        let extended_control = if self.extended_control {
            let control = vcpu.get_xcrs();
            Some(Raw(control.map_err(refused("read extended control"))?))
        } else {
            None
        };
        let debug = vcpu.get_debug_regs();
        let local_apic = vcpu.get_lapic().map_err(refused("read a local APIC"))?;
        let msrs = msrs::read(vcpu, &self.msrs)?;
        // Last: reading the others may change it.
        let events = vcpu.get_vcpu_events().map_err(refused("read events"))?;
        Ok(ProcessorState {
            cpuid: self.features[id].as_slice().iter().map(row).collect(),
            mp_state: mp_state.mp_state,
            registers: Raw(registers),
            special_registers: Raw(special_registers),
            extended: Bytes(extended),
            extended_control,
            debug_registers: Raw(debug.map_err(refused("read debug registers"))?),
            local_apic: Raw(local_apic),
            tsc_khz: vcpu.get_tsc_khz().ok(),
            msrs,
            events: Raw(events),
        })
    }
}

/// The model-specific registers that the host has.
fn known_msrs(kvm: &Kvm) -> Result<Vec<u32>, ArchError> {
    let known = kvm
        .get_msr_index_list()
        .map_err(refused("tell its model-specific registers"))?;
    Ok(known.as_slice().to_vec())
}

/// How much extended state there can be, or nothing where the host does not tell.
fn extended_bytes(kvm: &Kvm) -> usize {
    usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or_default()
}

fn row(entry: &kvm_cpuid_entry2) -> [u32; 7] {
    [
        entry.function,
        entry.index,
        entry.flags,
        entry.eax,
        entry.ebx,
        entry.ecx,
        entry.edx,
    ]
}

fn entry(row: &[u32; 7]) -> kvm_cpuid_entry2 {
    let [function, index, flags, eax, ebx, ecx, edx] = *row;
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Puts `vcpus`, which have never run, into the saved states. Their time-stamp counters go on
/// `elapsed_ns` later. Returns the features of each.
///
/// # Errors
///
/// If this host's processors lack what the saved ones had, or the kernel takes a value for
/// impossible.
pub fn restore(
    kvm: &Kvm,
    vcpus: &[VcpuFd],
    states: &[ProcessorState],
    elapsed_ns: u64,
) -> Result<Vec<CpuId>, ArchError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell the processor features"))?;
    let count = u8::try_from(vcpus.len()).expect("the plan allows 32");
    let resumption = Resumption {
        elapsed_ns,
        extended_bytes: extended_bytes(kvm),
        msrs: &known_msrs(kvm)?,
    };
    let mut all = Vec::new();
    for ((id, vcpu), state) in (0..).zip(vcpus).zip(states) {
        let entries: Vec<_> = state.cpuid.iter().map(entry).collect();
        let host = cpuid::normalise(&supported, id, count);
        cpuid::check(&entries, host.as_slice())?;
        let features = CpuId::from_entries(&entries).map_err(|_| ArchError::Features)?;
        restore_one(vcpu, state, &features, resumption)?;
        all.push(features);
    }
    Ok(all)
}

/// What is the same for all processors.
#[derive(Clone, Copy)]
struct Resumption<'a> {
    elapsed_ns: u64,
    /// What this host's processors have.
    extended_bytes: usize,
    msrs: &'a [u32],
}

fn restore_one(
    vcpu: &VcpuFd,
    state: &ProcessorState,
    features: &CpuId,
    resumption: Resumption<'_>,
) -> Result<(), ArchError> {
    if let (Some(saved), Ok(now)) = (state.tsc_khz, vcpu.get_tsc_khz())
        && !same_speed(saved, now)
    {
        vcpu.set_tsc_khz(saved)
            .map_err(refused("run the time-stamp counter at the saved speed"))?;
    }
    vcpu.set_cpuid2(features)
        .map_err(refused("set processor features"))?;
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: state.mp_state,
    })
    .map_err(refused("set a run state"))?;
    vcpu.set_regs(&state.registers.0)
        .map_err(refused("set registers"))?;
    vcpu.set_sregs(&state.special_registers.0)
        .map_err(refused("set system registers"))?;
    kvm::set_extended_state(vcpu, &state.extended.0, resumption.extended_bytes)
        .map_err(refused("set extended state"))?;
    if let Some(Raw(control)) = &state.extended_control {
        vcpu.set_xcrs(control)
            .map_err(refused("set extended control"))?;
    }
    vcpu.set_debug_regs(&state.debug_registers.0)
        .map_err(refused("set debug registers"))?;
    // After the system registers, which say where it is; before the timer's register.
    vcpu.set_lapic(&state.local_apic.0)
        .map_err(refused("set a local APIC"))?;
    let ticks = ticks(resumption.elapsed_ns, state.tsc_khz.unwrap_or_default());
    let values = msrs::settable(&msrs::resumed(&state.msrs, ticks), resumption.msrs)?;
    msrs::write(vcpu, &values)?;
    // After the registers, which clear exceptions.
    vcpu.set_vcpu_events(&state.events.0)
        .map_err(refused("set events"))
}

/// How far a time-stamp counter comes in so many nanoseconds.
pub fn ticks(nanoseconds: u64, khz: u32) -> u64 {
    let ticks = u128::from(nanoseconds) * u128::from(khz) / NS_PER_MS;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// How many nanoseconds a time-stamp counter of this speed takes for so many ticks; nothing if the
/// speed is not known.
pub fn nanoseconds(ticks: u64, khz: u32) -> Option<u64> {
    let nanoseconds = (u128::from(ticks) * NS_PER_MS).checked_div(khz.into())?;
    u64::try_from(nanoseconds).ok()
}

/// The time-stamp counter of `vcpu`, which does not stand still.
pub fn time_stamp(vcpu: &VcpuFd) -> Result<u64, ArchError> {
    let values = msrs::read(vcpu, &[msrs::TSC])?;
    let (_, value) = values.first().ok_or(ArchError::Msr { index: msrs::TSC })?;
    Ok(*value)
}

fn same_speed(one: u32, other: u32) -> bool {
    let tolerance = u64::from(one) * TSC_TOLERANCE_PPM / 1_000_000;
    u64::from(one.abs_diff(other)) <= tolerance
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_differ_by_a_little_are_the_same() {
        for (one, other, want) in [
            (2_000_000, 2_000_000, true),
            (2_000_000, 2_000_500, true),
            (2_000_000, 1_999_499, false),
            (0, 1, false),
            (u32::MAX, 0, false),
        ] {
            assert_eq!(same_speed(one, other), want, "{one} {other}");
        }
    }

    #[test]
    fn ticks_are_time_where_the_speed_is_known() {
        let day = 86_400_000_000_000;
        for (ns, khz, count) in [(1_000_000, 2_600_000, 2_600_000), (day, 3, 259_200_000)] {
            assert_eq!(ticks(ns, khz), count);
            assert_eq!(nanoseconds(count, khz), Some(ns));
        }
        assert_eq!(ticks(u64::MAX, u32::MAX), u64::MAX);
        assert_eq!(nanoseconds(1, 0), None);
        assert_eq!(nanoseconds(u64::MAX, 1), None);
    }

    #[test]
    fn an_entry_of_the_feature_table_survives() {
        let cells = [1, 2, 1, 4, 5, 6, 7];
        assert_eq!(row(&entry(&cells)), cells);
    }
}
