//! A virtio device as a PCI function (virtio 1.2, section 4.1): its configuration space, and the
//! structures in its window.
//!
//! The window has a page for each structure, as the offsets below say. What drivers do all the time,
//! kicks, is watched for by the platform and does not come through here.

pub mod interrupts;
mod state;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use self::interrupts::Interrupts;
pub use self::state::FunctionState;
use super::registers;
use super::transport::Transport;
use super::transport::pci::{COMMON_BYTES, field};
use crate::bus::BusDevice;
use crate::fair_mutex::FairMutex;
use crate::layout;
use crate::pci::bus::Function;
use crate::pci::config::{Config, Identity};

/// Where structures are in the window.
const COMMON: u64 = 0x0000;
const CAUSES: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// The room that each has.
const PAGE: u64 = 0x1000;

/// Each queue is kicked by a write to four bytes of its own.
const NOTIFY_STRIDE: u32 = 4;

/// Capabilities: interrupts by messages, and virtio's.
const CAPABILITY_MESSAGES: u8 = 0x11;
const CAPABILITY_VENDOR: u8 = 0x09;
/// Types of virtio's.
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_CAUSES: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_ACCESS: u8 = 5;

/// What every virtio function is.
const VENDOR: u16 = 0x1af4;
const DEVICES: u16 = 0x1040;
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x1100;

/// Where in its capability fields of the access through the configuration space are.
mod access {
    pub(super) const WINDOW: usize = 4;
    pub(super) const OFFSET: usize = 8;
    pub(super) const LENGTH: usize = 12;
    pub(super) const DATA: usize = 16;
    pub(super) const END: usize = 20;
}

/// Where a function is kicked, for those that watch for it.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The start of its window; zero if it answers nowhere.
    window: Arc<AtomicU64>,
}

impl Place {
    /// The address at which a queue is kicked, if there is one.
    pub fn kick(&self, queue: u32) -> Option<u64> {
        let start = self.window.load(Ordering::Relaxed);
        let offset = NOTIFY + u64::from(queue) * u64::from(NOTIFY_STRIDE);
        (start != 0).then(|| start + offset)
    }

    /// Returns whether that is another place than before.
    fn set(&self, window: Option<Range<u64>>) -> bool {
        // A guest that puts it over something else has no use for kicks.
        let inside = |window: &Range<u64>| {
            layout::PCI_MEMORY <= window.start && window.end <= layout::PCI_END
        };
        let start = window.filter(inside).map_or(0, |window| window.start);
        self.window.swap(start, Ordering::Relaxed) != start
    }
}

/// A function.
pub struct VirtioFunction {
    config: Config,
    /// Where the capability of messages is, and that of the access through the configuration space.
    messages: usize,
    access: usize,
    transport: Arc<FairMutex<Transport>>,
    interrupts: Arc<Mutex<Interrupts>>,
    place: Place,
}

opaque_debug!(VirtioFunction);

