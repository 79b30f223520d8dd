//! Checks a configuration as `create` does, and carries nothing out.

use std::path::Path;

use crate::plan::{Plan, PlanError, Setting};
use crate::spec::{Config, SpecError};

/// Why a configuration would be refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Reads and plans the configuration of the container `id` in `bundle`, an absolute path: what it names
/// is looked up and opened, and nothing is changed. Returns what would be warned of.
///
/// # Errors
/// The field that is wrong, and why.
pub fn check(text: Vec<u8>, bundle: &Path, id: &str) -> Result<Vec<String>, CheckError> {
    let config = Config::parse(text, &bundle.join("config.json"))?;
    let setting = Setting {
        id,
        bundle,
        bare: false,
        systemd: false,
        check: true,
    };
    Plan::new(&config, &setting)?;
    Ok(config.warnings)
}
