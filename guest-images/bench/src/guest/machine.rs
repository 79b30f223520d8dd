//! The machine as code without an operating system sees it: ports, physical memory, the time-stamp
//! counter; and the routines that the compiler expects a C library to have.
//!
//! UNSAFETY: all of memory is mapped to itself and belongs to this program alone, which has one
//! thread and no heap. Addresses that are used as numbers lie outside of what Rust knows: devices'
//! windows, and memory behind the image.
#![expect(
    unsafe_code,
    reason = "ports and physical memory are reached by address"
)]

use core::arch::{asm, global_asm};

const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's command port, and the command that pulses the reset line.
const KEYBOARD_PORT: u16 = 0x64;
const RESET: u8 = 0xfe;

/// Writes a byte to an I/O port.
pub(crate) fn out_byte(port: u16, value: u8) {
    // SAFETY: no port of these machines writes to memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Writes text to the serial port.
pub(crate) fn print(text: &[u8]) {
    for byte in text {
        out_byte(SERIAL_PORT, *byte);
    }
}

/// Writes a number to the serial port, in decimal.
pub(crate) fn print_number(number: u64) {
    if number > 9 {
        print_number(number / 10);
    }
    out_byte(SERIAL_PORT, b'0' | (number % 10).to_le_bytes()[0]);
}

/// The time-stamp counter, read after all that comes before it.
pub(crate) fn ticks() -> u64 {
    // SAFETY: the instructions touch no memory.
    unsafe {
        core::arch::x86_64::_mm_lfence();
    }
    // SAFETY: as above.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Ends the machine.
pub(crate) fn reset() -> ! {
    out_byte(KEYBOARD_PORT, RESET);
    // There is no keyboard controller: an exception that nobody handles resets as well.
    // SAFETY: nothing comes after it.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Memory that devices share.
pub(crate) mod memory {
    use core::ptr;
    use core::sync::atomic::{Ordering, fence};

    /// Reads once, and before all that is read later.
    pub(crate) fn load<T: Copy>(address: usize) -> T {
        // SAFETY: callers name windows of devices, and memory that is theirs; every bit pattern is
        // a value of the integers that are read.
        let value = unsafe { ptr::read_volatile(ptr::with_exposed_provenance(address)) };
        fence(Ordering::Acquire);
        value
    }

    /// Writes once, and after all that was written before.
    pub(crate) fn store<T: Copy>(address: usize, value: T) {
        fence(Ordering::Release);
        // SAFETY: as for `load`.
        unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(address), value) };
    }
}

// What the compiler calls for copies and comparisons. Processors have had fast string instructions
// for as long as they have had virtualization.
global_asm!(
    "
    .globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    mov rax, rdi
    sub rax, rsi
    cmp rax, rdx
    jb 2f
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
2:
    mov rax, rdi
    mov rcx, rdx
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    cmp rcx, rcx
    repe cmpsb
    je 3f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
3:
    ret
    "
);
