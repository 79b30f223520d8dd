//! The first processor as the boot protocols want it: flat segments, and for Linux's 64-bit protocol
//! long mode, with the first 4 GiB mapped one to one.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{ArchError, refused};
use crate::layout;

/// Where and how the first processor starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Entry {
    /// In 64-bit mode, as the Linux 64-bit boot protocol wants it.
    Linux { address: u64 },
    /// In 32-bit mode without paging, as PVH wants it.
    Pvh { address: u64 },
}

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const TABLE_ENTRIES: u64 = 512;
const LARGE_PAGE_SHIFT: u64 = 21;

/// The selectors that the boot protocol names: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Type and flags as in bits 40 to 55 of a descriptor: present, 4 KiB granular.
const CODE_FLAGS: u16 = 0xa09b;
const CODE_32_FLAGS: u16 = 0xc09b;
const DATA_FLAGS: u16 = 0xc093;
const TASK_FLAGS: u16 = 0x808b;

/// Writes page tables and segment descriptors.
pub(super) fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let directory = |index: u64| layout::PAGE_DIRECTORY + index * layout::PAGE_BYTES;
    let put = |value: u64, address: u64| memory.write_obj(value, GuestAddress(address));

    put(layout::PDPT | PRESENT | WRITABLE, layout::PML4)?;
    for gib in 0..layout::PAGE_DIRECTORIES {
        put(directory(gib) | PRESENT | WRITABLE, layout::PDPT + gib * 8)?;
        let mut entries = Vec::new();
        for page in gib * TABLE_ENTRIES..(gib + 1) * TABLE_ENTRIES {
            let entry = page << LARGE_PAGE_SHIFT | PRESENT | WRITABLE | LARGE;
            entries.extend(entry.to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(directory(gib)))?;
    }
    for (selector, flags) in [
        (CODE_SELECTOR, CODE_FLAGS),
        (DATA_SELECTOR, DATA_FLAGS),
        (TASK_SELECTOR, TASK_FLAGS),
    ] {
        put(descriptor(flags), layout::GDT + u64::from(selector))?;
    }
    Ok(())
}

/// A descriptor from 0 to the end.
fn descriptor(flags: u16) -> u64 {
    0x000f_0000_0000_ffff | u64::from(flags) << 40
}

/// The same descriptor, as the processor keeps it.
fn segment(selector: u16, flags: u16) -> kvm_segment {
    let bits = |shift: u16, mask: u16| (flags >> shift & mask).to_le_bytes()[0];
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: bits(0, 0xf),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        unusable: 0,
        padding: 0,
    }
}

/// Puts `vcpu` at `entry`.
pub(super) fn set(vcpu: &VcpuFd, entry: Entry) -> Result<(), ArchError> {
    let mut special = vcpu.get_sregs().map_err(refused("read system registers"))?;
    for data in [
        &mut special.ds,
        &mut special.es,
        &mut special.fs,
        &mut special.gs,
        &mut special.ss,
    ] {
        *data = segment(DATA_SELECTOR, DATA_FLAGS);
    }
    special.tr = segment(TASK_SELECTOR, TASK_FLAGS);
    special.gdt.base = layout::GDT;
    special.gdt.limit = TASK_SELECTOR + 7;
    special.idt.base = 0;
    special.idt.limit = 0;
    special.cr0 |= CR0_PROTECTED | CR0_EXTENSION_TYPE;
    match entry {
        Entry::Linux { .. } => {
            special.cs = segment(CODE_SELECTOR, CODE_FLAGS);
            special.cr3 = layout::PML4;
            special.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
            special.cr0 |= CR0_PAGING;
            special.efer |= EFER_LONG_MODE;
        }
        Entry::Pvh { .. } => special.cs = segment(CODE_SELECTOR, CODE_32_FLAGS),
    }
    vcpu.set_sregs(&special)
        .map_err(refused("set system registers"))?;
    vcpu.set_regs(&general(entry))
        .map_err(refused("set registers"))?;

    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .map_err(refused("set floating-point registers"))
}

/// The registers in which the protocols pass the address of what the kernel is told.
fn general(entry: Entry) -> kvm_regs {
    let common = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Linux { address } => kvm_regs {
            rip: address,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            rsi: layout::ZERO_PAGE,
            ..common
        },
        Entry::Pvh { address } => kvm_regs {
            rip: address,
            rbx: layout::START_INFO,
            ..common
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_below_4_gib_is_mapped_to_itself() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory).unwrap();
        let get = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        let table = |entry: u64| {
            assert_eq!(entry & 0xfff, PRESENT | WRITABLE);
            entry & !0xfff
        };
        for address in [0, 0x20_0000, 0x1234_5678, 0xc000_0000, 0xffff_ffff] {
            let pdpt = table(get(layout::PML4));
            let directory = table(get(pdpt + (address >> 30) * 8));
            let page = get(directory + (address >> 21 & 511) * 8);
            assert_eq!(page & 0xfff, PRESENT | WRITABLE | LARGE);
            assert_eq!(page & !0xfff | address & 0x1f_ffff, address);
        }
    }

    #[test]
    fn segments_are_flat() {
        assert_eq!(descriptor(CODE_FLAGS), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(DATA_FLAGS), 0x00cf_9300_0000_ffff);
        let code = segment(CODE_SELECTOR, CODE_FLAGS);
        assert_eq!(
            (code.l, code.db, code.g, code.s, code.type_),
            (1, 0, 1, 1, 0xb)
        );
    }
}