impl VirtioFunction {
    /// A function whose window is at `window` until the guest puts it elsewhere. The transport's
    /// platform raises `interrupts`, and watches for kicks at `place`.
    pub fn new(
        window: u64,
        transport: Arc<FairMutex<Transport>>,
        interrupts: Arc<Mutex<Interrupts>>,
        place: Place,
    ) -> VirtioFunction {
        let device = transport.lock().device_id();
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICES + u16::try_from(device).expect("types are small"),
            revision: REVISION,
            class: class(device),
            subsystem: SUBSYSTEM,
        };
        let long = |value: u64| u32::try_from(value).expect("below 4 GiB");
        let window = long(window)..long(window + layout::PCI_WINDOW_BYTES);
        let mut config = Config::new(identity, window);
        let control = lock_interrupts(&interrupts).read_only_control();
        let body = [
            &control.to_le_bytes()[..],
            &long(TABLE).to_le_bytes(),
            &long(PENDING).to_le_bytes(),
        ];
        let messages = config.add_capability(CAPABILITY_MESSAGES, &body.concat(), &[0, 0xc0]);
        let mut add = |number, offset, bytes, more: &[u8], writable: &[u8]| {
            let body = virtio_capability(number, long(offset), long(bytes), more);
            config.add_capability(CAPABILITY_VENDOR, &body, writable)
        };
        add(TYPE_COMMON, COMMON, COMMON_BYTES as u64, &[], &[]);
        add(TYPE_NOTIFY, NOTIFY, PAGE, &NOTIFY_STRIDE.to_le_bytes(), &[]);
        add(TYPE_CAUSES, CAUSES, 1, &[], &[]);
        add(TYPE_DEVICE, DEVICE, PAGE, &[], &[]);
        let mut writable = [0; access::DATA - 2];
        writable[access::WINDOW - 2] = 0xff;
        writable[access::OFFSET - 2..].fill(0xff);
        let access = add(TYPE_ACCESS, 0, 0, &[0; 4], &writable);
        VirtioFunction {
            config,
            messages,
            access,
            transport,
            interrupts,
            place,
        }
    }

    fn interrupts(&self) -> MutexGuard<'_, Interrupts> {
        lock_interrupts(&self.interrupts)
    }

    /// After a change of the configuration space.
    fn use_config(&mut self) {
        self.interrupts()
            .set_control(self.config.word(self.messages + 2));
        if self.place.set(self.config.window()) {
            self.transport.lock().moved();
        }
    }

    /// What the guest accesses through its configuration space (section 4.1.4.9), if that is
    /// possible: an offset in the window, and how many bytes.
    fn accessed(&self, offset: usize) -> Option<(u64, usize)> {
        if !(self.access + access::DATA..self.access + access::END).contains(&offset) {
            return None;
        }
        let place = self.config.long(self.access + access::OFFSET);
        let length = usize::try_from(self.config.long(self.access + access::LENGTH)).ok()?;
        let mut window = [0];
        self.config.read(self.access + access::WINDOW, &mut window);
        let possible = matches!(length, 1 | 2 | 4)
            && window == [0]
            && u64::from(place) < layout::PCI_WINDOW_BYTES
            && usize::try_from(place).is_ok_and(|place| place.is_multiple_of(length));
        possible.then_some((place.into(), length))
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let transport = self.transport.lock();
        let mut bytes = transport.common();
        let interrupts = self.interrupts();
        let queue = transport.selected_queue();
        let queue_vector = queue.map_or(interrupts::NO_VECTOR, |queue| {
            interrupts.queue_vector(queue)
        });
        for (offset, vector) in [
            (field::CONFIG_VECTOR, interrupts.config_vector()),
            (field::QUEUE_VECTOR, queue_vector),
        ] {
            let start = usize::try_from(offset).expect("a few bytes");
            bytes[start..start + 2].copy_from_slice(&vector.to_le_bytes());
        }
        copy(&bytes, offset, data);
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut transport = self.transport.lock();
        match (offset, <[u8; 2]>::try_from(data).map(u16::from_le_bytes)) {
            (field::CONFIG_VECTOR, Ok(vector)) => self.interrupts().set_config_vector(vector),
            (field::QUEUE_VECTOR, Ok(vector)) => {
                if let Some(queue) = transport.selected_queue() {
                    self.interrupts().set_queue_vector(queue, vector);
                }
            }
            _ => transport.write_common(offset, data),
        }
        if offset == field::STATUS && transport.is_reset() {
            self.interrupts().forget_vectors();
        }
    }
}

impl Function for VirtioFunction {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if let Some((place, length)) = self.accessed(offset) {
            let mut bytes = [0; 4];
            self.read(place, &mut bytes[..length]);
            self.config.put(self.access + access::DATA, &bytes);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        match self.accessed(offset) {
            Some((place, length)) if data.len() >= length => self.write(place, &data[..length]),
            Some(_) => {}
            None => {
                self.config.write(offset, data);
                self.use_config();
            }
        }
    }

    fn window(&self) -> Option<Range<u64>> {
        self.config.window()
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.read_common(within, data),
            CAUSES if within == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.transport.lock().take_interrupt_status();
                }
            }
            DEVICE => self.transport.lock().read(registers::CONFIG + within, data),
            TABLE => self.interrupts().read_table(within, data),
            PENDING => self.interrupts().read_pending(within, data),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => self
                .transport
                .lock()
                .write(registers::CONFIG + within, data),
            NOTIFY => {
                let queue = within / u64::from(NOTIFY_STRIDE);
                let queue = usize::try_from(queue).expect("less than a page");
                self.transport.lock().on_kick(queue);
            }
            TABLE => self.interrupts().write_table(within, data),
            _ => {}
        }
    }
}

fn lock_interrupts(interrupts: &Mutex<Interrupts>) -> MutexGuard<'_, Interrupts> {
    interrupts.lock().expect("nothing panics in here")
}

/// A capability that names a structure in the window, without its number and link.
fn virtio_capability(number: u8, offset: u32, bytes: u32, more: &[u8]) -> Vec<u8> {
    const HEAD_BYTES: usize = 16;
    let length = u8::try_from(HEAD_BYTES + more.len()).expect("a few bytes");
    // The window is the first of the function, and the structure the only one of its type.
    let head = [length, number, 0, 0, 0, 0];
    [&head, &offset.to_le_bytes()[..], &bytes.to_le_bytes(), more].concat()
}

/// Class, subclass, interface.
fn class(device: u32) -> u32 {
    match device {
        1 => 0x02_0000,  // Ethernet.
        2 => 0x01_8000,  // Other mass storage.
        19 => 0x07_8000, // Other communication.
        _ => 0x00_ff00,  // Nothing that there is a class for.
    }
}

fn copy(bytes: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let there = bytes.get(start..).unwrap_or_default();
    let count = there.len().min(data.len());
    data[..count].copy_from_slice(&there[..count]);
}

#[cfg(test)]
mod tests;
