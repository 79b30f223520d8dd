//! What hostd-oci is meant to reach, as fractions of crun: milliseconds of another machine say nothing.

/// Aims for one scene.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goal {
    /// Of crun's median wall time.
    pub(super) wall: f64,
    /// Of crun's median processor time.
    pub(super) processor: Option<f64>,
}

/// `run` of /bin/true with a bare configuration: 6.5 ms of 9.5, 5.5 ms of 8.2 in processor time.
pub(super) const RUN_BARE: Goal = Goal {
    wall: 0.68,
    processor: Some(0.67),
};

/// `run` with podman's configuration: 11 ms of 18.7.
pub(super) const RUN_PODMAN: Goal = Goal {
    wall: 0.59,
    processor: None,
};

/// create + start + delete: 12 ms of 17.7.
pub(super) const CREATE_START_DELETE: Goal = Goal {
    wall: 0.68,
    processor: None,
};

/// exec: below crun.
pub(super) const EXEC: Goal = Goal {
    wall: 1.0,
    processor: Some(1.0),
};

/// The most memory at a time, in KiB. This does not depend on the machine.
pub(super) const MEMORY_KIB_MAX: f64 = 3.0 * 1024.0;
