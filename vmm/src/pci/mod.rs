//! PCI: one bus of functions that guests find by themselves, each with a window in memory.
//!
//! Configuration spaces are reached through memory (PCI Express, ECAM) and in no other way. There are
//! no ports, no bridges but the one to the processors, and no interrupt pins: functions send messages.

pub mod bus;
pub mod config;
