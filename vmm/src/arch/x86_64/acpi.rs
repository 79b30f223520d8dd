//! The ACPI tables: how a stock kernel finds processors, devices, and the ways to be switched off.
//! Hardware-reduced (ACPI 6.5, section 4.1): there is no legacy hardware to describe.

mod hotplug;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, MethodCall, Name, Notify, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::devices::power;
use crate::layout;
use crate::spec::Transport;
use crate::virtio::transport::Window;

const OEM: [u8; 6] = *b"HOSTD ";
const OEM_TABLE: [u8; 8] = *b"HOSTDVMM";
const OEM_REVISION: u32 = 1;

/// FADT, boot architecture flags: no VGA, no real-time clock.
const NO_VGA: u16 = 1 << 2;
const NO_CLOCK: u16 = 1 << 5;

/// A notification of a power button: it was pressed.
const PRESSED: u8 = 0x80;
/// A notification of the generation's device: the number is another one.
const RENEWED: u8 = 0x80;

/// The tables do not fit.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables take {bytes} bytes; there is room for {room}")]
    Size { bytes: usize, room: u64 },
    #[error("cannot write the ACPI tables to the guest's memory")]
    Memory(#[source] GuestMemoryError),
}

/// Writes the tables of a machine with `cpus` processors and these devices to their place. The
/// root pointer is at [`layout::ACPI`].
pub fn write(
    memory: &GuestMemoryMmap,
    cpus: u8,
    transport: Transport,
    windows: &[Window],
) -> Result<(), AcpiError> {
    let bytes = tables(cpus, transport, windows);
    let room = layout::ACPI_END - layout::ACPI;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= room) {
        memory
            .write_slice(&bytes, GuestAddress(layout::ACPI))
            .map_err(AcpiError::Memory)
    } else {
        Err(AcpiError::Size {
            bytes: bytes.len(),
            room,
        })
    }
}

/// All tables in a row, the root pointer first.
fn tables(cpus: u8, transport: Transport, windows: &[Window]) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = append(&mut bytes, &dsdt(transport, windows));
    let fadt = append(&mut bytes, &fadt(dsdt));
    let madt = append(&mut bytes, &madt(cpus));
    let mut list = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    list.add_entry(fadt);
    list.add_entry(madt);
    if transport == Transport::Pci {
        list.add_entry(append(&mut bytes, &mcfg()));
    }
    let list = append(&mut bytes, &list);

    let mut root = Vec::new();
    Rsdp::new(OEM, list).to_aml_bytes(&mut root);
    bytes[..root.len()].copy_from_slice(&root);
    bytes
}

/// Puts a table behind the others and returns its address.
fn append(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    let aligned = bytes.len().next_multiple_of(8);
    bytes.resize(aligned, 0);
    table.to_aml_bytes(bytes);
    layout::ACPI + u64::try_from(aligned).expect("usize is 64 bits")
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset: u16| {
        GAS::new(
            Space::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            layout::POWER_PORT + u64::from(offset),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set means that the buttons are devices, or not there.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CLOCK).into();
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, controller);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    let address = u32::try_from(layout::IOAPIC).expect("below 4 GiB");
    madt.add_structure(IoApic::new(0, address, 0));
    madt
}

/// Where the configuration spaces of PCI functions are.
fn mcfg() -> impl Aml {
    let (segment, first_bus, last_bus) = (0, 0, 0);
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_CONFIG, segment, first_bus, last_bus);
    mcfg
}

fn dsdt(transport: Transport, windows: &[Window]) -> impl Aml {
    let mut body = Vec::new();
    serial_port(&mut body);
    power_button(&mut body);
    generation(&mut body);
    events(&mut body, transport);
    match transport {
        Transport::Mmio => {
            for (index, window) in windows.iter().enumerate() {
                virtio_device(&mut body, index, window);
            }
        }
        Transport::Pci => {
            hotplug::controller(&mut body);
            pci(&mut body);
        }
    }
    let off = power::SOFT_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&off, &ZERO])).to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn interrupt(line: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, line)
}

fn serial_port(sink: &mut dyn AmlSink) {
    let port = u16::try_from(layout::SERIAL_PORT).expect("a port");
    let ports = u8::try_from(layout::SERIAL_PORTS).expect("8");
    let resources = ResourceTemplate::new(vec![
        &IO::new(port, port, 1, ports),
        &interrupt(layout::SERIAL_GSI),
    ])
    .to_vec();
    device(
        sink,
        "COM1",
        &[
            name("_HID", &EISAName::new("PNP0501")),
            name("_UID", &ZERO),
            name("_DDN", &"COM1"),
            name("_CRS", &Raw(resources)),
        ],
    );
}

fn power_button(sink: &mut dyn AmlSink) {
    device(
        sink,
        "PWRB",
        &[name("_HID", &EISAName::new("PNP0C0C")), name("_UID", &ZERO)],
    );
}

/// Microsoft's "Virtual Machine Generation ID", version 1: where the number is. Linux goes by the
/// hardware's name before 6.10, others by the compatible one.
fn generation(sink: &mut dyn AmlSink) {
    let low = u32::try_from(layout::GENERATION).expect("below 4 GiB");
    device(
        sink,
        "VGEN",
        &[
            name("_HID", &"VMGENCTR"),
            name("_CID", &"VM_Gen_Counter"),
            name("_DDN", &"VM_Gen_Counter"),
            name("_UID", &ZERO),
            name("ADDR", &Package::new(vec![&low, &ZERO])),
        ],
    );
}

