//! Guests of a few instructions, as ELF kernels. They start in 64-bit mode, ring 0.

use vmm::{guest_status, layout};

/// Where guests are loaded, and start.
const START: u64 = 0x10_0000;

/// Instructions of one byte.
const HALT: u8 = 0xf4;
const NOTHING: u8 = 0x90;

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

    /// Makes the GiB of memory at `address`, or rather its first or last 2 MiB as `address` says,
    /// reachable at its own address: the page tables that a guest starts with end at 4 GiB.
    pub(crate) fn map(self, address: u64) -> Self {
        let directory = 0x20_0000 + (address >> 30) * 0x1000;
        let (gib, block) = (address >> 30, address >> 21 & 0x1ff);
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap();
        let pointer = low(layout::PDPT + 8 * gib);
        let entry = low(directory + 8 * block);
        let page = address & !0x1f_ffff | 0x83; // Present, writable, 2 MiB.
        self.store_long(pointer, low(directory | 3))
            .store_long(pointer + 4, 0)
            .store_long(entry, low(page))
            .store_long(entry + 4, low(page >> 32))
    }

    /// Stores 16 bits in memory, or in what lies there.
    pub(crate) fn store_word(self, address: u32, value: u16) -> Self {
        let (address, value) = (address.to_le_bytes(), value.to_le_bytes());
        self.then(&[&[0xb9], &address, &[0x66, 0xc7, 0x01], &value])
    }

    /// As [`store_long`](Self::store_long), at any address.
    pub(crate) fn store_far(self, address: u64, value: u32) -> Self {
        let (address, value) = (address.to_le_bytes(), value.to_le_bytes());
        self.then(&[&[0x48, 0xb9], &address, &[0xc7, 0x01], &value])
    }

    /// As [`print_long`](Self::print_long), at any address.
    pub(crate) fn print_far(self, address: u64) -> Self {
        self.then(&[&[0x48, 0xb9], &address.to_le_bytes(), &[0x8b, 0x01]])
            .print_eax()
    }

    /// Writes what the register that the kernel was told with points to, 32 bits at `offset` from
    /// it, to the serial port: RSI by Linux's protocol, EBX by PVH's.
    pub(crate) fn print_parameter(self, protocol: Protocol, offset: u32) -> Self {
        let register = match protocol {
            Protocol::Linux => 0x86,
            Protocol::Pvh => 0x83,
        };
        self.then(&[&[0x8b, register], &offset.to_le_bytes()])
            .print_eax()
    }

    /// Writes the first register of what the processor says of itself to the serial port.
    pub(crate) fn print_cpuid_eax(self, leaf: u32) -> Self {
        // mov eax, leaf; xor ecx, ecx; cpuid
        self.then(&[&[0xb8], &leaf.to_le_bytes(), &[0x31, 0xc9, 0x0f, 0xa2]])
            .print_eax()
    }

    /// Starts all other processors, each of which counts itself at `counter`, below 64 KiB, and
    /// stops; and waits until there are `others`.
    pub(crate) fn start_others(self, counter: u16, others: u8) -> Self {
        self.start_others_with(counter, others, HALT)
    }

    /// The same, but that they never stop.
    pub(crate) fn start_others_to_spin(self, counter: u16, others: u8) -> Self {
        self.start_others_with(counter, others, NOTHING)
    }

    fn start_others_with(self, counter: u16, others: u8, instruction: u8) -> Self {
        let [low, high] = counter.to_le_bytes();
        // In real mode: ds = 0; lock inc word [counter]; the instruction, for ever.
        let code = [
            0x31,
            0xc0,
            0x8e,
            0xd8,
            0xf0,
            0xff,
            0x06,
            low,
            high,
            instruction,
            0xeb,
            0xfd,
        ];
        let command = layout::LOCAL_APIC + 0x300;
        let page = 0x1_0000;
        let mut guest = self.store_long(counter.into(), 0);
        for (address, word) in (page..).step_by(4).zip(code.chunks(4)) {
            let word = u32::from_le_bytes(word.try_into().unwrap());
            guest = guest.store_long(address, word);
        }
        // INIT and then start-up at that page, to all but oneself; then compare and jump back.
        guest
            .store_long(command, 0xc4500)
            .store_long(command, 0xc4600 | page >> 12)
            .then(&[&[0xb9], &u32::from(counter).to_le_bytes()])
            .then(&[&[0x83, 0x39, others, 0x75, 0xfb]])
    }

    /// Does `body` over and over again.
    pub(crate) fn times(self, count: u32, body: &Guest) -> Self {
        let body = &body.code;
        // dec esi; jnz back to the body, from behind this jump.
        let back = -i32::try_from(body.len() + 8).unwrap();
        self.then(&[&[0xbe], &count.to_le_bytes(), body])
            .then(&[&[0xff, 0xce, 0x0f, 0x85], &back.to_le_bytes()])
    }

    /// Does `body` for ever.
    pub(crate) fn forever(self, body: &Guest) -> Self {
        // jmp back to the body, from behind this jump.
        let back = -i32::try_from(body.code.len() + 5).unwrap();
        self.then(&[&body.code, &[0xe9], &back.to_le_bytes()])
    }

    /// Adds one to 32 bits of memory.
    pub(crate) fn increment(self, address: u32) -> Self {
        self.then(&[&[0xb9], &address.to_le_bytes(), &[0xff, 0x01]])
    }

    /// Adds to 16 bits of memory.
    pub(crate) fn add_word(self, address: u32, value: u16) -> Self {
        let (address, value) = (address.to_le_bytes(), value.to_le_bytes());
        self.then(&[&[0xb9], &address, &[0x66, 0x81, 0x01], &value])
    }

    /// Stores the time-stamp counter in 64 bits of memory.
    pub(crate) fn store_time_stamp(self, address: u32) -> Self {
        // rdtsc; mov [rcx], eax; mov [rcx + 4], edx.
        self.then(&[&[0xb9], &address.to_le_bytes()])
            .then(&[&[0x0f, 0x31, 0x89, 0x01, 0x89, 0x51, 0x04]])
    }

    /// Writes to a model-specific register.
    pub(crate) fn write_msr(self, index: u32, value: u32) -> Self {
        let (index, value) = (index.to_le_bytes(), value.to_le_bytes());
        // xor edx, edx; wrmsr.
        self.then(&[&[0xb9], &index, &[0xb8], &value, &[0x31, 0xd2, 0x0f, 0x30]])
    }

    /// Waits until 16 bits of memory have this value.
    pub(crate) fn wait_for(self, address: u32, value: u16) -> Self {
        // cmp word [rcx], value; jne back to cmp.
        let (address, value) = (address.to_le_bytes(), value.to_le_bytes());
        self.then(&[&[0xb9], &address])
            .then(&[&[0x66, 0x81, 0x39], &value, &[0x75, 0xf9]])
    }

    /// As [`wait_for`](Self::wait_for), of 32 bits, which are read at once.
    pub(crate) fn wait_for_long(self, address: u32, value: u32) -> Self {
        let (address, value) = (address.to_le_bytes(), value.to_le_bytes());
        self.then(&[&[0xb9], &address])
            .then(&[&[0x81, 0x39], &value, &[0x75, 0xf8]])
    }

    /// Waits until two places in memory have the same 16 bits.
    pub(crate) fn wait_same(self, left: u32, right: u32) -> Self {
        // mov ax, [rdx]; cmp [rcx], ax; jne back to mov.
        self.then(&[&[0xb9], &left.to_le_bytes(), &[0xba], &right.to_le_bytes()])
            .then(&[&[0x66, 0x8b, 0x02, 0x66, 0x39, 0x01, 0x75, 0xf8]])
    }

    /// Writes text to the serial port.
    pub(crate) fn print(self, text: &str) -> Self {
        let port = u16::try_from(layout::SERIAL_PORT).unwrap();
        text.bytes()
            .fold(self, |guest, byte| guest.out_byte(port, byte))
    }

    /// Writes 32 bits of memory, read at once, to the serial port, lowest byte first.
    pub(crate) fn print_long(self, address: u32) -> Self {
        self.then(&[&[0xb9], &address.to_le_bytes(), &[0x8b, 0x01]])
            .print_eax()
    }

    fn print_eax(mut self) -> Self {
        let port = u16::try_from(layout::SERIAL_PORT).unwrap().to_le_bytes();
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

    /// A bzImage: a sector of set-up, and the program at its 64-bit entry.
    pub(crate) fn bzimage(self) -> Vec<u8> {
        let mut image = vec![0; 1024 + 0x200];
        for (at, bytes) in [
            (0x1f1, &[1_u8][..]), // Sectors of set-up after the first.
            (0x1fe, &[0x55, 0xaa]),
            (0x202, b"HdrS"),
            (0x206, &0x20f_u16.to_le_bytes()),
            (0x211, &[1]), // To be loaded high.
            (0x22c, &0x7fff_ffff_u32.to_le_bytes()),
            (0x236, &1_u16.to_le_bytes()), // There is a 64-bit entry.
            (0x258, &START.to_le_bytes()),
            (0x260, &0x1000_u32.to_le_bytes()),
        ] {
            image[at..at + bytes.len()].copy_from_slice(bytes);
        }
        image.extend(self.code());
        image
    }

    /// An ELF kernel with a PVH entry, where it starts in 32-bit mode.
    pub(crate) fn pvh(self) -> Vec<u8> {
        let entry = u32::try_from(START).unwrap();
        let mut note = Vec::new();
        for word in [4_u32, 4, 18] {
            note.extend(word.to_le_bytes()); // Name and value of 4 bytes: the entry.
        }
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
        elf(&self.code(), &note)
    }

    /// The kernel file, without a PVH entry.
    pub(crate) fn elf(self) -> Vec<u8> {
        elf(&self.code(), &[])
    }

    /// Behind the end of the program the guest waits for ever.
    fn code(self) -> Vec<u8> {
        self.then(&[&[0xf4, 0xeb, 0xfd]]).code
    }
}

/// How a kernel is told about the machine.
#[derive(Clone, Copy)]
pub(crate) enum Protocol {
    Linux,
    Pvh,
}

/// An ELF file with a program at [`START`], and perhaps with notes.
fn elf(code: &[u8], notes: &[u8]) -> Vec<u8> {
    let headers = if notes.is_empty() { 1_u16 } else { 2 };
    let offset = u64::from(ELF_HEADER_BYTES + headers * PROGRAM_HEADER_BYTES);
    let [size, notes_size] = [code, notes].map(|part| u64::try_from(part.len()).unwrap());
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
    for half in [ELF_HEADER_BYTES, PROGRAM_HEADER_BYTES, headers, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // To be loaded, readable, writable, executable; and a readable note.
    let loaded = ([1_u32, 7], [offset, START, START, size, size, 0x1000]);
    let note = ([4, 4], [offset + size, 0, 0, notes_size, notes_size, 4]);
    for (kind, place) in [loaded, note].into_iter().take(headers.into()) {
        elf.extend(kind.map(u32::to_le_bytes).as_flattened());
        elf.extend(place.map(u64::to_le_bytes).as_flattened());
    }
    elf.extend(code);
    elf.extend(notes);
    elf
}
