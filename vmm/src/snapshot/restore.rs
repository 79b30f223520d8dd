//! The wire form of a restore: which snapshot, and what of the new machine is not the old one's.
//! Data only, and how it changes a specification.
//!
//! What belongs to a run and not to the machine (the console, the control socket, the exit status,
//! the device of KVM) is never taken from a snapshot: it is what is said here, or not there. Disks,
//! taps and vsock sockets are those of the old machine unless others are named here; where the old
//! machine was handed a descriptor, another must be.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{MEMORY_FILE, STATE_FILE};
use crate::plan::Places;
use crate::spec::{Backing, Console, DiskFormat, Spec, VsockStream};

/// The most snapshots on top of each other.
pub const LAYERS_MAX: usize = 64;

/// A machine to be restored, as asked for. Wherever a path stands, `fd:N` may, as in a
/// specification.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// A full snapshot, and differences on top of it in the order in which they were taken. At most
    /// [`LAYERS_MAX`].
    #[serde(default)]
    pub snapshots: Vec<SnapshotFiles>,
    /// `/dev/kvm` if absent.
    #[serde(default)]
    pub kvm: Option<PathBuf>,
    /// By name: `disk0` is the first.
    #[serde(default)]
    pub disks: BTreeMap<String, DiskOverride>,
    /// By name: `net0` is the first.
    #[serde(default)]
    pub nets: BTreeMap<String, NetOverride>,
    #[serde(default)]
    pub vsock: Option<VsockOverride>,
    /// By name: `pmem0` is the first.
    #[serde(default)]
    pub pmem: BTreeMap<String, PmemOverride>,
    /// As in a specification.
    #[serde(default)]
    pub console: Option<Console>,
    /// As in a specification.
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// As in a specification.
    #[serde(default)]
    pub exit_status: Option<PathBuf>,
    /// What time the guest believes it is.
    #[serde(default)]
    pub clock: ClockPolicy,
    /// Wait for a `resume` on the control socket.
    #[serde(default)]
    pub paused: bool,
    /// Track what the guest writes, for differences to this snapshot; as the old machine did if
    /// absent.
    #[serde(default)]
    pub track_dirty: Option<bool>,
}

/// The two files of a snapshot.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotFiles {
    pub state: PathBuf,
    /// Of a full snapshot: not to be changed as long as the machine runs.
    pub memory: PathBuf,
}

impl SnapshotFiles {
    /// Those that the program itself puts into a folder.
    pub fn of_folder(folder: &Path) -> SnapshotFiles {
        SnapshotFiles {
            state: folder.join(STATE_FILE),
            memory: folder.join(MEMORY_FILE),
        }
    }
}

/// Another file for a disk, which holds what the disk held when the snapshot was taken: a copy, say, or
/// a qcow2 image that refers to it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOverride {
    pub path: PathBuf,
    /// Of that file; as before if absent.
    #[serde(default)]
    pub format: Option<DiskFormat>,
    /// What it refers to; as before if absent.
    #[serde(default)]
    pub backing: Option<Vec<Backing>>,
}

/// Another file for an image that the guest sees as memory.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PmemOverride {
    pub path: PathBuf,
}

/// Another tap, and perhaps another address.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetOverride {
    pub tap: String,
    /// As in a specification; that of the old machine if absent. The driver has read that one and goes
    /// on with it: it is told that its configuration has changed, and finds the new one when it looks
    /// again, as a driver that is bound anew does.
    #[serde(default)]
    pub mac: Option<String>,
    /// As in a specification: who serves it may be another one now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<PathBuf>,
}

/// Other ends for vsock. The guest is told that all its connections are gone, and may be given
/// another context id with that.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    pub path: PathBuf,
    #[serde(default)]
    pub cid: Option<u32>,
    /// All of them; those of the old machine if absent.
    #[serde(default)]
    pub streams: Option<Vec<VsockStream>>,
}

/// What a guest's clocks show when it goes on.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ClockPolicy {
    /// The time that it is: the guest sees that time has passed.
    #[default]
    Advance,
    /// What they showed when the snapshot was taken: the guest sees nothing.
    Freeze,
}

/// Why a machine cannot be made from a snapshot in this way.
#[derive(Debug, thiserror::Error)]
pub enum OverrideError {
    #[error("`/{kind}/{name}`: the snapshot has no such device; it has {count} of that kind")]
    NoDevice {
        kind: &'static str,
        name: String,
        count: usize,
    },
    #[error(
        "`{field}` of the old machine was a descriptor that it had inherited ({value}); \
         say here what it is to be"
    )]
    Handed { field: String, value: String },
    #[error("`/vsock`: the snapshot has no such device")]
    NoVsock,
}

