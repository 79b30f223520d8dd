//! Device rules: `linux.resources.devices` as writes for the v1 controller, and as the ordered list
//! that `device_program` makes a v2 program of.
//!
//! A group starts with nothing allowed. Then come the devices that every container has, then the
//! configuration's rules in their order; the last rule that matches decides. A configuration that
//! starts by denying everything, as most do, says what already holds, and keeps the default
//! devices; one that does so later loses them.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::Path,
};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::CgroupError;

/// More rules than this are refused, to bound the work for a hostile configuration.
const RULES_MAX: usize = 1024;

/// What a Linux device number can hold: 12 and 20 bits.
const MAJOR_MAX: i64 = 0xfff;
const MINOR_MAX: i64 = 0xf_ffff;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Block,
    Character,
}

/// Bits of access, as the kernel's `BPF_DEVCG_ACC_*`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Access(pub(super) u8);

impl Access {
    pub(super) const ALL: Access = Access(7);
    const MKNOD: Access = Access(1);
    const LETTERS: [(char, u8); 3] = [('r', 2), ('w', 4), ('m', 1)];

    /// Nobody knows what an `a` would be, and peers take it for nothing.
    fn parse(text: &str) -> Option<Access> {
        let mut bits = 0;
        for letter in text.chars().filter(|letter| *letter != 'a') {
            bits |= Access::LETTERS.iter().find(|(have, _)| *have == letter)?.1;
        }
        (bits != 0).then_some(Access(bits))
    }

    fn letters(self) -> String {
        let set = Access::LETTERS.iter().filter(|(_, bit)| self.0 & bit != 0);
        set.map(|(letter, _)| letter).collect()
    }

    fn without(self, other: Access) -> Access {
        Access(self.0 & !other.0)
    }

    fn meets(self, other: Access) -> bool {
        self.0 & other.0 != 0
    }
}

/// Some devices and what may be done with them; `None` is any number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Devices {
    pub(super) kind: Kind,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    pub(super) access: Access,
}

impl Devices {
    const fn new(kind: Kind, major: Option<u32>, minor: Option<u32>, access: Access) -> Devices {
        Devices {
            kind,
            major,
            minor,
            access,
        }
    }

    fn same_numbers(&self, other: &Devices) -> bool {
        (self.kind, self.major, self.minor) == (other.kind, other.major, other.minor)
    }

    fn meets(&self, other: &Devices) -> bool {
        let number = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
        self.kind == other.kind
            && number(self.major, other.major)
            && number(self.minor, other.minor)
            && self.access.meets(other.access)
    }

    fn covers(&self, other: &Devices) -> bool {
        let number = |a: Option<u32>, b: Option<u32>| a.is_none() || a == b;
        self.kind == other.kind
            && number(self.major, other.major)
            && number(self.minor, other.minor)
    }

    /// As the v1 controller reads and prints it: `c 1:3 rwm`.
    fn line(&self) -> String {
        let kind = match self.kind {
            Kind::Block => 'b',
            Kind::Character => 'c',
        };
        let number = |number: Option<u32>| {
            number.map_or_else(|| "*".to_owned(), |number| number.to_string())
        };
        format!(
            "{kind} {}:{} {}",
            number(self.major),
            number(self.minor),
            self.access.letters()
        )
    }

    /// As systemd names it, with the access; nothing for a driver that is not there, which has no
    /// devices. `drivers` is the text of /proc/devices.
    pub(super) fn node(&self, drivers: &str) -> Option<(String, String)> {
        let (word, title) = match self.kind {
            Kind::Block => ("block", "Block devices:"),
            Kind::Character => ("char", "Character devices:"),
        };
        let node = match (self.major, self.minor) {
            (Some(major), Some(minor)) => format!("/dev/{word}/{major}:{minor}"),
            // A minor number of all drivers cannot be said; no driver is asked for so.
            (None, Some(_)) => return None,
            (None, None) => format!("{word}-*"),
            (Some(major), None) => {
                let mut lines = drivers.lines().skip_while(|line| *line != title).skip(1);
                let driver = lines
                    .by_ref()
                    .take_while(|line| !line.is_empty())
                    .find_map(|line| {
                        let (number, name) = line.trim_start().split_once(' ')?;
                        (number.parse() == Ok(major)).then_some(name)
                    })?;
                format!("{word}-{driver}")
            }
        };
        Some((node, self.access.letters()))
    }

