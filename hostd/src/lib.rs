//! The daemon and its client. The only crate that sees both kinds of isolation.

pub mod api;
pub mod doctor;
pub mod image;
pub mod network;
