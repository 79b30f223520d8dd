//! Makes the tap that a virtual machine's NIC is joined to.
//!
//! A tap can only be made by an ioctl on /dev/net/tun: the kernel refuses it over netlink.
//!
//! UNSAFETY: three ioctls of the tun driver. One takes a pointer to an `ifreq`, the others a number;
//! the kernel keeps none of them after the call.
#![expect(unsafe_code, reason = "taps are made by ioctl")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::{ioctl_write_int_bad, ioctl_write_ptr_bad, request_code_write};

use super::error::NetworkError;

const TUN: u8 = b'T';

ioctl_write_ptr_bad!(
    tun_set_iff,
    request_code_write!(TUN, 202, size_of::<libc::c_int>()),
    libc::ifreq
);
ioctl_write_int_bad!(
    tun_set_persist,
    request_code_write!(TUN, 203, size_of::<libc::c_int>())
);
ioctl_write_int_bad!(
    tun_set_owner,
    request_code_write!(TUN, 204, size_of::<libc::c_int>())
);

/// Makes a tap that stays when nobody has it open, in the calling thread's network namespace.
///
/// It has one queue, whole Ethernet frames and a virtio-net header. `owner` may open it without
/// CAP_NET_ADMIN; without an owner only a process with that capability may.
pub(super) fn create(name: &str, owner: Option<u32>) -> Result<(), NetworkError> {
    let path = "/dev/net/tun";
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| NetworkError::Path {
            action: "open",
            path: path.into(),
            source,
        })?;
    let request = request(name)?;
    // SAFETY: `request` is a whole `ifreq` that lives through the call, which only reads it.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }.map_err(host("make a tap"))?;
    if let Some(uid) = owner {
        let uid = uid.cast_signed();
        // SAFETY: the argument is a number.
        unsafe { tun_set_owner(tun.as_raw_fd(), uid) }.map_err(host("set the owner of a tap"))?;
    }
    // SAFETY: the argument is a number.
    unsafe { tun_set_persist(tun.as_raw_fd(), 1) }.map_err(host("make a tap persistent"))?;
    Ok(())
}

fn request(name: &str) -> Result<libc::ifreq, NetworkError> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    if name.len() >= ifr_name.len() {
        return Err(host("name a tap")(nix::Error::ENAMETOOLONG));
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let ifru_flags = i16::try_from(flags).expect("three flags of the lower 15 bits");
    Ok(libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags },
    })
}

fn host(action: &'static str) -> impl FnOnce(nix::Error) -> NetworkError {
    move |errno| NetworkError::Host {
        action,
        source: io::Error::from(errno),
    }
}
