//! Drivers that break the rules: known tricks, and noise.

use std::time::Duration;

use proptest::prelude::*;

use super::{
    BUFFERS, Buffer, Driver, HOLE, HOLE_END, INDIRECT, MEMORY_END, NEXT, WRITE, descriptor,
};
use crate::virtio::{DeviceError, VirtioDevice};

/// What a hostile driver does to a queue.
type Trick = fn(&mut Driver, usize);

/// Malformed rings and chains, none of which any device can do anything with.
pub(crate) const TRICKS: [(&str, Trick); 22] = [
    ("a head that is not in the table", |driver, queue| {
        let size = driver.rings[queue].size;
        driver.make_available(queue, size);
    }),
    ("the largest head", |driver, queue| {
        driver.make_available(queue, u16::MAX);
    }),
    ("a chain that leads out of the table", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 64), NEXT, u16::MAX);
        driver.make_available(queue, 0);
    }),
    ("a descriptor that is its own successor", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 64), NEXT, 0);
        driver.make_available(queue, 0);
    }),
    ("a loop of two", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 64), NEXT | WRITE, 1);
        driver.describe(queue, 1, (BUFFERS, 64), NEXT | WRITE, 0);
        driver.make_available(queue, 0);
    }),
    ("a readable buffer after a writable one", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 4096), NEXT | WRITE, 1);
        driver.describe(queue, 1, (BUFFERS, 4096), 0, 0);
        driver.make_available(queue, 0);
    }),
    ("a buffer outside memory", |driver, queue| {
        driver.describe(queue, 0, (MEMORY_END, 4096), WRITE, 0);
        driver.make_available(queue, 0);
    }),
    ("a buffer that ends outside memory", |driver, queue| {
        driver.describe(queue, 0, (MEMORY_END - 4095, 4096), 0, 0);
        driver.make_available(queue, 0);
    }),
    (
        "a readable buffer where the devices are",
        |driver, queue| {
            driver.describe(queue, 0, (HOLE, 64), 0, 0);
            driver.make_available(queue, 0);
        },
    ),
    (
        "a writable buffer where the devices are",
        |driver, queue| {
            driver.describe(queue, 0, (HOLE_END - 64, 64), WRITE, 0);
            driver.make_available(queue, 0);
        },
    ),
    (
        "a buffer across the devices, with memory at both ends",
        |driver, queue| {
            let len = u32::try_from(HOLE_END - HOLE).unwrap() + 8192;
            driver.describe(queue, 0, (HOLE - 4096, len), WRITE, 0);
            driver.make_available(queue, 0);
        },
    ),
    (
        "a good buffer and then one that ends among the devices",
        |driver, queue| {
            driver.describe(queue, 0, (BUFFERS, 64), NEXT | WRITE, 1);
            driver.describe(queue, 1, (HOLE - 4, 8), WRITE, 0);
            driver.make_available(queue, 0);
        },
    ),
    (
        "a buffer that wraps around the address space",
        |driver, queue| {
            driver.describe(queue, 0, (u64::MAX - 100, u32::MAX), WRITE, 0);
            driver.make_available(queue, 0);
        },
    ),
    ("a chain of more than 4 GiB", |driver, queue| {
        driver.describe(queue, 0, (0, u32::MAX), NEXT, 1);
        driver.describe(queue, 1, (0, u32::MAX), NEXT, 2);
        driver.describe(queue, 2, (0, 64), WRITE, 0);
        driver.make_available(queue, 0);
    }),
    (
        "an indirect table within an indirect table",
        |driver, queue| {
            driver.write(BUFFERS, &descriptor(BUFFERS, 16, INDIRECT, 0));
            driver.describe(queue, 0, (BUFFERS, 16), INDIRECT, 0);
            driver.make_available(queue, 0);
        },
    ),
    ("an indirect table of half a descriptor", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 24), INDIRECT, 0);
        driver.make_available(queue, 0);
    }),
    ("an indirect table of nothing", |driver, queue| {
        driver.describe(queue, 0, (BUFFERS, 0), INDIRECT, 0);
        driver.make_available(queue, 0);
    }),
    ("an indirect table that loops", |driver, queue| {
        driver.write(BUFFERS, &descriptor(BUFFERS, 16, NEXT | WRITE, 1));
        driver.write(BUFFERS + 16, &descriptor(BUFFERS, 16, NEXT | WRITE, 0));
        driver.describe(queue, 0, (BUFFERS, 32), INDIRECT, 0);
        driver.make_available(queue, 0);
    }),
    (
        "an indirect table that leads out of itself",
        |driver, queue| {
            driver.write(BUFFERS, &descriptor(BUFFERS, 16, NEXT | WRITE, 1));
            driver.describe(queue, 0, (BUFFERS, 16), INDIRECT, 0);
            driver.make_available(queue, 0);
        },
    ),
    (
        "an indirect table of which the end is among the devices",
        |driver, queue| {
            driver.write(HOLE - 16, &descriptor(BUFFERS, 16, NEXT | WRITE, 1));
            driver.describe(queue, 0, (HOLE - 16, 32), INDIRECT, 0);
            driver.make_available(queue, 0);
        },
    ),
    ("an indirect table outside memory", |driver, queue| {
        driver.describe(queue, 0, (MEMORY_END, 160), INDIRECT, 0);
        driver.make_available(queue, 0);
    }),
    ("an available index that jumps", |driver, queue| {
        let size = driver.rings[queue].size;
        driver.jump(queue, size + 1);
    }),
];

