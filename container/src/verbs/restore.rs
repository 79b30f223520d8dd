//! `restore`: makes a container from files that `checkpoint` wrote.

use crate::create::{self, RestoreOptions};
use crate::process::Exit;
use crate::verbs::run::{RunError, RunMode, run_made};

/// Restores a container in the foreground, and deletes it at its end. Nothing is returned for one that was
/// detached.
///
/// # Errors
/// Those of [`RunError`]; the container is then gone.
pub fn restore(options: RestoreOptions, mode: RunMode) -> Result<Option<Exit>, RunError> {
    let (root, id) = (options.root.clone(), options.id.clone());
    run_made(root, id, mode, || create::restore(options))
}