    fn parse_line(line: &str) -> Option<Devices> {
        let mut words = line.split(' ');
        let kind = match words.next()? {
            "b" => Kind::Block,
            "c" => Kind::Character,
            _ => return None,
        };
        let (major, minor) = words.next()?.split_once(':')?;
        let number = |text: &str| match text {
            "*" => Some(None),
            text => text.parse().ok().map(Some),
        };
        let access = Access::parse(words.next()?)?;
        Some(Devices::new(kind, number(major)?, number(minor)?, access))
    }
}

/// What every container may use: making any node, since using it is another right, and null, zero,
/// full, random, urandom, tty, console, the multiplexer of pseudo terminals, and these.
const DEFAULTS: [Devices; 11] = [
    Devices::new(Kind::Character, None, None, Access::MKNOD),
    Devices::new(Kind::Block, None, None, Access::MKNOD),
    Devices::new(Kind::Character, Some(1), Some(3), Access::ALL),
    Devices::new(Kind::Character, Some(1), Some(5), Access::ALL),
    Devices::new(Kind::Character, Some(1), Some(7), Access::ALL),
    Devices::new(Kind::Character, Some(1), Some(8), Access::ALL),
    Devices::new(Kind::Character, Some(1), Some(9), Access::ALL),
    Devices::new(Kind::Character, Some(5), Some(0), Access::ALL),
    Devices::new(Kind::Character, Some(5), Some(1), Access::ALL),
    Devices::new(Kind::Character, Some(5), Some(2), Access::ALL),
    Devices::new(Kind::Character, Some(136), None, Access::ALL),
];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Rule {
    pub(super) allow: bool,
    pub(super) devices: Devices,
    /// The index in the configuration; `None` for a default.
    index: Option<usize>,
}

/// All rules of a group: what holds where no rule matches, and the rules in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Rules {
    pub(super) otherwise: bool,
    pub(super) rules: Vec<Rule>,
}

impl Rules {
    /// # Errors
    ///
    /// If a rule is malformed; the error names it by its index.
    pub(super) fn new(configured: &[LinuxDeviceCgroup]) -> Result<Rules, CgroupError> {
        if configured.len() > RULES_MAX {
            let reason = format!("at most {RULES_MAX} rules are taken");
            return Err(CgroupError::invalid("devices", configured.len(), reason));
        }
        let defaults = DEFAULTS.into_iter().map(|devices| Rule {
            allow: true,
            devices,
            index: None,
        });
        let mut all = Rules {
            otherwise: false,
            rules: defaults.collect(),
        };
        let mut started = false;
        for (index, rule) in configured.iter().enumerate() {
            let allow = rule.allow();
            let devices = parse(index, rule)?;
            let everything = devices.len() == 2
                && devices.iter().all(|devices| {
                    (devices.major, devices.minor) == (None, None) && devices.access == Access::ALL
                });
            if everything && (started || allow) {
                all = Rules {
                    otherwise: allow,
                    rules: Vec::new(),
                };
            } else if !everything {
                let index = Some(index);
                all.rules.extend(devices.into_iter().map(|devices| Rule {
                    allow,
                    devices,
                    index,
                }));
            }
            started |= !everything || allow;
        }
        Ok(all)
    }