/// The generic event device (ACPI 6.5, section 5.6.9): what the lines of events mean.
fn events(sink: &mut dyn AmlSink, transport: Transport) {
    let notify = |device, notification: u8| {
        let device = Path::new(device);
        Notify::new(&device, &notification).to_vec()
    };
    let mut events = vec![
        (layout::POWER_BUTTON_GSI, notify("PWRB", PRESSED)),
        (layout::GENERATION_GSI, notify("VGEN", RENEWED)),
    ];
    if transport == Transport::Pci {
        let scan = MethodCall::new(Path::new(hotplug::METHOD), Vec::new());
        events.push((layout::HOTPLUG_GSI, scan.to_vec()));
    }
    let lines = events.iter().map(|(line, _)| interrupt(*line));
    let lines: Vec<_> = lines.collect();
    let lines = lines.iter().map(|line| line as &dyn Aml).collect();
    let argument = Arg(0);
    let handler = |(line, act): (u32, Vec<u8>)| {
        If::new(&Equal::new(&argument, &line), vec![&Raw(act)]).to_vec()
    };
    let handlers: Vec<_> = events.into_iter().map(handler).map(Raw).collect();
    let handlers = handlers.iter().map(|handler| handler as &dyn Aml).collect();
    device(
        sink,
        "GED_",
        &[
            name("_HID", &"ACPI0013"),
            name("_UID", &ZERO),
            name("_CRS", &Raw(ResourceTemplate::new(lines).to_vec())),
            Method::new("_EVT".into(), 1, true, handlers).to_vec(),
        ],
    );
}

fn virtio_device(sink: &mut dyn AmlSink, index: usize, window: &Window) {
    let base = u32::try_from(window.address).expect("windows are below 4 GiB");
    let length = u32::try_from(layout::VIRTIO_BYTES).expect("a page");
    let resources = ResourceTemplate::new(vec![
        &Memory32Fixed::new(true, base, length),
        &interrupt(window.gsi),
    ])
    .to_vec();
    device(
        sink,
        &format!("V{index:03}"),
        &[
            name("_HID", &"LNRO0005"),
            name("_UID", &index),
            // The device's accesses see what the processors' caches hold.
            name("_CCA", &acpi_tables::aml::ONE),
            name("_CRS", &Raw(resources)),
        ],
    );
}

/// The bus, on which guests find devices by themselves. Its configuration spaces are a board's
/// resource, without which Linux does not believe the table that tells where they are.
fn pci(sink: &mut dyn AmlSink) {
    let long = |address: u64| u32::try_from(address).expect("below 4 GiB");
    let (config, bytes) = (layout::PCI_CONFIG, layout::PCI_CONFIG_BYTES);
    let board = Memory32Fixed::new(true, long(config), long(bytes));
    let resources = ResourceTemplate::new(vec![&board]).to_vec();
    device(
        sink,
        "MBRD",
        &[
            name("_HID", &EISAName::new("PNP0C02")),
            name("_UID", &ZERO),
            name("_CRS", &Raw(resources)),
        ],
    );
    let (start, last) = (long(layout::PCI_MEMORY), long(layout::PCI_END - 1));
    let cached = AddressSpaceCacheable::NotCacheable;
    let resources = ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0_u16, 0),
        &AddressSpace::new_memory(cached, true, start, last, None),
    ])
    .to_vec();
    let mut objects = vec![
        name("_HID", &EISAName::new("PNP0A08")),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_UID", &ZERO),
        name("_SEG", &ZERO),
        name("_BBN", &ZERO),
        name("_CCA", &acpi_tables::aml::ONE),
        name("_CRS", &Raw(resources)),
    ];
    objects.extend(hotplug::slot_objects());
    device(sink, "PCI0", &objects);
}

/// `\_SB.NAME` with these objects in it.
fn device(sink: &mut dyn AmlSink, name: &str, objects: &[Vec<u8>]) {
    let objects: Vec<Raw> = objects.iter().cloned().map(Raw).collect();
    let objects = objects.iter().map(|object| object as &dyn Aml).collect();
    let device = Device::new(name.into(), objects);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(sink);
}

fn name(path: &str, value: &dyn Aml) -> Vec<u8> {
    Name::new(path.into(), value).to_vec()
}

/// Byte code that is ready.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

trait ToVec: Aml {
    fn to_vec(&self) -> Vec<u8>
    where
        Self: Sized,
    {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        bytes
    }
}

impl<T: Aml> ToVec for T {}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(count: usize) -> Vec<Window> {
        (0..count).map(Window::nth).collect()
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, by the length in its header.
    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let at = usize::try_from(address - layout::ACPI).unwrap();
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        &bytes[at..at + usize::try_from(length).unwrap()]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_root_and_adds_up_to_zero() {
        for transport in [Transport::Mmio, Transport::Pci] {
            check(transport);
        }
    }

    fn check(transport: Transport) {
        let bytes = tables(32, transport, &windows(layout::VIRTIO_DEVICES_MAX));
        assert!(bytes.len() < usize::try_from(layout::ACPI_END - layout::ACPI).unwrap());
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));

        let list = table(&bytes, word(&bytes, 24));
        let fadt = table(&bytes, word(list, 36));
        let madt = table(&bytes, word(list, 44));
        let dsdt = table(&bytes, word(fadt, 140));
        for (signature, table) in [
            (b"XSDT", list),
            (b"FACP", fadt),
            (b"APIC", madt),
            (b"DSDT", dsdt),
        ] {
            assert_eq!(&table[..4], signature);
            assert_eq!(sum(table), 0, "{signature:?}");
        }
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        if transport == Transport::Pci {
            let mcfg = table(&bytes, word(list, 52));
            assert_eq!((&mcfg[..4], sum(mcfg)), (&b"MCFG"[..], 0));
            assert_eq!(word(mcfg, 44), layout::PCI_CONFIG);
        }
    }
}
