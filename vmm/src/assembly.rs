//! Makes virtio devices of what was planned, and puts each together with its transport and its place in
//! the machine: for the list of devices that a machine begins with, and for those that come later.

use std::io;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::events::EventLoop;
use crate::exit::ExitSwitch;
use crate::fair_mutex::FairMutex;
use crate::inventory::{Entry, Handle};
use crate::kvm::Vm;
use crate::plan::{DiskPlan, ListenPlan, NetPlan, TapPlan, VsockPlan};
use crate::platform::{DevicePlatform, Wiring};
use crate::virtio::VirtioDevice;
use crate::virtio::block::{Block, BlockError, BlockOptions};
use crate::virtio::net::Net;
use crate::virtio::net::vhost::{VhostError, VhostNet};
use crate::virtio::pci::interrupts::Interrupts;
use crate::virtio::pci::{Place, VirtioFunction};
use crate::virtio::tap::{Tap, TapError};
use crate::virtio::transport::{Transport, Window};
use crate::virtio::vsock::{Vsock, VsockError, VsockHost};

/// Why a virtio device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSetupError {
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Vhost(#[from] VhostError),
    #[error("its socket cannot be listened on")]
    Listen(#[source] io::Error),
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error("its event cannot be made")]
    Event(#[source] Errno),
}

/// Why a device does not become part of a machine.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    #[error("device `{name}` cannot be made")]
    Device {
        name: String,
        source: DeviceSetupError,
    },
    #[error("device `{name}` asks for queues that cannot be")]
    Queues {
        name: String,
        source: virtio_queue::Error,
    },
}

/// A device before it has a place.
pub struct NewDevice {
    pub name: String,
    pub device: Box<dyn VirtioDevice>,
    pub handle: Handle,
}

opaque_debug!(NewDevice);

/// What devices become part of.
#[derive(Debug)]
pub struct Surroundings<'a> {
    pub vm: &'a Arc<Vm>,
    pub exit: &'a ExitSwitch,
}

/// The disk of `plan`.
pub fn disk(plan: DiskPlan) -> Result<NewDevice, DeviceSetupError> {
    let options = BlockOptions {
        read_only: plan.read_only,
        serial: plan.serial,
        limits: plan.limits,
    };
    let block = Block::open(plan.top, plan.backing, options)?;
    Ok(NewDevice {
        name: plan.name,
        handle: Handle::Disk(block.handle()),
        device: Box::new(block),
    })
}

/// The network interface of `plan`.
pub fn net(plan: NetPlan) -> Result<NewDevice, DeviceSetupError> {
    let tap = match plan.tap {
        TapPlan::Name(name) => Tap::open(&name)?,
        TapPlan::Open(descriptor) => Tap::from_fd(descriptor)?,
    };
    if let Some(device) = plan.vhost {
        return Ok(NewDevice {
            name: plan.name,
            device: Box::new(VhostNet::new(device, tap, plan.mac, plan.mtu)?),
            handle: Handle::Other,
        });
    }
    let net = Net::new(tap, plan.mac).map_err(DeviceSetupError::Event)?;
    let net = net.with_mtu(plan.mtu);
    net.handle().set_limits(plan.limits);
    Ok(NewDevice {
        name: plan.name,
        handle: Handle::Net(net.handle()),
        device: Box::new(net),
    })
}

/// The vsock device of `plan`.
pub fn vsock(plan: VsockPlan) -> Result<Vsock, DeviceSetupError> {
    let host = match plan.listen {
        ListenPlan::Path(path) => VsockHost::bind(&path),
        ListenPlan::Open(listener) => VsockHost::inherited(listener),
    };
    let host = host.map_err(DeviceSetupError::Listen)?;
    Ok(Vsock::new(plan.cid, host, plan.streams)?)
}

/// A device whose registers are in memory, served by `events`.
pub fn registers(
    machine: &Surroundings<'_>,
    events: &mut EventLoop,
    new: NewDevice,
    window: Window,
    line: EventFd,
) -> Result<Entry, AssemblyError> {
    let wiring = Wiring::Registers { window, line };
    join(machine, events, new, window, wiring)
}

/// A device that is a function on PCI, served by `events`.
pub fn function(
    machine: &Surroundings<'_>,
    events: &mut EventLoop,
    new: NewDevice,
    window: Window,
) -> Result<Entry, AssemblyError> {
    let queues = new.device.info().queue_sizes.len();
    let interrupts = Interrupts::new(queues, Box::new(machine.vm.clone()));
    let (interrupts, place) = (Arc::new(Mutex::new(interrupts)), Place::default());
    let wiring = Wiring::Function {
        interrupts: interrupts.clone(),
        place: place.clone(),
    };
    let mut entry = join(machine, events, new, window, wiring)?;
    let transport = entry.transport.clone();
    let function = VirtioFunction::new(window.address, transport, interrupts, place);
    entry.function = Some(Arc::new(Mutex::new(function)));
    Ok(entry)
}

fn join(
    machine: &Surroundings<'_>,
    events: &mut EventLoop,
    new: NewDevice,
    window: Window,
    wiring: Wiring,
) -> Result<Entry, AssemblyError> {
    let source = events.reserve();
    let platform = DevicePlatform::new(
        machine.vm.clone(),
        events.poller(),
        machine.exit.clone(),
        wiring,
        source,
    );
    let memory = machine.vm.memory().clone();
    let platform = Box::new(platform);
    let transport = Transport::new(new.name.clone(), new.device, memory, platform);
    let transport = transport.map_err(|source| AssemblyError::Queues {
        name: new.name.clone(),
        source,
    })?;
    let counters = transport.counters().clone();
    let transport = Arc::new(FairMutex::new(transport));
    events.attach(source, transport.clone());
    Ok(Entry {
        name: new.name,
        window,
        transport,
        counters,
        function: None,
        handle: new.handle,
        thread: None,
        ticket: 0,
    })
}
