//! The wire form of the API: what a client sends and what it gets back, and nothing that acts.
//!
//! `hostctl` uses these same types. A request refuses unknown fields; a response may grow fields.
//! Sizes are bytes, rates are bytes (or operations) per second, times are RFC 3339 in UTC.

mod images;
mod snapshots;
mod stats;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::images::{Image, ImportRequest, PullRequest, TransferEvent};
pub use self::snapshots::{RestoreRequest, Snapshot, SnapshotRequest};
pub use self::stats::{
    BalloonStats, DeviceStats, DiskStats, GuestMemoryStats, MemStats, NetStats, RngStats, Stats,
    VcpuExits, VcpuStats, VmMemoryStats, VmStats, VsockStats,
};

/// What stands between the workload and the host.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Namespaces, cgroup, capabilities and seccomp; the host's kernel is shared.
    #[default]
    Container,
    /// A KVM virtual machine with a kernel of its own, whose VMM is itself confined like a container.
    Vm,
}

/// Who the users of a container are on the host.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum UserNamespaceMode {
    /// Users of its own: 0 to 65535 are 65536 users of the host that nobody else is. Its root has no
    /// rights over anything outside of it.
    Own,
    /// The host's users: root in the container is root's user on the host, with fewer rights.
    Host,
}

/// `POST /v1/instances` and `PUT /v1/instances/{name}`: an instance as asked for.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceSpec {
    /// 1 to 63 of `a-z`, `0-9` and `-`, first a letter, last not `-`. Chosen by hostd if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `INSTANCE/SNAPSHOT`: makes a clone. It has the files of the snapshot, and where this request
    /// says nothing else its spec, without name, hostname and published ports. `isolation`, `image`
    /// and `limits.disk.size` cannot be others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_snapshot: Option<String>,
    #[serde(default)]
    pub isolation: Isolation,
    /// A reference of an image that `GET /v1/images` lists, e.g. `localhost:5000/busybox:1`.
    pub image: String,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Added to the image's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; the image's user if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// `own` if absent. For containers only: a VM shares no users with the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_namespace: Option<UserNamespaceMode>,
    /// An absolute path; the image's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The instance's name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Gives the workload a terminal for its three standard streams.
    #[serde(default)]
    pub tty: bool,
    /// Keeps the workload's standard input open for `attach`; otherwise it reads end of file.
    #[serde(default)]
    pub stdin: bool,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub network: NetworkSpec,
    #[serde(default)]
    pub mounts: Vec<MountSpec>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Removes the instance once it has stopped.
    #[serde(default)]
    pub auto_remove: bool,
    /// Seconds between the polite signal of `stop` and the kill. Default 10, at most 3600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout_s: Option<u32>,
}

/// Limits with one meaning for both kinds. An absent limit is no limit, except that a VM without
/// `cpu.cores` has one vCPU and a VM without `memory.max` has 512 MiB.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    #[serde(default)]
    pub cpu: CpuLimits,
    #[serde(default)]
    pub memory: MemoryLimits,
    #[serde(default)]
    pub pids: PidsLimits,
    #[serde(default)]
    pub disk: DiskLimits,
    #[serde(default)]
    pub network: NetworkLimits,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuLimits {
    /// Processors' worth of time, e.g. 0.5. At least 0.01, at most what the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<f64>,
    /// Share under contention, 1 to 10000, 100 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Processors that may be used, as a list such as `0-2,4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryLimits {
    /// Bytes. At least 6 MiB for a container, 64 MiB for a VM; at most what the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PidsLimits {
    /// Processes and threads of the workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    /// Bytes that the writable layer may hold. Fixed at creation; a VM's default is 10 GiB, sparse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bps: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_bps: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_iops: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_iops: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkLimits {
    /// Bytes per second towards the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress_bps: Option<u64>,
    /// Bytes per second from the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_bps: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// An address on hostd's bridge, with NAT to the outside.
    #[default]
    Bridge,
    /// Loopback only.
    None,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    #[serde(default)]
    pub mode: NetworkMode,
    #[serde(default)]
    pub ports: Vec<PortSpec>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// A port of the host that leads to a port of the instance.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// The host's address to listen on; all of them if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub host_ip: Option<Ipv4Addr>,
    /// 1 to 65535.
    pub host: u16,
    /// 1 to 65535.
    pub instance: u16,
    #[serde(default)]
    pub protocol: Protocol,
}

