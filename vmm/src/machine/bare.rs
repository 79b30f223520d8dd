//! A machine that was just put together is given something to do: a kernel, or what was saved of
//! another.
//!
//! The order of the latter: processors with their local APICs, the clock, the devices, and then the I/O APIC, since
//! an interrupt that reaches a local APIC before it is what it will be is lost.

use std::sync::{Arc, Mutex};

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::parts::Parts;
use super::{MachineError, unrestorable};
use crate::arch::x86_64::state::{nanoseconds, ticks, time_stamp};
use crate::arch::x86_64::{self, acpi};
use crate::boot;
use crate::devices::generation;
use crate::devices::ioapic::IoApic;
use crate::inventory::{Entry, lock};
use crate::kvm::{KernelRoutes, Vm};
use crate::plan::{KernelPlan, Origin};
use crate::snapshot::file::Id;
use crate::snapshot::restore::ClockPolicy;
use crate::snapshot::state::State;
use crate::snapshot::take::host_clock;
use crate::spec::{Cpus, Transport};
use crate::virtio::pci::FunctionState;
use crate::virtio::state::{StateError, expect};
use crate::virtio::transport::Window;

/// What passes at most between the restore of a time-stamp counter and that of the clock.
const RESTORE_NS_MAX: i64 = 60_000_000_000;

/// The parts of a machine that have a state, all new.
pub(super) struct Bare<'a> {
    pub(super) kvm: &'a Kvm,
    pub(super) vm: &'a Vm,
    /// What a kernel is told about.
    pub(super) boot_memory: &'a GuestMemoryMmap,
    pub(super) vcpus: &'a [VcpuFd],
    /// What a guest that boots is shown of the processor.
    pub(super) cpus: &'a Cpus,
    /// How it finds its devices.
    pub(super) transport: Transport,
    /// In the order of the devices.
    pub(super) windows: &'a [Window],
    /// Its serial port is what it will be.
    pub(super) parts: &'a Parts,
    pub(super) io_apic: &'a Arc<Mutex<IoApic<KernelRoutes>>>,
    /// The line that tells of a new generation.
    pub(super) generation: &'a EventFd,
}

/// What has become of a bare machine.
pub(super) struct Begun {
    /// Of each processor.
    pub(super) features: Vec<CpuId>,
    /// What the processors lack of what was asked for.
    pub(super) missing_features: Vec<&'static str>,
    /// It is to wait to be resumed.
    pub(super) paused: bool,
    /// The guest hears of devices that come and go, if there is PCI.
    pub(super) hears: bool,
    /// The snapshot that it was made from.
    pub(super) from: Option<Id>,
}

