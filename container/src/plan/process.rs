//! The process of a container, or one more of `exec`: checked, in the form the kernel takes.

use std::collections::HashSet;
use std::ffi::CString;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit,
    PosixRlimitType, Process, Scheduler,
};
use rustix::process::{Resource, Rlimit};
use rustix::termios::Winsize;
use rustix::thread::{CapabilitySet, CpuSet};

use super::PlanError;
use super::capability::Capabilities;
use crate::sys::SchedulerAttributes;

/// What is executed, and as whom.
#[derive(Debug)]
pub(crate) struct ProcessPlan {
    pub(crate) args: Vec<CString>,
    pub(crate) env: Vec<CString>,
    /// Absolute, in the container.
    pub(crate) cwd: PathBuf,
    pub(crate) user: UserPlan,
    pub(crate) capabilities: Capabilities,
    pub(crate) limits: Vec<(Resource, Rlimit)>,
    pub(crate) no_new_privileges: bool,
    pub(crate) oom_score_adj: Option<i32>,
    /// The size of the terminal, if there is to be one.
    pub(crate) terminal: Option<Winsize>,
    /// Class and level as ioprio_set(2) takes them.
    pub(crate) io_priority: Option<i32>,
    pub(crate) scheduler: Option<SchedulerAttributes>,
    pub(crate) labels: Vec<Label>,
    /// The processors that a process of `exec` may use before and after it is in its cgroup.
    pub(crate) affinity: (Option<CpuSet>, Option<CpuSet>),
}

/// The identity of a process, in numbers of the container's user namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct UserPlan {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// The caller's additional groups stay, in place of `groups`.
    pub(crate) keep_groups: bool,
    pub(crate) umask: Option<u32>,
}

/// The label of a mandatory access control system, taken on at exec.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Label {
    AppArmor(String),
    Selinux(String),
}

impl ProcessPlan {
    /// # Errors
    /// The field that is wrong, and why.
    pub(crate) fn new(process: &Process, available: CapabilitySet) -> Result<Self, PlanError> {
        let args = process.args().as_deref().unwrap_or_default();
        match args.first() {
            Some(program) if !program.is_empty() => {}
            Some(_) => {
                let allowed = "it must name a program";
                return Err(PlanError::value("process.args[0]", "", allowed));
            }
            None => {
                let reason = "it is empty or not there; its first word must name a program";
                return Err(PlanError::invalid("process.args", reason));
            }
        }
        if !process.cwd().is_absolute() {
            return Err(PlanError::value(
                "process.cwd",
                process.cwd().display(),
                "it must be an absolute path",
            ));
        }
        let env = process.env().as_deref().unwrap_or_default();
        let nameless = |entry: &&String| entry.find('=').is_none_or(|at| at == 0);
        if let Some((index, entry)) = env.iter().enumerate().find(|(_, entry)| nameless(entry)) {
            return Err(PlanError::value(
                format!("process.env[{index}]"),
                entry,
                "it must be NAME=VALUE with a name",
            ));
        }
        let user = process.user();
        Ok(Self {
            args: strings("process.args", args)?,
            env: strings("process.env", env)?,
            cwd: process.cwd().clone(),
            user: UserPlan {
                uid: user.uid(),
                gid: user.gid(),
                groups: user.additional_gids().clone().unwrap_or_default(),
                keep_groups: false,
                umask: user.umask(),
            },
            capabilities: Capabilities::new(process.capabilities().as_ref(), available),
            limits: limits(process.rlimits().as_deref().unwrap_or_default())?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            oom_score_adj: oom_score_adj(process.oom_score_adj())?,
            terminal: terminal(process)?,
            io_priority: process
                .io_priority()
                .as_ref()
                .map(io_priority)
                .transpose()?,
            scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
            labels: labels(process, Enforced::here())?,
            affinity: affinity(process)?,
        })
    }
}

/// Strings without NUL bytes, which the kernel cannot take.
fn strings(field: &str, list: &[String]) -> Result<Vec<CString>, PlanError> {
    let convert = |(index, text): (usize, &String)| {
        CString::new(text.as_str()).map_err(|_| {
            PlanError::value(
                format!("{field}[{index}]"),
                text,
                "it must not have a NUL byte",
            )
        })
    };
    list.iter().enumerate().map(convert).collect()
}

