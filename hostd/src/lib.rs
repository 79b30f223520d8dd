//! The daemon and its client. The only crate that sees both kinds of isolation.

pub mod api;
pub mod cli;
pub mod daemon;
pub mod doctor;
pub mod driver;
pub mod events;
pub mod host;
pub mod image;
pub mod instance;
pub mod lifecycle;
pub mod limits;
pub mod logs;
pub mod metrics;
pub mod network;
pub mod paths;
pub mod pointer;
pub mod process;
pub mod random;
pub mod store;
pub mod validate;
pub mod volume;
