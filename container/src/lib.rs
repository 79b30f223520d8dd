//! Confinement of processes on Linux: the OCI runtime verbs and the monitor. Knows nothing of VMs
//! or hostd.

pub mod cgroup;
pub mod monitor;
pub mod seccomp;