    /// The same as the v1 controller sees it: only what differs from `otherwise`.
    ///
    /// # Errors
    ///
    /// If a rule takes a part out of a wildcard, which v1 has no way to say.
    pub(super) fn exceptions(&self) -> Result<Vec<Devices>, CgroupError> {
        let mut exceptions: Vec<Devices> = Vec::new();
        for rule in &self.rules {
            let devices = rule.devices;
            if rule.allow != self.otherwise {
                match exceptions
                    .iter_mut()
                    .find(|have| have.same_numbers(&devices))
                {
                    Some(have) => have.access.0 |= devices.access.0,
                    None => exceptions.push(devices),
                }
                continue;
            }
            for have in exceptions.iter_mut().filter(|have| have.meets(&devices)) {
                if !devices.covers(have) {
                    let field = format!("devices[{}]", rule.index.unwrap_or_default());
                    let reason = format!(
                        "cgroup v1 cannot except {} from {}; leave out the bits that both have",
                        devices.line(),
                        have.line()
                    );
                    return Err(CgroupError::unsupported(field, reason));
                }
                have.access = have.access.without(devices.access);
            }
            exceptions.retain(|have| have.access.0 != 0);
        }
        Ok(exceptions)
    }
}

/// The devices that one configured rule is about; a rule for every kind gives two.
fn parse(index: usize, rule: &LinuxDeviceCgroup) -> Result<Vec<Devices>, CgroupError> {
    let field = |name: &str| format!("devices[{index}].{name}");
    let kinds: &[Kind] = match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => &[Kind::Character, Kind::Block],
        LinuxDeviceType::B => &[Kind::Block],
        LinuxDeviceType::C | LinuxDeviceType::U => &[Kind::Character],
        LinuxDeviceType::P => {
            let reason = "a pipe is no device; it is a, b, c or u";
            return Err(CgroupError::invalid(field("type"), "p", reason));
        }
    };
    let number = |name, value: Option<i64>, max: i64| match value {
        None | Some(-1) => Ok(None),
        Some(value) => match u32::try_from(value) {
            Ok(number) if value <= max => Ok(Some(number)),
            _ => {
                let reason = format!("it is between 0 and {max}, or -1 for any");
                Err(CgroupError::invalid(field(name), value, reason))
            }
        },
    };
    let major = number("major", rule.major(), MAJOR_MAX)?;
    let minor = number("minor", rule.minor(), MINOR_MAX)?;
    let text = rule.access().as_deref().unwrap_or_default();
    let Some(access) = Access::parse(text) else {
        let reason = "it is made of the letters r, w and m";
        return Err(CgroupError::invalid(
            field("access"),
            format!("{text:?}"),
            reason,
        ));
    };
    Ok(kinds
        .iter()
        .map(|&kind| Devices::new(kind, major, minor, access))
        .collect())
}

/// Brings the v1 controller in `directory` to `rules`.
///
/// Where only some devices come or go, only these are touched: a container that runs never sees a
/// moment in which /dev/null is denied. In a `fresh` group there is nobody yet.
pub(super) fn apply_v1(directory: &Path, rules: &Rules, fresh: bool) -> Result<(), CgroupError> {
    let wanted = rules.exceptions()?;
    let (mut add, mut remove) = ("devices.allow", "devices.deny");
    if rules.otherwise {
        (add, remove) = (remove, add);
    }
    // A group that allows by default does not list what it denies, so it cannot be compared.
    let comparable = !rules.otherwise && !fresh;
    let present = if comparable { listed(directory)? } else { None };
    if present.is_none() {
        write(directory, remove, &["a"])?;
    }
    let present = present.unwrap_or_default();
    let missing = |have: &[Devices], from: &[Devices]| -> Vec<String> {
        from.iter()
            .map(|devices| {
                let same = have.iter().find(|have| have.same_numbers(devices));
                let access =
                    same.map_or(devices.access, |same| devices.access.without(same.access));
                Devices { access, ..*devices }
            })
            .filter(|devices| devices.access.0 != 0)
            .map(|devices| devices.line())
            .collect()
    };
    write(directory, add, &missing(&present, &wanted))?;
    write(directory, remove, &missing(&wanted, &present))
}

/// What the group allows; nothing if it allows by default.
fn listed(directory: &Path) -> Result<Option<Vec<Devices>>, CgroupError> {
    let path = directory.join("devices.list");
    let text = fs::read_to_string(&path).map_err(|source| CgroupError::Io {
        action: "read",
        path,
        source,
    })?;
    let denies = !text.starts_with('a');
    Ok(denies.then(|| text.lines().filter_map(Devices::parse_line).collect()))
}

