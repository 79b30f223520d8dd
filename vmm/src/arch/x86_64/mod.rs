//! An x86-64 processor before its first instruction.

pub mod acpi;
mod cpuid;
mod msrs;
mod registers;
mod reset_vector;
pub mod state;
mod template;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::GuestMemoryMmap;

pub use registers::Entry;

use crate::spec::{CpuTemplate, Cpus};

/// What went wrong while a processor was set up.
#[derive(Debug, thiserror::Error)]
pub enum ArchError {
    #[error("KVM cannot {action}")]
    Kvm {
        /// What was attempted.
        action: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("KVM does not take model-specific register {index:#x}")]
    Msr { index: u32 },
    #[error(
        "the host lacks model-specific register {index:#x}, which the guest uses (it holds {value:#x})"
    )]
    LackingMsr { index: u32, value: u64 },
    #[error("the saved processor features are more than the kernel takes")]
    Features,
    #[error("the host's processor is of another make than the one that the guest has seen")]
    Make,
    #[error(
        "the host's processor lacks features that the guest has seen \
         (CPUID leaf {leaf:#x}.{index}, {register}: {missing:#x})"
    )]
    Lacking {
        leaf: u32,
        index: u32,
        register: &'static str,
        /// The bits.
        missing: u32,
    },
    #[error("cannot write to the guest's low memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

fn refused(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> ArchError {
    move |source| ArchError::Kvm { action, source }
}

/// What the host's processor, or its KVM, lacks of the template of `cpus`, by names as in /proc/cpuinfo.
pub fn missing_features(kvm: &Kvm, cpus: &Cpus) -> Result<Vec<&'static str>, ArchError> {
    if cpus.template == CpuTemplate::Host {
        return Ok(Vec::new());
    }
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell the processor features"))?;
    Ok(template::apply(cpus, &supported).missing)
}

/// Makes `vcpus` ready: all have the same features, the first starts at `entry`, and the others
/// wait for its start-up message. Returns the features of each.
pub fn configure(
    kvm: &Kvm,
    vcpus: &[VcpuFd],
    memory: &GuestMemoryMmap,
    entry: Entry,
    cpus: &Cpus,
) -> Result<Vec<CpuId>, ArchError> {
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell the processor features"))?;
    let supported = template::apply(cpus, &supported).features;
    let count = u8::try_from(vcpus.len()).expect("the plan allows 32");
    let mut all = Vec::new();
    for (id, vcpu) in (0..).zip(vcpus) {
        let features = cpuid::normalise(&supported, id, count);
        vcpu.set_cpuid2(&features)
            .map_err(refused("set processor features"))?;
        // After the features: they decide which registers there are.
        msrs::set_boot_values(vcpu)?;
        all.push(features);
    }
    registers::write_tables(memory)
        .and_then(|()| reset_vector::write(memory))
        .map_err(ArchError::Memory)?;
    if let Some(first) = vcpus.first() {
        registers::set(first, entry)?;
    }
    Ok(all)
}
