//! The OCI configuration of a container. Pure: everything has been resolved before.

use std::path::Path;

use container::seccomp;
use container::users::IdRange;
use oci_spec::runtime::{Capabilities, Capability, LinuxResources};
use serde_json::{Value, json};

use super::user::User;
use super::users::Users;
use crate::api::types::{InstanceSpec, MountSpec};
use crate::driver::workload::Workload;

/// What root in a container may do: Docker's choice.
const CAPABILITIES: &[Capability] = &[
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Files of /proc and /sys that tell of the host, or change it.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What goes into a configuration.
pub(super) struct Parts<'a> {
    pub(super) spec: &'a InstanceSpec,
    pub(super) name: &'a str,
    pub(super) workload: &'a Workload,
    pub(super) user: &'a User,
    /// The container's own users; without them it has the host's.
    pub(super) users: Option<&'a Users>,
    pub(super) cgroup_path: &'a str,
    pub(super) resources: &'a LinuxResources,
    /// The network namespace to join; a new one, with loopback alone, if absent.
    pub(super) netns: Option<&'a Path>,
    /// Files of hostd's that are put into /etc, by name.
    pub(super) etc: &'a Path,
    /// The host's directories for `spec.mounts`, in the same order.
    pub(super) sources: &'a [std::path::PathBuf],
}

/// Files that are put into /etc.
pub(super) const ETC_FILES: &[&str] = &["hostname", "hosts", "resolv.conf"];

/// The `config.json`.
pub(super) fn config(parts: &Parts<'_>) -> Value {
    let hostname = parts.spec.hostname.as_deref().unwrap_or(parts.name);
    let capabilities: Capabilities = CAPABILITIES.iter().copied().collect();
    json!({
        "ociVersion": "1.2.0",
        "hostname": hostname,
        "root": {"path": "rootfs"},
        "process": process(parts, &capabilities),
        "mounts": mounts(parts),
        "linux": {
            "cgroupsPath": parts.cgroup_path,
            "namespaces": namespaces(parts),
            "resources": resources(parts.resources),
            "seccomp": seccomp::default_profile(&capabilities),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "sysctl": {
                // Both are safe in a network namespace of one's own, and spare a capability.
                "net.ipv4.ip_unprivileged_port_start": "0",
                "net.ipv4.ping_group_range": format!("0 {}", greatest_group(parts.users)),
            },
        },
    })
}

fn process(parts: &Parts<'_>, capabilities: &Capabilities) -> Value {
    let mut env = parts.workload.clone();
    env.env
        .entry("HOME".to_owned())
        .or_insert_with(|| parts.user.home.clone());
    json!({
        "terminal": parts.spec.tty,
        "user": {
            "uid": parts.user.uid,
            "gid": parts.user.gid,
            "additionalGids": parts.user.groups,
        },
        "args": parts.workload.args,
        "env": env.environment(),
        "cwd": parts.workload.working_dir,
        "capabilities": {
            "bounding": capabilities,
            "effective": capabilities,
            "permitted": capabilities,
        },
        "noNewPrivileges": true,
    })
}

/// The kernel takes only groups that there are.
fn greatest_group(users: Option<&Users>) -> u32 {
    users.map_or(i32::MAX.cast_unsigned(), |users| users.range().count - 1)
}

fn namespaces(parts: &Parts<'_>) -> Value {
    let network = match parts.netns {
        Some(path) => json!({"type": "network", "path": path}),
        None => json!({"type": "network"}),
    };
    let user = parts
        .users
        .map(|users| json!({"type": "user", "path": users.path()}));
    let mut namespaces = vec![
        json!({"type": "pid"}),
        json!({"type": "mount"}),
        json!({"type": "uts"}),
        json!({"type": "ipc"}),
        json!({"type": "cgroup"}),
        network,
    ];
    namespaces.extend(user);
    Value::Array(namespaces)
}

/// The limits, and no device but those that every container has.
fn resources(limits: &LinuxResources) -> Value {
    let mut resources =
        serde_json::to_value(limits).expect("resources have only string keys and plain values");
    resources["devices"] = json!([{"allow": false, "access": "rwm"}]);
    resources
}

fn mounts(parts: &Parts<'_>) -> Value {
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
    ];
    for name in ETC_FILES {
        let source = parts.etc.join(name);
        mounts.push(bind(&source, &format!("/etc/{name}"), false));
    }
    let wanted = parts.spec.mounts.iter().zip(parts.sources);
    mounts.extend(wanted.map(
        |(
            MountSpec {
                target, read_only, ..
            },
            source,
        )| { mapped(bind(source, target, *read_only), parts.users) },
    ));
    Value::Array(mounts)
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": source, "options": options})
}

fn bind(source: &Path, destination: &str, read_only: bool) -> Value {
    let access = if read_only { "ro" } else { "rw" };
    json!({
        "destination": destination, "type": "bind", "source": source,
        "options": ["rbind", "rprivate", access],
    })
}

/// A bind mount whose files are the container's users' as they are the host's on the disk.
fn mapped(mut mount: Value, users: Option<&Users>) -> Value {
    let Some(users) = users else {
        return mount;
    };
    let IdRange { first, count } = users.range();
    let mapping = json!([{"containerID": 0, "hostID": first, "size": count}]);
    if let Value::Array(options) = &mut mount["options"] {
        options.push("ridmap".into());
    }
    mount["uidMappings"] = mapping.clone();
    mount["gidMappings"] = mapping;
    mount
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxResources, Spec};
    use serde_json::json;

    use super::*;

    #[test]
    fn the_configuration_is_one_that_the_specification_knows() {
        let spec: InstanceSpec = serde_json::from_value(json!({
            "image": "a", "tty": true,
            "mounts": [{"source": "/srv", "target": "/data", "read_only": true}],
        }))
        .unwrap();
        let workload = Workload {
            args: vec!["sh".to_owned()],
            env: [("A".to_owned(), "b".to_owned())].into(),
            user: None,
            working_dir: "/".to_owned(),
        };
        let user = User {
            uid: 5,
            gid: 6,
            groups: vec![7],
            home: "/root".to_owned(),
        };
        let value = config(&Parts {
            spec: &spec,
            name: "web",
            workload: &workload,
            user: &user,
            users: None,
            cgroup_path: "/hostd/web",
            resources: &LinuxResources::default(),
            netns: Some(Path::new("/run/netns/web")),
            etc: Path::new("/run/etc"),
            sources: &["/srv".into()],
        });
        let parsed: Spec = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(parsed.hostname().as_deref(), Some("web"));
        assert_eq!(value["process"]["env"], json!(["A=b", "HOME=/root"]));
        assert_eq!(value["linux"]["resources"]["devices"][0]["allow"], false);
        let last = value["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!(last["options"], json!(["rbind", "rprivate", "ro"]));
        let network = value["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .last()
            .unwrap();
        assert_eq!(network["path"], "/run/netns/web");
    }
}
