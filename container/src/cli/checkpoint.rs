//! `checkpoint` and `restore`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use container::create::RestoreOptions;
use container::criu::{Allowed, CgroupsMode, DumpOptions, Images, PageServer, Source};
use container::log;
use container::process::copy_inherited;
use container::verbs;

use super::Global;
use super::create::{Attendance, Place};

/// What both have in common.
#[derive(Args, Debug)]
struct Common {
    /// Directory of the images
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory of CRIU's log; that of the images if not given
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Keep TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Keep unix sockets that are connected to processes outside
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow terminals and sessions of processes outside
    #[arg(long)]
    shell_job: bool,
    /// Keep file locks
    #[arg(long)]
    file_locks: bool,
    /// What is done about control groups below the container's
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Cgroups::Soft)]
    manage_cgroups_mode: Cgroups,
    /// Make a namespace anew, and leave it empty
    #[arg(long, value_enum, value_name = "KIND")]
    empty_ns: Vec<Namespace>,
    /// Take pages out of earlier images that are in later ones
    #[arg(long)]
    auto_dedup: bool,
    /// Leave memory where it is until it is used
    #[arg(long)]
    lazy_pages: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Cgroups {
    Soft,
    Full,
    Strict,
    Ignore,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Namespace {
    Network,
}

impl Common {
    fn images(&self) -> Images {
        Images {
            directory: self.image_path.clone(),
            work: self.work_path.clone(),
        }
    }

    fn allowed(&self) -> Allowed {
        Allowed {
            tcp_established: self.tcp_established,
            unix_sockets: self.ext_unix_sk,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            auto_dedup: self.auto_dedup,
            empty_network: !self.empty_ns.is_empty(),
            cgroups: match self.manage_cgroups_mode {
                Cgroups::Soft => CgroupsMode::Soft,
                Cgroups::Full => CgroupsMode::Full,
                Cgroups::Strict => CgroupsMode::Strict,
                Cgroups::Ignore => CgroupsMode::Ignore,
            },
            lazy_pages: self.lazy_pages,
        }
    }
}

#[derive(Args, Debug)]
pub(super) struct Checkpoint {
    #[command(flatten)]
    common: Common,
    /// Images of a pre-dump to build on, relative to those of this checkpoint
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Write only the memory, for a checkpoint to build on; the container goes on
    #[arg(long)]
    pre_dump: bool,
    /// Do not end and delete the container
    #[arg(long)]
    leave_running: bool,
    /// Give files a name that have none
    #[arg(long)]
    link_remap: bool,
    /// Leave out connections that are being made
    #[arg(long)]
    tcp_skip_in_flight: bool,
    /// Send the memory there, and not to the images
    #[arg(long, value_name = "ADDRESS:PORT")]
    page_server: Option<String>,
    /// Descriptor that gets a zero byte when pages can be fetched
    #[arg(long, value_name = "FD", requires = "lazy_pages")]
    status_fd: Option<i32>,
    /// Name of the container
    id: String,
}

#[derive(Args, Debug)]
pub(super) struct Restore {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    attendance: Attendance,
    /// Security label in place of the one that was dumped
    #[arg(long, value_name = "TYPE:NAME")]
    lsm_profile: Option<String>,
    /// Context of mounts in place of the one that was dumped
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
    /// Name of the container
    id: String,
}

impl Checkpoint {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let status = self.status_fd.map(|number| {
            copy_inherited(number).with_context(|| format!("--status-fd {number} is not open"))
        });
        let options = DumpOptions {
            images: self.common.images(),
            allowed: self.common.allowed(),
            pre_dump: self.pre_dump,
            parent: self.parent_path,
            leave_running: self.leave_running,
            link_remap: self.link_remap,
            tcp_skip_in_flight: self.tcp_skip_in_flight,
            page_server: self.page_server.as_deref().map(page_server).transpose()?,
            status: status.transpose()?,
        };
        let (root, criu) = (&global.root, global.criu.as_deref());
        let warnings = verbs::checkpoint::checkpoint(root, &self.id, criu, &options)?;
        warnings.iter().for_each(|warning| log::warn(warning));
        Ok(0)
    }
}

impl Restore {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let (place, mode) = (self.place, self.attendance.mode());
        let options = RestoreOptions {
            root: global.root.clone(),
            id: self.id,
            bundle: place.bundle,
            config: place.config,
            stdio: super::stdio(place.console_socket, !mode.detach),
            pid_file: place.pid_file,
            pidfd_socket: place.pidfd_socket,
            grouping: global.grouping(),
            from: Source {
                criu: global.criu.clone(),
                images: self.common.images(),
                allowed: self.common.allowed(),
                lsm_profile: self.lsm_profile,
                lsm_mount_context: self.lsm_mount_context,
            },
        };
        let exit = verbs::restore::restore(options, mode)?;
        Ok(exit.map_or(0, container::process::Exit::status))
    }
}

/// As runc has it: the address may be one of IPv6, in brackets or not.
fn page_server(text: &str) -> Result<PageServer> {
    let parsed = text.rsplit_once(':').and_then(|(address, port)| {
        let address = address.trim_start_matches('[').trim_end_matches(']');
        Some((address, port.parse().ok()?))
    });
    let (address, port) = parsed.with_context(|| {
        format!("--page-server `{text}`: it must be ADDRESS:PORT, as 192.0.2.1:1234")
    })?;
    ensure!(
        !address.is_empty(),
        "--page-server `{text}`: it has no address"
    );
    Ok(PageServer {
        address: address.to_owned(),
        port,
    })
}
