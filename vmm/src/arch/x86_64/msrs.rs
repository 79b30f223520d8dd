//! Model-specific registers as firmware leaves them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{ArchError, refused};

/// IA32_MISC_ENABLE, and its bit 0: fast string instructions.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE: enabled, and write-back where no range says otherwise.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets what differs from the reset state.
pub(super) fn set_boot_values(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let entries =
        [(MISC_ENABLE, FAST_STRING), (MTRR_DEF_TYPE, MTRR_WRITE_BACK)].map(|(index, data)| {
            kvm_msr_entry {
                index,
                data,
                ..Default::default()
            }
        });
    let msrs = Msrs::from_entries(&entries).expect("fewer than the kernel's limit");
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(refused("set model-specific registers"))?;
    match entries.get(set) {
        Some(refused) => Err(ArchError::Msr {
            index: refused.index,
        }),
        None => Ok(()),
    }
}
