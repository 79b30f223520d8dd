//! `boot_params`, by which a kernel is told about the machine in the Linux boot protocol (Linux,
//! Documentation/arch/x86/boot.rst and zero-page.rst).

use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::memory_map;
use crate::layout;

/// `type_of_loader`: one without a number of its own.
const LOADER_OTHER: u8 = 0xff;
/// `boot_flag`, and the header's magic number, `HdrS`.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol version 2.15, and what a kernel of that version asks for.
const VERSION: u16 = 0x020f;
const LOADED_HIGH: u8 = 1;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The part that a bzImage brings in its file, for a kernel without one.
pub(super) fn of_vmlinux() -> boot_params {
    let mut parameters = boot_params::default();
    parameters.hdr.boot_flag = BOOT_FLAG;
    parameters.hdr.header = HEADER;
    parameters.hdr.version = VERSION;
    parameters.hdr.loadflags = LOADED_HIGH;
    parameters.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    parameters
}

/// Fills in the rest and writes it to its place.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    mut parameters: boot_params,
    initramfs: &Range<u64>,
) -> Result<(), GuestMemoryError> {
    parameters.hdr.type_of_loader = LOADER_OTHER;
    parameters.hdr.cmd_line_ptr = low_address(layout::CMDLINE);
    parameters.hdr.ramdisk_image = low_address(initramfs.start);
    parameters.hdr.ramdisk_size = low_address(initramfs.end - initramfs.start);
    parameters.acpi_rsdp_addr = layout::ACPI;
    let map = memory_map(memory);
    parameters.e820_entries = u8::try_from(map.len()).expect("four");
    for (entry, piece) in parameters.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: piece.range.start,
            size: piece.range.end - piece.range.start,
            r#type: if piece.usable {
                E820_RAM
            } else {
                E820_RESERVED
            },
        };
    }
    memory.write_slice(parameters.as_slice(), GuestAddress(layout::ZERO_PAGE))
}

fn low_address(address: u64) -> u32 {
    u32::try_from(address).expect("below 4 GiB")
}