/// Each of [`TRICKS`], on each queue, must be the guest's error and nothing else, and a device that
/// is reset afterwards must serve the next driver.
pub(crate) fn assert_tricks_are_the_guests_error(device: &mut dyn VirtioDevice) {
    let queues = device.info().queue_sizes.len();
    for (name, trick) in TRICKS {
        for queue in 0..queues {
            let mut driver = Driver::start(device);
            trick(&mut driver, queue);
            let result = driver.kick(device, queue);
            assert!(
                matches!(result, Err(DeviceError::Guest { index, .. }) if index == queue),
                "{name}, queue {queue}: {result:?}"
            );
            device.reset();
        }
    }
}

/// A driver that offers the same chain again and again without getting it back must not make the
/// device hold more chains than the queue has.
pub(crate) fn assert_held_chains_are_bounded(
    device: &mut dyn VirtioDevice,
    queue: usize,
    buffer: Buffer,
) {
    let mut driver = Driver::start(device);
    let size = device.info().queue_sizes[queue];
    let write = if buffer.writable { WRITE } else { 0 };
    driver.describe(queue, 0, (buffer.address, buffer.len), write, 0);
    for _ in 0..size {
        driver.make_available(queue, 0);
    }
    let _ = driver.kick(device, queue).unwrap();
    driver.make_available(queue, 0);
    let result = driver.kick(device, queue);
    assert!(
        matches!(result, Err(DeviceError::Guest { .. })),
        "{result:?}"
    );
    device.reset();
}

/// One descriptor of a random table: mostly plausible, so that chains get somewhere.
fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        8 => BUFFERS..BUFFERS + 0x1000,
        1 => MEMORY_END - 0x100..MEMORY_END + 0x100,
        1 => HOLE - 0x100..HOLE + 0x100,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => 0u32..0x200, 2 => 0u32..0x2_0000, 1 => any::<u32>()];
    let flags = prop_oneof![12 => 0u16..4, 1 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (address, len, flags, next)
}

/// A random driver: a table, what the buffers hold, and which heads it makes available on which
/// queue before each kick.
#[derive(Clone, Debug)]
pub(crate) struct Noise {
    table: Vec<(u64, u32, u16, u16)>,
    content: Vec<u8>,
    steps: Vec<(usize, Vec<u16>)>,
}

/// How many random drivers each device meets: each has memory and descriptors of its own.
pub(crate) fn noise_config() -> ProptestConfig {
    ProptestConfig {
        // A crash is told by what it prints; nothing is written into the source tree.
        failure_persistence: None,
        ..ProptestConfig::with_cases(64)
    }
}

pub(crate) fn any_noise(queues: usize) -> impl Strategy<Value = Noise> {
    let head = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (
        prop::collection::vec(any_descriptor(), 8),
        prop::collection::vec(prop_oneof![4 => 0u8..4, 1 => any::<u8>()], 0x400),
        prop::collection::vec((0..queues, prop::collection::vec(head, 0..6)), 1..12),
    )
        .prop_map(|(table, content, steps)| Noise {
            table,
            content,
            steps,
        })
}

/// Whatever a driver does, the device returns, and blames nobody but the guest.
pub(crate) fn assert_noise_is_survived(device: &mut dyn VirtioDevice, noise: &Noise) {
    let mut driver = Driver::start(device);
    for (index, (address, len, flags, next)) in (0..).zip(&noise.table) {
        for queue in 0..driver.queues.len() {
            driver.describe(queue, index, (*address, *len), *flags, *next);
        }
    }
    driver.write(BUFFERS, &noise.content);
    for (queue, heads) in &noise.steps {
        for head in heads {
            driver.make_available(*queue, *head);
        }
        match driver.kick(device, *queue) {
            Ok(_) => {}
            Err(DeviceError::Guest { .. }) => break,
            Err(error @ DeviceError::Host { .. }) => panic!("{error:?}"),
        }
        driver.turn(device, Duration::ZERO);
    }
    device.reset();
}
