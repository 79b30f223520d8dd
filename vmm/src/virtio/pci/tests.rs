//! Functions in front of a device that echoes, and guests that look at them and start them.

use std::sync::{Arc, Mutex};

use super::interrupts::tests::Sent;
use super::*;
use crate::bus::BusDevice;
use crate::pci::bus::PciBus;
use crate::virtio::Signal;
use crate::virtio::transport::testing::{AVAILABLE, DESCRIPTORS, Driver, USED, VERSION_1, World};

const WINDOW: u64 = layout::PCI_MEMORY;

/// The bus's range, by offsets, with the function as device 1.
struct Guest {
    bus: PciBus,
    function: Arc<Mutex<VirtioFunction>>,
    interrupts: Arc<Mutex<Interrupts>>,
    sent: Sent,
    world: Arc<Mutex<World>>,
    driver: Driver,
}

const SPACE: u64 = 1 << 15;
const MEMORY: u64 = layout::PCI_CONFIG_BYTES;

impl Guest {
    fn new() -> Guest {
        let mut driver = Driver::new();
        let world = driver.platform.0.clone();
        let transport = Arc::new(FairMutex::new(driver.take_transport()));
        let sent = Sent::default();
        let queues = transport.lock().queue_count();
        let interrupts = Interrupts::new(queues, Box::new(sent.clone()));
        let interrupts = Arc::new(Mutex::new(interrupts));
        let place = Place::default();
        let function = VirtioFunction::new(WINDOW, transport, interrupts.clone(), place);
        let function = Arc::new(Mutex::new(function));
        let mut bus = PciBus::new();
        bus.insert(1, function.clone());
        Guest {
            bus,
            function,
            interrupts,
            sent,
            world,
            driver,
        }
    }

