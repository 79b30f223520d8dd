//! The virtual machine as the kernel sees it: memory, interrupt routes, kicks, virtual processors.
//! Nothing here knows a device.
//!
//! The order matters (each late memory slot, and each ioeventfd or in-kernel interrupt chip, costs
//! milliseconds of waiting in the kernel): memory first, no timer chip, local APICs in the kernel
//! but no I/O APIC, and ioeventfds only once a driver is there.
//!
//! UNSAFETY: KVM is told about memory by raw address, and a signal handler writes to the page that
//! KVM shares with a virtual processor. Both addresses stay in this module.
#![expect(
    unsafe_code,
    reason = "KVM takes raw addresses, and a signal handler has to reach its thread's processor"
)]

mod extended;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MEM_LOG_DIRTY_PAGES,
    KvmIrqRouting, kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

pub use self::extended::{extended_state, set_extended_state};
use crate::devices::ioapic::{Message, Routes};
use crate::dirty;
use crate::exit::ExitSwitch;
use crate::layout;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("KVM speaks version {found} of its interface, not {KVM_API_VERSION}")]
    Version { found: i32 },
    #[error("cannot keep /dev/kvm open")]
    Descriptor(#[source] io::Error),
    #[error("KVM lacks {0:?}; the host's kernel is too old")]
    Missing(Cap),
    #[error("KVM cannot {action}")]
    Call {
        /// What was attempted.
        action: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("cannot set up the signal that stops a virtual processor")]
    Signal(#[source] kvm_ioctls::Error),
}

fn refused(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { action, source }
}

/// What a host's kernel must offer.
const CAPABILITIES: &[Cap] = &[
    Cap::UserMemory,
    Cap::SplitIrqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::ImmediateExit,
    Cap::SignalMsi,
    Cap::ExtCpuid,
    Cap::MpState,
];

/// The kernel's virtual machines, by a descriptor of /dev/kvm.
pub fn open(device: &File) -> Result<Kvm, KvmError> {
    permit_tiles();
    let descriptor = device
        .try_clone()
        .map_err(KvmError::Descriptor)?
        .into_raw_fd();
    // SAFETY: the descriptor was just made and belongs to nobody else. If it is not /dev/kvm, calls
    // fail, which `Vm::new` is the first to see.
    Ok(unsafe { Kvm::from_raw_fd(descriptor) })
}

/// Asks for guests what processors with tile registers want to be asked for.
///
/// Without it, kernels before 6.4 tell of tiles and then refuse them to the guest. Kernels and
/// processors that know nothing of it refuse, and nothing is lost.
fn permit_tiles() {
    const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: sets what future virtual processors of this process may have; touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, TILE_DATA) };
}

/// A virtual machine. Dropping it stops everything in it.
pub struct Vm {
    // Field order is drop order: the machine goes before its memory.
    fd: VmFd,
    memory: GuestMemoryMmap,
}

impl Vm {
    /// A machine with `memory` and with local APICs, but no processor yet. The kernel remembers
    /// what guests write in regions that are `tracked`, for which it maps them in small pages.
    pub fn new(kvm: &Kvm, memory: GuestMemoryMmap, tracked: &[bool]) -> Result<Self, KvmError> {
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(KvmError::Version { found });
        }
        for capability in CAPABILITIES {
            if !kvm.check_extension(*capability) {
                return Err(KvmError::Missing(*capability));
            }
        }
        let fd = create(kvm)?;
        fd.set_tss_address(layout::TSS)
            .map_err(refused("place the task state segment"))?;
        let vm = Self { fd, memory };
        if tracked.contains(&true) {
            let regions = vm.memory.iter().zip(tracked);
            dirty::track(regions.filter(|(_, tracked)| **tracked).map(|(region, _)| {
                let start = region.as_ptr();
                (start.addr(), region.size())
            }));
        }
        vm.map_memory(tracked)?;
        vm.fd
            .enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_SPLIT_IRQCHIP,
                args: [layout::PINS.into(), 0, 0, 0],
                ..Default::default()
            })
            .map_err(refused("keep the I/O APIC out of the kernel"))?;
        Ok(vm)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn map_memory(&self, tracked: &[bool]) -> Result<(), KvmError> {
        for ((slot, region), tracked) in (0..).zip(self.memory.iter()).zip(tracked) {
            let flags = if *tracked { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            let start = region
                .get_host_address(MemoryRegionAddress(0))
                .expect("a region is not empty");
            let description = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: vm_memory::Address::raw_value(&region.start_addr()),
                memory_size: region.len(),
                userspace_addr: start.expose_provenance() as u64,
            };
            // SAFETY: the range is one whole mapping of `self.memory`, which is never remapped and
            // outlives `self.fd` (see the field order), so the guest only ever reaches live memory
            // that Rust accesses through volatile operations alone.
            unsafe { self.fd.set_user_memory_region(description) }
                .map_err(refused("map memory"))?;
        }
        Ok(())
    }

    /// What guests have written of region `index` of the memory since the last call: a bit for each
    /// page of 4 KiB. Only if it was made to be tracked.
    pub fn take_dirty(&self, index: usize, bytes: usize) -> Result<Vec<u64>, KvmError> {
        let slot = u32::try_from(index).expect("a few regions");
        self.fd
            .get_dirty_log(slot, bytes)
            .map_err(refused("tell which memory was written"))
    }

    /// The guest's clock, in nanoseconds.
    pub fn clock(&self) -> Result<u64, KvmError> {
        let clock = self.fd.get_clock().map_err(refused("tell the clock"))?;
        Ok(clock.clock)
    }

    /// Sets the guest's clock.
    pub fn set_clock(&self, nanoseconds: u64) -> Result<(), KvmError> {
        self.fd
            .set_clock(&kvm_clock_data {
                clock: nanoseconds,
                ..Default::default()
            })
            .map_err(refused("set the clock"))
    }

    /// A processor with local APIC number `id`, switched off if it is not the first.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(id.into())
            .map_err(refused("create a virtual processor"))
    }

    /// From now on a guest's 32-bit write of `value` to `address`, or any write without one, writes
    /// to `event` instead of coming out of the processor.
    pub fn add_kick(&self, event: &EventFd, address: u64, value: Option<u32>) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        let added = match value {
            Some(value) => self.fd.register_ioevent(event, &address, value),
            None => self.fd.register_ioevent(event, &address, NoDatamatch),
        };
        added.map_err(Into::into)
    }

    /// The opposite of [`add_kick`](Self::add_kick), with the same arguments.
    pub fn remove_kick(&self, event: &EventFd, address: u64, value: Option<u32>) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        let removed = match value {
            Some(value) => self.fd.unregister_ioevent(event, &address, value),
            None => self.fd.unregister_ioevent(event, &address, NoDatamatch),
        };
        removed.map_err(Into::into)
    }

    /// Sends an interrupt to processors. One that the guest has addressed to nobody is lost.
    pub fn send_message(&self, message: Message) {
        // The kernel takes whatever is written, and says whether it has reached anybody.
        let _ = self.fd.signal_msi(kvm_msi {
            address_lo: message.address,
            data: message.data,
            ..Default::default()
        });
    }
}

