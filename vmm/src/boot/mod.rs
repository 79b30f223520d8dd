//! From a kernel file to memory in which a processor can start: by the Linux 64-bit boot protocol, or
//! by PVH.

mod cmdline;
mod start_info;
mod zero_page;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
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
/// The highest initramfs address of kernels that do not say.
const INITRAMFS_MAX: u32 = 0x37ff_ffff;

/// Loads the kernel and the initramfs files, writes what the kernel is told, and returns its first
/// instruction.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
    initramfs: &mut [File],
    cmdline: &str,
) -> Result<Entry, BootError> {
    let kernel = match kind(kernel)? {
        Kind::BzImage => load_bzimage(memory, kernel)?,
        Kind::Elf => load_elf(memory, kernel)?,
    };
    let initramfs = load_initramfs(memory, initramfs, &kernel)?;
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    memory
        .write_slice(&text, GuestAddress(layout::CMDLINE))
        .map_err(BootError::Memory)?;
    match kernel.protocol {
        Protocol::Linux(parameters) => zero_page::write(memory, *parameters, &initramfs),
        Protocol::Pvh => start_info::write(memory, &initramfs),
    }
    .map_err(BootError::Memory)?;
    Ok(kernel.entry)
}

/// A kernel in memory.
struct Loaded {
    entry: Entry,
    protocol: Protocol,
    /// The end of the memory that it uses before it looks at the memory map.
    end: u64,
}

/// How a kernel wants to be told about the machine.
enum Protocol {
    /// With `boot_params`, of which the kernel's file brought a part.
    Linux(Box<boot_params>),
    /// With `hvm_start_info`.
    Pvh,
}

impl Loaded {
    /// The highest address that an initramfs may have a byte at.
    fn initramfs_max(&self) -> u32 {
        match &self.protocol {
            Protocol::Linux(parameters) if parameters.hdr.initrd_addr_max != 0 => {
                parameters.hdr.initrd_addr_max
            }
            Protocol::Linux(_) | Protocol::Pvh => INITRAMFS_MAX,
        }
    }
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
    let parameters = boot_params {
        hdr: header,
        ..Default::default()
    };
    Ok(Loaded {
        entry: Entry::Linux {
            address: loaded.kernel_load.0 + ENTRY_64,
        },
        protocol: Protocol::Linux(Box::new(parameters)),
        end: fits(memory, end.max(loaded.kernel_end))?,
    })
}

/// A kernel with a PVH entry is started there, since that is the only entry of an ELF file whose
/// protocol is written in the file.
fn load_elf(memory: &GuestMemoryMmap, kernel: &mut File) -> Result<Loaded, BootError> {
    let high = GuestAddress(layout::HIGH_RAM);
    let loaded = Elf::load(memory, None, kernel, Some(high)).map_err(BootError::Kernel)?;
    let (entry, protocol) = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            (Entry::Pvh { address: entry.0 }, Protocol::Pvh)
        }
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            let address = loaded.kernel_load.0;
            let parameters = Box::new(zero_page::of_vmlinux());
            (Entry::Linux { address }, Protocol::Linux(parameters))
        }
    };
    Ok(Loaded {
        entry,
        protocol,
        end: fits(memory, loaded.kernel_end)?,
    })
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

/// Puts the files end to end, each padded to 4 bytes, as high as the kernel allows, and returns
/// where they are. Nowhere is nothing at 0.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    files: &mut [File],
    kernel: &Loaded,
) -> Result<Range<u64>, BootError> {
    let mut sizes = Vec::new();
    for file in files.iter_mut() {
        // Not by its metadata: a block device has no length there, and a pipe none at all.
        let size = file.seek(SeekFrom::End(0)).map_err(BootError::Initramfs)?;
        sizes.push(size);
    }
    let bytes = sizes.iter().fold(0u64, |sum, size| {
        sum.saturating_add(size.checked_next_multiple_of(4).unwrap_or(u64::MAX))
    });
    if bytes == 0 {
        return Ok(0..0);
    }
    let top = low_memory_end(memory).min(u64::from(kernel.initramfs_max()) + 1);
    let start = top
        .checked_sub(bytes)
        .map(|start| start & !(layout::PAGE_BYTES - 1))
        .filter(|start| *start >= kernel.end)
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
    Ok(start..address)
}

/// A piece of the memory map.
struct Piece {
    range: Range<u64>,
    /// The kernel's own to use. Otherwise something is there that it must leave alone.
    usable: bool,
}

/// Which memory there is, by address.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<Piece> {
    let usable = |range| Piece {
        range,
        usable: true,
    };
    let mut map = vec![
        usable(0..layout::LOW_RAM_END),
        Piece {
            range: layout::ACPI..layout::HIGH_RAM,
            usable: false,
        },
        usable(layout::HIGH_RAM..low_memory_end(memory)),
    ];
    for region in memory.iter().skip(1) {
        let start = region.start_addr().0;
        map.push(usable(start..start + region.len()));
    }
    map
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
        assert_eq!(entry, Entry::Linux { address: 0x10_0200 });

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
        let map = memory_map(&memory);
        let usable = map.iter().filter(|piece| piece.usable);
        let sum: u64 = usable
            .map(|piece| piece.range.end - piece.range.start)
            .sum();
        let below = layout::LOW_RAM_END + layout::HOLE - layout::HIGH_RAM;
        assert_eq!(sum, below + 0x10_0000);
        assert_eq!(map[3].range.start, layout::HOLE_END);
    }
}
