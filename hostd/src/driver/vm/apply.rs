//! New limits for a machine that runs.

use std::fs;
use std::time::Duration;

use agent::protocol::Request as GuestRequest;
use tokio::time::{self, Instant};
use vmm::control::Request as MachineRequest;
use vmm::spec::Spec;

use super::{VMM_OVERHEAD, VmDriver, machine};
use crate::api::types::{InstanceState, Limits};
use crate::driver::DriverError;
use crate::limits::MIB;
use crate::store::Record;

/// How long a guest may take to plug memory in, or to find some that it can do without.
const MEMORY_DEADLINE: Duration = Duration::from_secs(12);

/// How often it is asked how far it is; a VMM does not tell by itself.
const MEMORY_INTERVAL: Duration = Duration::from_millis(50);

impl VmDriver {
    pub(super) async fn apply(&self, record: &Record, limits: &Limits) -> Result<(), DriverError> {
        let paused = record.instance.state == InstanceState::Paused;
        let running = self.running(record)?;
        let before = self.memory_bytes(record).await?;
        let after = machine::reachable_memory_bytes(&running, limits);
        if paused && after != before {
            return Err(DriverError::Paused);
        }
        // Until the guest is where it is to be, its group has room for where it comes from.
        self.limit_group(record, limits, &running, before.max(after))
            .await?;
        let request = MachineRequest::SetDiskLimits {
            disk: machine::WRITABLE_DISK,
            limits: machine::disk_limits(&limits.disk),
        };
        self.ask_machine(record, &request).await?;
        // A paused guest is told when it is resumed.
        if paused {
            return Ok(());
        }
        let request = GuestRequest::SetPidsMax {
            max: limits.pids.max,
        };
        self.ask_guest(record, &request).await?;
        if after != before {
            self.resize(record, &running, before, after).await?;
            self.limit_group(record, limits, &running, after).await?;
        }
        Ok(())
    }

    /// What the guest has been asked to have.
    async fn memory_bytes(&self, record: &Record) -> Result<u64, DriverError> {
        let told = self.machine_stats(record).await?.memory.requested_bytes;
        let group = self.engine.stats(record).await?.memory_limit_bytes;
        Ok(believed_bytes(told, group))
    }

    /// The machine as it was started.
    pub(super) fn running(&self, record: &Record) -> Result<Spec, DriverError> {
        let run = self.engine.paths.instance_run(&record.instance.name);
        let text = fs::read(machine::machine_file(&run))
            .map_err(DriverError::io("reading the machine's description"))?;
        serde_json::from_slice(&text)
            .map_err(|error| DriverError::io("reading the machine's description")(error.into()))
    }

    async fn limit_group(
        &self,
        record: &Record,
        limits: &Limits,
        running: &Spec,
        memory: u64,
    ) -> Result<(), DriverError> {
        let resources = self.to_resources(limits, running.cpus.count, memory)?;
        self.engine.apply(record, resources).await
    }

    /// Has the guest plug memory in or give it up. The workload's share is lowered before the
    /// machine's memory, and raised after it, so that it is the workload and not the rest of the
    /// guest that is short of memory in between.
    async fn resize(
        &self,
        record: &Record,
        running: &Spec,
        before: u64,
        after: u64,
    ) -> Result<(), DriverError> {
        let share = GuestRequest::SetMemory {
            at_start_bytes: running.memory.size_mib * MIB,
            now_bytes: after,
        };
        if after < before {
            self.ask_guest(record, &share).await?;
        }
        let size = MachineRequest::Memory {
            size_mib: after / MIB,
        };
        self.ask_machine(record, &size).await?;
        self.await_memory(record, before, after).await?;
        if after > before {
            self.ask_guest(record, &share).await?;
        }
        Ok(())
    }

    async fn await_memory(
        &self,
        record: &Record,
        before: u64,
        after: u64,
    ) -> Result<(), DriverError> {
        let deadline = Instant::now() + MEMORY_DEADLINE;
        loop {
            let stats = self.machine_stats(record).await?;
            let given_up = stats.balloon.map_or(0, |balloon| balloon.actual_bytes);
            let has = stats.memory.size_bytes.saturating_sub(given_up);
            let there = if after > before {
                has >= after
            } else {
                has <= after
            };
            if there {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(DriverError::Memory {
                    wanted_mib: after / MIB,
                    has_mib: has / MIB,
                });
            }
            time::sleep(MEMORY_INTERVAL).await;
        }
    }
}

/// As much of what a machine says that it is to have as its group has let it have until now: the group
/// is given room by that, and whoever has taken a machine over says what they like.
fn believed_bytes(told: u64, group_limit: Option<u64>) -> u64 {
    let most = group_limit.map(|limit| VMM_OVERHEAD.most_within(limit));
    told.min(most.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_believed_no_more_than_its_group_has_let_it_have() {
        let limit = Some(VMM_OVERHEAD.with(256 * MIB));
        let table = [
            (256 * MIB, limit, 256 * MIB),
            (128 * MIB, limit, 128 * MIB),
            (u64::MAX, limit, 256 * MIB),
            (u64::MAX, Some(MIB), 0),
            // A host that limits nobody's memory.
            (512 * MIB, None, 512 * MIB),
        ];
        for (told, limit, believed) in table {
            assert_eq!(believed_bytes(told, limit), believed, "{told} {limit:?}");
        }
    }
}
