//! The first instructions of the program, before those of the C library: they do what
//! [`container::sealed`] does, where that is wanted and possible, and go on to the library's.
//!
//! To execute itself again a program need not have been set up, and setting up is dear: the C library
//! asks the processor for its features, each of which a virtual machine has to ask its host for. Here
//! the second execution costs half a millisecond less, of the six that running a container takes.
//! Nothing depends on it: whatever goes wrong, `sealed` tries again and has the last word.
//!
//! UNSAFETY: assembly that runs on the stack which the kernel has just set up, of which it reads the
//! arguments (System V ABI for x86-64, figure 3.9) and below which it writes. It uses no other memory,
//! calls nothing, and hands the stack on as it got it. An argument is read in eight bytes, also when
//! it is shorter: the file's name and eight zeros follow the last one, still on the stack.
#![expect(
    unsafe_code,
    reason = "there is no Rust before the C library is set up"
)]

use std::arch::global_asm;

/// A word of the command line as the number that its first eight bytes are, end included.
const fn word(text: &[u8; 8]) -> u64 {
    u64::from_le_bytes(*text)
}

global_asm!(
    ".globl hostd_oci_entry",
    ".type hostd_oci_entry, @function",
    "hostd_oci_entry:",
    // The stack: the count, as many pointers to arguments, zero, pointers to variables, zero.
    "mov r12, [rsp]",
    "lea r13, [rsp + 8]",
    "lea r14, [r13 + 8 * r12 + 8]",
    // Only what enters a container (`Verb::enters`) is worth it. Its word may stand for something else
    // on the command line: then it was done in vain.
    "mov rcx, r13",
    "2:",
    "mov rdx, [rcx]",
    "test rdx, rdx",
    "jz 4f",
    "add rcx, 8",
    "mov rax, [rdx]",
    "movabs rdx, {monitor}",
    "cmp rax, rdx",
    "je 3f",
    "shl rax, 8", // Seven bytes are left,
    "movabs rdx, {create}",
    "cmp rax, rdx",
    "je 3f",
    "shl rax, 16", // five,
    "movabs rdx, {exec}",
    "cmp rax, rdx",
    "je 3f",
    "shl rax, 8", // four.
    "movabs rdx, {run}",
    "cmp rax, rdx",
    "jne 2b",
    // statfs: nothing to do on a mount that is read-only, as this one is the second time.
    "3:",
    "sub rsp, {room}",
    "lea rdi, [rip + 5f]",
    "mov rsi, rsp",
    "mov eax, {statfs}",
    "syscall",
    "test rax, rax",
    "jnz 6f",
    "test qword ptr [rsp + {flags}], {read_only}",
    "jnz 6f",
    // open_tree: a copy of the mount, with nothing but the program's file.
    "mov edi, {here}",
    "lea rsi, [rip + 5f]",
    "mov edx, {copy}",
    "mov eax, {open_tree}",
    "syscall",
    "test rax, rax",
    "js 6f",
    "mov r15, rax",
    // mount_setattr: read-only. The structure is four numbers: set, clear, propagation, namespace.
    "mov qword ptr [rsp], {set}",
    "mov qword ptr [rsp + 8], 0",
    "mov qword ptr [rsp + 16], 0",
    "mov qword ptr [rsp + 24], 0",
    "mov rdi, r15",
    "lea rsi, [rip + 7f]",
    "mov edx, {itself}",
    "mov r10, rsp",
    "mov r8d, 32",
    "mov eax, {mount_setattr}",
    "syscall",
    "test rax, rax",
    "jnz 6f",
    // execveat, which returns only if it fails.
    "mov rdi, r15",
    "lea rsi, [rip + 7f]",
    "mov rdx, r13",
    "mov r10, r14",
    "mov r8d, {itself}",
    "mov eax, {execveat}",
    "syscall",
    "6:",
    "add rsp, {room}",
    // As the kernel left it: no function to call at the end.
    "4:",
    "xor edx, edx",
    "jmp _start",
    "5:",
    ".asciz \"/proc/self/exe\"",
    "7:",
    ".byte 0",
    ".size hostd_oci_entry, . - hostd_oci_entry",
    monitor = const word(b"monitor\0"),
    create = const word(b"create\0\0") << 8,
    exec = const word(b"exec\0\0\0\0") << 24,
    run = const word(b"run\0\0\0\0\0") << 32,
    room = const 128, // `struct statfs` takes 120 bytes.
    // The flags come after the fragment size; the crate has no name for them.
    flags = const std::mem::offset_of!(libc::statfs, f_frsize) + 8,
    read_only = const libc::ST_RDONLY,
    here = const libc::AT_FDCWD,
    copy = const libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC,
    itself = const libc::AT_EMPTY_PATH,
    set = const libc::MOUNT_ATTR_RDONLY,
    statfs = const libc::SYS_statfs,
    open_tree = const libc::SYS_open_tree,
    mount_setattr = const libc::SYS_mount_setattr,
    execveat = const libc::SYS_execveat,
);
