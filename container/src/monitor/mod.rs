//! The parent of a workload: holds its streams, its log and its exit record.

pub mod protocol;
