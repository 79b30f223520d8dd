//! A machine while it is put together: its buses, its interrupt lines, and what is behind them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::{MachineError, host, unrestorable};
use crate::assembly::{self, NewDevice, Surroundings};
use crate::bus::BusDevice;
use crate::console::Feed;
use crate::control::console::Console;
use crate::devices::boot_timer::{BootTimer, Start};
use crate::devices::guest_status::{GuestStatus, Reports};
use crate::devices::ioapic::IoApic;
use crate::devices::keyboard::KeyboardController;
use crate::devices::power::PowerRegisters;
use crate::devices::serial::{SerialPort, SerialPortState};
use crate::events::{EventLoop, event};
use crate::exit::ExitSwitch;
use crate::guest_status;
use crate::hotplug::Departures;
use crate::hotplug::slots::{self, SlotRegisters, Slots};
use crate::inventory::{Entry, Inventory, SharedInventory, lock};
use crate::kvm::{KernelRoutes, Vm};
use crate::layout;
use crate::pci::bus::PciBus;
use crate::plan::ConsolePlan;
use crate::signals;
use crate::spec::{Spec, Transport};
use crate::terminal::RawTerminal;
use crate::vcpu::Buses;
use crate::virtio::transport::Window;

/// What a machine with PCI has more.
pub(super) struct Pci {
    pub(super) bus: Arc<Mutex<PciBus>>,
    /// Which devices come and go.
    pub(super) slots: Arc<Slots>,
    pub(super) departures: Departures,
}

/// The machine while it is put together.
pub(super) struct Parts {
    vm: Arc<Vm>,
    pub(super) exit: ExitSwitch,
    pub(super) reports: Reports,
    pub(super) events: EventLoop,
    pub(super) buses: Buses,
    /// The devices' ends of the interrupt lines.
    lines: BTreeMap<u32, EventFd>,
    pub(super) inventory: SharedInventory,
    pub(super) pci: Option<Pci>,
}

impl Parts {
    /// Of a machine that is made from `spec`.
    pub(super) fn new(
        vm: Arc<Vm>,
        exit: ExitSwitch,
        reports: Reports,
        spec: Spec,
    ) -> Result<Self, MachineError> {
        let mut events = EventLoop::new(exit.clone()).map_err(host("make an event loop"))?;
        signals::end_machine(&mut events, &exit)?;
        let transport = spec.transport;
        let mut parts = Self {
            vm,
            events,
            exit,
            reports,
            buses: Buses::default(),
            lines: BTreeMap::new(),
            inventory: Arc::new(Mutex::new(Inventory::new(spec))),
            pci: None,
        };
        if transport == Transport::Pci {
            let line = parts.line(layout::HOTPLUG_GSI)?;
            parts.pci = Some(Pci {
                bus: Arc::new(Mutex::new(PciBus::new())),
                slots: Arc::new(Slots::new(line)),
                departures: Departures::default(),
            });
        }
        Ok(parts)
    }

    /// A new interrupt line: the device's end of it.
    pub(super) fn line(&mut self, gsi: u32) -> Result<EventFd, MachineError> {
        let ours = event().map_err(host("make an interrupt line"))?;
        let line = ours.try_clone().map_err(host("make an interrupt line"))?;
        self.lines.insert(gsi, ours);
        Ok(line)
    }

    fn add_port(&mut self, ports: Range<u64>, device: impl BusDevice + 'static) {
        self.buses.ports.insert(ports, Arc::new(Mutex::new(device)));
    }

    fn add_page(&mut self, address: u64, device: impl BusDevice + 'static) {
        let pages = address..address + layout::PAGE_BYTES;
        self.buses
            .memory
            .insert(pages, Arc::new(Mutex::new(device)));
    }

    pub(super) fn add_serial_port(
        &mut self,
        console: ConsolePlan,
        saved: Option<&SerialPortState>,
    ) -> Result<(Console, Option<RawTerminal>), MachineError> {
        let line = self.line(layout::SERIAL_GSI)?;
        let mut port = match saved {
            None => SerialPort::new(line, console.output),
            Some(state) => {
                let port = SerialPort::restored(line, console.output, state);
                port.map_err(unrestorable("serial port"))?
            }
        };
        let source = self.events.reserve();
        let mut terminal = None;
        if let Some(input) = console.input {
            terminal = RawTerminal::new(&input).map_err(host("set the terminal up"))?;
            port.connect(input, self.events.poller(), source)
                .map_err(host("wait for input"))?;
        }
        let port = Arc::new(Mutex::new(port));
        self.events.attach(source, port.clone());
        let ports = layout::SERIAL_PORT..layout::SERIAL_PORT + layout::SERIAL_PORTS;
        self.buses.ports.insert(ports, port.clone());
        let console = Console {
            port,
            feed: Feed::new().map_err(host("make an event"))?,
            poller: self.events.poller(),
            source,
        };
        Ok((console, terminal))
    }

