//! Has a running container written to files.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;

use super::rpc::{Kind, Options, Request};
use super::streams::Streams;
use super::worker::{Place, Served, Worker};
use super::{Allowed, Criu, CriuError, Images, OpenImages, PageServer, options, outside};
use crate::cgroup::Cgroup;

/// In the work directory.
const LOG: &str = "dump.log";

/// How to make a checkpoint.
#[derive(Debug)]
pub struct DumpOptions {
    pub images: Images,
    pub allowed: Allowed,
    /// Only the memory: the container goes on, and a later checkpoint with this as its parent has
    /// less to write.
    pub pre_dump: bool,
    /// The images of a pre-dump, relative to the directory of the images.
    pub parent: Option<PathBuf>,
    /// The container goes on.
    pub leave_running: bool,
    /// Files without a name get one.
    pub link_remap: bool,
    /// Connections that are being made are left out.
    pub tcp_skip_in_flight: bool,
    /// Where the memory goes, in place of the images.
    pub page_server: Option<PageServer>,
    /// Gets a zero byte when pages can be fetched.
    pub status: Option<OwnedFd>,
}

/// A container that is to be dumped.
#[derive(Debug)]
pub(crate) struct Dump<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) annotations: &'a BTreeMap<String, String>,
    pub(crate) rootfs: &'a Path,
    pub(crate) pid: i32,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) options: &'a DumpOptions,
}

impl Dump<'_> {
    /// # Errors
    /// Those of [`CriuError`]; the container goes on then.
    pub(crate) fn run(&self, criu: &Criu) -> Result<(), CriuError> {
        outside::refuse(self.spec)?;
        let DumpOptions {
            images, allowed, ..
        } = self.options;
        let images = images.open(true, LOG)?;
        self.check_parent()?;
        let mut options = options(criu, &images, allowed, self.annotations);
        self.describe(&mut options).map_err(CriuError::step(
            "find out what the container uses of the host",
        ))?;
        let kind = if self.options.pre_dump {
            Kind::PreDump
        } else {
            let streams = self.streams(&images, &mut options);
            streams.map_err(CriuError::step("find out about the standard streams"))?;
            Kind::Dump
        };
        let request = Request {
            kind: kind.into(),
            options: Some(options),
            notify_success: None,
        };
        let descriptors: Vec<BorrowedFd<'_>> = images.descriptors().collect();
        let place = Place {
            descriptors: &descriptors,
            ..Place::HERE
        };
        let worker = Worker::start(&criu.program, place)?;
        let served = worker.serve(
            &request,
            &mut |notification, _| match &self.options.status {
                Some(status) if notification.script() == "status-ready" => {
                    rustix::io::write(status, &[0]).map(drop)
                }
                _ => Ok(()),
            },
        );
        match served {
            Ok(response) if response.success => Ok(()),
            Ok(_) => Err(images.failure("checkpoint")),
            Err(Served::Criu(error)) => Err(error),
            Err(Served::Caller(error)) => {
                Err(CriuError::step("write to the status descriptor")(error))
            }
        }
    }

    /// CRIU would take a path that leads nowhere for a dump without a parent.
    fn check_parent(&self) -> Result<(), CriuError> {
        let Some(parent) = &self.options.parent else {
            return Ok(());
        };
        let is_relative = parent
            .components()
            .all(|part| !matches!(part, Component::RootDir | Component::Prefix(_)));
        let path = self.options.images.directory.join(parent);
        let source = match (is_relative, path.is_dir()) {
            (true, true) => return Ok(()),
            (false, _) => io::Error::other("it must be relative to --image-path, as `../pre-dump`"),
            (true, false) => io::Error::other("it is no directory; it is relative to --image-path"),
        };
        Err(CriuError::Directory {
            path: parent.clone(),
            source,
        })
    }

    fn describe(&self, options: &mut Options) -> io::Result<()> {
        options.pid = Some(self.pid);
        options.root = Some(self.rootfs.display().to_string());
        options.leave_running = Some(self.options.leave_running);
        options.link_remap = Some(self.options.link_remap);
        options.tcp_skip_in_flight = Some(self.options.tcp_skip_in_flight);
        let freezer = Some(self.cgroup.freezer_path()).filter(|path| path.is_dir());
        options.freeze_cgroup = freezer.map(|path| path.display().to_string());
        options.page_server = self.options.page_server.as_ref().map(PageServer::message);
        if let Some(parent) = &self.options.parent {
            options.parent_img = Some(parent.display().to_string());
        }
        if self.options.parent.is_some() || self.options.pre_dump {
            options.track_mem = Some(true);
        }
        options.external = outside::namespaces(self.spec, self.pid)?;
        if !self.options.pre_dump {
            options
                .external
                .extend(outside::mounts(self.spec, self.cgroup, self.pid)?);
        }
        Ok(())
    }

    fn streams(&self, images: &OpenImages, options: &mut Options) -> io::Result<()> {
        let streams = Streams::of(self.pid)?;
        options.external.extend(streams.external());
        streams.write(images)
    }
}
