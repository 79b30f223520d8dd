//! Extended processor state: floating point, vectors, and whatever else XSAVE covers.
//!
//! UNSAFETY: how much the kernel reads and writes is as much as the host's processor has, up to what
//! KVM tells beforehand.
#![expect(
    unsafe_code,
    reason = "the kernel decides how long the structure is that it reads and writes"
)]

use kvm_bindings::{Xsave, kvm_xsave};
#[cfg(doc)]
use kvm_ioctls::Cap;
use kvm_ioctls::{Error, VcpuFd};
use zerocopy::{FromBytes, IntoBytes};

/// The part that every host has.
const LEGACY_BYTES: usize = size_of::<kvm_xsave>();

/// More than any processor has to this day.
const EXTENDED_BYTES_MAX: usize = 64 * 1024;

/// The state of `vcpu`. `bytes` is what KVM says of [`Cap::Xsave2`], at least.
pub fn extended_state(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, Error> {
    if bytes <= LEGACY_BYTES {
        return Ok(vcpu.get_xsave()?.region.as_bytes().to_vec());
    }
    let mut state = empty(bytes)?;
    // SAFETY: the kernel writes as much as it says of `Cap::Xsave2`, which is no more than `bytes`.
    unsafe { vcpu.get_xsave2(&mut state) }?;
    let legacy = state.as_fam_struct_ref().xsave.region.as_bytes();
    Ok([legacy, state.as_slice().as_bytes()].concat())
}

/// Sets the state of `vcpu` to what [`extended_state`] has told, on whatever host. `needed` is what
/// this host's KVM says of [`Cap::Xsave2`], at least.
pub fn set_extended_state(vcpu: &VcpuFd, bytes: &[u8], needed: usize) -> Result<(), Error> {
    let Some((legacy, rest)) = bytes.split_at_checked(LEGACY_BYTES) else {
        return Err(Error::new(libc::EINVAL));
    };
    if rest.len() % size_of::<u32>() != 0 || rest.len() > EXTENDED_BYTES_MAX {
        return Err(Error::new(libc::EINVAL));
    }
    let mut state = empty(bytes.len().max(needed))?;
    // SAFETY: only the content is changed, not the length.
    let inner = unsafe { state.as_mut_fam_struct() };
    inner.xsave.region = FromBytes::read_from_bytes(legacy).expect("as long as the region");
    let place = state.as_mut_slice().as_mut_bytes();
    place[..rest.len()].copy_from_slice(rest);
    // SAFETY: the kernel reads as much as it says of `Cap::Xsave2`, and there is as much.
    unsafe { vcpu.set_xsave2(&state) }
}

/// Zeroes of this length, at least [`LEGACY_BYTES`].
fn empty(bytes: usize) -> Result<Xsave, Error> {
    let more = bytes.saturating_sub(LEGACY_BYTES);
    Xsave::new(more.div_ceil(size_of::<u32>())).map_err(|_| Error::new(libc::ENOMEM))
}