impl Restore {
    /// What is asked for, in place of what the old machine had.
    /// Its devices go by the names of `places`.
    pub fn apply(&self, mut spec: Spec, places: &Places) -> Result<Spec, OverrideError> {
        spec.kvm.clone_from(&self.kvm);
        spec.console.clone_from(&self.console);
        spec.control.clone_from(&self.control);
        spec.exit_status.clone_from(&self.exit_status);
        if let Some(track_dirty) = self.track_dirty {
            spec.memory.track_dirty = track_dirty;
        }
        self.apply_disks(&mut spec, &names("disk", &places.disks))?;
        self.apply_nets(&mut spec, &names("net", &places.nets))?;
        let mut images: Vec<_> = spec.pmem.iter_mut().map(|pmem| &mut pmem.path).collect();
        let wanted = self.pmem.iter().map(|(name, pmem)| (name, &pmem.path));
        let numbers: Vec<u16> = (0..).take(images.len()).collect();
        replace("pmem", &names("pmem", &numbers), &mut images, wanted)?;
        self.apply_vsock(&mut spec)?;
        Ok(spec)
    }

    fn apply_disks(&self, spec: &mut Spec, names: &[String]) -> Result<(), OverrideError> {
        for (name, disk) in names.iter().zip(&mut spec.disks) {
            let wanted = self.disks.get(name);
            disk.format = wanted
                .and_then(|wanted| wanted.format)
                .unwrap_or(disk.format);
            if let Some(backing) = wanted.and_then(|wanted| wanted.backing.clone()) {
                disk.backing = backing;
            } else {
                for backing in &disk.backing {
                    own(&format!("/disks/{name}/backing"), &backing.path)?;
                }
            }
        }
        let mut disks: Vec<_> = spec.disks.iter_mut().map(|disk| &mut disk.path).collect();
        let wanted = self.disks.iter().map(|(name, disk)| (name, &disk.path));
        replace("disks", names, &mut disks, wanted)
    }

    fn apply_nets(&self, spec: &mut Spec, names: &[String]) -> Result<(), OverrideError> {
        for (name, net) in names.iter().zip(&mut spec.nets) {
            let wanted = self.nets.get(name);
            match (wanted, &net.vhost) {
                (Some(wanted), _) => net.vhost.clone_from(&wanted.vhost),
                (None, Some(vhost)) => own(&format!("/nets/{name}/vhost"), vhost)?,
                (None, None) => {}
            }
            if let Some(mac) = wanted.and_then(|wanted| wanted.mac.as_ref()) {
                net.mac = Some(mac.clone());
            }
        }
        let mut taps: Vec<_> = spec.nets.iter_mut().map(|net| &mut net.tap).collect();
        let wanted = self.nets.iter().map(|(name, net)| (name, &net.tap));
        replace("nets", names, &mut taps, wanted)
    }

    fn apply_vsock(&self, spec: &mut Spec) -> Result<(), OverrideError> {
        let Some(vsock) = &mut spec.vsock else {
            return match self.vsock {
                Some(_) => Err(OverrideError::NoVsock),
                None => Ok(()),
            };
        };
        let wanted = self.vsock.as_ref();
        match wanted {
            Some(wanted) => vsock.path.clone_from(&wanted.path),
            None => own("/vsock/path", &vsock.path)?,
        }
        if let Some(cid) = wanted.and_then(|wanted| wanted.cid) {
            vsock.cid = cid;
        }
        match wanted.and_then(|wanted| wanted.streams.clone()) {
            Some(streams) => vsock.streams = streams,
            None => {
                for stream in &vsock.streams {
                    own("/vsock/streams", &stream.path)?;
                }
            }
        }
        Ok(())
    }
}

fn names(prefix: &str, numbers: &[u16]) -> Vec<String> {
    let numbers = numbers.iter();
    numbers.map(|number| format!("{prefix}{number}")).collect()
}

/// Replaces values by the names of their devices, and checks that the others can be used again.
fn replace<'a, T: Clone + AsRef<Path> + 'a>(
    kind: &'static str,
    names: &[String],
    values: &mut [&mut T],
    wanted: impl Iterator<Item = (&'a String, &'a T)>,
) -> Result<(), OverrideError> {
    let mut named: BTreeMap<&String, &T> = wanted.collect();
    for (name, value) in names.iter().zip(values.iter_mut()) {
        match named.remove(name) {
            Some(other) => (*value).clone_from(other),
            None => own(&format!("/{kind}/{name}"), value.as_ref())?,
        }
    }
    match named.keys().next() {
        Some(name) => Err(OverrideError::NoDevice {
            kind,
            name: (*name).clone(),
            count: values.len(),
        }),
        None => Ok(()),
    }
}

