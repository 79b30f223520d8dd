//! From rules to a program of the kernel's filter machine (Linux, classic BPF on `seccomp_data`).
//!
//! The program is a binary search for the number of the call. The usual list of comparisons is as
//! good once it is installed, since the kernel remembers which calls are always allowed; but to find
//! that out it runs the program for every number that there is, and it translates each instruction,
//! which for a list takes longer than the rest of what a thread needs to start.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::sock_filter;

use super::When;

/// Instructions.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_NOT_LESS: u16 = 0x35;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// What a program may return.
const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;
const KILL: u32 = 0x8000_0000;

/// Places in `seccomp_data`, and the only value of the architecture that we are called with.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;
const X86_64: u32 = 0xc000_003e;

type Program = Vec<sock_filter>;

/// All that is permitted of one call.
type Call<'a> = (u32, Vec<&'a When>);

/// The program that permits these calls and traps all others. Of arguments, the lower 32 bits count.
pub(super) fn compile<'a>(rules: impl Iterator<Item = (c_long, &'a When)>) -> Program {
    let mut calls: BTreeMap<u32, Vec<&When>> = BTreeMap::new();
    for (call, when) in rules {
        let number = u32::try_from(call).expect("numbers of system calls are small");
        calls.entry(number).or_default().push(when);
    }
    let calls: Vec<Call<'_>> = calls.into_iter().collect();
    let mut program = vec![
        plain(LOAD, ARCHITECTURE_AT),
        branch(JUMP_IF_EQUAL, X86_64, 1, 0),
        plain(RETURN, KILL),
        plain(LOAD, NUMBER_AT),
    ];
    program.extend(search(&calls));
    program
}

/// So many calls share the instructions that end the program, which jumps must reach.
const BLOCK_CALLS_MAX: usize = 32;

