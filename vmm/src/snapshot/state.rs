//! The state of a machine: what the third line of a state file holds. Data only; each part is
//! checked by what it is the state of.

use serde::{Deserialize, Serialize};

use super::bounded;
use super::memory::{Region, Run};
use crate::arch::x86_64::state::ProcessorState;
use crate::devices::ioapic::IoApicState;
use crate::devices::serial::SerialPortState;
use crate::hotplug::slots::SlotsState;
use crate::spec::Spec;
use crate::virtio::pci::FunctionState;
use crate::virtio::transport::TransportState;

/// A machine as it was saved.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// What it was made from, without what belongs to a run: the console, the control socket, the
    /// exit status, and the device that KVM was reached through.
    #[serde(deserialize_with = "bounded::part")]
    pub machine: Spec,
    pub clock: ClockState,
    pub processors: Vec<ProcessorState>,
    pub devices: DevicesState,
    pub memory: MemoryState,
}

/// When it was, by three clocks that were read in one go: a guest compares them with each other.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// The guest's clock (KVM_GET_CLOCK).
    pub guest_ns: u64,
    /// The time-stamp counter of the first processor.
    pub time_stamp: u64,
    /// The host's, since 1970.
    pub host_ns: u64,
}

/// All devices.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesState {
    pub io_apic: IoApicState,
    pub serial: SerialPortState,
    /// The guest has reported that it is ready.
    pub ready: bool,
    /// In the order of the specification.
    pub virtio: Vec<VirtioState>,
    /// Which devices of a PCI bus come and go, if the guest's tables tell how it hears of that. Since
    /// format 3.
    #[serde(default)]
    pub slots: Option<SlotsState>,
}

/// A virtio device and its place.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    /// As in the machine's statistics.
    pub name: String,
    pub address: u64,
    /// On PCI, the number of the device there.
    pub interrupt: u32,
    pub transport: TransportState,
    /// On PCI. Since format 2.
    #[serde(default)]
    pub function: Option<FunctionState>,
}

/// Where memory is, and what of it is in the memory file.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryState {
    pub regions: Vec<Region>,
    /// The pages that are in the file whether zero or not: all that are, of a difference; those of
    /// images, of a full snapshot.
    pub written: Option<Vec<Run>>,
    /// The length of each image, if what the guest has not changed of it is in its own file alone.
    /// Since format 4; before, all of it was in the memory file.
    #[serde(default)]
    pub images: Vec<u64>,
}