/// Writes lines one by one, as the kernel wants them.
fn write(directory: &Path, file: &str, lines: &[impl AsRef<str>]) -> Result<(), CgroupError> {
    let path = directory.join(file);
    let failed = |line: &str, source: io::Error| CgroupError::Set {
        field: "devices".to_owned(),
        value: line.to_owned(),
        file: path.clone(),
        source,
    };
    let Some(first) = lines.first() else {
        return Ok(());
    };
    let mut file = OpenOptions::new()
        .write(true)
        .open(&path)
        .map_err(|source| failed(first.as_ref(), source))?;
    for line in lines.iter().map(AsRef::as_ref) {
        file.write_all(line.as_bytes())
            .map_err(|source| failed(line, source))?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn rules(json: &str) -> Result<Rules, CgroupError> {
        let configured: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        Rules::new(&configured)
    }

    #[test]
    fn a_leading_deny_keeps_the_default_devices_and_a_later_one_does_not() {
        let plain = rules("[]").unwrap();
        assert_eq!(plain.rules.len(), DEFAULTS.len());
        assert!(!plain.otherwise);
        let usual = r#"[{"allow":false,"access":"rwm"}]"#;
        assert_eq!(rules(usual).unwrap(), plain);
        let late = r#"[{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"},
                       {"allow":false,"access":"rwm"}]"#;
        assert_eq!(rules(late).unwrap().rules, []);
        let privileged = r#"[{"allow":true,"access":"rwm"}]"#;
        let privileged = rules(privileged).unwrap();
        assert!(privileged.otherwise && privileged.rules.is_empty());
    }

    #[test]
    fn a_malformed_rule_is_named_by_its_index() {
        for (rule, field) in [
            (
                r#"{"allow":true,"type":"p","access":"r"}"#,
                "devices[1].type",
            ),
            (
                r#"{"allow":true,"type":"c","access":"rx"}"#,
                "devices[1].access",
            ),
            (r#"{"allow":true,"type":"c"}"#, "devices[1].access"),
            (
                r#"{"allow":true,"type":"c","major":-2,"access":"r"}"#,
                "devices[1].major",
            ),
            (
                r#"{"allow":true,"type":"c","minor":1048576,"access":"r"}"#,
                "devices[1].minor",
            ),
        ] {
            let json = format!(r#"[{{"allow":false,"access":"rwm"}},{rule}]"#);
            let text = rules(&json).unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("linux.resources.{field}")),
                "{text}"
            );
        }
    }

    #[test]
    fn v1_gets_only_the_devices_that_remain_allowed() {
        let json = r#"[{"allow":false,"access":"rwm"},
            {"allow":true,"type":"b","major":8,"minor":0,"access":"rw"},
            {"allow":true,"type":"b","major":8,"minor":1,"access":"rw"},
            {"allow":false,"type":"b","major":8,"access":"w"},
            {"allow":true,"type":"c","major":10,"minor":229,"access":"r"},
            {"allow":true,"type":"c","major":10,"minor":229,"access":"w"}]"#;
        let exceptions = rules(json).unwrap().exceptions().unwrap();
        let lines: Vec<_> = exceptions[DEFAULTS.len()..]
            .iter()
            .map(Devices::line)
            .collect();
        assert_eq!(lines, ["b 8:0 r", "b 8:1 r", "c 10:229 rw"]);
        for devices in exceptions {
            assert_eq!(Devices::parse_line(&devices.line()), Some(devices));
        }
    }

    #[test]
    fn v1_refuses_to_take_a_part_out_of_a_wildcard() {
        let json = r#"[{"allow":true,"type":"c","major":10,"access":"rw"},
                       {"allow":false,"type":"c","major":10,"minor":1,"access":"r"}]"#;
        let text = rules(json).unwrap().exceptions().unwrap_err().to_string();
        assert!(text.starts_with("linux.resources.devices[1]"), "{text}");
    }
}
