//! What fake instances have written, and the snapshots of it.

use std::collections::{BTreeMap, BTreeSet};
use std::future;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::FakeHost;
use crate::driver::snapshots::{SnapshotName, Snapshots};
use crate::driver::{Control, DriverError};
use crate::store::Record;

/// The disks of the host.
#[derive(Debug, Default)]
pub(super) struct Files {
    written: BTreeMap<String, String>,
    staged: BTreeMap<String, Kept>,
    /// By instance and snapshot.
    snapshots: BTreeMap<(String, String), Kept>,
    /// Instances whose next start goes on from memory.
    pending: BTreeSet<String>,
    /// Instances whose last start did.
    resumed: BTreeSet<String>,
    /// Nothing more fits.
    full: bool,
}

#[derive(Clone, Debug)]
struct Kept {
    written: String,
    memory: bool,
}

impl Files {
    pub(super) fn start(&mut self, instance: &str) {
        self.resumed.remove(instance);
        if let Some(name) = self.pending.take(instance) {
            self.resumed.insert(name);
        }
    }

    pub(super) fn forget(&mut self, instance: &str) {
        self.written.remove(instance);
        self.staged.remove(instance);
        self.pending.remove(instance);
        self.resumed.remove(instance);
        self.snapshots.retain(|(owner, _), _| owner != instance);
    }
}

impl FakeHost {
    /// An instance writes.
    pub fn write(&self, instance: &str, text: &str) {
        let mut state = self.lock();
        state.files.written.insert(instance.into(), text.into());
    }

    /// What an instance has written.
    pub fn written(&self, instance: &str) -> Option<String> {
        self.lock().files.written.get(instance).cloned()
    }

    /// The snapshots that there are of an instance.
    pub fn snapshots(&self, instance: &str) -> Vec<String> {
        let state = self.lock();
        let all = state.files.snapshots.keys();
        all.filter(|(owner, _)| owner == instance)
            .map(|(_, snapshot)| snapshot.clone())
            .collect()
    }

    /// Whether the last start of an instance went on from the memory of a snapshot.
    pub fn has_resumed(&self, instance: &str) -> bool {
        self.lock().files.resumed.contains(instance)
    }

    /// hostd is cut off while it takes a snapshot: half of one is there, and the instance stands
    /// still.
    pub fn cut_off_snapshot(&self, instance: &str, snapshot: &str) {
        let kept = Kept {
            written: "half".to_owned(),
            memory: false,
        };
        let mut state = self.lock();
        let key = (instance.to_owned(), snapshot.to_owned());
        state.files.snapshots.insert(key, kept);
        drop(state);
        // One that does not run stands still anyway.
        let _ = self.steer(instance, Control::Pause);
    }

    /// Whether an instance stands still.
    pub fn is_paused(&self, instance: &str) -> bool {
        let state = self.lock();
        state
            .instances
            .get(instance)
            .is_some_and(|found| found.paused)
    }

    /// The host's disk is full from now on, or no longer.
    pub fn fill_up(&self, full: bool) {
        self.lock().files.full = full;
    }

    fn keep(&self, record: &Record, snapshot: &str, memory: bool) -> Result<u64, DriverError> {
        let instance = &record.instance.name;
        let mut state = self.lock();
        if state.files.full {
            return Err(no_room());
        }
        let written = state.files.written.get(instance).cloned();
        let kept = Kept {
            written: written.unwrap_or_default(),
            memory,
        };
        let bytes = u64::try_from(kept.written.len()).unwrap_or(u64::MAX);
        let key = (instance.clone(), snapshot.to_owned());
        state.files.snapshots.insert(key, kept);
        Ok(bytes)
    }

    fn copy(
        &self,
        record: &Record,
        source: &SnapshotName,
        memory: bool,
    ) -> Result<(), DriverError> {
        let mut state = self.lock();
        let key = (source.instance.clone(), source.snapshot.clone());
        let kept = state.files.snapshots.get(&key).cloned();
        let Some(mut kept) = kept.filter(|_| !state.files.full) else {
            return Err(no_room());
        };
        kept.memory = memory;
        state
            .files
            .staged
            .insert(record.instance.name.clone(), kept);
        Ok(())
    }
}

fn no_room() -> DriverError {
    DriverError::Helper {
        action: "copying".to_owned(),
        message: "No space left on device".to_owned(),
    }
}

impl Snapshots for FakeHost {
    fn capture<'a>(
        &'a self,
        record: &'a Record,
        snapshot: &'a str,
        memory: bool,
    ) -> BoxFuture<'a, Result<u64, DriverError>> {
        future::ready(self.keep(record, snapshot, memory)).boxed()
    }

    fn stage<'a>(
        &'a self,
        record: &'a Record,
        source: &'a SnapshotName,
        memory: bool,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        future::ready(self.copy(record, source, memory)).boxed()
    }

    fn install<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<(), DriverError>> {
        let mut state = self.lock();
        if let Some(staged) = state.files.staged.remove(&record.instance.name) {
            let name = record.instance.name.clone();
            if staged.memory {
                state.files.pending.insert(name.clone());
            }
            state.files.written.insert(name, staged.written);
        }
        future::ready(Ok(())).boxed()
    }

    fn discard<'a>(
        &'a self,
        record: &'a Record,
        snapshot: &'a str,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        let key = (record.instance.name.clone(), snapshot.to_owned());
        self.lock().files.snapshots.remove(&key);
        future::ready(Ok(())).boxed()
    }

    fn tidy<'a>(
        &'a self,
        record: &'a Record,
        known: &'a [String],
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        let mut state = self.lock();
        let files = &mut state.files;
        files.staged.remove(&record.instance.name);
        files.snapshots.retain(|(owner, snapshot), _| {
            *owner != record.instance.name || known.contains(snapshot)
        });
        future::ready(Ok(())).boxed()
    }
}
