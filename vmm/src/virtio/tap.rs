//! A tap interface of the host: the other end of a network device's cable.
//!
//! UNSAFETY: tap interfaces are set up by ioctls, which nix only wraps as unsafe functions.
#![expect(unsafe_code, reason = "tap interfaces are set up by ioctls")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;

/// Where tap interfaces are attached to.
const TUN_DEVICE: &str = "/dev/net/tun";

/// The length of `struct virtio_net_hdr_v1`, in bytes.
pub(crate) const HEADER_BYTES: usize = 12;

/// Frames (not packets), without a protocol header of the tap's own, with a virtio header.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

nix::ioctl_readwrite_bad!(set_interface, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(set_offload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
nix::ioctl_read_bad!(get_interface, libc::TUNGETIFF, libc::ifreq);

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("`{name}` is not a possible name of an interface")]
    Name { name: String },
    #[error("There is no interface `{name}`")]
    Missing { name: String, source: Errno },
    #[error("/dev/net/tun cannot be opened")]
    Device(#[source] io::Error),
    #[error("The interface `{name}` cannot be attached to; it may be in use, or not a tap")]
    Attach { name: String, source: Errno },
    #[error("The descriptor is not one of a tap")]
    NotTap(#[source] Errno),
    #[error("The descriptor's tap must have the flags IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags,
    #[error("The tap cannot be set up: {action}")]
    SetUp { action: &'static str, source: Errno },
}

/// An attached tap interface.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Attaches to the interface `name`, which must exist.
    pub fn open(name: &str) -> Result<Tap, TapError> {
        let bad_name = || TapError::Name { name: name.into() };
        let mut request = empty_request();
        // One byte is left for the terminator.
        if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains(['\0', '/']) {
            return Err(bad_name());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        // TUNSETIFF would make an interface that leads nowhere.
        if_nametoindex(name).map_err(|source| TapError::Missing {
            name: name.into(),
            source,
        })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN_DEVICE)
            .map_err(TapError::Device)?;
        request.ifr_ifru.ifru_flags = short(FLAGS);
        // SAFETY: TUNSETIFF reads and writes an ifreq.
        unsafe { set_interface(file.as_raw_fd(), &raw mut request) }.map_err(|source| {
            TapError::Attach {
                name: name.into(),
                source,
            }
        })?;
        Tap { file }.set_up()
    }

    /// Takes over a descriptor of an interface that someone else has attached to. It is made
    /// non-blocking: a tap's frames are for one reader only, so nobody else can be using it.
    pub fn from_fd(fd: OwnedFd) -> Result<Tap, TapError> {
        let mut request = empty_request();
        // SAFETY: TUNGETIFF writes an ifreq.
        unsafe { get_interface(fd.as_raw_fd(), &raw mut request) }.map_err(TapError::NotTap)?;
        // SAFETY: TUNGETIFF fills in the flags; any bits are a valid number.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & FLAGS != FLAGS {
            return Err(TapError::Flags);
        }
        let set_up = |source| TapError::SetUp {
            action: "make it non-blocking",
            source,
        };
        let status = fcntl(&fd, FcntlArg::F_GETFL).map_err(set_up)?;
        let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(status)).map_err(set_up)?;
        Tap { file: fd.into() }.set_up()
    }

    fn set_up(self) -> Result<Tap, TapError> {
        let bytes = libc::c_int::try_from(HEADER_BYTES).unwrap_or_default();
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        unsafe { set_header_size(self.file.as_raw_fd(), &raw const bytes) }.map_err(|source| {
            TapError::SetUp {
                action: "set the length of the virtio header",
                source,
            }
        })?;
        Ok(self)
    }

    /// Says what the reader of frames can do by itself: TUN_F bits.
    pub(crate) fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        let offloads = libc::c_int::try_from(offloads).unwrap_or_default();
        // SAFETY: TUNSETOFFLOAD takes a number.
        unsafe { set_offload(self.file.as_raw_fd(), offloads) }?;
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn empty_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

/// The flags of a request are 16 bits wide.
fn short(flags: i32) -> i16 {
    i16::try_from(flags).unwrap_or_default()
}
