//! What the end-to-end tests share: a running hostd to speak to, natively or in the simulated host.
//!
//! `HOSTD_E2E_KINDS` (`container`, or `container,vm`) says which kinds of instance a test covers.
//! `HOSTD_E2E_PART` takes only what each kind must do alike (`each-kind`), or only the rest (`one-kind`).
//! `HOSTD_E2E_HOST=installed` takes the hostd that runs on this machine; without it every test
//! process starts a daemon of its own, with directories and a network namespace of its own.

mod host;
mod http;
mod output;

pub use host::{Host, Kind, kinds};
pub use http::Answer;
pub use output::Output;
