//! Moves network devices into the container's network namespace (`linux.netDevices`), and back if the
//! container does not come to be.
//!
//! At the end of a container nothing is done: with the namespace the kernel ends its virtual devices,
//! and gives the others back to the first namespace.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_route::address::{AddressHeaderFlags, AddressMessage, AddressScope};

use crate::netlink::{Device, Netlink};
use crate::plan::namespaces::{Kind, NamespacePlan};
use crate::plan::network::NetworkDevicePlan;

/// Why a device was not moved.
#[derive(Debug, thiserror::Error)]
pub enum NetworkDeviceError {
    #[error("config.json: {field}: cannot {step}")]
    Step {
        field: String,
        step: &'static str,
        source: io::Error,
    },
    #[error("config.json: {field}.name: the container's network namespace has a `{name}` already")]
    Exists { field: String, name: String },
    #[error("cannot reach the container's network namespace")]
    Namespace(#[source] io::Error),
}

/// Devices that were moved; they go back when this is dropped, unless [`Moved::keep`] is called.
pub(crate) struct Moved {
    outside: Netlink,
    inside: Netlink,
    home: OwnedFd,
    devices: Vec<MovedDevice>,
}

struct MovedDevice {
    /// As it was.
    device: Device,
    addresses: Vec<AddressMessage>,
    index_inside: u32,
}

/// Moves the devices into the network namespace of the first process, which is in all namespaces that
/// are made for it. The caller has a single thread.
pub(crate) fn attach(
    devices: &[NetworkDevicePlan],
    namespaces: &NamespacePlan,
    pid: i32,
) -> Result<Option<Moved>, NetworkDeviceError> {
    if devices.is_empty() {
        return Ok(None);
    }
    let open = || -> io::Result<(OwnedFd, Moved)> {
        let target = match namespaces.joined(Kind::NETWORK) {
            Some(joined) => joined.try_clone()?,
            None => std::fs::File::open(format!("/proc/{pid}/ns/net"))?.into(),
        };
        let moved = Moved {
            outside: Netlink::open()?,
            inside: Netlink::open_in(target.as_fd())?,
            home: std::fs::File::open("/proc/self/ns/net")?.into(),
            devices: Vec::new(),
        };
        Ok((target, moved))
    };
    let (target, mut moved) = open().map_err(NetworkDeviceError::Namespace)?;
    for device in devices {
        moved.attach(device, target.as_fd())?;
    }
    Ok(Some(moved))
}

impl Moved {
    fn attach(
        &mut self,
        plan: &NetworkDevicePlan,
        target: BorrowedFd<'_>,
    ) -> Result<(), NetworkDeviceError> {
        let step = |step| {
            let field = plan.field.clone();
            move |source| NetworkDeviceError::Step {
                field,
                step,
                source,
            }
        };
        let device = self.outside.device(&plan.name);
        let device = device.map_err(step("find the network device"))?;
        let before = self.inside.devices();
        let before = before.map_err(step("list the container's network devices"))?;
        if before.iter().any(|other| other.name == plan.name_inside) {
            return Err(NetworkDeviceError::Exists {
                field: plan.field.clone(),
                name: plan.name_inside.clone(),
            });
        }
        let addresses = self.outside.addresses(device.index);
        let mut addresses = addresses.map_err(step("read the addresses"))?;
        addresses.retain(is_kept);
        self.outside
            .move_device(device.index, target, &plan.name_inside)
            .map_err(step("move the network device"))?;
        // Its number may be another one there.
        let after = self.inside.devices();
        let after = after.map_err(step("list the container's network devices"))?;
        let inside = after
            .iter()
            .find(|now| before.iter().all(|then| then.index != now.index));
        let inside = inside
            .ok_or_else(|| rustix::io::Errno::NODEV.into())
            .map_err(step("find the network device again"))?;
        let index = inside.index;
        self.devices.push(MovedDevice {
            device,
            addresses: addresses.clone(),
            index_inside: index,
        });
        for address in addresses {
            let added = self.inside.add_address(address, index);
            added.map_err(step("set an address"))?;
        }
        self.inside
            .set_up(index)
            .map_err(step("set the network device up"))
    }

    /// The container exists: they stay.
    pub(crate) fn keep(mut self) {
        self.devices.clear();
    }

    fn give_back(&self, moved: &MovedDevice) -> io::Result<()> {
        let name = &moved.device.name;
        self.inside
            .move_device(moved.index_inside, self.home.as_fd(), name)?;
        let index = self.outside.device(name)?.index;
        for address in &moved.addresses {
            self.outside.add_address(address.clone(), index)?;
        }
        if moved.device.up {
            self.outside.set_up(index)?;
        }
        Ok(())
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        for moved in self.devices.drain(..).collect::<Vec<_>>().iter().rev() {
            // What is reported is why the container did not come to be.
            let _ = self.give_back(moved);
        }
    }
}

/// Addresses that were set, and hold beyond the link: the kernel makes the others anew.
fn is_kept(address: &AddressMessage) -> bool {
    address.header.scope == AddressScope::Universe
        && address.header.flags.contains(AddressHeaderFlags::Permanent)
}
