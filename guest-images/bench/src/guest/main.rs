//! A guest without an operating system, which measures the machine that it runs on.
//!
//! It boots the same on every VMM that loads ELF kernels by PVH, executes a few instructions in
//! ring 0 and all else in ring 3, so that it also runs at full speed where KVM has no processor
//! support and interprets ring 0. Devices are found by `virtio_mmio.device=SIZE@ADDRESS:LINE` and
//! polled, without interrupts. Times are ticks of the time-stamp counter; the host knows its rate.
//!
//! Each `bench=` word of the command line is one measurement, in order, and one line on the serial
//! port: `NAME COUNT TICKS`, or `NAME error REASON`. Then the guest resets the machine.
//!
//! | word | what is counted |
//! |---|---|
//! | `touch:PAGES` | first writes to pages of 4 KiB |
//! | `port:COUNT` | writes to an I/O port where nothing is |
//! | `mmio:COUNT` | reads of a virtio device's register |
//! | `block:KIND:BYTES:DEPTH:COUNT` | requests to a disk; KIND is `read`, `write`, `random-read`, `random-write` |
//! | `net:BYTES:DEPTH:COUNT` | frames sent |
//! | `hold` | nothing: the guest says so and runs until it is killed |
//! | `beat` | the same, and it writes to the boot timer again and again |
//!
//! A panic, which would be a bug, resets the machine, and the measurement has no result.
#![no_std]
#![no_main]

mod block;
mod boot;
mod machine;
mod mmio;
mod net;
mod queue;
mod words;

use machine::{memory, print, print_number, reset, ticks};
use words::Fields;

/// Nothing is at this port on any of the machines.
const PORT_UNUSED: u16 = 0x700;

/// Memory from here on belongs to [`touch`].
const TOUCHED: usize = 32 << 20;

const PAGE_BYTES: usize = 4096;

/// Where a guest says that it runs, by this byte.
const BOOT_TIMER: usize = 0xc000_0000;
const BOOTED: u8 = 123;

/// Some microseconds.
const BEAT_PAUSE: u32 = 100;

/// Why there is no result.
enum Failure {
    /// No device of this kind.
    NoDevice,
    /// The device does not offer what the driver needs.
    Refused,
    /// The device could not do a request.
    Request,
    /// The measurement is not one.
    Word,
}

impl Failure {
    fn name(&self) -> &'static [u8] {
        match self {
            Failure::NoDevice => b"no device",
            Failure::Refused => b"refused by the device",
            Failure::Request => b"request failed",
            Failure::Word => b"not a measurement",
        }
    }
}

/// How many there were, and how long they took.
struct Measured {
    count: u64,
    ticks: u64,
}

/// Does what `command_line` says. Ring 3; nothing is behind it on the stack.
fn run(command_line: &[u8]) -> ! {
    for word in words::of(command_line) {
        if let Some(asked) = word.strip_prefix(b"bench=") {
            report(asked, measure(asked, command_line));
        }
    }
    reset()
}

fn measure(asked: &[u8], command_line: &[u8]) -> Result<Measured, Failure> {
    let mut fields = Fields::new(asked);
    match fields.name() {
        b"touch" => Ok(touch(fields.number()?)),
        b"port" => Ok(port(fields.number()?)),
        b"mmio" => mmio::reads(command_line, fields.number()?),
        b"block" => block::run(command_line, &block::Load::parse(&mut fields)?),
        b"net" => net::run(command_line, &net::Load::parse(&mut fields)?),
        b"hold" => hold(),
        b"beat" => beat(),
        _ => Err(Failure::Word),
    }
}

fn report(asked: &[u8], result: Result<Measured, Failure>) {
    print(asked);
    match result {
        Ok(measured) => {
            print(b" ");
            print_number(measured.count);
            print(b" ");
            print_number(measured.ticks);
        }
        Err(failure) => {
            print(b" error ");
            print(failure.name());
        }
    }
    print(b"\n");
}

fn touch(pages: u64) -> Measured {
    let start = ticks();
    let mut address = TOUCHED;
    for _ in 0..pages {
        memory::store(address, 1_u8);
        address = address.wrapping_add(PAGE_BYTES);
    }
    Measured {
        count: pages,
        ticks: ticks().wrapping_sub(start),
    }
}

fn port(count: u64) -> Measured {
    let start = ticks();
    for _ in 0..count {
        machine::out_byte(PORT_UNUSED, 0);
    }
    Measured {
        count,
        ticks: ticks().wrapping_sub(start),
    }
}

fn hold() -> ! {
    print(b"holding\n");
    loop {
        core::hint::spin_loop();
    }
}

fn beat() -> ! {
    print(b"beating\n");
    loop {
        memory::store(BOOT_TIMER, BOOTED);
        for _ in 0..BEAT_PAUSE {
            core::hint::spin_loop();
        }
    }
}

#[panic_handler]
fn on_panic(_panic: &core::panic::PanicInfo<'_>) -> ! {
    print(b"panic\n");
    reset()
}