    fn get(&mut self, offset: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.read(offset, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    fn put(&mut self, offset: u64, bytes: usize, value: u64) {
        self.bus.write(offset, &value.to_le_bytes()[..bytes]);
    }

    /// Where a capability of that type is, and the structure that it names.
    fn structure(&mut self, wanted: u8) -> Option<(u64, u64)> {
        let mut at = SPACE + self.get(SPACE + 0x34, 1);
        while at != SPACE {
            let head = self.get(at, 4).to_le_bytes();
            if head[0] == CAPABILITY_VENDOR && head[3] == wanted {
                return Some((at, MEMORY + self.get(at + 8, 4)));
            }
            at = SPACE + u64::from(head[1]);
        }
        None
    }

    fn start(&mut self) {
        self.put(SPACE + 4, 2, 0x0406);
        let (_, common) = self.structure(TYPE_COMMON).unwrap();
        // Message N has data 50 + N.
        for vector in 0..3 {
            let entry = MEMORY + TABLE + 16 * vector;
            self.put(entry, 8, 0xfee0_0000);
            self.put(entry + 8, 8, 50 + vector);
        }
        let messages = SPACE + self.get(SPACE + 0x34, 1);
        self.put(messages + 2, 2, 0x8000);
        self.put(common + field::STATUS, 1, 1);
        self.put(common + field::STATUS, 1, 3);
        for select in [0, 1] {
            self.put(common + field::DRIVER_FEATURES_SELECT, 4, select);
            self.put(
                common + field::DRIVER_FEATURES,
                4,
                VERSION_1 >> (32 * select),
            );
        }
        self.put(common + field::STATUS, 1, 11);
        self.put(common + field::CONFIG_VECTOR, 2, 0);
        self.put(common + field::QUEUE_VECTOR, 2, 1);
        for (field, address) in [
            (field::QUEUE_DESCRIPTORS, DESCRIPTORS),
            (field::QUEUE_AVAILABLE, AVAILABLE),
            (field::QUEUE_USED, USED),
        ] {
            self.put(common + field, 8, address);
        }
        self.put(common + field::QUEUE_ENABLE, 2, 1);
        self.put(common + field::STATUS, 1, 15);
        assert_eq!(self.get(common + field::STATUS, 1), 15);
    }

    /// Uses a buffer.
    fn work(&mut self) -> Vec<(u32, u32)> {
        self.driver.add_buffer();
        let (_, notify) = self.structure(TYPE_NOTIFY).unwrap();
        self.world.lock().unwrap().told = Signal::NONE;
        self.put(notify, 2, 0);
        let told = self.world.lock().unwrap().told;
        self.interrupts.lock().unwrap().raise(told);
        self.sent.take()
    }
}

#[test]
fn a_guest_finds_a_virtio_function_with_all_its_structures() {
    let mut guest = Guest::new();
    assert_eq!(guest.get(SPACE, 4), (0x1040 + 42) << 16 | 0x1af4);
    assert_eq!(guest.get(SPACE + 0x3d, 1), 0, "no pin");
    for (wanted, offset) in [
        (TYPE_COMMON, COMMON),
        (TYPE_NOTIFY, NOTIFY),
        (TYPE_CAUSES, CAUSES),
        (TYPE_DEVICE, DEVICE),
        (TYPE_ACCESS, 0),
    ] {
        let (_, found) = guest.structure(wanted).unwrap();
        assert_eq!(found, MEMORY + offset);
    }
    let messages = guest.get(SPACE + 0x40, 4);
    assert_eq!(messages & 0x07ff_00ff, 2 << 16 | 0x11, "three messages");
}

#[test]
fn a_driver_starts_a_function_and_hears_by_messages() {
    let mut guest = Guest::new();
    guest.start();
    assert_eq!(guest.get(MEMORY + DEVICE + 1, 2), 0x0302);
    assert_eq!(guest.work(), [(0xfee0_0000, 51)]);
    assert_eq!(guest.driver.used(), 1);
    assert_eq!(guest.get(MEMORY + CAUSES, 1), 1);
    assert_eq!(guest.get(MEMORY + CAUSES, 1), 0);
    guest.interrupts.lock().unwrap().raise(Signal::CONFIG);
    assert_eq!(guest.sent.take(), [(0xfee0_0000, 50)]);
    // A reset takes the messages away.
    guest.put(MEMORY + field::STATUS, 1, 0);
    assert_eq!(guest.get(MEMORY + field::CONFIG_VECTOR, 2), 0xffff);
    assert_eq!(guest.get(MEMORY + field::QUEUE_VECTOR, 2), 0xffff);
}

#[test]
fn kicks_are_watched_for_where_the_window_is() {
    let mut guest = Guest::new();
    let place = guest.function.lock().unwrap().place.clone();
    assert_eq!(place.kick(0), None);
    guest.start();
    assert_eq!(place.kick(1), Some(WINDOW + NOTIFY + 4));
    let moves = guest.world.lock().unwrap().moves;
    guest.put(SPACE + 0x10, 4, 0xe800_0000);
    assert_eq!(place.kick(0), Some(0xe800_0000 + NOTIFY));
    assert_eq!(guest.world.lock().unwrap().moves, moves + 1);
    // Where the bus is not, nobody watches.
    for elsewhere in [0, 0x10_0000, layout::PCI_CONFIG, 0xfee0_0000] {
        guest.put(SPACE + 0x10, 4, elsewhere);
        assert_eq!(place.kick(0), None, "{elsewhere:#x}");
    }
    guest.put(SPACE + 0x10, 4, WINDOW);
    guest.put(SPACE + 4, 2, 0);
    assert_eq!(place.kick(0), None);
}

#[test]
fn the_window_is_reached_through_the_configuration_space_as_well() {
    let mut guest = Guest::new();
    let (access, _) = guest.structure(TYPE_ACCESS).unwrap();
    let through = |guest: &mut Guest, offset: u64, bytes: u64| {
        guest.put(access + 8, 4, offset);
        guest.put(access + 12, 4, bytes);
    };
    through(&mut guest, field::STATUS, 1);
    guest.put(access + 16, 4, 1);
    assert_eq!(guest.get(access + 16, 4), 1);
    through(&mut guest, DEVICE, 4);
    assert_eq!(guest.get(access + 16, 4), 0x0403_0201);
    // What cannot be: another window, beyond its end, not aligned, of another width.
    for (window, offset, bytes) in [
        (1, DEVICE, 4),
        (0, layout::PCI_WINDOW_BYTES, 4),
        (0, u64::from(u32::MAX), 1),
        (0, DEVICE + 2, 4),
        (0, DEVICE, 3),
        (0, DEVICE, 0),
    ] {
        guest.put(access + 4, 1, window);
        through(&mut guest, offset, bytes);
        guest.put(access + 16, 4, u64::from(u32::MAX));
        assert_eq!(guest.get(access + 16, 4), 0x0403_0201, "as it was");
        guest.put(access + 4, 1, 0);
    }
}

#[test]
fn a_restored_function_is_where_and_what_the_saved_one_was() {
    let mut guest = Guest::new();
    guest.start();
    guest.put(SPACE + 0x10, 4, 0xe800_0000);
    let (access, _) = guest.structure(TYPE_ACCESS).unwrap();
    guest.put(access + 8, 4, 0x14);
    guest.put(access + 12, 4, 1);
    let state = guest.function.lock().unwrap().save();
    let text = serde_json::to_string(&state).unwrap();
    let state: FunctionState = serde_json::from_str(&text).unwrap();

    let other = Guest::new();
    other.function.lock().unwrap().restore(&state).unwrap();
    let function = other.function.lock().unwrap();
    assert_eq!(function.save(), state);
    assert_eq!(function.place.kick(0), Some(0xe800_0000 + NOTIFY));
    drop(function);
    other.interrupts.lock().unwrap().raise(Signal::queue(0));
    assert_eq!(other.sent.take(), [(0xfee0_0000, 51)]);

    let mut wrong = state;
    wrong.interrupts.queue_vectors.pop();
    let refused = other.function.lock().unwrap().restore(&wrong);
    refused.unwrap_err();
}

mod noise {
    use proptest::prelude::{Strategy, any, prop_oneof, proptest};

    use super::*;

    fn any_offset() -> impl Strategy<Value = u64> {
        prop_oneof![
            SPACE..SPACE + 0x110,
            MEMORY..MEMORY + layout::PCI_WINDOW_BYTES,
            MEMORY..MEMORY + COMMON_BYTES as u64,
            0..layout::PCI_END - layout::PCI_CONFIG,
        ]
    }

    proptest! {
        /// Nothing panics, and an honest driver finds the function as it should be afterwards.
        #[test]
        fn a_guest_may_do_anything_to_a_function_and_no_harm(
            started: bool,
            acts in proptest::collection::vec(
                (any_offset(), proptest::sample::select(vec![1_usize, 2, 4, 8]), any::<u64>()),
                0..200,
            ),
        ) {
            let mut guest = Guest::new();
            if started {
                guest.start();
            }
            for (offset, bytes, value) in acts {
                guest.put(offset, bytes, value);
                guest.get(offset, bytes);
            }
            let failures = guest.world.lock().unwrap().failures.clone();
            proptest::prop_assert_eq!(failures, Vec::<String>::new());
            guest.put(SPACE + 0x10, 4, WINDOW);
            guest.put(SPACE + 4, 2, 2);
            guest.put(MEMORY + field::STATUS, 1, 0);
            guest.driver.forget();
            guest.put(MEMORY + field::QUEUE_SELECT, 2, 0);
            guest.start();
            guest.sent.take();
            let messages = guest.work();
            proptest::prop_assert_eq!(messages, vec![(0xfee0_0000, 51)]);
            proptest::prop_assert_eq!(guest.driver.used(), 1);
        }
    }
}
