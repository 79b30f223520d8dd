//! What a guest needs to hear of devices that come to its PCI bus and go: a controller with the
//! registers of `hotplug::slots`, and an object for each slot that can be told, and can let go (ACPI 6.5,
//! sections 5.6.6 and 6.3).

use acpi_tables::aml::{
    And, Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace,
    Path, ResourceTemplate, ShiftLeft, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::{Raw, ToVec, device, name};
use crate::hotplug::slots;
use crate::layout;
use crate::pci::bus::DEVICES_MAX;

/// Notifications: look whether a device is there; let go of it.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The method that a change of the slots calls.
pub(super) const METHOD: &str = "\\_SB_.PHPC.PSCN";

/// The controller: registers, and the methods that use them. One at a time runs, since they wait for
/// each other.
pub(super) fn controller(sink: &mut dyn AmlSink) {
    let port = u16::try_from(layout::HOTPLUG_PORT).expect("a port");
    let bytes = u8::try_from(slots::REGISTER_BYTES).expect("a few");
    let resources = ResourceTemplate::new(vec![&IO::new(port, port, 1, bytes)]).to_vec();
    let region = OpRegion::new("REGS".into(), OpRegionSpace::SystemIO, &port, &bytes);
    let fields = Field::new(
        "REGS".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        ["COME", "ASKD", "LEAV"]
            .map(|name| FieldEntry::Named(name.as_bytes().try_into().expect("4 letters"), 32))
            .into(),
    );
    device(
        sink,
        "PHPC",
        &[
            name("_HID", &EISAName::new("PNP0A06")),
            name("_UID", &"PCI slots"),
            name("_CRS", &Raw(resources)),
            region.to_vec(),
            fields.to_vec(),
            scan(),
            let_go(),
        ],
    );
}

/// `PSCN()`: tells each slot what has become of it.
fn scan() -> Vec<u8> {
    let mut body = Vec::new();
    for (register, notification) in [("COME", DEVICE_CHECK), ("ASKD", EJECT_REQUEST)] {
        // Reading takes the bits, so it is done once.
        let word = Local(0);
        Store::new(&word, &Path::new(register)).to_aml_bytes(&mut body);
        for slot in slots() {
            let bit = 1_u32 << slot;
            let there = And::new(&Local(1), &word, &bit);
            there.to_aml_bytes(&mut body);
            let slot = Path::new(&format!("\\_SB_.PCI0.{}", slot_name(slot)));
            let notify = Notify::new(&slot, &notification);
            If::new(&Equal::new(&Local(1), &bit), vec![&notify]).to_aml_bytes(&mut body);
        }
    }
    Method::new("PSCN".into(), 0, true, vec![&Raw(body)]).to_vec()
}

/// `PEJ0(slot)`: the guest has let go of the device there.
fn let_go() -> Vec<u8> {
    let shift = ShiftLeft::new(&Local(0), &1_u32, &Arg(0)).to_vec();
    let leave = Path::new("LEAV");
    let store = Store::new(&leave, &Local(0)).to_vec();
    let body = [Raw(shift), Raw(store)];
    let body = body.iter().map(|part| part as &dyn Aml).collect();
    Method::new("PEJ0".into(), 1, true, body).to_vec()
}

/// The objects of all slots, for that of the bus.
pub(super) fn slot_objects() -> Vec<Vec<u8>> {
    slots().map(slot_object).collect()
}

fn slot_object(slot: u32) -> Vec<u8> {
    // The device's number, and all its functions.
    let address = slot << 16;
    let eject = MethodCall::new(Path::new("\\_SB_.PHPC.PEJ0"), vec![&slot]);
    let eject = Method::new("_EJ0".into(), 1, true, vec![&eject]);
    let objects: [&dyn Aml; 3] = [
        &Name::new("_SUN".into(), &slot),
        &Name::new("_ADR".into(), &address),
        &eject,
    ];
    Device::new(slot_name(slot).as_str().into(), objects.into()).to_vec()
}

fn slots() -> std::ops::Range<u32> {
    1..u32::try_from(DEVICES_MAX).expect("a few")
}

fn slot_name(slot: u32) -> String {
    format!("S{slot:03}")
}
