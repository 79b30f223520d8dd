//! Snapshots of virtual machines: their writable disks, and with memory their machines as well.
//!
//! A machine is kept as the folder [`MACHINE`], in a snapshot and, until the next start, beside the disk
//! of an instance that is to go on from there.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::protocol::Request as GuestRequest;
use futures::FutureExt;
use futures::future::BoxFuture;
use vmm::control::Request as MachineRequest;
use vmm::snapshot::client;
use vmm::snapshot::file::Kind;
use vmm::snapshot::{MEMORY_FILE, STATE_FILE};

use super::{VmDriver, guest, machine};
use crate::api::types::InstanceState;
use crate::driver::confined::blocking;
use crate::driver::copy::check_room;
use crate::driver::snapshots::{Draft, SnapshotName, Snapshots, remove_any};
use crate::driver::{DriverError, chain};
use crate::store::Record;

/// The writable disk in the instance's directory.
const CONTENT: &str = "disk";

/// The machine: its state, its memory, and what it was started as.
const MACHINE: &str = "machine";
/// A machine that is to take the place of [`MACHINE`].
const MACHINE_STAGED: &str = ".staged-machine";
/// A machine that a start goes on from, and none after it: the disk is another one from then on.
const MACHINE_TAKEN: &str = ".taken-machine";

/// In a machine's folder: the specification that it was started with.
pub(super) const SPEC_FILE: &str = "spec.json";

/// How long a guest may take to stop its workload and to write to its disk what it has in its cache.
const HOLD_DEADLINE: Duration = Duration::from_secs(60);

/// How long a machine may take to write its memory to files.
const MEMORY_DEADLINE: Duration = Duration::from_secs(300);

impl VmDriver {
    async fn take(
        &self,
        record: &Record,
        snapshot: &str,
        memory: bool,
    ) -> Result<u64, DriverError> {
        let engine = &self.engine;
        let draft = engine.draft(record, snapshot)?;
        let outcome = if record.instance.state == InstanceState::Running {
            let copied = self.hold_and_copy(record, &draft, memory).await;
            // In any case: it may have been paused even if there was no answer.
            let resumed = self.resume(record).await;
            copied.and_then(|bytes| resumed.map(|()| bytes))
        } else {
            self.copy(record, &draft, memory).await
        };
        engine.finish(draft, outcome).await
    }

    async fn hold_and_copy(
        &self,
        record: &Record,
        draft: &Draft,
        memory: bool,
    ) -> Result<u64, DriverError> {
        let socket = machine::agent_socket(&self.run(record));
        guest::ask_patiently(&socket, &GuestRequest::Hold { sync: true }, HOLD_DEADLINE).await?;
        self.ask_machine(record, &MachineRequest::Pause {}).await?;
        self.copy(record, draft, memory).await
    }

    /// Copies what stands still. The machine is first: it ends its requests to the disk for that.
    async fn copy(&self, record: &Record, draft: &Draft, memory: bool) -> Result<u64, DriverError> {
        let mut bytes = 0;
        if memory {
            let (run, folder) = (self.run(record), draft.path.join(MACHINE));
            let most = machine::memory_bytes(&record.instance.spec.limits);
            bytes += blocking(move || keep_machine(&run, &folder, most)).await?;
        }
        Ok(bytes + self.engine.copy_out(record, CONTENT, draft).await?)
    }

    /// Lets the guest's workload go on, if it was held.
    pub(super) async fn release(&self, record: &Record) {
        let request = GuestRequest::Release {
            renewal: None,
            clock_ns: None,
        };
        if let Err(error) = self.ask_guest(record, &request).await {
            tracing::error!(
                name = record.instance.name,
                error = chain(&error),
                "the guest was resumed and may not have let its workload go on"
            );
        }
    }

    async fn stage_all(
        &self,
        record: &Record,
        source: &SnapshotName,
        memory: bool,
    ) -> Result<(), DriverError> {
        let from = self.engine.paths.snapshots(&source.instance);
        let from = from.join(&source.snapshot).join(MACHINE);
        let state = self.engine.paths.instance_state(&record.instance.name);
        let staged = state.join(MACHINE_STAGED);
        let linked = blocking(move || {
            fs::create_dir_all(&state)?;
            remove_any(&staged)?;
            if memory {
                link_all(&from, &staged)
            } else {
                Ok(())
            }
        });
        linked
            .await
            .map_err(DriverError::io("taking the snapshot's memory"))?;
        self.engine.stage(record, CONTENT, source).await
    }

