//! From a kernel file to memory in which a processor can start (Linux, Documentation/arch/x86/boot.rst).

mod cmdline;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion,
};

pub use cmdline::{CmdlineError, cmdline};

use crate::arch::x86_64::Entry;
use crate::layout;

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("`/boot/kernel` cannot be read")]
    Read(#[source] io::Error),
    #[error("`/boot/kernel` is neither a bzImage nor an ELF vmlinux for x86-64")]
    NotAKernel,
    #[error("`/boot/kernel` has no 64-bit entry; a kernel built with CONFIG_X86_64 has one")]
    No64BitEntry,
    #[error(
        "`/boot/kernel` cannot be loaded; it may be cut short, or `/memory/size_mib` too small"
    )]
    Kernel(#[source] linux_loader::loader::Error),
    #[error("`/boot/kernel` needs memory up to {needed:#x}; raise `/memory/size_mib`")]
    KernelMemory { needed: u64 },
    #[error("`/boot/initramfs` cannot be read")]
    Initramfs(#[source] io::Error),
    #[error(
        "`/boot/initramfs` takes {bytes} bytes and does not fit beside the kernel; raise `/memory/size_mib`"
    )]
    InitramfsMemory { bytes: u64 },
    #[error("cannot write to the guest's memory")]
    Memory(#[source] GuestMemoryError),
}

/// The setup header's magic number, `HdrS`, and where it is in a bzImage.
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_AT: u64 = 0x202;
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// In `xloadflags`: the kernel has a 64-bit entry, [`ENTRY_64`] behind its start.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: one without a number of its own.
const LOADER_OTHER: u8 = 0xff;
/// The highest initramfs address of kernels that do not say.
const INITRAMFS_MAX: u32 = 0x37ff_ffff;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Loads the kernel and the initramfs files, writes the boot parameters, and returns the first
/// instruction.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
    initramfs: &mut [File],
    cmdline: &str,
) -> Result<Entry, BootError> {
    let (entry, mut parameters, kernel_end) = match kind(kernel)? {
        Kind::BzImage => load_bzimage(memory, kernel)?,
        Kind::Elf => load_elf(memory, kernel)?,
    };
    if !initramfs.is_empty() {
        load_initramfs(memory, initramfs, kernel_end, &mut parameters)?;
    }
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    memory
        .write_slice(&text, GuestAddress(layout::CMDLINE))
        .map_err(BootError::Memory)?;
    parameters.hdr.type_of_loader = LOADER_OTHER;
    parameters.hdr.cmd_line_ptr = low_address(layout::CMDLINE);
    parameters.hdr.cmdline_size = u32::try_from(text.len()).expect("at most 2048");
    parameters.acpi_rsdp_addr = layout::ACPI;
    write_memory_map(memory, &mut parameters);
    memory
        .write_slice(parameters.as_slice(), GuestAddress(layout::ZERO_PAGE))
        .map_err(BootError::Memory)?;
    Ok(entry)
}

enum Kind {
    BzImage,
    Elf,
}

fn kind(kernel: &mut File) -> Result<Kind, BootError> {
    if magic(kernel, 0)? == ELF_MAGIC {
        Ok(Kind::Elf)
    } else if magic(kernel, BZIMAGE_MAGIC_AT)? == BZIMAGE_MAGIC {
        Ok(Kind::BzImage)
    } else {
        Err(BootError::NotAKernel)
    }
}

/// Four bytes of a file that may be shorter.
fn magic(file: &mut File, at: u64) -> Result<[u8; 4], BootError> {
    let mut bytes = [0; 4];
    file.seek(SeekFrom::Start(at)).map_err(BootError::Read)?;
    match file.read_exact(&mut bytes) {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(BootError::Read(error)),
        _ => Ok(bytes),
    }
}

type Loaded = (Entry, boot_params, u64);

fn load_bzimage(memory: &GuestMemoryMmap, kernel: &mut File) -> Result<Loaded, BootError> {
    let high = GuestAddress(layout::HIGH_RAM);
    let loaded = BzImage::load(memory, Some(high), kernel, None).map_err(BootError::Kernel)?;
    let header = loaded.setup_header.ok_or(BootError::NotAKernel)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    // The kernel unpacks itself to where it prefers to be, or to where it is if that is higher,
    // and says how much memory it uses there before it looks at the memory map.
    let start = header.pref_address.max(layout::HIGH_RAM);
    let end = start.saturating_add(header.init_size.into());
    let entry = Entry {
        address: loaded.kernel_load.0 + ENTRY_64,
    };
    let parameters = boot_params {
        hdr: header,
        ..Default::default()
    };
    Ok((entry, parameters, fits(memory, end.max(loaded.kernel_end))?))
}

fn load_elf(memory: &GuestMemoryMmap, kernel: &mut File) -> Result<Loaded, BootError> {
    let high = GuestAddress(layout::HIGH_RAM);
    let KernelLoaderResult {
        kernel_load,
        kernel_end,
        ..
    } = Elf::load(memory, None, kernel, Some(high)).map_err(BootError::Kernel)?;
    let mut parameters = boot_params::default();
    parameters.hdr.boot_flag = 0xaa55;
    parameters.hdr.header = u32::from_le_bytes(*b"HdrS");
    parameters.hdr.version = 0x020f;
    parameters.hdr.loadflags = 1;
    parameters.hdr.kernel_alignment = 0x100_0000;
    parameters.hdr.initrd_addr_max = INITRAMFS_MAX;
    let entry = Entry {
        address: kernel_load.0,
    };
    Ok((entry, parameters, fits(memory, kernel_end)?))
}

