//! Has a container brought back from files.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use libc::CLONE_NEWNS;
use oci_spec::runtime::Spec;
use rustix::mount::{MountPropagationFlags, mount_bind_recursive, mount_change};

use super::rpc::{CgroupRoot, InheritFd, Kind, Options, Request};
use super::streams::Streams;
use super::worker::{Place, Served, Worker};
use super::{Allowed, CgroupsMode, Criu, CriuError, Images, OpenImages, options, outside};
use crate::cgroup::{Cgroup, Entry};

/// In the work directory.
const LOG: &str = "restore.log";

/// From what to restore, and how.
#[derive(Clone, Debug)]
pub struct Source {
    /// CRIU's program; `criu` in PATH if none is named.
    pub criu: Option<PathBuf>,
    pub images: Images,
    pub allowed: Allowed,
    /// Another label, or context of the mounts, than the dumped one.
    pub lsm_profile: Option<String>,
    pub lsm_mount_context: Option<String>,
}

/// A container that is to be restored.
#[derive(Debug)]
pub(crate) struct Restore<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) annotations: &'a BTreeMap<String, String>,
    pub(crate) bundle: &'a Path,
    pub(crate) rootfs: &'a Path,
    /// The host's group of the container's root, if it has users of its own.
    pub(crate) root_group: Option<u32>,
    /// An empty directory, absolute, where CRIU has the root file system meanwhile.
    pub(crate) scaffold: &'a Path,
    /// The path of the control group, empty if there is none; the group, and the way into it.
    pub(crate) cgroup_path: &'a str,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) entry: &'a Entry,
    /// None if a terminal takes their place.
    pub(crate) streams: Option<[BorrowedFd<'a>; 3]>,
    pub(crate) source: &'a Source,
}

/// A point at which CRIU waits.
#[derive(Debug)]
pub(crate) enum Point {
    /// The first process is there, with its namespaces and nothing else.
    Namespaces { pid: i32 },
    /// The container has a terminal, and this is its other side.
    Terminal(OwnedFd),
    /// All is there, and stands still. If this process dies from here on, it is undone.
    Restored { pid: i32 },
}

impl Restore<'_> {
    /// Restores it; the first process is a child of this one. If `attend` fails CRIU undoes all.
    ///
    /// # Errors
    /// Those of [`CriuError`], and of `attend`; no process is left then.
    pub(crate) fn run<E>(
        &self,
        criu: &Criu,
        attend: &mut dyn FnMut(Point) -> Result<(), E>,
    ) -> Result<(), Served<E>> {
        let Source {
            images, allowed, ..
        } = self.source;
        outside::refuse(self.spec)?;
        let images = images.open(false, LOG)?;
        let mut options = options(criu, &images, allowed, self.annotations);
        let streams = Streams::read(&images).map_err(CriuError::step(
            "read descriptors.json, which a checkpoint has beside its images",
        ))?;
        let failed = CriuError::step("find what the container used of the host");
        let given = self.describe(&streams, &mut options).map_err(failed)?;
        if let Some(group) = self.root_group {
            let failed = CriuError::step("let the container's root read the images");
            images.let_in(group).map_err(failed)?;
        }
        let failed = CriuError::step("make the places of the mounts");
        outside::make_mount_points(self.spec, self.bundle, self.rootfs).map_err(failed)?;
        let request = Request {
            kind: Kind::Restore.into(),
            options: Some(options),
            notify_success: None,
        };
        let descriptors: Vec<BorrowedFd<'_>> = images
            .descriptors()
            .chain(given.iter().map(AsFd::as_fd))
            .collect();
        let place = Place {
            descriptors: &descriptors,
            // What is mounted for CRIU goes with it.
            namespaces: u64::from(CLONE_NEWNS.unsigned_abs()),
            cgroup: self.entry.clone_into().filter(|_| self.is_inside()),
            prepare: &|| self.prepare(&images),
        };
        let worker = Worker::start(&criu.program, place)?;
        let response = worker.serve(&request, &mut |notification, descriptor| {
            let pid = notification.pid();
            match (notification.script(), descriptor) {
                ("setup-namespaces", _) => attend(Point::Namespaces { pid }),
                ("orphan-pts-master", Some(master)) => attend(Point::Terminal(master)),
                ("post-restore", _) => attend(Point::Restored { pid }),
                _ => Ok(()),
            }
        })?;
        if response.success {
            return Ok(());
        }
        Err(images.failure("restore").into())
    }

    /// Whether CRIU runs in the container's group, and what it makes with it, as it does not care for groups.
    fn is_inside(&self) -> bool {
        self.source.allowed.cgroups == CgroupsMode::Ignore
    }

    /// In CRIU's process: it wants the root on a mount of its own.
    fn prepare(&self, images: &OpenImages) -> io::Result<()> {
        if self.is_inside() {
            self.entry.join()?;
        }
        let from_above = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", from_above)?;
        mount_bind_recursive(self.rootfs, self.scaffold)?;
        images.reopen()
    }

    /// Returns the descriptors that CRIU is given.
    fn describe(&self, streams: &Streams, options: &mut Options) -> io::Result<Vec<OwnedFd>> {
        options.root = Some(self.scaffold.display().to_string());
        options.rst_sibling = Some(true);
        options.evasive_devices = Some(true);
        options.lsm_profile.clone_from(&self.source.lsm_profile);
        options
            .lsm_mount_context
            .clone_from(&self.source.lsm_mount_context);
        if !self.cgroup_path.is_empty() {
            options.cg_root = vec![CgroupRoot {
                controller: None,
                path: self.cgroup_path.to_owned(),
            }];
        }
        options.external = outside::sources(self.spec, self.cgroup, self.bundle);
        let (mut given, joined) = outside::replaced_namespaces(self.spec)?;
        options.join_ns = joined;
        given.extend(streams.replaced(self.streams)?);
        let inherit = |(key, descriptor): &(String, OwnedFd)| InheritFd {
            key: key.clone(),
            fd: descriptor.as_raw_fd(),
        };
        options.inherit_fd = given.iter().map(inherit).collect();
        Ok(given
            .into_iter()
            .map(|(_, descriptor)| descriptor)
            .collect())
    }
}
