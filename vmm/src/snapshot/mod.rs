//! Snapshots: a paused machine in two files, and machines that go on from there.
//!
//! The *state* file is text: a header that every version of this program can read, the processors
//! and devices as JSON, and a checksum ([`file`]). The *memory* file is the guest's memory from its
//! lowest address on, with holes where it is zero, where it is an image that the guest has not changed,
//! and, in a difference, where nothing was written since the snapshot before ([`memory`]).
//!
//! [`take`] makes them, [`load`] reads them, [`restore`] is how somebody asks for it. A machine that
//! was restored has the memory file mapped privately: it reads from it whatever it has not written
//! yet, so any number of machines may run on one file, which must not change as long as one does.
//!
//! Snapshots are input that anybody may have made or damaged. The checksum is against accidents
//! only; against the rest, everything is checked again by what it concerns.

pub mod bounded;
pub mod client;
pub mod file;
pub mod hex;
pub mod layers;
pub mod load;
pub mod memory;
pub mod restore;
pub mod state;
pub mod take;
pub mod thread;
mod touched;
mod writer;
pub mod written;

/// The name of the state file in a snapshot's folder.
pub const STATE_FILE: &str = "state";
/// The name of the memory file.
pub const MEMORY_FILE: &str = "memory";