impl Bare<'_> {
    /// Gives it what it is to run.
    pub(super) fn begin(&self, origin: Origin) -> Result<Begun, MachineError> {
        Ok(match origin {
            Origin::Kernel(kernel) => Begun {
                features: self.load(kernel)?,
                missing_features: x86_64::missing_features(self.kvm, self.cpus)?,
                paused: false,
                hears: true,
                from: None,
            },
            Origin::Snapshot(snapshot) => Begun {
                features: self.restore(&snapshot.loaded.state, snapshot.clock)?,
                missing_features: Vec::new(),
                paused: snapshot.paused,
                hears: snapshot.loaded.state.devices.slots.is_some(),
                from: Some(snapshot.loaded.id),
            },
        })
    }

    /// Loads a kernel, and lets the first processor start there. Returns the features of each.
    fn load(&self, mut plan: KernelPlan) -> Result<Vec<CpuId>, MachineError> {
        let memory = self.boot_memory;
        let entry = boot::load(memory, &mut plan.kernel, &mut plan.initramfs, &plan.cmdline)?;
        let cpus = u8::try_from(self.vcpus.len()).expect("the plan allows 32");
        acpi::write(memory, cpus, self.transport, self.windows)?;
        Ok(x86_64::configure(
            self.kvm, self.vcpus, memory, entry, self.cpus,
        )?)
    }

    /// Goes on from `state`. Returns the features of each processor.
    fn restore(&self, state: &State, clock: ClockPolicy) -> Result<Vec<CpuId>, MachineError> {
        let processors = state.processors.len();
        expect("number of processors", &processors, &self.vcpus.len())
            .map_err(unrestorable("the machine"))?;
        let elapsed_ns = match clock {
            ClockPolicy::Advance => host_clock().saturating_sub(state.clock.host_ns),
            ClockPolicy::Freeze => 0,
        };
        let features = x86_64::state::restore(self.kvm, self.vcpus, &state.processors, elapsed_ns)?;
        self.set_clock(state, elapsed_ns)?;
        if state.devices.ready {
            self.parts.reports.readiness().set();
        }
        self.restore_virtio(state)?;
        let mut io_apic = self.io_apic.lock().expect("no device panics");
        io_apic
            .restore(&state.devices.io_apic)
            .map_err(unrestorable("the I/O APIC"))?;
        if let (Some(pci), Some(slots)) = (&self.parts.pci, state.devices.slots) {
            pci.slots.restore(slots);
        }
        generation::announce(self.generation)?;
        Ok(features)
    }

    /// Sets the guest's clock to what it would show beside the first processor's time-stamp counter,
    /// which has counted on since it was restored: a guest that sees them differ trusts neither.
    fn set_clock(&self, state: &State, elapsed_ns: u64) -> Result<(), MachineError> {
        let mut since_ns = 0;
        let khz = state.processors.first().and_then(|first| first.tsc_khz);
        if let (Some(vcpu), Some(khz)) = (self.vcpus.first(), khz) {
            let begun = state.clock.time_stamp.wrapping_add(ticks(elapsed_ns, khz));
            // The processor was saved before the clock was read, so that it may still be behind.
            let distance = time_stamp(vcpu)?.wrapping_sub(begun).cast_signed();
            let ns = nanoseconds(distance.unsigned_abs(), khz).unwrap_or(u64::MAX);
            // On a host that does not let it be set, it has nothing to do with what was saved.
            since_ns = i64::try_from(ns)
                .ok()
                .filter(|ns| *ns < RESTORE_NS_MAX)
                .map_or(0, |ns| ns * distance.signum());
        }
        let then = state.clock.guest_ns.saturating_add(elapsed_ns);
        Ok(self.vm.set_clock(then.saturating_add_signed(since_ns))?)
    }

    fn restore_virtio(&self, state: &State) -> Result<(), MachineError> {
        let saved = &state.devices.virtio;
        let inventory = lock(&self.parts.inventory);
        let entries = inventory.entries();
        expect("number of devices", &saved.len(), &entries.len())
            .map_err(unrestorable("the machine"))?;
        for (entry, saved) in entries.iter().zip(saved) {
            // Before its transport is held: the function has to do with that.
            let function = restore_function(entry, saved.function.as_ref());
            let mut transport = entry.transport.lock();
            let (name, window) = (&entry.name, entry.window);
            let result = expect("name", &saved.name, name)
                .and_then(|()| expect("address", &saved.address, &window.address))
                .and_then(|()| expect("interrupt", &saved.interrupt, &window.gsi))
                .and(function)
                .and_then(|()| transport.restore(&saved.transport));
            result.map_err(unrestorable(format!("device `{name}`")))?;
        }
        Ok(())
    }
}

/// Makes a device's function, if it is one, what was saved: its driver is told by it when the device
/// goes on.
fn restore_function(entry: &Entry, saved: Option<&FunctionState>) -> Result<(), StateError> {
    let function = entry.function.as_ref();
    expect("being on PCI", &saved.is_some(), &function.is_some())?;
    match (function, saved) {
        (Some(function), Some(saved)) => {
            function.lock().expect("no function panics").restore(saved)
        }
        _ => Ok(()),
    }
}
