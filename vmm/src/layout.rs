//! Where everything lies in the guest's physical address space and among its I/O ports. Numbers
//! only.
//!
//! ```text
//! 0x0000_0500  descriptor table, boot parameters, page tables, command line
//! 0x0009_fc00  end of conventional memory
//! 0x000e_0000  ACPI tables; at 0x000f_f000 the number of the machine's generation; the last 16
//!              bytes below the kernel are the reset vector
//! 0x0010_0000  kernel; the initramfs ends where low memory ends
//! 0xc000_0000  end of low memory; boot timer
//! 0xd000_0000  virtio windows, of a machine without PCI
//! 0xe000_0000  of a machine with PCI: configuration spaces, and at 0xe010_0000 windows
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs (KVM's own)
//! 1 << 32      the rest of memory
//! ```

/// The boot processor's descriptor table.
pub const GDT: u64 = 0x500;
/// PVH's `hvm_start_info` and what it points to, one page.
pub const START_INFO: u64 = 0x6000;
/// Linux's `boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// The top of the boot processor's stack, which grows down.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables: one PML4, one PDPT, then [`PAGE_DIRECTORIES`] directories that map 4 GiB one to one.
pub const PML4: u64 = 0x9000;
/// The only directory pointer table.
pub const PDPT: u64 = 0xa000;
/// The first page directory; the others follow.
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// One for each GiB that is mapped.
pub const PAGE_DIRECTORIES: u64 = 4;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The most bytes of command line, its final zero included: x86 kernels read 2048.
pub const CMDLINE_BYTES_MAX: usize = 2048;

/// Conventional memory ends here; a BIOS would keep its data area behind it.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables, root pointer first, in the area that guests without boot parameters search.
pub const ACPI: u64 = 0xe_0000;
/// The ACPI tables end before this.
pub const ACPI_END: u64 = GENERATION;
/// The 16 bytes that tell a guest whether it is still the same machine.
pub const GENERATION: u64 = 0xf_f000;
/// Where a processor without a kernel would start, in the last bytes of the first MiB.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Memory that a kernel may be loaded to starts here.
pub const HIGH_RAM: u64 = 0x10_0000;

/// No memory lies from here to [`HOLE_END`]: it belongs to devices.
pub const HOLE: u64 = 0xc000_0000;
/// Memory that did not fit below the hole goes on here.
pub const HOLE_END: u64 = 1 << 32;

/// A guest writes [`crate::devices::boot_timer::DONE`] here when it has booted.
pub const BOOT_TIMER: u64 = 0xc000_0000;
/// The first virtio window.
pub const VIRTIO: u64 = 0xd000_0000;
/// One virtio window.
pub const VIRTIO_BYTES: u64 = 0x1000;
/// The configuration spaces of PCI functions, 4 KiB each, of one bus.
pub const PCI_CONFIG: u64 = 0xe000_0000;
/// The size of all of them.
pub const PCI_CONFIG_BYTES: u64 = 1 << 20;
/// Where windows of PCI functions can be.
pub const PCI_MEMORY: u64 = PCI_CONFIG + PCI_CONFIG_BYTES;
/// The end of that.
pub const PCI_END: u64 = 0xf000_0000;
/// The window of a virtio function.
pub const PCI_WINDOW_BYTES: u64 = 0x8000;
/// The I/O APIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The size of a small device's window.
pub const PAGE_BYTES: u64 = 0x1000;
/// The local APIC's registers, in the kernel.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel hosts, just below the BIOS's place.
pub const TSS: usize = 0xfffb_d000;

/// Pins of the I/O APIC, and so interrupt lines of the machine.
pub const PINS: u32 = 24;
/// The line that tells of a new generation: the second serial port's, by tradition, which there is
/// none of.
pub const GENERATION_GSI: u32 = 3;
/// The serial port's line, by tradition.
pub const SERIAL_GSI: u32 = 4;
/// The line of power button presses: between the serial port's and the devices'.
pub const POWER_BUTTON_GSI: u32 = 5;
/// The line by which a machine with PCI tells of devices that come and go: there, virtio devices have
/// no lines.
pub const HOTPLUG_GSI: u32 = VIRTIO_GSI;
/// The first virtio device's line; the others follow.
pub const VIRTIO_GSI: u32 = 6;
/// One line for each device.
pub const VIRTIO_DEVICES_MAX: usize = (PINS - VIRTIO_GSI) as usize;

/// The first serial port.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Ports of the serial port.
pub const SERIAL_PORTS: u64 = 8;
/// The keyboard controller's command port, of which only the reset line is there.
pub const KEYBOARD_PORT: u64 = 0x64;
/// ACPI's sleep control, sleep status and reset registers, a byte each.
pub const POWER_PORT: u64 = 0x600;
/// Which devices of the PCI bus come and go (`hotplug::slots`).
pub const HOTPLUG_PORT: u64 = 0x620;
/// Registers at [`POWER_PORT`].
pub const POWER_PORTS: u64 = 3;
