//! Making instances: from an image, or as clones of a snapshot.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde_json::{Map, Value};
use tokio::sync::oneshot;

use super::patch::merge;
use super::task::Beginning;
use super::{Handle, INSTANCES_MAX, InstanceError, Instances};
use crate::api::types::{Instance, InstanceSpec, InstanceState, NetworkMode, Snapshot};
use crate::driver::SnapshotName;
use crate::pointer;
use crate::store::{self, StoreError};
use crate::validate::{self, FieldError};

/// Members of a snapshot's spec that its clones do not have from it: no two instances can have them
/// alike, or it would be a mistake if they had.
const NOT_INHERITED: [&str; 3] = ["/name", "/hostname", "/network/ports"];

/// Members of a spec that follow from the snapshot.
const FIXED: [&str; 3] = ["/isolation", "/image", "/limits/disk/size"];

/// And of one whose first start goes on from memory: the workload runs already.
pub(super) const FIXED_BY_MEMORY: [&str; 10] = [
    "/entrypoint",
    "/command",
    "/env",
    "/user",
    "/working_dir",
    "/tty",
    "/stdin",
    "/network/mode",
    "/limits/memory/max",
    "/limits/cpu/cores",
];

/// An instance as asked for, and complete.
#[derive(Debug)]
pub struct Order {
    spec: InstanceSpec,
    origin: Option<Origin>,
}

/// What an instance is a clone of.
#[derive(Debug)]
struct Origin {
    snapshot: Snapshot,
    /// Whether its first start goes on from the snapshot's memory.
    memory: bool,
}

/// Whether `PUT` made the instance or found it as wanted.
#[derive(Debug)]
pub enum Made {
    New(Instance),
    Existing(Instance),
}

impl Instances {
    /// Reads what is wanted. What a clone's says nothing of is as in the snapshot, with its memory if it
    /// has some, unless `memory` says otherwise.
    ///
    /// # Errors
    /// It is no spec, or there is no such snapshot.
    pub async fn order(
        &self,
        wanted: Map<String, Value>,
        memory: Option<bool>,
    ) -> Result<Order, InstanceError> {
        let Some(source) = wanted.get("from_snapshot").filter(|value| !value.is_null()) else {
            let spec = pointer::deserialize(Value::Object(wanted))?;
            return Ok(Order { spec, origin: None });
        };
        let source = source.as_str().and_then(|text| text.split_once('/'));
        let (instance, snapshot) = source.ok_or_else(|| {
            FieldError::new("/from_snapshot", "must be `INSTANCE/SNAPSHOT`")
                .hint("GET /v1/instances/INSTANCE/snapshots lists them")
        })?;
        let snapshot = self.snapshot(instance, snapshot).await?;
        let memory = memory.unwrap_or(true) && snapshot.stateful;
        let spec = completed(&snapshot.spec, wanted, memory)?;
        let origin = Origin { snapshot, memory };
        Ok(Order {
            spec,
            origin: Some(origin),
        })
    }

    /// Makes an instance; nothing of it runs yet.
    ///
    /// # Errors
    /// The spec is at fault, the name is taken, or the host has no room.
    pub async fn create(&self, order: Order) -> Result<Instance, InstanceError> {
        let Order { spec, origin } = order;
        let rules = self.shared.kinds.of(spec.isolation).rules;
        validate::check(&spec, rules, &self.shared.capacity)?;
        let digest = match &origin {
            // The name may stand for another image by now.
            Some(origin) => origin.snapshot.image_digest.clone(),
            None => self
                .supplies
                .digest(&spec.image)
                .await?
                .ok_or_else(|| InstanceError::NoImage(spec.image.clone()))?,
        };
        let filled = self.insert(spec, digest, origin).await?;
        filled.await.unwrap_or(Err(InstanceError::CalledOff))
    }

    /// Stores a new instance and starts its task; the answer comes once it has its files.
    async fn insert(
        &self,
        spec: InstanceSpec,
        digest: String,
        origin: Option<Origin>,
    ) -> Result<oneshot::Receiver<Result<Instance, InstanceError>>, InstanceError> {
        let _creating = self.creating.lock().await;
        let taken = self.list();
        if taken.len() >= INSTANCES_MAX {
            return Err(InstanceError::Full);
        }
        let name = spec.name.clone().unwrap_or_else(|| free_name(&taken));
        let address = match spec.network.mode {
            NetworkMode::Bridge => {
                let used = taken
                    .iter()
                    .filter_map(|instance| instance.address)
                    .collect();
                Some(self.supplies.address(&used)?)
            }
            NetworkMode::None => None,
        };
        let instance = new_instance(name, spec, digest, address);
        let is_clone = origin.is_some();
        let (record, sequence) = self
            .shared
            .store
            .run(move |connection| {
                if is_clone {
                    store::insert_unfinished(connection, instance)
                } else {
                    store::insert(connection, instance)
                }
            })
            .await?;
        let (reply, filled) = oneshot::channel();
        match origin {
            None => {
                // Nobody has gone yet who could not be told.
                let _ = reply.send(Ok(record.instance.clone()));
                self.adopt(record, Beginning::New);
            }
            Some(origin) => {
                let source = SnapshotName {
                    instance: origin.snapshot.instance,
                    snapshot: origin.snapshot.name,
                };
                let memory = origin.memory;
                let beginning = Beginning::Clone {
                    source,
                    memory,
                    reply,
                };
                self.adopt(record, beginning);
            }
        }
        self.shared.events.announce(sequence);
        Ok(filled)
    }

