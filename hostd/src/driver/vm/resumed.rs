//! Machines that go on from the memory of a snapshot: what their VMM is given in place of a kernel, and
//! what their guests are told before the workload goes on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::protocol::{self, Renewal, Request as GuestRequest};
use container::monitor::protocol::Descriptor;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmm::control::Request as MachineRequest;
use vmm::snapshot::restore::{DiskOverride, NetOverride, Restore, SnapshotFiles, VsockOverride};
use vmm::spec::Spec;

use super::snapshots::SPEC_FILE;
use super::{control, guest, machine};
use crate::driver::DriverError;
use crate::store::Record;

/// A guest that has just gone on has much to read back before it answers.
const RELEASE_DEADLINE: Duration = Duration::from_secs(60);

/// What a guest is to be told once it has gone on: the content of a file of the run, so that another
/// hostd can tell it.
#[derive(Debug, Deserialize, Serialize)]
struct Welcome {
    /// It is another machine than the one that was kept.
    renewal: Option<Renewal>,
    pids_max: Option<u32>,
    disk_limits: vmm::spec::DiskLimits,
}

fn welcome_file(run: &Path) -> PathBuf {
    run.join("welcome.json")
}

fn restore_file(run: &Path) -> PathBuf {
    run.join("restore.json")
}

/// Writes what the VMM is to go on from, and gives it the descriptors for that: in place of those of
/// `spec`, which a machine that boots would have. Returns what the machine was started as.
pub(super) fn prepare(
    run: &Path,
    kept: &Path,
    spec: &Spec,
    descriptors: &mut machine::Descriptors,
) -> Result<Spec, DriverError> {
    let started: Spec = fs::read(kept.join(SPEC_FILE))
        .and_then(|text| serde_json::from_slice(&text).map_err(io::Error::from))
        .map_err(DriverError::io("reading the kept machine's description"))?;
    descriptors.replace_first(Descriptor::File {
        path: restore_file(run),
        write: false,
    });
    let files = SnapshotFiles::of_folder(kept);
    let files = SnapshotFiles {
        state: descriptors.file(files.state, false),
        memory: descriptors.file(files.memory, false),
    };
    let text = serde_json::to_vec(&restore(spec, files)).expect("paths of ours are UTF-8");
    fs::write(restore_file(run), text)
        .map_err(DriverError::io("writing what the machine goes on from"))?;
    Ok(started)
}

/// Everything that the machine has outside of itself is what `spec` names; the rest is its own.
fn restore(spec: &Spec, files: SnapshotFiles) -> Restore {
    let disks = spec.disks.iter().enumerate().map(|(index, disk)| {
        let disk = DiskOverride {
            path: disk.path.clone(),
            format: None,
            backing: None,
        };
        (format!("disk{index}"), disk)
    });
    let nets = spec.nets.iter().enumerate().map(|(index, net)| {
        // The agent gives the running guest its address; this is what the guest finds if it looks again.
        let net_override = NetOverride {
            tap: net.tap.clone(),
            mac: net.mac.clone(),
            vhost: None,
        };
        (format!("net{index}"), net_override)
    });
    Restore {
        snapshots: vec![files],
        kvm: spec.kvm.clone(),
        disks: disks.collect(),
        nets: nets.collect(),
        vsock: spec.vsock.as_ref().map(|vsock| VsockOverride {
            path: vsock.path.clone(),
            cid: None,
            streams: Some(vsock.streams.clone()),
        }),
        console: spec.console.clone(),
        control: spec.control.clone(),
        exit_status: spec.exit_status.clone(),
        ..Restore::default()
    }
}

/// The container of a VMM that goes on: that of one that starts, with another command line.
pub(super) fn with_restore(mut config: Value) -> Value {
    if let Some(Value::Array(args)) = config.pointer_mut("/process/args") {
        args.insert(1, "--restore".into());
    }
    config
}

/// Writes down what the guest is to be told. `config` is what it would be told at a boot.
pub(super) fn prepare_welcome(
    run: &Path,
    record: &Record,
    config: &protocol::Config,
) -> Result<(), DriverError> {
    let spec = &record.instance.spec;
    let welcome = Welcome {
        renewal: spec.from_snapshot.as_ref().map(|_| Renewal {
            hostname: config.hostname.clone(),
            network: config.network.clone(),
            machine_id: config.machine_id.clone(),
        }),
        pids_max: spec.limits.pids.max,
        disk_limits: machine::disk_limits(&spec.limits.disk),
    };
    let text = serde_json::to_vec(&welcome).expect("a welcome has only plain values");
    fs::write(welcome_file(run), text).map_err(DriverError::io("writing what the guest is told"))
}

/// Tells a guest that has gone on what it is to know, and lets its workload go on. Does nothing for
/// one that has booted, and found it all in its configuration.
pub(super) async fn welcome(run: &Path) -> Result<(), DriverError> {
    let failed = || DriverError::io("reading what the guest is told");
    let text = match fs::read(welcome_file(run)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text.map_err(failed())?,
    };
    let welcome: Welcome = serde_json::from_slice(&text)
        .map_err(io::Error::from)
        .map_err(failed())?;
    let request = MachineRequest::SetDiskLimits {
        disk: machine::WRITABLE_DISK,
        limits: welcome.disk_limits,
    };
    control::ask(&machine::control_socket(run), &request).await?;
    let socket = machine::agent_socket(run);
    let request = GuestRequest::SetPidsMax {
        max: welcome.pids_max,
    };
    guest::ask_patiently(&socket, &request, RELEASE_DEADLINE).await?;
    let request = GuestRequest::Release {
        renewal: welcome.renewal,
        clock_ns: i64::try_from(Timestamp::now().as_nanosecond()).ok(),
    };
    guest::ask_patiently(&socket, &request, RELEASE_DEADLINE).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vmm::plan::Places;

    use super::*;

    #[test]
    fn whatever_a_machine_was_handed_it_is_handed_again() {
        let spec: Spec = serde_json::from_value(json!({
            "boot": {"kernel": "fd:5", "initramfs": ["fd:6", "fd:7"]},
            "kvm": "fd:4",
            "disks": [{"path": "fd:8", "read_only": true}, {"path": "fd:9"}],
            "nets": [{"tap": "fd:10"}],
            "vsock": {"cid": 3, "path": "fd:11", "streams": [
                {"port": 1001, "path": "fd:1", "direction": "from_guest"},
            ]},
            "console": {"path": "fd:12"}, "control": "fd:13", "exit_status": "fd:14",
        }))
        .unwrap();
        let files = SnapshotFiles::of_folder(Path::new("/kept"));
        let places = Places::new(&spec).unwrap();
        let restored = restore(&spec, files).apply(spec.clone(), &places);
        let restored = restored.unwrap();
        assert_eq!(restored, spec);
    }

    #[test]
    fn the_command_line_says_that_it_goes_on() {
        let config = with_restore(json!({"process": {"args": ["vmm", "--config", "fd:3"]}}));
        let args = &config["process"]["args"];
        assert_eq!(*args, json!(["vmm", "--restore", "--config", "fd:3"]));
    }
}