fn limits(list: &[PosixRlimit]) -> Result<Vec<(Resource, Rlimit)>, PlanError> {
    let mut seen = HashSet::new();
    let mut limits = Vec::with_capacity(list.len());
    for (index, limit) in list.iter().enumerate() {
        let field = format!("process.rlimits[{index}]");
        if !seen.insert(limit.typ().to_string()) {
            return Err(PlanError::value(
                format!("{field}.type"),
                limit.typ(),
                "it is given twice, and may be given once",
            ));
        }
        if limit.soft() > limit.hard() {
            let allowed = format!("it must not be more than hard, which is {}", limit.hard());
            return Err(PlanError::value(
                format!("{field}.soft"),
                limit.soft(),
                &allowed,
            ));
        }
        // RLIM_INFINITY is all ones.
        let value = |value: u64| (value != u64::MAX).then_some(value);
        let limit_value = Rlimit {
            current: value(limit.soft()),
            maximum: value(limit.hard()),
        };
        limits.push((resource(limit.typ()), limit_value));
    }
    Ok(limits)
}

fn resource(name: PosixRlimitType) -> Resource {
    match name {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

fn oom_score_adj(value: Option<i32>) -> Result<Option<i32>, PlanError> {
    match value {
        Some(value) if !(-1000..=1000).contains(&value) => Err(PlanError::invalid(
            "process.oomScoreAdj",
            format!("{value} is not between -1000 and 1000"),
        )),
        value => Ok(value),
    }
}

fn terminal(process: &Process) -> Result<Option<Winsize>, PlanError> {
    if !process.terminal().unwrap_or(false) {
        return Ok(None);
    }
    let (rows, columns) = process
        .console_size()
        .map_or((0, 0), |size| (size.height(), size.width()));
    let convert = |side: &str, value: u64| {
        let field = format!("process.consoleSize.{side}");
        let wrong = |_| PlanError::value(field, value, "it must be less than 65536");
        u16::try_from(value).map_err(wrong)
    };
    Ok(Some(Winsize {
        ws_row: convert("height", rows)?,
        ws_col: convert("width", columns)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }))
}

fn io_priority(priority: &LinuxIOPriority) -> Result<i32, PlanError> {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = i32::try_from(priority.priority()).ok();
    let level = level
        .filter(|level| (0..=7).contains(level))
        .ok_or_else(|| {
            let reason = format!("{} is not between 0 and 7", priority.priority());
            PlanError::invalid("process.ioPriority.priority", reason)
        })?;
    Ok(level | (class << 13))
}

fn scheduler(scheduler: &Scheduler) -> Result<SchedulerAttributes, PlanError> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(PlanError::value(
                "process.scheduler.policy",
                "SCHED_ISO",
                "Linux does not have it; it must be SCHED_OTHER, SCHED_FIFO, SCHED_RR, SCHED_BATCH, \
                 SCHED_IDLE or SCHED_DEADLINE",
            ));
        }
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let flag = |flag: &LinuxSchedulerFlag| -> u64 {
        match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        }
    };
    let priority = scheduler.priority().unwrap_or(0);
    let priority = u32::try_from(priority).map_err(|_| {
        PlanError::value(
            "process.scheduler.priority",
            priority,
            "it must not be negative",
        )
    })?;
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        let reason = format!("{nice} is not between -20 and 19");
        return Err(PlanError::invalid("process.scheduler.nice", reason));
    }
    Ok(SchedulerAttributes {
        policy: policy.unsigned_abs(),
        flags: scheduler
            .flags()
            .iter()
            .flatten()
            .map(flag)
            .fold(0, |all, one| all | one),
        nice,
        priority,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedulerAttributes::default()
    })
}

fn affinity(process: &Process) -> Result<(Option<CpuSet>, Option<CpuSet>), PlanError> {
    let Some(affinity) = process.exec_cpu_affinity() else {
        return Ok((None, None));
    };
    let set = |name: &str, list: &Option<String>| {
        let Some(list) = list else { return Ok(None) };
        parse_processors(list).map(Some).ok_or_else(|| {
            let reason = format!(
                "`{list}` is no list of processors below {}",
                CpuSet::MAX_CPU
            );
            PlanError::invalid(format!("process.execCPUAffinity.{name}"), reason)
        })
    };
    Ok((
        set("initial", affinity.initial())?,
        set("final", affinity.cpu_affinity_final())?,
    ))
}