opaque_debug!(Vm);

/// Creating a machine takes so long that a signal may come in between.
fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(refused("create a machine")),
        }
    }
}

/// Interrupt lines that end in messages to local APICs, sent by the kernel.
pub struct KernelRoutes {
    vm: Arc<Vm>,
    exit: ExitSwitch,
    /// The devices' ends of the lines that are in use.
    lines: BTreeMap<u32, EventFd>,
    messages: BTreeMap<u32, Message>,
}

opaque_debug!(KernelRoutes);

impl KernelRoutes {
    /// Of a machine whose devices signal through `lines`, by pin. A failure throws `exit`.
    pub fn new(vm: Arc<Vm>, lines: BTreeMap<u32, EventFd>, exit: ExitSwitch) -> Self {
        Self {
            vm,
            exit,
            lines,
            messages: BTreeMap::new(),
        }
    }

    fn try_set(&mut self, pin: u32, message: Option<Message>) -> Result<(), KvmError> {
        let Some(line) = self.lines.get(&pin) else {
            return Ok(());
        };
        let Some(message) = message else {
            // The kernel leaves what the device signals in the eventfd, and sends it once the
            // line is connected again.
            self.messages.remove(&pin);
            return self
                .vm
                .fd
                .unregister_irqfd(line, pin)
                .map_err(refused("disconnect an interrupt line"));
        };
        let connected = self.messages.insert(pin, message).is_some();
        let mut entries = Vec::new();
        for (pin, message) in &self.messages {
            entries.push(entry(*pin, *message));
        }
        let table = KvmIrqRouting::from_entries(&entries).expect("at most one for each pin");
        self.vm
            .fd
            .set_gsi_routing(&table)
            .map_err(refused("route interrupts"))?;
        if !connected {
            self.vm
                .fd
                .register_irqfd(line, pin)
                .map_err(refused("connect an interrupt line"))?;
        }
        Ok(())
    }
}

impl Routes for KernelRoutes {
    fn set(&mut self, pin: u32, message: Option<Message>) {
        if let Err(error) = self.try_set(pin, message) {
            self.exit.fail(&error);
        }
    }
}

fn entry(pin: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address;
    entry.u.msi.data = message.data;
    entry
}

thread_local! {
    /// The byte that makes KVM_RUN of this thread's processor return at once, while there is one.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Makes [`interrupt`] work on the calling thread as long as it runs `vcpu`.
///
/// A signal that comes just before KVM_RUN would be lost without this: its handler sets a flag that
/// KVM_RUN looks at first.
pub fn accept_interrupts(vcpu: &mut VcpuFd) {
    IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
}

/// The end of [`accept_interrupts`]; to be called before the processor is dropped.
pub fn refuse_interrupts() {
    IMMEDIATE_EXIT.set(ptr::null_mut());
}

/// What KVM could not do for a guest, after an exit that says so: 1 is an instruction that it does
/// not emulate, 2 an event during the delivery of another (Linux, Documentation/virt/kvm/api.rst).
pub fn internal_error(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: any bits are a valid number.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}

/// Installs the handler of [`interrupt`], once for the process.
pub fn prepare_interrupts() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<Result<(), kvm_ioctls::Error>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), on_interrupt))
        .map_err(KvmError::Signal)
}

/// Makes the processor that `thread` runs come out of guest mode soon, or not enter it once more.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // A thread that is gone does not need it.
    let _ = thread.kill(SIGRTMIN());
}

extern "C" fn on_interrupt(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: set by `accept_interrupts` to a byte of the shared page of the processor that
        // this thread owns, and cleared before that processor goes. The kernel reads it while this
        // thread is in KVM_RUN; Rust code accesses it on this thread only.
        unsafe { ptr::write_volatile(flag, 1) };
    }
}
