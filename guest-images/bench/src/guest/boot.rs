//! From the first instruction to ring 3.
//!
//! All tables are in the image: code in ring 0 may be interpreted, at a microsecond for each
//! instruction, so there is as little of it as possible. The first 1 GiB and the fourth are mapped to
//! themselves: memory and the windows of devices.
//!
//! UNSAFETY: this is where the processor jumps to, and where Rust code begins without a caller. It is
//! entered once, by `start_64` below, with the address that PVH puts in RBX.
#![expect(unsafe_code, reason = "the entry point is called by assembly")]

use core::arch::global_asm;

use crate::machine::memory;

/// `cmdline_paddr` in `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h).
const COMMAND_LINE_AT: usize = 24;

/// Longer command lines are cut off.
const COMMAND_LINE_BYTES_MAX: usize = 2048;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .long 4, 8, 18              // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start_32

    .section .boot, "awx"
    .code32
    .globl start_32
start_32:
    movb $123, 0xc0000000       // The boot timer, where there is one.
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0x620, %eax           // PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx      // EFER
    xorl %edx, %edx
    movl $0x100, %eax           // LME
    wrmsr
    movl $0x80000013, %eax      // PG, ET, MP, PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $start_64
    .code64
start_64:
    movl $0x28, %eax
    ltr %ax
    movl %ebx, %edi
    movl $stack_top, %esp
    pushq $0x23                 // SS
    pushq $stack_top
    pushq $0x2                  // RFLAGS
    pushq $0x1b                 // CS
    pushq $start_user
    iretq
start_user:
    // As if it had been called.
    subq $8, %rsp
    jmp bench_main

    .balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    // 0x08: ring 0, 64-bit code
    .quad 0x00cf93000000ffff    // 0x10: ring 0, data
    .quad 0x00affb000000ffff    // 0x18: ring 3, 64-bit code
    .quad 0x00cff3000000ffff    // 0x20: ring 3, data
    .quad 0x0000891040000000 + {task_bytes} - 1     // 0x28: task state at 0x104000
    .quad 0
gdt_end:

    .balign 4096
pml4:
    .quad directory_pointers + 7
    .fill 511, 8, 0
directory_pointers:
    .quad directory_low + 7
    .quad 0, 0
    .quad directory_devices + 7
    .fill 508, 8, 0
directory_low:
    .set page, 0
    .rept 512
    .quad page + 0x87           // Present, writable, for all rings, 2 MiB
    .set page, page + 0x200000
    .endr
    .globl task
task:
    // Ports 0 to 0xfff are open to ring 3: no bit of their map is set.
    .fill 102, 1, 0
    .word 104
    .fill 512, 1, 0
    .byte 0xff
    .balign 4096
directory_devices:
    .set page, 0xc0000000
    .rept 512
    .quad page + 0x97           // The same, and not cached
    .set page, page + 0x200000
    .endr

    .bss
    .balign 16
    .skip 32768
stack_top:
    .text
    "#,
    task_bytes = const 104 + 512 + 1,
    options(att_syntax)
);

// SAFETY: no other function has this name, and `start_user` jumps here as a call would.
#[unsafe(no_mangle)]
extern "C" fn bench_main(start_info: usize) -> ! {
    let address: u64 = memory::load(start_info.wrapping_add(COMMAND_LINE_AT));
    let address = usize::try_from(address).unwrap_or_default();
    let mut text = [0; COMMAND_LINE_BYTES_MAX];
    let mut length = 0;
    for (offset, byte) in text.iter_mut().enumerate() {
        *byte = memory::load(address.wrapping_add(offset));
        if *byte == 0 {
            break;
        }
        length = offset;
    }
    crate::run(text.get(..=length).unwrap_or_default())
}