    async fn install_all(&self, record: &Record) -> Result<(), DriverError> {
        let state = self.engine.paths.instance_state(&record.instance.name);
        let (staged, kept) = (state.join(MACHINE_STAGED), state.join(MACHINE));
        let failed = || DriverError::io("putting the snapshot's memory in place");
        // A machine and a disk that do not belong together are never there at once.
        let old = kept.clone();
        blocking(move || remove_any(&old)).await.map_err(failed())?;
        self.engine.install(record, CONTENT).await?;
        blocking(move || match fs::rename(staged, kept) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed,
        })
        .await
        .map_err(failed())
    }

    /// The machine that the instance is to go on from, if there is one. It is there for one start only.
    pub(super) fn take_machine(&self, record: &Record) -> Result<Option<PathBuf>, DriverError> {
        let state = self.engine.paths.instance_state(&record.instance.name);
        let taken = state.join(MACHINE_TAKEN);
        let renamed = remove_any(&taken).and_then(|()| fs::rename(state.join(MACHINE), &taken));
        match renamed {
            Ok(()) => Ok(Some(taken)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(DriverError::io("taking the instance's memory")(error)),
        }
    }
}

impl VmDriver {
    /// Removes the names of what a start went on from: whoever needs the files has them open.
    pub(super) fn forget_machine(&self, record: &Record) {
        let state = self.engine.paths.instance_state(&record.instance.name);
        if let Err(error) = remove_any(&state.join(MACHINE_TAKEN)) {
            tracing::warn!(
                name = record.instance.name,
                error = chain(&error),
                "the files that a machine has gone on from are left behind"
            );
        }
    }
}

/// Has the paused machine of a run, with so many bytes of memory, write itself to a new folder. Returns
/// what that takes, in bytes.
fn keep_machine(run: &Path, folder: &Path, memory: u64) -> Result<u64, DriverError> {
    let action = "keeping the memory";
    let disk = File::open(folder.parent().unwrap_or(folder)).map_err(DriverError::io(action))?;
    check_room(disk, memory).map_err(|error| error.during(action))?;
    let control = UnixStream::connect(machine::control_socket(run))
        .and_then(|control| {
            control.set_read_timeout(Some(MEMORY_DEADLINE))?;
            Ok(control)
        })
        .map_err(DriverError::io("connecting to the VMM"))?;
    let report = client::snapshot_paused(&control, folder, Kind::Full).map_err(|error| {
        DriverError::Helper {
            action: action.to_owned(),
            message: chain(&error),
        }
    })?;
    fs::copy(machine::machine_file(run), folder.join(SPEC_FILE))
        .map_err(DriverError::io("keeping the machine's description"))?;
    Ok(report.state_bytes.saturating_add(report.memory_bytes))
}

/// A machine's files are never changed, so that all who go on from there can have the same ones.
fn link_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for name in [STATE_FILE, MEMORY_FILE, SPEC_FILE] {
        fs::hard_link(from.join(name), to.join(name))?;
    }
    Ok(())
}

impl Snapshots for VmDriver {
    fn capture<'a>(
        &'a self,
        record: &'a Record,
        snapshot: &'a str,
        memory: bool,
    ) -> BoxFuture<'a, Result<u64, DriverError>> {
        self.take(record, snapshot, memory).boxed()
    }

    fn stage<'a>(
        &'a self,
        record: &'a Record,
        source: &'a SnapshotName,
        memory: bool,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.stage_all(record, source, memory).boxed()
    }

    fn install<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<(), DriverError>> {
        self.install_all(record).boxed()
    }

    fn discard<'a>(
        &'a self,
        record: &'a Record,
        snapshot: &'a str,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.engine.discard(record, snapshot).boxed()
    }

    fn tidy<'a>(
        &'a self,
        record: &'a Record,
        known: &'a [String],
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.engine.tidy(record, known).boxed()
    }
}
