//! What a checkpoint may contain, and how it is made, as runc's options have it.

use libc::CLONE_NEWNET;

use super::rpc::{self, Options};

/// Options that dump and restore have in common.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// Connections that stand are kept, of TCP and of unix sockets to processes outside.
    pub tcp_established: bool,
    pub unix_sockets: bool,
    /// Terminals and sessions of processes outside.
    pub shell_job: bool,
    pub file_locks: bool,
    /// Pages that are in later images, too, are taken out of earlier ones.
    pub auto_dedup: bool,
    /// The network namespace is made anew and left empty.
    pub empty_network: bool,
    pub cgroups: CgroupsMode,
    /// Memory stays where it is and is fetched when it is used.
    pub lazy_pages: bool,
}

/// What is done about control groups below the container's own, by CRIU's numbers.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum CgroupsMode {
    /// Those that are not there are made, with the settings that they had. The default.
    Soft = 3,
    /// All are given the settings that they had.
    Full = 4,
    /// None may be there.
    Strict = 5,
    /// Nothing: all processes come to be in the container's own group.
    Ignore = 0,
}

/// Where pages are sent to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PageServer {
    pub address: String,
    pub port: u16,
}

impl Allowed {
    pub(super) fn enter_into(&self, options: &mut Options) {
        options.tcp_established = Some(self.tcp_established);
        options.ext_unix_sk = Some(self.unix_sockets);
        options.shell_job = Some(self.shell_job);
        options.file_locks = Some(self.file_locks);
        options.auto_dedup = Some(self.auto_dedup);
        options.lazy_pages = Some(self.lazy_pages);
        options.empty_ns = self.empty_network.then_some(CLONE_NEWNET.unsigned_abs());
        options.manage_cgroups_mode = Some(self.cgroups.into());
    }
}

impl PageServer {
    pub(super) fn message(&self) -> rpc::PageServer {
        rpc::PageServer {
            address: Some(self.address.clone()),
            port: Some(i32::from(self.port)),
        }
    }
}
