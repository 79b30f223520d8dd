//! Which pages of anonymous memory hold anything: what was never touched is zero, and need not be
//! read to find that out, which would also touch it.
//!
//! UNSAFETY: `mincore` is asked about a range of addresses, which it does not access.
#![expect(unsafe_code, reason = "mincore takes a raw range of addresses")]

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use crate::dirty::PAGE_BYTES;

/// For each page of `region`, which is anonymous memory, whether it may hold anything. Nothing if
/// the host cannot tell: a page that was swapped out looks like one that never was.
pub(super) fn touched(region: &GuestRegionMmap) -> Option<Vec<bool>> {
    if rustix::system::sysinfo().totalswap > 0 {
        return None;
    }
    let length = usize::try_from(region.len()).ok()?;
    let mut pages = vec![0_u8; length.div_ceil(PAGE_BYTES)];
    // SAFETY: the range is one mapping, of which only page tables are looked at; there is a byte for
    // each of its pages.
    let told = unsafe { libc::mincore(region.as_ptr().cast(), length, pages.as_mut_ptr()) };
    (told == 0).then(|| pages.into_iter().map(|page| page & 1 != 0).collect())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    use super::*;

    #[test]
    fn pages_that_were_written_are_told() {
        let region = GuestRegionMmap::from_range(GuestAddress(0), 64 << 20, None).unwrap();
        let written = [0, 77, 16383];
        for page in written {
            let place = MemoryRegionAddress(page * PAGE_BYTES as u64);
            region.write_obj(1_u8, place).unwrap();
        }
        // A host with swap cannot tell.
        let Some(touched) = touched(&region) else {
            return;
        };
        assert_eq!(touched.len(), 16384);
        assert!(
            written
                .iter()
                .all(|page| touched[usize::try_from(*page).unwrap()])
        );
        assert!(touched.contains(&false));
    }
}
