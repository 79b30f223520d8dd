//! Guests of a few instructions, as ELF kernels. They start in 64-bit mode, ring 0.

use vmm::{guest_status, layout};

/// Where guests are loaded, and start.
const START: u64 = 0x10_0000;

const ELF_HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;

/// A program that grows.
#[derive(Clone, Default)]
pub(crate) struct Guest {
    code: Vec<u8>,
}

impl Guest {
    fn then(mut self, code: &[&[u8]]) -> Self {
        self.code.extend(code.concat());
        self
    }

    /// Writes a byte to an I/O port.
    pub(crate) fn out_byte(self, port: u16, value: u8) -> Self {
        let port = port.to_le_bytes();
        self.then(&[&[0x66, 0xba], &port, &[0xb0, value], &[0xee]])
    }

    /// Writes 32 bits to an I/O port.
    pub(crate) fn out_long(self, port: u16, value: u32) -> Self {
        let (port, value) = (port.to_le_bytes(), value.to_le_bytes());
        self.then(&[&[0x66, 0xba], &port, &[0xb8], &value, &[0xef]])
    }

    /// Writes a byte to memory.
    pub(crate) fn store_byte(self, address: u32, value: u8) -> Self {
        self.then(&[&[0xb9], &address.to_le_bytes(), &[0xc6, 0x01, value]])
    }

    /// Writes 32 bits to memory, at once.
    pub(crate) fn store_long(self, address: u32, value: u32) -> Self {
        let (address, value) = (address.to_le_bytes(), value.to_le_bytes());
        self.then(&[&[0xb9], &address, &[0xc7, 0x01], &value])
    }

    /// Does `body` over and over again.
    pub(crate) fn times(self, count: u32, body: &Guest) -> Self {
        let body = &body.code;
        // dec esi; jnz back to the body, from behind this jump.
        let back = -i32::try_from(body.len() + 8).unwrap();
        self.then(&[&[0xbe], &count.to_le_bytes(), body])
            .then(&[&[0xff, 0xce, 0x0f, 0x85], &back.to_le_bytes()])
    }

    /// Writes text to the serial port.
    pub(crate) fn print(self, text: &str) -> Self {
        let port = u16::try_from(layout::SERIAL_PORT).unwrap();
        text.bytes()
            .fold(self, |guest, byte| guest.out_byte(port, byte))
    }

    /// Writes 32 bits of memory, read at once, to the serial port, lowest byte first.
    pub(crate) fn print_long(mut self, address: u32) -> Self {
        let port = u16::try_from(layout::SERIAL_PORT).unwrap().to_le_bytes();
        self = self.then(&[&[0xb9], &address.to_le_bytes(), &[0x8b, 0x01]]);
        for _ in 0..4 {
            // out dx, al; shr eax, 8
            self = self.then(&[&[0x66, 0xba], &port, &[0xee, 0xc1, 0xe8, 8]]);
        }
        self
    }

    /// Waits for a byte on the serial port and keeps it.
    pub(crate) fn read_serial(self) -> Self {
        let port = |offset| {
            u16::try_from(layout::SERIAL_PORT + offset)
                .unwrap()
                .to_le_bytes()
        };
        let (data, status) = (port(0), port(5));
        // Until bit 0 of the line status is set: mov dx; in al, dx; test al, 1; jz back to in.
        self.then(&[&[0x66, 0xba], &status, &[0xec, 0xa8, 1, 0x74, 0xfb]])
            .then(&[&[0x66, 0xba], &data, &[0xec]])
    }

    /// Writes the byte that was read to the serial port.
    pub(crate) fn print_read(self) -> Self {
        let port = u16::try_from(layout::SERIAL_PORT).unwrap().to_le_bytes();
        self.then(&[&[0x66, 0xba], &port, &[0xee]])
    }

    /// Reports the workload's exit.
    pub(crate) fn exit(self, code: u8) -> Self {
        self.out_long(guest_status::PORT, guest_status::exit(code, false))
    }

    /// Executes an instruction that is none, without anyone to handle that.
    pub(crate) fn crash(self) -> Self {
        self.then(&[&[0x0f, 0x0b]])
    }

    /// The kernel file. Behind its end the guest waits for ever.
    pub(crate) fn elf(self) -> Vec<u8> {
        let code = self.then(&[&[0xf4, 0xeb, 0xfd]]).code;
        let offset = u64::from(ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES);
        let size = u64::try_from(code.len()).unwrap();
        let mut elf = Vec::new();
        elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        for half in [2_u16, 62] {
            elf.extend(half.to_le_bytes()); // Executable, x86-64.
        }
        elf.extend(1_u32.to_le_bytes());
        for word in [START, u64::from(ELF_HEADER_BYTES), 0] {
            elf.extend(word.to_le_bytes()); // Entry, program headers, no sections.
        }
        elf.extend(0_u32.to_le_bytes());
        for half in [ELF_HEADER_BYTES, PROGRAM_HEADER_BYTES, 1, 0, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        for half in [1_u32, 7] {
            elf.extend(half.to_le_bytes()); // To be loaded; readable, writable, executable.
        }
        for word in [offset, START, START, size, size, 0x1000] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(code);
        elf
    }
}