/// Refuses a descriptor, whose number means something else by now.
fn own(field: &str, path: &Path) -> Result<(), OverrideError> {
    match path.to_str() {
        Some(text) if text.starts_with("fd:") => Err(OverrideError::Handed {
            field: field.to_owned(),
            value: text.to_owned(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> Spec {
        serde_json::from_value(json!({
            "boot": {"kernel": "k"},
            "disks": [{"path": "a"}, {"path": "fd:9"}],
            "nets": [{"tap": "tap0"}],
            "vsock": {"cid": 3, "path": "v"},
            "console": "stdio",
            "control": "c",
        }))
        .unwrap()
    }

    fn applied(restore: serde_json::Value) -> Result<Spec, OverrideError> {
        let restore: Restore = serde_json::from_value(restore).unwrap();
        let spec = spec();
        let places = Places::new(&spec).unwrap();
        restore.apply(spec, &places)
    }

    #[test]
    fn what_belongs_to_a_run_is_new_and_the_rest_is_old_unless_named() {
        let new = applied(json!({"disks": {"disk1": {"path": "fd:3"}}, "control": "d"})).unwrap();
        let mut want = spec();
        want.console = None;
        want.control = Some("d".into());
        want.disks[1].path = "fd:3".into();
        assert_eq!(new, want);

        let backing = json!([{"path": "a", "format": "raw"}]);
        let new = applied(json!({
            "disks": {
                "disk0": {"path": "b", "format": "qcow2", "backing": backing},
                "disk1": {"path": "c"},
            },
            "nets": {"net0": {"tap": "tap9", "mac": "02:00:00:00:00:09"}},
            "vsock": {"path": "w", "cid": 7, "streams": []},
            "track_dirty": true,
        }))
        .unwrap();
        let vsock = new.vsock.unwrap();
        assert_eq!(
            (new.disks[0].path.to_str(), new.nets[0].tap.as_str()),
            (Some("b"), "tap9")
        );
        assert_eq!(new.nets[0].mac.as_deref(), Some("02:00:00:00:00:09"));
        assert_eq!((vsock.cid, vsock.path.to_str()), (7, Some("w")));
        assert!(new.memory.track_dirty);
        assert_eq!(new.disks[0].format, DiskFormat::Qcow2);
        assert_eq!(new.disks[0].backing[0].path, Path::new("a"));
        assert_eq!(new.disks[1].format, DiskFormat::Raw);
    }

    #[test]
    fn who_serves_a_network_is_as_named_now_or_as_before() {
        let served = |vhost: &str, nets: serde_json::Value| {
            let mut spec = spec();
            spec.disks.clear();
            spec.nets[0].vhost = Some(vhost.into());
            let places = Places::new(&spec).unwrap();
            let restore: Restore = serde_json::from_value(json!({ "nets": nets })).unwrap();
            let spec = restore.apply(spec, &places)?;
            Ok::<_, OverrideError>(spec.nets[0].vhost.clone())
        };
        let [device, handed] = ["/dev/vhost-net", "fd:9"];
        let own = json!({"net0": {"tap": "tap9"}});
        let other = json!({"net0": {"tap": "tap9", "vhost": "fd:7"}});
        assert_eq!(served(device, json!({})).unwrap(), Some(device.into()));
        assert_eq!(served(handed, own).unwrap(), None);
        assert_eq!(served(handed, other).unwrap(), Some("fd:7".into()));
        let error = served(handed, json!({})).unwrap_err().to_string();
        assert!(
            error.starts_with("`/nets/net0/vhost` of the old machine was a descriptor"),
            "{error}"
        );
    }

    #[test]
    fn what_cannot_be_is_refused_and_named() {
        for (restore, want) in [
            (
                json!({}),
                "`/disks/disk1` of the old machine was a descriptor",
            ),
            (
                json!({"disks": {"disk1": {"path": "x"}, "disk2": {"path": "x"}}}),
                "`/disks/disk2`: the snapshot has no such device; it has 2",
            ),
            (
                json!({"disks": {"disk1": {"path": "x"}}, "nets": {"disk0": {"tap": "x"}}}),
                "`/nets/disk0`",
            ),
        ] {
            let error = applied(restore).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
