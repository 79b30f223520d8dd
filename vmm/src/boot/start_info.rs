//! `hvm_start_info`, by which a kernel is told about the machine in the PVH protocol (Xen,
//! public/arch-x86/hvm/start_info.h). One page: the structure, its one module, its memory map.

use std::mem::size_of;
use std::ops::Range;

use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::memory_map;
use crate::layout;

/// The version with a memory map.
const VERSION: u32 = 1;

/// Writes it to its place.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    initramfs: &Range<u64>,
) -> Result<(), GuestMemoryError> {
    let modules = layout::START_INFO + size::<hvm_start_info>();
    let map_start = modules + size::<hvm_modlist_entry>();
    let map = memory_map(memory);
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: u32::from(!initramfs.is_empty()),
        modlist_paddr: modules,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: map_start,
        memmap_entries: u32::try_from(map.len()).expect("four"),
        ..Default::default()
    };
    let module = hvm_modlist_entry {
        paddr: initramfs.start,
        size: initramfs.end - initramfs.start,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(layout::START_INFO))?;
    memory.write_obj(module, GuestAddress(modules))?;
    let places = (map_start..).step_by(size_of::<hvm_memmap_table_entry>());
    for (piece, place) in map.iter().zip(places) {
        let entry = hvm_memmap_table_entry {
            addr: piece.range.start,
            size: piece.range.end - piece.range.start,
            type_: if piece.usable {
                XEN_HVM_MEMMAP_TYPE_RAM
            } else {
                XEN_HVM_MEMMAP_TYPE_RESERVED
            },
            ..Default::default()
        };
        memory.write_obj(entry, GuestAddress(place))?;
    }
    Ok(())
}

fn size<T>() -> u64 {
    u64::try_from(size_of::<T>()).expect("usize is 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_finds_all_from_the_start_of_the_page() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
        write(&memory, &(0x1f0_0000..0x200_0000)).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(layout::START_INFO)).unwrap();
        assert_eq!((info.magic, info.nr_modules), (0x336e_c578, 1));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x1f0_0000, 0x10_0000));
        assert_eq!(info.memmap_entries, 3);
        let last = info.memmap_paddr + 2 * size::<hvm_memmap_table_entry>();
        let entry: hvm_memmap_table_entry = memory.read_obj(GuestAddress(last)).unwrap();
        assert_eq!(
            (entry.addr, entry.size, entry.type_),
            (0x10_0000, 31 << 20, 1)
        );

        write(&memory, &(0..0)).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(layout::START_INFO)).unwrap();
        assert_eq!(info.nr_modules, 0);
    }
}
