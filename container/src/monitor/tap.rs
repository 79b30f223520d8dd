//! Attaches to a tap interface (Documentation/networking/tuntap.rst).
//!
//! UNSAFETY: the request TUNSETIFF reads and writes one `struct ifreq`, which lives on the stack
//! during the call.
#![expect(
    unsafe_code,
    reason = "ioctl(2) takes a pointer whose type depends on the request"
)]

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
};

use nix::net::if_::if_nametoindex;

/// `_IOW('T', 202, int)`
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// Opens the persistent tap `name` of the caller's network namespace, without copying frames
/// through a header of its own and with virtio's.
///
/// # Errors
///
/// If there is no such interface (the kernel would make one), it is no tap, or is in use.
pub(super) fn open(name: &str) -> io::Result<File> {
    if_nametoindex(name)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(flags).map_err(io::Error::other)?,
        },
    };
    // One byte stays zero. A longer name has no index and does not get here.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from.cast_signed();
    }
    // SAFETY: TUNSETIFF takes a pointer to a `struct ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
