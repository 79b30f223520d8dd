//! What a profile says about each call: names become numbers, actions become what the kernel
//! returns, and rules for one call come together.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall,
};

use super::{SeccompError, architecture::Architecture};

/// The arguments that a system call can have.
const ARGUMENTS_MAX: usize = 6;

/// The kernel's MAX_ERRNO; it would clamp what is above.
const ERRNO_MAX: u32 = 4095;

/// What a filter returns to the kernel: an action with sixteen bits of data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Return(pub(super) u32);

impl Return {
    pub(super) const KILL_THREAD: Return = Return(0);
    pub(super) const NO_SUCH_CALL: Return = Return(0x0005_0000 | libc::ENOSYS.cast_unsigned());

    fn new(
        field: &str,
        action: LinuxSeccompAction,
        errno: Option<u32>,
    ) -> Result<Return, SeccompError> {
        let takes_errno = matches!(
            action,
            LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace
        );
        let reason = match errno {
            Some(_) if !takes_errno => "its action returns no errno",
            Some(errno) if errno > ERRNO_MAX => "it is at most 4095",
            _ => return Ok(Return(action.as_u32(errno))),
        };
        Err(SeccompError::Invalid {
            field: field.to_owned(),
            value: errno.unwrap_or_default().to_string(),
            reason,
        })
    }

    /// Whether the call is made: allowed, or allowed and logged.
    pub(super) fn permits(self) -> bool {
        matches!(self.0, 0x7fff_0000 | 0x7ffc_0000)
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// Equal when only the bits of the mask are left of the argument.
    Masked(u64),
}

/// A comparison of one argument, unsigned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Condition {
    pub(super) argument: usize,
    pub(super) operator: Operator,
    pub(super) value: u64,
}

/// Conditions that must all hold, and what is then returned.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Case {
    pub(super) conditions: Vec<Condition>,
    pub(super) result: Return,
}

/// What becomes of one call.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    Always(Return),
    /// The first case that matches decides, and the default action if none does.
    Cases(Vec<Case>),
}

/// All about one architecture.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) architecture: Architecture,
    pub(super) outcomes: BTreeMap<u32, Outcome>,
    /// Numbers above it are not in the profile, and do not exist as far as the process can tell.
    pub(super) last: Option<u32>,
}

#[derive(Debug)]
pub(super) struct Rules {
    pub(super) otherwise: Return,
    pub(super) sections: Vec<Section>,
}

impl Rules {
    pub(super) fn new(seccomp: &LinuxSeccomp) -> Result<Rules, SeccompError> {
        let invalid = |field: String, value: &str, reason| SeccompError::Invalid {
            field,
            value: value.to_owned(),
            reason,
        };
        if seccomp.default_action() == LinuxSeccompAction::ScmpActNotify {
            let reason = "the listener itself would have to be asked about its calls";
            return Err(invalid(
                "defaultAction".to_owned(),
                "SCMP_ACT_NOTIFY",
                reason,
            ));
        }
        let errno = seccomp.default_errno_ret();
        let otherwise = Return::new("defaultErrnoRet", seccomp.default_action(), errno)?;
        let mut sections: Vec<Section> = Vec::new();
        for architecture in architectures(seccomp) {
            sections.push(Section {
                architecture,
                outcomes: BTreeMap::new(),
                last: None,
            });
        }
        for (index, syscall) in seccomp.syscalls().iter().flatten().enumerate() {
            let field = format!("syscalls[{index}]");
            let notify = syscall.action() == LinuxSeccompAction::ScmpActNotify;
            let unanswered = |name: &&String| matches!(name.as_str(), "write" | "sendmsg");
            if let (true, Some(name)) = (notify, syscall.names().iter().find(unanswered)) {
                // The agent hears of the listener by it, and could not answer before.
                let reason = match name.as_str() {
                    "write" => "SCMP_ACT_NOTIFY cannot be used for the write syscall",
                    _ => "SCMP_ACT_NOTIFY cannot be used for the sendmsg syscall",
                };
                return Err(invalid(format!("{field}.names"), name, reason));
            }
            if syscall.names().is_empty() {
                let reason = "a rule is about one system call at least";
                return Err(invalid(format!("{field}.names"), "[]", reason));
            }
            let errno = format!("{field}.errnoRet");
            let result = Return::new(&errno, syscall.action(), syscall.errno_ret())?;
            let cases = cases(&field, syscall)?;
            for section in &mut sections {
                for name in syscall.names() {
                    section.add(name, &cases, result, otherwise);
                }
            }
        }
        Ok(Rules {
            otherwise,
            sections,
        })
    }