/// A directory or file of the host, or a named volume, inside the instance.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MountSpec {
    /// An absolute path of the host, or the name of a volume, which is made if it is not there.
    pub source: String,
    /// An absolute path in the instance.
    pub target: String,
    #[serde(default)]
    pub read_only: bool,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    #[default]
    No,
    OnFailure,
    Always,
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    Created,
    Starting,
    Running,
    Paused,
    Stopping,
    Stopped,
    /// It could not be started, or what ran it is lost; `error` says why.
    Failed,
}

/// Why an instance is in its state.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StateReason {
    /// A client asked for it.
    Requested,
    /// The workload ended by itself.
    Exited,
    /// The workload exceeded its memory limit.
    OutOfMemory,
    /// What ran the workload ended before it: the guest was reset, or its VMM failed. `error` says
    /// more, and the exit code is 125.
    Crashed,
    /// The start failed.
    StartFailed,
    /// The processes were gone and left no exit record: the host was reset, or they were killed.
    Lost,
}

/// How a workload ended. Exactly one of `code` and `signal` is set.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct Exit {
    /// The exit status, 0 to 255.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// It was killed for want of memory under its limit.
    pub oom: bool,
}

/// `GET /v1/instances/{name}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Instance {
    pub name: String,
    pub state: InstanceState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<StateReason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// The last error, for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What was asked for, with the changes of `PATCH` applied.
    pub spec: InstanceSpec,
    /// The manifest digest that `spec.image` stood for at creation.
    pub image_digest: String,
    /// The workload's first process (for a VM, its VMM) in the host's pid namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub address: Option<Ipv4Addr>,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub finished_at: Option<Timestamp>,
    /// How long each phase of the last start took, in microseconds, by the phase's name.
    #[serde(default)]
    pub start_us: BTreeMap<String, u64>,
    /// The names of its snapshots, the oldest first.
    #[serde(default)]
    pub snapshots: Vec<String>,
    /// Changes with every change of the instance; the value of the `ETag` header.
    pub generation: u64,
}

/// `PATCH /v1/instances/{name}`: an absent field stays, `null` takes the limit away.
///
/// RFC 7396 merge patch over `spec.limits` and `spec.labels`; all or nothing.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstancePatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub limits: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub labels: Option<serde_json::Value>,
}

/// When a changed field takes effect.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Already in force.
    Live,
    /// At the next start.
    AtRestart,
}

/// The answer to `PATCH`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct PatchResult {
    /// By JSON pointer of the field, e.g. `/limits/memory/max`.
    pub plan: BTreeMap<String, Effect>,
    pub instance: Instance,
}

/// `POST /v1/instances/{name}/exec`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    pub command: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    #[serde(default)]
    pub tty: bool,
    /// Standard input as text, for the one-call form; the process then reads end of file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// Kills the process after so many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// The answer to the one-call form of exec. The texts have invalid UTF-8 replaced; the `_base64`
/// fields are exact. Each stream is cut at 1 MiB.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct ExecResult {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
    pub stdout_base64: String,
    pub stderr_base64: String,
    pub truncated: bool,
    pub timed_out: bool,
}

/// One entry of `GET /v1/events` (server-sent events; `?since=SEQUENCE` replays).
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Event {
    /// Grows by one with each event, also across restarts of hostd.
    pub sequence: u64,
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// `instance.created`, `instance.running`, `instance.stopped`, `snapshot.created`, `image.pulled`, ….
    pub kind: String,
    /// The instance or image that it is about.
    pub subject: String,
    #[schema(value_type = Object)]
    pub data: serde_json::Value,
}

/// One line of `GET /v1/instances/{name}/logs` (NDJSON).
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct LogLine {
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// `stdout` or `stderr`; a workload with a terminal has `stdout` only.
    pub stream: String,
    /// The text with its line end, if it had one.
    pub text: String,
}

/// One check of `hostctl doctor` and of `GET /v1/host`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Finding {
    /// A short name, e.g. `kvm`.
    pub check: String,
    pub level: FindingLevel,
    /// What was found, one sentence.
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FindingLevel {
    Ok,
    Warning,
    Error,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Host {
    pub version: String,
    pub kernel: String,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub memory_allocated_bytes: u64,
    /// `v1`, `hybrid` or `v2`.
    pub cgroup: String,
    pub instances: u64,
    pub findings: Vec<Finding>,
}

/// RFC 9457 `application/problem+json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Problem {
    /// Stable, for programs: e.g. `not_found`, `name_taken`, `invalid_field`, `unknown_field`,
    /// `refused`, `digest_mismatch`, `driver_failed`.
    pub code: String,
    /// The HTTP status.
    pub status: u16,
    /// One sentence for a person.
    pub detail: String,
    /// JSON pointer of the field at fault, e.g. `/limits/cpu/cores`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The same request may succeed later.
    pub retryable: bool,
    pub request_id: String,
}
