//! Device rules as a program for cgroup v2: a small assembler for the dozen instructions that it
//! needs (Documentation/bpf/standardization/instruction-set.rst).
//!
//! The kernel calls the program for each attempt to open or make a device node, with the type, the
//! numbers and the bits of access. The rules are asked from the last to the first; each settles the
//! bits that it is about, until one denies a bit or all are allowed.

use super::devices::{Kind, Rule, Rules};

/// One instruction, in the kernel's layout (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the low, source in the high four bits.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// The result, and room to compute.
const RESULT: u8 = 0;
/// At entry, the address of the kernel's `struct bpf_cgroup_dev_ctx`.
const CONTEXT: u8 = 1;
/// The bits of access that no rule has settled yet.
const ACCESS: u8 = 2;
const TYPE: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// The kernel's `BPF_DEVCG_DEV_BLOCK` and `BPF_DEVCG_DEV_CHAR`.
const TYPE_BLOCK: i32 = 1;
const TYPE_CHARACTER: i32 = 2;

impl Instruction {
    const fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Instruction {
            code,
            registers: destination | source << 4,
            offset,
            immediate,
        }
    }

    const fn with_immediate(code: u8, destination: u8, immediate: i32) -> Self {
        Instruction::new(code, destination, 0, 0, immediate)
    }
}

/// Makes the program for `rules`.
pub(super) fn program(rules: &Rules) -> Vec<Instruction> {
    let mut program = vec![
        Instruction::new(LOAD_WORD, ACCESS, CONTEXT, 0, 0),
        Instruction::new(MOVE_REGISTER, TYPE, ACCESS, 0, 0),
        Instruction::with_immediate(AND, TYPE, 0xffff),
        Instruction::with_immediate(SHIFT_RIGHT, ACCESS, 16),
        Instruction::new(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        Instruction::new(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.rules.iter().rev() {
        program.extend(rule_program(rule));
    }
    program.extend(answer(rules.otherwise));
    program
}

fn answer(allow: bool) -> [Instruction; 2] {
    [
        Instruction::with_immediate(MOVE, RESULT, i32::from(allow)),
        Instruction::new(EXIT, 0, 0, 0, 0),
    ]
}

fn rule_program(rule: &Rule) -> Vec<Instruction> {
    let devices = rule.devices;
    let kind = match devices.kind {
        Kind::Block => TYPE_BLOCK,
        Kind::Character => TYPE_CHARACTER,
    };
    // The numbers have 12 and 20 bits, which `Rules::new` has checked.
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    let conditions = [
        Some((TYPE, kind)),
        devices.major.map(|major| (MAJOR, number(major))),
        devices.minor.map(|minor| (MINOR, number(minor))),
    ];
    let access = i32::from(devices.access.0);
    let mut part = Vec::new();
    for (register, value) in conditions.into_iter().flatten() {
        part.push(Instruction::with_immediate(
            JUMP_IF_NOT_EQUAL,
            register,
            value,
        ));
    }
    if rule.allow {
        part.push(Instruction::with_immediate(AND, ACCESS, !access));
        part.push(Instruction::with_immediate(JUMP_IF_NOT_EQUAL, ACCESS, 0));
    } else {
        part.push(Instruction::new(MOVE_REGISTER, RESULT, ACCESS, 0, 0));
        part.push(Instruction::with_immediate(AND, RESULT, access));
        part.push(Instruction::with_immediate(JUMP_IF_EQUAL, RESULT, 0));
    }
    part.extend(answer(rule.allow));
    // Every jump leaves the part; an offset counts from the instruction after the jump.
    let end = part.len();
    for (index, instruction) in part.iter_mut().enumerate() {
        if matches!(instruction.code, JUMP_IF_EQUAL | JUMP_IF_NOT_EQUAL) {
            instruction.offset = i16::try_from(end - index - 1).unwrap_or(i16::MAX);
        }
    }
    part
}

#[cfg(test)]
mod tests {
    use super::{
        super::devices::{Access, Devices, tests::rules},
        *,
    };

    /// Runs the program as the kernel would.
    fn run(program: &[Instruction], devices: &Devices) -> bool {
        let kind = match devices.kind {
            Kind::Block => 1u32,
            Kind::Character => 2,
        };
        let words = [
            u32::from(devices.access.0) << 16 | kind,
            devices.major.unwrap(),
            devices.minor.unwrap(),
        ];
        let mut registers = [0i64; 11];
        let mut next = 0usize;
        loop {
            let at = program[next];
            let destination = usize::from(at.registers & 15);
            let source = usize::from(at.registers >> 4);
            let immediate = i64::from(at.immediate);
            next += 1;
            let mut jump = |condition: bool| {
                if condition {
                    next += usize::try_from(at.offset).unwrap();
                }
            };
            match at.code {
                LOAD_WORD => {
                    assert_eq!(source, usize::from(CONTEXT));
                    registers[destination] =
                        i64::from(words[usize::try_from(at.offset).unwrap() / 4]);
                }
                AND => registers[destination] &= immediate,
                SHIFT_RIGHT => registers[destination] >>= immediate,
                MOVE => registers[destination] = immediate,
                MOVE_REGISTER => registers[destination] = registers[source],
                JUMP_IF_EQUAL => jump(registers[destination] == immediate),
                JUMP_IF_NOT_EQUAL => jump(registers[destination] != immediate),
                EXIT => return registers[0] != 0,
                code => panic!("{code:#x} is no instruction of ours"),
            }
        }
    }

    /// The meaning, said again without a program: per bit, the last rule that matches decides.
    fn expected(rules: &Rules, asked: &Devices) -> bool {
        [1u8, 2, 4]
            .into_iter()
            .filter(|bit| asked.access.0 & bit != 0)
            .all(|bit| {
                let matching = rules.rules.iter().rev().find(|rule| {
                    let devices = rule.devices;
                    devices.kind == asked.kind
                        && (devices.major.is_none() || devices.major == asked.major)
                        && (devices.minor.is_none() || devices.minor == asked.minor)
                        && devices.access.0 & bit != 0
                });
                matching.map_or(rules.otherwise, |rule| rule.allow)
            })
    }

    #[test]
    fn the_program_decides_each_bit_by_the_last_rule_that_matches() {
        let lists = [
            "[]",
            r#"[{"allow":true,"access":"rwm"}]"#,
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"c","major":1,"access":"w"}]"#,
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"a","major":8,"minor":1,"access":"rw"},
                {"allow":false,"type":"b","access":"w"},
                {"allow":true,"type":"b","major":8,"minor":0,"access":"w"}]"#,
            r#"[{"allow":true,"type":"c","major":1,"minor":3,"access":"r"},
                {"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","minor":3,"access":"rm"}]"#,
        ];
        for list in lists {
            let rules = rules(list).unwrap();
            let program = program(&rules);
            for kind in [Kind::Block, Kind::Character] {
                for (major, minor) in [(1, 3), (1, 9), (8, 0), (8, 1), (136, 77), (10, 3)] {
                    for access in 1..=7 {
                        let asked = Devices {
                            kind,
                            major: Some(major),
                            minor: Some(minor),
                            access: Access(access),
                        };
                        let got = run(&program, &asked);
                        assert_eq!(got, expected(&rules, &asked), "{list} {asked:?}");
                    }
                }
            }
        }
    }
}
