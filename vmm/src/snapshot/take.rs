//! Takes a snapshot of a paused machine, which may go on afterwards.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use kvm_ioctls::VcpuFd;

use super::file::{self, Header, Id, Kind};
use super::memory::{self, Run};
use super::state::{ClockState, DevicesState, MemoryState, State, VirtioState};
use super::writer::{Writer, write_all, write_runs};
use super::written::Written;
use crate::arch::x86_64::ArchError;
use crate::arch::x86_64::state::{Saver, time_stamp};
use crate::control::SnapshotReport;
use crate::devices::guest_status::Readiness;
use crate::devices::ioapic::IoApic;
use crate::devices::serial::SerialPort;
use crate::exit::ExitSwitch;
use crate::hotplug::slots::Slots;
use crate::inventory::{Entry, SharedInventory, lock as lock_inventory};
use crate::kvm::{KernelRoutes, KvmError, Vm};
use crate::memory::RegionOrigin;
use crate::spec::Spec;
use crate::vcpu::Vcpus;
use crate::virtio::state::StateError;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    #[error("the machine runs; pause it first")]
    Running,
    #[error(
        "what the guest writes is not tracked, so there can be no difference; \
         set `memory.track_dirty`"
    )]
    NotTracked,
    #[error("there is no snapshot that this could be a difference to; take a full one first")]
    NoParent,
    #[error("a guest that may run machines of its own cannot be saved; leave out `cpus.nested`")]
    Nested,
    #[error("device `{name}` cannot be saved")]
    Device { name: String, source: StateError },
    #[error("a processor cannot be saved")]
    Processor(#[from] ArchError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("no name can be made up for it")]
    Id(#[source] io::Error),
    #[error("the memory file cannot be written")]
    Memory(#[source] io::Error),
    #[error("the state file cannot be written")]
    State(#[source] io::Error),
}

/// The parts of a machine that a snapshot is made of.
pub struct Snapshotter {
    pub vm: Arc<Vm>,
    pub vcpus: Arc<Vcpus>,
    /// Once it is thrown, nothing more is written.
    pub exit: ExitSwitch,
    pub saver: Saver,
    pub io_apic: Arc<Mutex<IoApic<KernelRoutes>>>,
    pub serial: Arc<Mutex<SerialPort>>,
    pub readiness: Readiness,
    /// Nothing comes or goes while a snapshot is taken.
    pub inventory: SharedInventory,
    /// Which devices come and go, if the guest hears of that.
    pub slots: Option<Arc<Slots>>,
    /// What each region of memory holds where nobody has written.
    pub origins: Vec<RegionOrigin>,
    pub written: Written,
    /// The last snapshot, taken of the machine or the one that it was made from.
    pub last: Mutex<Option<Id>>,
}

opaque_debug!(Snapshotter);

impl Snapshotter {
    /// Writes a snapshot to two empty files. Waits for the host's work for the guest to end, and
    /// for the file system.
    ///
    /// # Errors
    ///
    /// The machine is as it was; what the files hold is nothing.
    pub fn take(
        &self,
        kind: Kind,
        state_file: &mut File,
        memory_file: &mut File,
    ) -> Result<SnapshotReport, TakeError> {
        if !self.vcpus.paused() {
            return Err(TakeError::Running);
        }
        let (entries, spec) = {
            let inventory = lock_inventory(&self.inventory);
            (inventory.entries().to_vec(), inventory.spec().clone())
        };
        if spec.cpus.nested {
            return Err(TakeError::Nested);
        }
        let tracked = spec.memory.track_dirty;
        let parent = self.parent(kind, tracked)?;
        let id = Id::random().map_err(TakeError::Id)?;
        // They first: they end their work in the guest's memory and interrupt processors.
        let held = Held::hold(&entries);
        let mut state = self.state(&entries, &spec)?;
        // From here on what was written is forgotten, so that a failure leaves nothing to be a
        // difference to.
        *self.last() = None;
        let written = self.written.take(kind, &self.vm, &state)?;
        let memory_bytes = self.write_memory(kind, memory_file, &id, &written)?;
        drop(held);
        state.memory.written = Some(written);
        let header = Header::new(kind, id.clone(), parent.clone());
        let state_bytes = rewind(state_file)
            .and_then(|()| file::write(state_file, &header, &state))
            .map_err(TakeError::State)?;
        *self.last() = Some(id.clone());
        Ok(SnapshotReport {
            id: id.to_string(),
            parent: parent.map(|id| id.to_string()),
            kind,
            state_bytes,
            memory_bytes,
        })
    }

    fn write_memory(
        &self,
        kind: Kind,
        file: &mut File,
        id: &Id,
        written: &[Run],
    ) -> Result<u64, TakeError> {
        let memory = self.vm.memory();
        let goes_on = || self.exit.status().is_none();
        let mut writer = Writer::new(file, memory, id, &goes_on).map_err(TakeError::Memory)?;
        let bytes = match kind {
            Kind::Full => write_all(memory, &mut writer, &self.origins)
                .and_then(|_| write_runs(memory, &mut writer, written)),
            Kind::Diff => write_runs(memory, &mut writer, written),
        };
        bytes.map_err(TakeError::Memory)
    }

    fn last(&self) -> MutexGuard<'_, Option<Id>> {
        self.last.lock().expect("nothing panics in here")
    }

    fn parent(&self, kind: Kind, tracked: bool) -> Result<Option<Id>, TakeError> {
        match kind {
            Kind::Full => Ok(None),
            Kind::Diff if !tracked => Err(TakeError::NotTracked),
            Kind::Diff => self.last().clone().map(Some).ok_or(TakeError::NoParent),
        }
    }

    fn state(&self, entries: &[Arc<Entry>], spec: &Spec) -> Result<State, TakeError> {
        let virtio = entries.iter().map(|entry| device(entry));
        let virtio = virtio.collect::<Result<_, TakeError>>()?;
        let devices = DevicesState {
            io_apic: self.io_apic.lock().expect("no device panics").save(),
            serial: self.serial.lock().expect("no device panics").save(),
            ready: self.readiness.get(),
            virtio,
            slots: self.slots.as_ref().map(|slots| slots.save()),
        };
        Ok(State {
            machine: recorded(spec),
            processors: self.vcpus.inspect(|id, vcpu| self.saver.save(id, vcpu))?,
            clock: self.clock()?,
            devices,
            memory: MemoryState {
                regions: memory::regions(self.vm.memory()),
                written: None,
                images: self.images(),
            },
        })
    }

    fn clock(&self) -> Result<ClockState, TakeError> {
        let now = |id, vcpu: &VcpuFd| {
            // The others count on, in step with the first.
            (id == 0)
                .then(|| {
                    Ok(ClockState {
                        guest_ns: self.vm.clock()?,
                        time_stamp: time_stamp(vcpu)?,
                        host_ns: host_clock(),
                    })
                })
                .transpose()
        };
        let clocks: Vec<_> = self.vcpus.inspect::<_, TakeError>(now)?;
        let first = clocks.into_iter().flatten().next();
        Ok(first.expect("there is a first processor"))
    }

    /// The lengths of images that are not in the memory file.
    fn images(&self) -> Vec<u64> {
        let origins = self.origins.iter();
        origins
            .filter_map(|origin| match origin {
                RegionOrigin::Image { bytes } => Some(*bytes),
                RegionOrigin::Nothing | RegionOrigin::Snapshot { .. } => None,
            })
            .collect()
    }
}

/// Devices that leave the guest's memory as it is.
struct Held<'a>(&'a [Arc<Entry>]);

impl<'a> Held<'a> {
    fn hold(entries: &'a [Arc<Entry>]) -> Self {
        for entry in entries {
            entry.transport.lock().hold();
        }
        Self(entries)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for entry in self.0 {
            entry.transport.lock().release();
        }
    }
}

fn device(entry: &Entry) -> Result<VirtioState, TakeError> {
    let function = entry.function.as_ref().map(|function| {
        let function = function.lock().expect("no function panics");
        function.save()
    });
    let name = entry.name.clone();
    match entry.transport.lock().save() {
        Ok(transport) => Ok(VirtioState {
            name,
            address: entry.window.address,
            interrupt: entry.window.gsi,
            transport,
            function,
        }),
        Err(source) => Err(TakeError::Device { name, source }),
    }
}

/// Without what belongs to the run.
fn recorded(spec: &Spec) -> Spec {
    Spec {
        kvm: None,
        console: None,
        control: None,
        exit_status: None,
        ..spec.clone()
    }
}

/// Nanoseconds since 1970.
pub fn host_clock() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    // A clock that was never set has stood still since then, and one beyond 2554 stands there.
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

fn rewind(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0)).map(|_| ())
}
