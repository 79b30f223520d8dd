//! Rules as a classic BPF program (Documentation/userspace-api/seccomp_filter.rst).
//!
//! The kernel runs it for every call, so it is a binary search: numbers with the same outcome that
//! follow each other are one range, and each comparison halves what is left of the ranges.

use super::{
    architecture::{Architecture, X32_BIT},
    rules::{Case, Condition, Operator, Outcome, Return, Rules, Section},
};

/// One instruction, in the kernel's layout (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub(super) struct Instruction {
    pub(super) code: u16,
    /// How many instructions to skip if the comparison is true, and if it is false.
    pub(super) yes: u8,
    pub(super) no: u8,
    pub(super) value: u32,
}

pub(super) const LOAD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const JUMP_EQUAL: u16 = 0x15;
pub(super) const JUMP_GREATER: u16 = 0x25;
pub(super) const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

/// Offsets in the kernel's `struct seccomp_data`.
const NUMBER: u32 = 0;
const AUDIT: u32 = 4;
const ARGUMENTS: u32 = 16;

/// A tracer that wants a call skipped makes its number this; it has no x32 mark.
const SKIPPED: u32 = u32::MAX;

const fn plain(code: u16, value: u32) -> Instruction {
    Instruction {
        code,
        yes: 0,
        no: 0,
        value,
    }
}

pub(super) fn program(rules: &Rules) -> Vec<Instruction> {
    let section = |architecture| {
        rules
            .sections
            .iter()
            .find(|section| section.architecture == architecture)
    };
    let numbers = |architecture| match section(architecture) {
        Some(section) => search(&ranges(section, rules), rules.otherwise),
        None => vec![plain(RETURN, Return::KILL_THREAD.0)],
    };
    // x86-64 and x32 share a name, so the number tells.
    let mut native = vec![plain(LOAD, NUMBER)];
    let (narrow, wide) = (numbers(Architecture::X32), numbers(Architecture::X86_64));
    native.extend(branch(
        JUMP_EQUAL,
        SKIPPED,
        vec![plain(RETURN, rules.otherwise.0)],
        branch(JUMP_GREATER_OR_EQUAL, X32_BIT, narrow, wide),
    ));
    let mut other = vec![plain(LOAD, NUMBER)];
    other.extend(numbers(Architecture::X86));

    let mut program = vec![plain(LOAD, AUDIT)];
    let kill = vec![plain(RETURN, Return::KILL_THREAD.0)];
    let other = match section(Architecture::X86) {
        Some(_) => branch(JUMP_EQUAL, Architecture::X86.audit(), other, kill),
        None => kill,
    };
    program.extend(branch(
        JUMP_EQUAL,
        Architecture::X86_64.audit(),
        native,
        other,
    ));
    program
}

/// A comparison and its two ways on. Both end in a return, so the first needs no jump over the
/// other.
fn branch(code: u16, value: u32, yes: Vec<Instruction>, no: Vec<Instruction>) -> Vec<Instruction> {
    let mut program = Vec::with_capacity(yes.len() + no.len() + 2);
    let instruction = plain(code, value);
    match u8::try_from(no.len()) {
        Ok(skip) => program.push(Instruction {
            yes: skip,
            ..instruction
        }),
        // A comparison reaches 255 instructions far, a jump everywhere.
        Err(_) => {
            program.push(Instruction {
                no: 1,
                ..instruction
            });
            program.push(plain(JUMP, u32::try_from(no.len()).unwrap_or(u32::MAX)));
        }
    }
    program.extend(no);
    program.extend(yes);
    program
}

/// What becomes of the numbers from `first` up to the next range.
#[derive(Debug)]
struct Range<'a> {
    first: u32,
    outcome: RangeOutcome<'a>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum RangeOutcome<'a> {
    Always(Return),
    Cases(&'a [Case], Architecture),
}

/// All numbers of an architecture, as few ranges as possible.
fn ranges<'a>(section: &'a Section, rules: &Rules) -> Vec<Range<'a>> {
    let mut ranges: Vec<Range<'a>> = Vec::new();
    let mut push = |first, outcome| {
        if ranges.last().is_none_or(|last| last.outcome != outcome) {
            ranges.push(Range { first, outcome });
        }
    };
    let otherwise = RangeOutcome::Always(rules.otherwise);
    let mut next = 0;
    for (&number, outcome) in &section.outcomes {
        if number > next {
            push(next, otherwise);
        }
        let outcome = match outcome {
            Outcome::Always(result) => RangeOutcome::Always(*result),
            Outcome::Cases(cases) => RangeOutcome::Cases(cases, section.architecture),
        };
        push(number, outcome);
        next = number + 1;
    }
    let newer = match section.last {
        // A profile that names nothing is not old.
        Some(last) if rules.hides_new_calls() => {
            if next <= last {
                push(next, otherwise);
            }
            next = last + 1;
            RangeOutcome::Always(Return::NO_SUCH_CALL)
        }
        _ => otherwise,
    };
    push(next, newer);
    ranges
}

