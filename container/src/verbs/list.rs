//! `list`: the states of all containers.

use std::path::Path;

use super::state::{State, state};
use crate::state::{StateError, ids};

/// The states of all containers under `root`, by id. One that disappears meanwhile is left out.
///
/// # Errors
/// When the directory, or one of the containers, cannot be read.
pub fn list(root: &Path) -> Result<Vec<State>, StateError> {
    let states = ids(root)?.into_iter().map(|id| state(root, &id));
    states
        .filter(|state| !matches!(state, Err(StateError::NotFound { .. })))
        .collect()
}