/// Whether low memory goes up to `end`.
fn fits(memory: &GuestMemoryMmap, end: u64) -> Result<u64, BootError> {
    if end <= low_memory_end(memory) {
        Ok(end)
    } else {
        Err(BootError::KernelMemory { needed: end })
    }
}

fn low_memory_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .iter()
        .map(GuestMemoryRegion::len)
        .next()
        .unwrap_or_default()
}

/// Puts the files end to end, each padded to 4 bytes, as high as the kernel allows.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    files: &mut [File],
    kernel_end: u64,
    parameters: &mut boot_params,
) -> Result<(), BootError> {
    let mut sizes = Vec::new();
    for file in files.iter_mut() {
        // Not by its metadata: a block device has no length there, and a pipe none at all.
        let size = file.seek(SeekFrom::End(0)).map_err(BootError::Initramfs)?;
        sizes.push(size);
    }
    let bytes = sizes.iter().fold(0u64, |sum, size| {
        sum.saturating_add(size.checked_next_multiple_of(4).unwrap_or(u64::MAX))
    });
    let limit = match parameters.hdr.initrd_addr_max {
        0 => INITRAMFS_MAX,
        limit => limit,
    };
    let top = low_memory_end(memory).min(u64::from(limit) + 1);
    let start = top
        .checked_sub(bytes)
        .map(|start| start & !(layout::PAGE_BYTES - 1))
        .filter(|start| *start >= kernel_end)
        .ok_or(BootError::InitramfsMemory { bytes })?;

    let mut address = start;
    for (file, size) in files.iter_mut().zip(sizes) {
        file.rewind().map_err(BootError::Initramfs)?;
        let length = usize::try_from(size).expect("usize is 64 bits");
        memory
            .read_exact_volatile_from(GuestAddress(address), file, length)
            .map_err(BootError::Memory)?;
        address += size.next_multiple_of(4);
    }
    parameters.hdr.ramdisk_image = low_address(start);
    parameters.hdr.ramdisk_size = low_address(address - start);
    Ok(())
}

fn low_address(address: u64) -> u32 {
    u32::try_from(address).expect("below 4 GiB")
}

/// Tells the kernel which memory is its own.
fn write_memory_map(memory: &GuestMemoryMmap, parameters: &mut boot_params) {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::ACPI, layout::HIGH_RAM, E820_RESERVED),
        (layout::HIGH_RAM, low_memory_end(memory), E820_RAM),
    ];
    for region in memory.iter().skip(1) {
        let start = region.start_addr().0;
        map.push((start, start + region.len(), E820_RAM));
    }
    for (entry, (start, end, kind)) in parameters.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *start,
            size: end - start,
            r#type: *kind,
        };
    }
    parameters.e820_entries = u8::try_from(map.len()).expect("four");
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const MIB: usize = 1 << 20;

    fn memory(mib: usize) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib * MIB)]).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// The smallest bzImage: one setup sector and eight bytes of kernel.
    fn bzimage(xloadflags: u16, init_size: u32) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(BZIMAGE_MAGIC);
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        image.extend(b"kernel!!");
        image
    }

    #[test]
    fn a_kernel_that_cannot_run_is_refused_with_its_field() {
        for (image, want) in [
            (vec![], "is neither a bzImage nor"),
            (b"#!/bin/sh\n".to_vec(), "is neither a bzImage nor"),
            (ELF_MAGIC.to_vec(), "cannot be loaded"),
            (bzimage(0, 4096), "has no 64-bit entry"),
            (bzimage(1, 0x200_0000), "raise `/memory/size_mib`"),
        ] {
            let error = load(&memory(32), &mut file(&image), &mut [], "").unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains(want) && text.contains("/boot/kernel"),
                "{text}"
            );
        }
    }

    #[test]
    fn several_initramfs_files_lie_end_to_end_at_the_top() {
        let memory = memory(32);
        let mut files = [file(b"first"), file(b"second")];
        let mut kernel = file(&bzimage(1, 4096));
        let entry = load(&memory, &mut kernel, &mut files, "quiet").unwrap();
        assert_eq!(entry.address, 0x10_0200);

        let parameters: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        let header = parameters.hdr;
        assert_eq!({ header.ramdisk_image }, 32 * 0x10_0000 - 4096);
        assert_eq!({ header.ramdisk_size }, 16);
        let mut bytes = [0; 16];
        let at = GuestAddress(header.ramdisk_image.into());
        memory.read_slice(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"first\0\0\0second\0\0");
    }

    #[test]
    fn an_initramfs_that_does_not_fit_is_refused() {
        let mut kernel = file(&bzimage(1, 4096));
        let big = tempfile::tempfile().unwrap();
        big.set_len(u64::MAX / 4)
            .unwrap_or_else(|_| big.set_len(1 << 40).unwrap());
        let error = load(&memory(32), &mut kernel, &mut [big], "").unwrap_err();
        assert!(error.to_string().contains("/boot/initramfs"), "{error}");
    }

    #[test]
    fn the_memory_map_leaves_out_the_hole() {
        let hole = usize::try_from(layout::HOLE).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), hole),
            (GuestAddress(layout::HOLE_END), MIB),
        ])
        .unwrap();
        let mut parameters = boot_params::default();
        write_memory_map(&memory, &mut parameters);
        let ram: u64 = parameters.e820_table[..4]
            .iter()
            .filter(|entry| entry.r#type == E820_RAM)
            .map(|entry| entry.size)
            .sum();
        assert_eq!(
            ram,
            layout::LOW_RAM_END + layout::HOLE - layout::HIGH_RAM + 0x10_0000
        );
        assert_eq!({ parameters.e820_table[3].addr }, layout::HOLE_END);
    }
}