fn search(ranges: &[Range<'_>], otherwise: Return) -> Vec<Instruction> {
    match ranges {
        [] => vec![plain(RETURN, otherwise.0)],
        [only] => match only.outcome {
            RangeOutcome::Always(result) => vec![plain(RETURN, result.0)],
            RangeOutcome::Cases(cases, architecture) => compare(cases, architecture, otherwise),
        },
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let first = high[0].first;
            let (low, high) = (search(low, otherwise), search(high, otherwise));
            branch(JUMP_GREATER_OR_EQUAL, first, high, low)
        }
    }
}

/// The cases of one call, in their order.
fn compare(cases: &[Case], architecture: Architecture, otherwise: Return) -> Vec<Instruction> {
    let mut program = Vec::new();
    for case in cases {
        program.extend(case_program(case, architecture));
    }
    program.push(plain(RETURN, otherwise.0));
    program
}

/// Where a comparison goes on. A case has six conditions of at most six instructions, so each is
/// within reach of a comparison.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Goal {
    /// The next instruction.
    Next,
    /// The next condition: this one holds.
    Holds,
    /// The next case: this one does not match.
    Fails,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Plain(Instruction),
    Compare(u16, u32, Goal, Goal),
}

fn case_program(case: &Case, architecture: Architecture) -> Vec<Instruction> {
    let conditions: Vec<Vec<Step>> = case
        .conditions
        .iter()
        .map(|condition| steps(condition, architecture))
        .collect();
    // The return at the end is one more.
    let end = conditions.iter().map(Vec::len).sum::<usize>() + 1;
    let mut program = Vec::with_capacity(end);
    let mut holds = 0;
    for steps in conditions {
        holds += steps.len();
        for step in steps {
            let here = program.len() + 1;
            let skip = |goal| {
                let target = match goal {
                    Goal::Next => here,
                    Goal::Holds => holds,
                    Goal::Fails => end,
                };
                u8::try_from(target - here).unwrap_or(u8::MAX)
            };
            program.push(match step {
                Step::Plain(instruction) => instruction,
                Step::Compare(code, value, yes, no) => Instruction {
                    code,
                    yes: skip(yes),
                    no: skip(no),
                    value,
                },
            });
        }
    }
    program.push(plain(RETURN, case.result.0));
    program
}

/// One condition: the upper half decides, or is equal and leaves it to the lower half. On a narrow
/// architecture only the lower half counts.
fn steps(condition: &Condition, architecture: Architecture) -> Vec<Step> {
    let (holds, fails) = (Goal::Holds, Goal::Fails);
    let mask = if let Operator::Masked(mask) = condition.operator {
        mask
    } else {
        u64::MAX
    };
    let (mask_high, mask_low) = halves(mask);
    let (high, low) = halves(condition.value);
    // How the upper half decides if it is greater, and if it is less.
    let (greater, less) = match condition.operator {
        Operator::Equal | Operator::Masked(_) => (fails, fails),
        Operator::NotEqual => (holds, holds),
        Operator::Greater | Operator::GreaterOrEqual => (holds, fails),
        Operator::Less | Operator::LessOrEqual => (fails, holds),
    };
    let decision = match condition.operator {
        Operator::Equal | Operator::Masked(_) => Step::Compare(JUMP_EQUAL, low, holds, fails),
        Operator::NotEqual => Step::Compare(JUMP_EQUAL, low, fails, holds),
        Operator::Greater => Step::Compare(JUMP_GREATER, low, holds, fails),
        Operator::GreaterOrEqual => Step::Compare(JUMP_GREATER_OR_EQUAL, low, holds, fails),
        Operator::Less => Step::Compare(JUMP_GREATER_OR_EQUAL, low, fails, holds),
        Operator::LessOrEqual => Step::Compare(JUMP_GREATER, low, fails, holds),
    };
    // An argument is below six.
    let offset = ARGUMENTS + 8 * u32::try_from(condition.argument).unwrap_or(0);
    let load = |offset, mask| {
        let and = (mask != u32::MAX).then(|| Step::Plain(plain(AND, mask)));
        [Some(Step::Plain(plain(LOAD, offset))), and]
            .into_iter()
            .flatten()
    };
    let mut steps = Vec::new();
    if architecture.is_wide() {
        steps.extend(load(offset + 4, mask_high));
        if greater != less {
            steps.push(Step::Compare(JUMP_GREATER, high, greater, Goal::Next));
        }
        steps.push(Step::Compare(JUMP_EQUAL, high, Goal::Next, less));
    }
    steps.extend(load(offset, mask_low));
    steps.push(decision);
    steps
}

/// The upper and the lower half.
fn halves(value: u64) -> (u32, u32) {
    let half = |value: u64| u32::try_from(value & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    (half(value >> 32), half(value))
}
