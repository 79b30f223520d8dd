//! Random profiles: the program decides as the rules read, call by call.

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};
use proptest::{collection::vec, prelude::*, sample::select};

use super::{architecture::Architecture, compile, tests::evaluate};

const X86_64: u32 = 0xc000_003e;

/// Few calls, so that rules meet; the last is never in a rule, and makes no other one new.
const NAMES: [&str; 6] = ["read", "lseek", "dup", "openat", "statx", "close_range"];

/// Values around the edges of the halves.
const VALUES: [u64; 9] = [
    0,
    1,
    5,
    0xffff_fffe,
    0xffff_ffff,
    0x1_0000_0000,
    0x1_0000_0005,
    u64::MAX - 1,
    u64::MAX,
];

fn argument() -> impl Strategy<Value = LinuxSeccompArg> {
    use LinuxSeccompOperator as Op;
    let operators = [
        Op::ScmpCmpNe,
        Op::ScmpCmpLt,
        Op::ScmpCmpLe,
        Op::ScmpCmpEq,
        Op::ScmpCmpGe,
        Op::ScmpCmpGt,
        Op::ScmpCmpMaskedEq,
    ];
    let parts = (
        0usize..6,
        select(operators.to_vec()),
        select(&VALUES[..]),
        select(&VALUES[..]),
    );
    parts.prop_map(|(index, op, value, value_two)| {
        let builder = LinuxSeccompArgBuilder::default()
            .index(index)
            .op(op)
            .value(value);
        builder.value_two(value_two).build().unwrap()
    })
}

fn rule() -> impl Strategy<Value = LinuxSyscall> {
    use LinuxSeccompAction as Action;
    let actions = [
        Action::ScmpActAllow,
        Action::ScmpActTrap,
        Action::ScmpActKillProcess,
    ];
    let names = vec(select(&NAMES[..5]), 1..3);
    let action = select(actions.to_vec());
    (names, action, vec(argument(), 0..4)).prop_map(|(names, action, arguments)| {
        let mut rule = LinuxSyscall::default();
        rule.set_names(names.into_iter().map(str::to_owned).collect());
        rule.set_action(action).set_args(Some(arguments));
        rule
    })
}

fn holds(argument: &LinuxSeccompArg, arguments: [u64; 6]) -> bool {
    let (have, value) = (arguments[argument.index()], argument.value());
    match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => have != value,
        LinuxSeccompOperator::ScmpCmpLt => have < value,
        LinuxSeccompOperator::ScmpCmpLe => have <= value,
        LinuxSeccompOperator::ScmpCmpEq => have == value,
        LinuxSeccompOperator::ScmpCmpGe => have >= value,
        LinuxSeccompOperator::ScmpCmpGt => have > value,
        LinuxSeccompOperator::ScmpCmpMaskedEq => have & value == argument.value_two().unwrap(),
    }
}

fn matches(rule: &LinuxSyscall, arguments: [u64; 6]) -> bool {
    let conditions = rule.args().as_deref().unwrap_or_default();
    let mut indices: Vec<usize> = conditions.iter().map(LinuxSeccompArg::index).collect();
    indices.sort_unstable();
    let count = indices.len();
    indices.dedup();
    if indices.len() < count {
        return conditions
            .iter()
            .any(|condition| holds(condition, arguments));
    }
    conditions
        .iter()
        .all(|condition| holds(condition, arguments))
}

/// The meaning of a profile, as the module says it in words.
fn expected(profile: &LinuxSeccomp, name: &str, arguments: [u64; 6]) -> LinuxSeccompAction {
    let otherwise = profile.default_action();
    let rules: Vec<&LinuxSyscall> = profile
        .syscalls()
        .iter()
        .flatten()
        .filter(|rule| rule.names().iter().any(|have| have == name) && rule.action() != otherwise)
        .collect();
    let unconditional = rules
        .iter()
        .find(|rule| rule.args().iter().flatten().next().is_none());
    let chosen = unconditional.or_else(|| rules.iter().find(|rule| matches(rule, arguments)));
    chosen.map_or(otherwise, |rule| rule.action())
}

proptest! {
    #[test]
    fn the_program_decides_as_the_rules_read(
        rules in vec(rule(), 1..12),
        kills in any::<bool>(),
        calls in vec((select(&NAMES[..5]), vec(select(&VALUES[..]), 6)), 30),
    ) {
        let mut last = LinuxSyscall::default();
        last.set_names(vec![NAMES[5].to_owned()]).set_action(LinuxSeccompAction::ScmpActAllow);
        let mut profile = LinuxSeccomp::default();
        profile.set_syscalls(Some(rules.into_iter().chain([last]).collect()));
        if kills {
            profile.set_default_action(LinuxSeccompAction::ScmpActKill);
        }
        let filter = compile(&profile).unwrap();
        for (name, arguments) in calls {
            let arguments: [u64; 6] = arguments.try_into().unwrap();
            let number = Architecture::X86_64.number(name).unwrap();
            let got = evaluate(&filter, X86_64, number, arguments);
            prop_assert_eq!(got, expected(&profile, name, arguments).as_u32(None), "{}", name);
        }
    }
}