fn parse_processors(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for processor in members(list, CpuSet::MAX_CPU)? {
        set.set(processor);
    }
    Some(set)
}

/// The members of a list as `0-3,7`; nothing if it is malformed, or one is not below the limit.
pub(crate) fn members(list: &str, limit: usize) -> Option<Vec<usize>> {
    let mut members = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        // More than all can only be repetitions.
        if first > last || last >= limit || members.len() > limit {
            return None;
        }
        members.extend(first..=last);
    }
    Some(members)
}

pub(super) fn selinux_is_enabled() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// The systems of mandatory access control that the host has.
#[derive(Clone, Copy)]
struct Enforced {
    selinux: bool,
    apparmor: bool,
}

impl Enforced {
    fn here() -> Self {
        Self {
            selinux: selinux_is_enabled(),
            apparmor: Path::new("/sys/kernel/security/apparmor/profiles").exists(),
        }
    }
}

/// A label is refused where the host could not enforce it: it must not be ignored.
fn labels(process: &Process, enforced: Enforced) -> Result<Vec<Label>, PlanError> {
    let given = |label: &Option<String>| label.clone().filter(|label| !label.is_empty());
    let mut labels = Vec::new();
    if let Some(label) = given(process.selinux_label()) {
        if !enforced.selinux {
            return Err(PlanError::value(
                "process.selinuxLabel",
                label,
                "SELinux is not enabled on this host",
            ));
        }
        labels.push(Label::Selinux(label));
    }
    if let Some(profile) = given(process.apparmor_profile()) {
        if !enforced.apparmor {
            return Err(PlanError::value(
                "process.apparmorProfile",
                profile,
                "AppArmor is not enabled on this host",
            ));
        }
        labels.push(Label::AppArmor(profile));
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<ProcessPlan, PlanError> {
        let process: Process = serde_json::from_str(json).unwrap();
        ProcessPlan::new(&process, CapabilitySet::all())
    }

    #[test]
    fn what_is_wrong_is_named() {
        let user = r#""user":{"uid":0,"gid":0}"#;
        for (json, field) in [
            (r#""cwd":"/""#, "process.args"),
            (r#""cwd":"/","args":[""]"#, "process.args[0]"),
            (r#""cwd":"a","args":["sh"]"#, "process.cwd"),
            (r#""cwd":"/","args":["sh","a\u0000b"]"#, "process.args[1]"),
            (
                r#""cwd":"/","args":["sh"],"env":["A=1","B"]"#,
                "process.env[1]",
            ),
            (
                r#""cwd":"/","args":["sh"],"oomScoreAdj":2000"#,
                "process.oomScoreAdj",
            ),
            (
                r#""cwd":"/","args":["sh"],"rlimits":[{"type":"RLIMIT_CORE","soft":2,"hard":1}]"#,
                "process.rlimits[0].soft",
            ),
        ] {
            let message = plan(&format!("{{{user},{json}}}")).unwrap_err().to_string();
            assert!(message.contains(&format!("{field}: ")), "{json}: {message}");
        }
    }

    #[test]
    fn no_label_is_left_out_for_another() {
        let json =
            r#"{"user":{"uid":0,"gid":0},"cwd":"/","selinuxLabel":"a","apparmorProfile":"b"}"#;
        let process: Process = serde_json::from_str(json).unwrap();
        let both = || vec![Label::Selinux("a".into()), Label::AppArmor("b".into())];
        for (selinux, apparmor, expected) in [
            (true, true, Ok(both())),
            (true, false, Err("process.apparmorProfile: `b`")),
            (false, true, Err("process.selinuxLabel: `a`")),
        ] {
            match (labels(&process, Enforced { selinux, apparmor }), expected) {
                (Ok(labels), Ok(expected)) => assert_eq!(labels, expected),
                (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
                (result, expected) => panic!("{result:?} is not {expected:?}"),
            }
        }
    }

    #[test]
    fn the_largest_limit_is_no_limit() {
        let json = r#"{"user":{"uid":0,"gid":0},"cwd":"/","args":["sh"],
            "rlimits":[{"type":"RLIMIT_CORE","soft":1,"hard":18446744073709551615}]}"#;
        let limits = plan(json).unwrap().limits;
        assert_eq!(
            limits,
            [(
                Resource::Core,
                Rlimit {
                    current: Some(1),
                    maximum: None
                }
            )]
        );
    }
}
