//! Control groups that systemd manages: each container's group is that of a scope, a unit of systemd
//! around processes that it did not start.
//!
//! What is below the scope's group is the container's (`Delegate`), and so is what systemd does not
//! know. The limits that it knows it is told, as properties of the unit: otherwise it would put its own
//! back in their place when it next reads its configuration.

pub(crate) mod annotation;
mod bus;
mod scope;
mod wire;

use std::path::PathBuf;

pub use self::bus::SystemdError;
use self::bus::{Bus, malformed};
pub(crate) use self::scope::ScopePlan;
pub(crate) use self::wire::Value;
use self::wire::{Call, Message, Writer};
use crate::rights;

/// The name and the value of a unit's property (org.freedesktop.systemd1(5)).
pub(crate) type Property = (&'static str, Value);

const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

/// The oldest systemd that is worked with.
const VERSION_MIN: u32 = 239;

/// The version of systemd that first knows a property, or that value of it (its NEWS).
fn since((name, value): &Property) -> u32 {
    match (*name, value) {
        ("MemoryZSwapMax", _) => 253,
        ("CPUWeight", Value::Large(0)) => 252,
        ("AllowedCPUs" | "AllowedMemoryNodes", _) => 244,
        ("CPUQuotaPeriodUSec", _) => 242,
        ("MemoryMin", _) => 240,
        _ => VERSION_MIN,
    }
}

/// The number in a version as `252.39-1~deb12u1` or `v254-rc1`; the oldest where there is none.
fn version_number(text: &str) -> u32 {
    let digits = text.trim_start_matches(|letter: char| !letter.is_ascii_digit());
    let end = digits.find(|letter: char| !letter.is_ascii_digit());
    digits[..end.unwrap_or(digits.len())]
        .parse()
        .unwrap_or(VERSION_MIN)
}

/// A connection to the manager of units: the system's for root, the user's own for others.
#[derive(Debug)]
pub(crate) struct Systemd(Bus);

impl Systemd {
    pub(crate) fn connect() -> Result<Systemd, SystemdError> {
        Bus::connect(&socket()).map(Systemd)
    }

    /// Starts the scope around the process `pid`, and returns the path of its group.
    pub(crate) fn start(
        &mut self,
        plan: &ScopePlan,
        id: &str,
        pid: i32,
    ) -> Result<String, SystemdError> {
        let started = match self.start_unit(plan, id, pid) {
            // One that failed is remembered, under a name that is free otherwise.
            Err(SystemdError::Refused { name, .. }) if name == UNIT_EXISTS => {
                self.forget(&plan.unit)?;
                self.start_unit(plan, id, pid)?
            }
            started => started?,
        };
        let job = started.body().text().map(str::to_owned);
        let job = job.ok_or_else(|| SystemdError::Talk(malformed()))?;
        let result = self.0.await_job(&job)?;
        if result != "done" {
            let unit = plan.unit.clone();
            return Err(match result.as_str() {
                "failed" if !rights::is_host_root() => SystemdError::NotMovable { unit },
                _ => SystemdError::Job { unit, result },
            });
        }
        self.control_group(&plan.unit)
    }

    fn start_unit(
        &mut self,
        plan: &ScopePlan,
        id: &str,
        pid: i32,
    ) -> Result<Message, SystemdError> {
        let mut properties: Vec<Property> = vec![
            ("Description", Value::Text(format!("OCI container {id}"))),
            ("PIDs", Value::Numbers(vec![pid.unsigned_abs()])),
            ("Delegate", Value::Flag(true)),
            ("DefaultDependencies", Value::Flag(false)),
        ];
        if !plan.slice.is_empty() {
            properties.push(("Slice", Value::Text(plan.slice.clone())));
        }
        for accounting in [
            "CPUAccounting",
            "IOAccounting",
            "MemoryAccounting",
            "TasksAccounting",
        ] {
            properties.push((accounting, Value::Flag(true)));
        }
        let mut body = Writer::default();
        body.text(&plan.unit);
        body.text("fail");
        let asked = plan
            .properties
            .iter()
            .map(|(name, value)| (name.as_str(), value));
        let own = properties.iter().map(|(name, value)| (*name, value));
        body.properties(own.chain(asked));
        // No units beside it.
        body.array(8, |_| {});
        self.manage(
            "start the scope of the container",
            "StartTransientUnit",
            "ssa(sv)a(sa(sv))",
            body,
        )
    }

    /// The path of the unit's group below the root of all that systemd sees.
    fn control_group(&mut self, unit: &str) -> Result<String, SystemdError> {
        let act = "say where the container's group is";
        let interface = "org.freedesktop.systemd1.Scope";
        self.property(act, &scope::object_path(unit), interface, "ControlGroup")
    }

    fn version(&mut self) -> Result<u32, SystemdError> {
        let act = "say which version it is";
        let text = self.property(act, MANAGER_PATH, MANAGER, "Version")?;
        Ok(version_number(&text))
    }

    /// A property of an object that is a text.
    fn property(
        &mut self,
        act: &'static str,
        path: &str,
        interface: &str,
        name: &str,
    ) -> Result<String, SystemdError> {
        let mut body = Writer::default();
        body.text(interface);
        body.text(name);
        let call = Call {
            path,
            interface: "org.freedesktop.DBus.Properties",
            member: "Get",
            signature: "ss",
            body,
        };
        let answer = self.0.call(act, &call)?;
        let text = answer.body().variant_text().map(str::to_owned);
        text.ok_or_else(|| SystemdError::Talk(malformed()))
    }

    /// Moves a process into the unit's group.
    pub(crate) fn attach(&mut self, unit: &str, pid: i32) -> Result<(), SystemdError> {
        let mut body = Writer::default();
        body.text(unit);
        // Not a group below.
        body.text("");
        body.array(4, |it| it.number(pid.unsigned_abs()));
        let act = "move a process into the container's scope";
        self.manage(act, "AttachProcessesToUnit", "ssau", body)
            .map(|_| ())
    }

    /// Tells limits to systemd, until the unit ends: those that its version knows. The others it leaves
    /// alone.
    pub(crate) fn set(&mut self, unit: &str, properties: &[Property]) -> Result<(), SystemdError> {
        let mut properties = properties.to_vec();
        if properties.iter().any(|it| since(it) > VERSION_MIN) {
            let version = self.version()?;
            properties.retain(|property| since(property) <= version);
        }
        if properties.is_empty() {
            return Ok(());
        }
        let mut body = Writer::default();
        body.text(unit);
        body.flag(true);
        body.properties(properties.iter().map(|(name, value)| (*name, value)));
        let act = "set linux.resources of the container's scope";
        self.manage(act, "SetUnitProperties", "sba(sv)", body)
            .map(|_| ())
    }

    /// Stops the unit, and has it forgotten if it failed. One that is not there is stopped.
    pub(crate) fn stop(&mut self, unit: &str) -> Result<(), SystemdError> {
        let mut body = Writer::default();
        body.text(unit);
        body.text("replace");
        let act = "stop the container's scope";
        match self.manage(act, "StopUnit", "ss", body) {
            Err(SystemdError::Refused { name, .. }) if name == NO_SUCH_UNIT => return Ok(()),
            stopped => stopped?,
        };
        self.forget(unit)
    }

    fn forget(&mut self, unit: &str) -> Result<(), SystemdError> {
        let mut body = Writer::default();
        body.text(unit);
        let act = "forget the container's failed scope";
        match self.manage(act, "ResetFailedUnit", "s", body) {
            Err(SystemdError::Refused { name, .. }) if name == NO_SUCH_UNIT => Ok(()),
            forgotten => forgotten.map(|_| ()),
        }
    }

    fn manage(
        &mut self,
        act: &'static str,
        member: &str,
        signature: &str,
        body: Writer,
    ) -> Result<Message, SystemdError> {
        let call = Call {
            path: MANAGER_PATH,
            interface: MANAGER,
            member,
            signature,
            body,
        };
        self.0.call(act, &call)
    }
}

/// Where systemd listens, as systemctl knows it.
fn socket() -> PathBuf {
    if rights::is_host_root() {
        return PathBuf::from("/run/systemd/private");
    }
    let directory = std::env::var_os("XDG_RUNTIME_DIR").filter(|it| !it.is_empty());
    let usual = || PathBuf::from(format!("/run/user/{}", rights::user_outside()));
    let directory = directory.map_or_else(usual, PathBuf::from);
    directory.join("systemd/private")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_systemd_is_told_what_it_knows() {
        for (text, number) in [
            ("252.39-1~deb12u1", 252),
            ("v254-rc1", 254),
            ("239 (239-82.el8)", 239),
            ("257", 257),
            ("", VERSION_MIN),
            ("?", VERSION_MIN),
        ] {
            assert_eq!(version_number(text), number, "{text}");
        }
        let known = |version: u32| {
            let all: [Property; 6] = [
                ("MemoryZSwapMax", Value::Large(1)),
                ("MemoryMax", Value::Large(1)),
                ("CPUQuotaPeriodUSec", Value::Large(1)),
                ("AllowedCPUs", Value::Bytes(vec![1])),
                ("CPUWeight", Value::Large(0)),
                ("CPUWeight", Value::Large(100)),
            ];
            all.into_iter().filter(|it| since(it) <= version).count()
        };
        assert_eq!([239, 242, 244, 252, 253].map(known), [2, 3, 4, 5, 6]);
    }
}