    /// Makes the instance `name`, unless it is there already as wanted.
    ///
    /// # Errors
    /// As `create`; and the instance is there with another spec.
    pub async fn ensure(&self, mut order: Order, name: &str) -> Result<Made, InstanceError> {
        if order.spec.name.get_or_insert_with(|| name.to_owned()) != name {
            return Err(
                FieldError::new("/name", "must be the name in the path, or left out").into(),
            );
        }
        if let Ok(handle) = self.find(name) {
            return existing(&handle, &order.spec);
        }
        let spec = order.spec.clone();
        match self.create(order).await {
            Ok(instance) => Ok(Made::New(instance)),
            // Another client was quicker.
            Err(InstanceError::Store(StoreError::NameTaken(_))) => {
                existing(&self.find(name)?, &spec)
            }
            Err(error) => Err(error),
        }
    }
}

/// The spec of a clone: the snapshot's, with what is wanted laid over it (RFC 7396).
fn completed(
    origin: &InstanceSpec,
    wanted: Map<String, Value>,
    memory: bool,
) -> Result<InstanceSpec, FieldError> {
    let of_origin = serde_json::to_value(origin).expect("a spec has only plain values");
    let mut spec = of_origin.clone();
    for member in NOT_INHERITED {
        remove(&mut spec, member);
    }
    merge(&mut spec, &Value::Object(wanted));
    let changed = |member: &&&str| spec.pointer(member) != of_origin.pointer(member);
    if let Some(member) = FIXED.iter().find(changed) {
        let why = "a clone has what its snapshot has; it cannot be another";
        return Err(FieldError::new(*member, why).hint("leave it out"));
    }
    if memory && let Some(member) = FIXED_BY_MEMORY.iter().find(changed) {
        let why = "a clone that goes on from memory has what its snapshot has";
        return Err(FieldError::new(*member, why)
            .hint("leave it out, or start from the files alone (hostctl copy --no-memory)"));
    }
    pointer::deserialize(spec)
}

fn remove(value: &mut Value, member: &str) {
    let Some((parent, key)) = member.rsplit_once('/') else {
        return;
    };
    if let Some(Value::Object(parent)) = value.pointer_mut(parent) {
        parent.remove(key);
    }
}

fn existing(handle: &Handle, spec: &InstanceSpec) -> Result<Made, InstanceError> {
    let instance = handle.instance();
    if instance.spec == *spec {
        Ok(Made::Existing(instance))
    } else {
        Err(InstanceError::Different(instance.name))
    }
}

fn new_instance(
    name: String,
    mut spec: InstanceSpec,
    image_digest: String,
    address: Option<Ipv4Addr>,
) -> Instance {
    spec.name = Some(name.clone());
    Instance {
        name,
        state: InstanceState::Created,
        reason: None,
        exit: None,
        error: None,
        spec,
        image_digest,
        pid: None,
        address,
        created_at: Timestamp::now(),
        started_at: None,
        finished_at: None,
        start_us: BTreeMap::new(),
        snapshots: Vec::new(),
        generation: 1,
    }
}

/// A name that no instance has.
fn free_name(taken: &[Instance]) -> String {
    loop {
        let name = format!("i-{:08x}", crate::random::number() >> 32);
        if taken.iter().all(|instance| instance.name != name) {
            return name;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn completed_with(wanted: Value, memory: bool) -> Result<InstanceSpec, FieldError> {
        let origin = json!({
            "name": "web", "image": "a", "isolation": "vm", "hostname": "old", "env": {"A": "1"},
            "limits": {"memory": {"max": 100}, "disk": {"size": 5}},
            "network": {"ports": [{"host": 80, "instance": 80}]}, "labels": {"x": "1", "y": "2"},
        });
        let Value::Object(wanted) = wanted else {
            panic!("{wanted} is no object");
        };
        completed(&serde_json::from_value(origin).unwrap(), wanted, memory)
    }

    #[test]
    fn a_clone_has_the_spec_of_its_snapshot_but_for_what_is_its_own_and_what_is_asked_for() {
        let plain = completed_with(json!({"from_snapshot": "web/a"}), true).unwrap();
        assert_eq!((plain.name, plain.hostname), (None, None));
        assert!(plain.network.ports.is_empty());
        assert_eq!(plain.env["A"], "1");
        assert_eq!(plain.from_snapshot.as_deref(), Some("web/a"));
        let wanted = json!({
            "name": "two", "hostname": "new", "limits": {"memory": {"max": 200}},
            "labels": {"y": null, "z": "3"}, "image": "a",
        });
        let other = completed_with(wanted.clone(), false).unwrap();
        assert_eq!(other.hostname.as_deref(), Some("new"));
        assert_eq!(other.limits.memory.max, Some(200));
        assert_eq!(other.limits.disk.size, Some(5));
        let labels: Vec<&String> = other.labels.keys().collect();
        assert_eq!(labels, ["x", "z"]);
        let refused = completed_with(wanted, true).unwrap_err();
        assert_eq!(refused.field, "/limits/memory/max");
    }

    #[test]
    fn what_follows_from_the_snapshot_cannot_be_asked_for() {
        for (wanted, field) in [
            (json!({"image": "b"}), "/image"),
            (json!({"isolation": "container"}), "/isolation"),
            (
                json!({"limits": {"disk": {"size": 6}}}),
                "/limits/disk/size",
            ),
            (json!({"limits": null}), "/limits/disk/size"),
            (json!({"colour": 1}), "/colour"),
        ] {
            assert_eq!(completed_with(wanted, false).unwrap_err().field, field);
        }
    }
}