    /// Whether calls that the profile is too old to know are to look as if the kernel were.
    pub(super) fn hides_new_calls(&self) -> bool {
        !self.otherwise.permits() && self.otherwise != Return::NO_SUCH_CALL
    }
}

/// The architectures to filter. Those of other processors cannot occur on this kernel.
fn architectures(seccomp: &LinuxSeccomp) -> Vec<Architecture> {
    let mut architectures = vec![Architecture::X86_64];
    for (listed, architecture) in [
        (Arch::ScmpArchX86, Architecture::X86),
        (Arch::ScmpArchX32, Architecture::X32),
    ] {
        if seccomp
            .architectures()
            .iter()
            .flatten()
            .any(|have| *have == listed)
        {
            architectures.push(architecture);
        }
    }
    architectures
}

/// The conditions of a rule: a list of alternatives, each of which must hold in all parts.
fn cases(field: &str, syscall: &LinuxSyscall) -> Result<Vec<Vec<Condition>>, SeccompError> {
    let mut conditions = Vec::new();
    for (index, argument) in syscall.args().iter().flatten().enumerate() {
        if argument.index() >= ARGUMENTS_MAX {
            return Err(SeccompError::Invalid {
                field: format!("{field}.args[{index}].index"),
                value: argument.index().to_string(),
                reason: "a call has the arguments 0 to 5",
            });
        }
        conditions.push(condition(argument));
    }
    let mut seen = [false; ARGUMENTS_MAX];
    let twice = conditions
        .iter()
        .any(|condition| std::mem::replace(&mut seen[condition.argument], true));
    if twice {
        return Ok(conditions
            .into_iter()
            .map(|condition| vec![condition])
            .collect());
    }
    Ok(vec![conditions])
}

fn condition(argument: &LinuxSeccompArg) -> Condition {
    let (operator, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (Operator::NotEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpLt => (Operator::Less, argument.value()),
        LinuxSeccompOperator::ScmpCmpLe => (Operator::LessOrEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpEq => (Operator::Equal, argument.value()),
        LinuxSeccompOperator::ScmpCmpGe => (Operator::GreaterOrEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpGt => (Operator::Greater, argument.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            Operator::Masked(argument.value()),
            argument.value_two().unwrap_or(0),
        ),
    };
    Condition {
        argument: argument.index(),
        operator,
        value,
    }
}

impl Section {
    fn add(&mut self, name: &str, cases: &[Vec<Condition>], result: Return, otherwise: Return) {
        let unconditional = cases.iter().all(Vec::is_empty);
        if let Some(number) = self.architecture.number(name) {
            // A rule that changes nothing says nevertheless that the call exists.
            self.last = self.last.max(Some(number));
            if result != otherwise {
                if unconditional {
                    self.always(number, result);
                } else {
                    self.cases(number, cases, result);
                }
            }
        }
        let Some((number, part)) = self.architecture.multiplexed(name) else {
            return;
        };
        self.last = self.last.max(Some(number));
        // The conditions are about arguments that are out of sight.
        if result != otherwise && (unconditional || !result.permits()) {
            let condition = Condition {
                argument: 0,
                operator: Operator::Equal,
                value: u64::from(part),
            };
            self.cases(number, &[vec![condition]], result);
        }
    }

    fn always(&mut self, number: u32, result: Return) {
        match self.outcomes.get(&number) {
            Some(Outcome::Always(_)) => {}
            Some(Outcome::Cases(_)) | None => {
                self.outcomes.insert(number, Outcome::Always(result));
            }
        }
    }

    fn cases(&mut self, number: u32, cases: &[Vec<Condition>], result: Return) {
        let outcome = self
            .outcomes
            .entry(number)
            .or_insert_with(|| Outcome::Cases(Vec::new()));
        if let Outcome::Cases(present) = outcome {
            present.extend(cases.iter().map(|conditions| Case {
                conditions: conditions.clone(),
                result,
            }));
        }
    }
}
