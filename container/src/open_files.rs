//! How many files this process may have open, for configurations with many mounts: each of their sources is
//! held open until the container is made.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::plan::process::ProcessPlan;
use crate::spec::Config;

/// What else is open, and some more.
const OTHERS: u64 = 64;

/// The limit that was raised, as it was before.
#[derive(Debug)]
pub(crate) struct Raised(Option<Rlimit>);

impl Raised {
    /// Raises this process's own limit as far as the mounts of a configuration need it and the hard limit
    /// lets it. If that is not enough, the mount that is one too many is refused.
    pub(crate) fn for_mounts(config: &Config) -> Self {
        let mounts = config.spec.mounts().as_ref().map_or(0, Vec::len) as u64;
        let needed = mounts.saturating_add(OTHERS);
        let own = getrlimit(Resource::Nofile);
        if own.current.is_none_or(|current| current >= needed) {
            return Self(None);
        }
        let current = own.maximum.map_or(needed, |maximum| maximum.min(needed));
        let raised = Rlimit {
            current: Some(current),
            ..own
        };
        let raised = setrlimit(Resource::Nofile, raised);
        Self(raised.is_ok().then_some(own))
    }

    /// Has the program of a container start with the limit as it was, unless it has one of its own.
    pub(crate) fn keep_from(self, process: &mut ProcessPlan) {
        let has_own = |(resource, _): &(Resource, Rlimit)| *resource == Resource::Nofile;
        if let Some(limit) = self.0
            && !process.limits.iter().any(has_own)
        {
            process.limits.push((Resource::Nofile, limit));
        }
    }
}
