//! Snapshots of containers: their writable layers. What a container has in its memory cannot be kept.

use futures::FutureExt;
use futures::future::BoxFuture;

use super::ContainerDriver;
use crate::api::types::InstanceState;
use crate::driver::DriverError;
use crate::driver::snapshots::{SnapshotName, Snapshots};
use crate::store::Record;

/// The writable layer in the instance's directory.
const CONTENT: &str = "upper";

impl ContainerDriver {
    async fn take(&self, record: &Record, snapshot: &str) -> Result<u64, DriverError> {
        let engine = &self.engine;
        let draft = engine.draft(record, snapshot)?;
        let runs = record.instance.state == InstanceState::Running;
        let held = if runs {
            engine.freeze(record).await
        } else {
            Ok(())
        };
        let copied = match held {
            Ok(()) => engine.copy_out(record, CONTENT, &draft).await,
            Err(error) => Err(error),
        };
        // In any case: some of it may be frozen even if not all of it is.
        let released = if runs {
            engine.thaw(record).await
        } else {
            Ok(())
        };
        let outcome = copied.and_then(|bytes| released.map(|()| bytes));
        engine.finish(draft, outcome).await
    }
}

impl Snapshots for ContainerDriver {
    fn capture<'a>(
        &'a self,
        record: &'a Record,
        snapshot: &'a str,
        _memory: bool,
    ) -> BoxFuture<'a, Result<u64, DriverError>> {
        self.take(record, snapshot).boxed()
    }

    fn stage<'a>(
        &'a self,
        record: &'a Record,
        source: &'a SnapshotName,
        _memory: bool,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.engine.stage(record, CONTENT, source).boxed()
    }

    fn install<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<(), DriverError>> {
        self.engine.install(record, CONTENT).boxed()
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
