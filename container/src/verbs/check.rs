//! Checks a configuration as `create` does, or a part of one as `exec` and `update` do, and carries nothing
//! out.

use std::path::Path;

use rustix::thread::CapabilitySet;
use serde_json::Value;

use crate::cgroup::{Cgroup, CgroupError};
use crate::create::Grouping;
use crate::plan::process::ProcessPlan;
use crate::plan::{Plan, PlanError, Setting};
use crate::spec::{Config, SpecError, parse_process, parse_resources};

/// Why a configuration would be refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
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
        grouping: Grouping::Files,
        check: true,
    };
    Plan::new(&config, &setting)?;
    Ok(config.warnings)
}

/// Reads and plans a process, as `exec --process` does.
///
/// # Errors
/// The field that is wrong, and why.
pub fn check_process(text: &[u8]) -> Result<(), CheckError> {
    let process = parse_process(text, Path::new("process.json"))?;
    ProcessPlan::new(&process, CapabilitySet::all())?;
    Ok(())
}

/// Reads and plans limits for the group `path`, which need not exist, as `update --resources` does.
///
/// # Errors
/// The field that is wrong, and why.
pub fn check_resources(resources: &Value, path: &str) -> Result<(), CheckError> {
    let resources = parse_resources(resources)?;
    Cgroup::open(path)?.check(&resources)?;
    Ok(())
}