/// Finds the call among `calls`, which are in order. Ends in all cases.
fn search(calls: &[Call<'_>]) -> Program {
    if calls.len() <= BLOCK_CALLS_MAX {
        return block(calls);
    }
    let (lower, higher) = calls.split_at(calls.len() / 2);
    let below = search(lower);
    let skip = u32::try_from(below.len()).expect("programs are short");
    let mut program = vec![
        branch(JUMP_IF_NOT_LESS, higher[0].0, 0, 1),
        plain(JUMP, skip),
    ];
    program.extend(below);
    program.extend(search(higher));
    program
}

/// Where a conditional jump leads.
#[derive(Clone, Copy)]
enum Goal {
    /// So many instructions further.
    Skip(usize),
    Trap,
    Allow,
}

use Goal::{Allow, Skip, Trap};

/// A load, or a conditional jump: code, operand, and the two goals.
type Step = (u16, u32, Goal, Goal);

/// A few calls, and behind them the two ends.
fn block(calls: &[Call<'_>]) -> Program {
    let mut steps = Vec::new();
    tree(calls, &mut steps);
    let length = steps.len();
    let mut program = Program::new();
    for (at, (code, operand, then, otherwise)) in steps.into_iter().enumerate() {
        let left = length - at - 1;
        let distance = |goal| match goal {
            Skip(count) => count,
            Trap => left,
            Allow => left + 1,
        };
        program.push(branch(code, operand, distance(then), distance(otherwise)));
    }
    program.extend([plain(RETURN, TRAP), plain(RETURN, ALLOW)]);
    program
}

fn tree(calls: &[Call<'_>], steps: &mut Vec<Step>) {
    match calls {
        [] => {}
        [(number, whens)] if whens.iter().any(|when| matches!(when, When::Always)) => {
            steps.push((JUMP_IF_EQUAL, *number, Allow, Trap));
        }
        [(number, whens)] => {
            steps.push((JUMP_IF_EQUAL, *number, Skip(0), Trap));
            arguments(whens, steps);
        }
        _ => {
            let (lower, higher) = calls.split_at(calls.len() / 2);
            let mut below = Vec::new();
            tree(lower, &mut below);
            let first = higher[0].0;
            steps.push((JUMP_IF_NOT_LESS, first, Skip(below.len()), Skip(0)));
            steps.extend(below);
            tree(higher, steps);
        }
    }
}

/// Decides about a call of which any of `whens` permits some.
fn arguments(whens: &[&When], steps: &mut Vec<Step>) {
    for (index, when) in whens.iter().enumerate() {
        let otherwise = if index + 1 == whens.len() {
            Trap
        } else {
            Skip(0)
        };
        match when {
            When::Always => {}
            When::OneOf(argument, values) => {
                steps.push(load_argument(*argument));
                for (index, value) in values.iter().enumerate() {
                    let last = index + 1 == values.len();
                    let otherwise = if last { otherwise } else { Skip(0) };
                    steps.push((JUMP_IF_EQUAL, lower_half(*value), Allow, otherwise));
                }
            }
            When::Without(argument, bits) => {
                steps.push(load_argument(*argument));
                // Any bit: on to the next rule, or to the end.
                let bits = lower_half(*bits);
                steps.push((JUMP_IF_ANY_BIT, bits, otherwise, Allow));
            }
        }
    }
}

fn load_argument(index: u8) -> Step {
    (LOAD, ARGUMENTS_AT + 8 * u32::from(index), Skip(0), Skip(0))
}

fn lower_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("it is 32 bits")
}

fn plain(code: u16, operand: u32) -> sock_filter {
    branch(code, operand, 0, 0)
}

/// How many instructions are skipped if the condition holds, and if it does not.
fn branch(code: u16, operand: u32, then: usize, otherwise: usize) -> sock_filter {
    let skip = |count| u8::try_from(count).expect("a rule has a few values");
    sock_filter {
        code,
        jt: skip(then),
        jf: skip(otherwise),
        k: operand,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Rule;
    use super::super::tests::THREADS;
    use super::*;

    /// What the kernel does with a program; and in how many steps.
    fn run(program: &Program, architecture: u32, number: u32, arguments: [u64; 6]) -> (u32, usize) {
        let (mut at, mut value, mut steps) = (0, 0, 0);
        loop {
            let instruction = &program[at];
            at += 1;
            steps += 1;
            let taken = match instruction.code {
                LOAD if instruction.k == NUMBER_AT => {
                    value = number;
                    continue;
                }
                LOAD if instruction.k == ARCHITECTURE_AT => {
                    value = architecture;
                    continue;
                }
                LOAD => {
                    let offset = instruction.k - ARGUMENTS_AT;
                    assert_eq!(offset % 8, 0);
                    value = lower_half(arguments[usize::try_from(offset / 8).unwrap()]);
                    continue;
                }
                JUMP => {
                    at += usize::try_from(instruction.k).unwrap();
                    continue;
                }
                RETURN => return (instruction.k, steps),
                JUMP_IF_EQUAL => value == instruction.k,
                JUMP_IF_NOT_LESS => value >= instruction.k,
                JUMP_IF_ANY_BIT => value & instruction.k != 0,
                other => panic!("instruction {other:#x}"),
            };
            at += usize::from(if taken {
                instruction.jt
            } else {
                instruction.jf
            });
        }
    }

    fn permits(rule: &Rule, number: u32, arguments: [u64; 6]) -> bool {
        u32::try_from(rule.call) == Ok(number)
            && match rule.when {
                When::Always => true,
                When::OneOf(index, values) => values.contains(&arguments[usize::from(index)]),
                When::Without(index, bits) => arguments[usize::from(index)] & bits == 0,
            }
    }

    #[test]
    fn a_program_permits_what_its_rules_do_and_nothing_else() {
        for thread in THREADS {
            let rules: Vec<&Rule> = thread.rules().into_iter().flatten().collect();
            let program = compile(rules.iter().map(|rule| (rule.call, &rule.when)));
            let mut values = vec![0, 1, 4, 7, 0xffff_ffff];
            for rule in &rules {
                if let When::OneOf(_, of) = rule.when {
                    values.extend(of.iter().flat_map(|value| [*value, value + 1]));
                }
            }
            for number in (0..1024).chain([1 << 30, 1 << 30 | 16, u32::MAX]) {
                for value in &values {
                    let arguments = [*value; 6];
                    let wanted = rules.iter().any(|rule| permits(rule, number, arguments));
                    let (got, steps) = run(&program, X86_64, number, arguments);
                    let want = if wanted { ALLOW } else { TRAP };
                    assert_eq!(got, want, "call {number} with {value:#x}");
                    assert!(steps < 48, "{steps} steps for call {number}");
                }
            }
            assert_eq!(run(&program, 0x4000_0003, 0, [0; 6]).0, KILL);
            assert!(program.len() < 3 * rules.len() + 64, "{}", program.len());
        }
    }

    #[test]
    fn without_rules_nothing_is_permitted() {
        let program = compile(std::iter::empty());
        assert_eq!(run(&program, X86_64, 0, [0; 6]).0, TRAP);
    }
}