    /// All ways in which a guest ends or is asked to end. Returns the power button's line.
    pub(super) fn add_power(&mut self) -> Result<EventFd, MachineError> {
        let power_button = self.line(layout::POWER_BUTTON_GSI)?;
        let exit = self.exit.clone();
        let ports = layout::POWER_PORT..layout::POWER_PORT + layout::POWER_PORTS;
        self.add_port(ports, PowerRegisters::new(exit.clone()));
        let ports = layout::KEYBOARD_PORT..layout::KEYBOARD_PORT + 1;
        self.add_port(ports, KeyboardController::new(exit));
        let ports = u64::from(guest_status::PORT)..u64::from(guest_status::PORT) + 4;
        self.add_port(ports, GuestStatus::new(self.reports.clone()));
        Ok(power_button)
    }

    pub(super) fn add_boot_timer(&mut self, start: Option<Start>) {
        if let Some(start) = start {
            self.add_page(layout::BOOT_TIMER, BootTimer::new(start));
        }
    }

    /// Puts devices at their places.
    pub(super) fn add_all_virtio(
        &mut self,
        devices: Vec<NewDevice>,
        windows: &[Window],
    ) -> Result<(), MachineError> {
        for (device, window) in devices.into_iter().zip(windows) {
            let fast = device.device.is_fast();
            let line = match self.pci {
                None => Some(self.line(window.gsi)?),
                Some(_) => None,
            };
            let entry = self.add_virtio(device, *window, line, fast)?;
            match (&self.pci, &entry.function) {
                (Some(pci), Some(function)) => {
                    let mut bus = pci.bus.lock().expect("nothing panics in here");
                    bus.insert(window.gsi, function.clone());
                }
                _ => {
                    let registers = window.address..window.address + layout::VIRTIO_BYTES;
                    let shared = Mutex::new(entry.transport.clone());
                    self.buses.memory.insert(registers, Arc::new(shared));
                }
            }
            lock(&self.inventory).push(entry);
        }
        Ok(())
    }

    fn add_virtio(
        &mut self,
        device: NewDevice,
        window: Window,
        line: Option<EventFd>,
        fast: bool,
    ) -> Result<Entry, MachineError> {
        let events = if fast {
            let branch = self.events.branch(&device.name);
            branch.map_err(host("make an event loop"))?
        } else {
            &mut self.events
        };
        let thread = match (fast, &line) {
            // It may be gone before the machine is.
            (true, None) => Some(events.stopper().map_err(host("make an event"))?),
            _ => None,
        };
        let surroundings = Surroundings {
            vm: &self.vm,
            exit: &self.exit,
        };
        let entry = match line {
            Some(line) => assembly::registers(&surroundings, events, device, window, line),
            None => assembly::function(&surroundings, events, device, window),
        }?;
        Ok(Entry { thread, ..entry })
    }

    /// Which devices come and go, if there is PCI.
    pub(super) fn slots(&self) -> Option<Arc<Slots>> {
        self.pci.as_ref().map(|pci| pci.slots.clone())
    }

    /// Joins all lines to the I/O APIC: the last part.
    pub(super) fn finish(&mut self) -> Arc<Mutex<IoApic<KernelRoutes>>> {
        let lines = std::mem::take(&mut self.lines);
        let routes = KernelRoutes::new(self.vm.clone(), lines, self.exit.clone());
        let chip = Arc::new(Mutex::new(IoApic::new(routes)));
        if let Some(pci) = &self.pci {
            self.buses.memory.insert(PciBus::range(), pci.bus.clone());
            let leave = pci
                .departures
                .leave(self.inventory.clone(), pci.bus.clone());
            let registers = SlotRegisters::new(pci.slots.clone(), leave);
            let ports = layout::HOTPLUG_PORT..layout::HOTPLUG_PORT + slots::REGISTER_BYTES;
            self.add_port(ports, registers);
        }
        let page = layout::IOAPIC..layout::IOAPIC + layout::PAGE_BYTES;
        self.buses.memory.insert(page, chip.clone());
        chip
    }
}
