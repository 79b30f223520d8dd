//! Settings of the kernel that are a namespace's own (`linux.sysctl`).

use std::collections::HashMap;
use std::path::PathBuf;

use super::PlanError;
use super::namespaces::{Kind, NamespacePlan};

/// The paths below /proc/sys, and the values. Any that is not a namespace's own would change the host.
///
/// # Errors
/// The setting that is wrong, and why.
pub(super) fn plan(
    settings: Option<&HashMap<String, String>>,
    namespaces: &NamespacePlan,
    domain_name: Option<&str>,
) -> Result<Vec<(PathBuf, String)>, PlanError> {
    const IPC: &[&str] = &[
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    let mut checked = Vec::new();
    for (name, value) in settings.into_iter().flatten() {
        let field = || format!("linux.sysctl.{name}");
        let path = sysctl_path(name);
        let kind = if path.starts_with("net/") {
            Kind::NETWORK
        } else if IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") {
            Kind::IPC
        } else if path == "kernel/domainname" {
            Kind::UTS
        } else if path.starts_with("user/") {
            Kind::USER
        } else {
            return Err(PlanError::value(
                field(),
                value,
                "the setting is the host's; a container has those of its namespaces: net.*, user.*, \
                 fs.mqueue.*, those of System V IPC and kernel.domainname; kernel.hostname is hostname's",
            ));
        };
        if !namespaces.has(kind) {
            let allowed = format!(
                "the setting needs a {} namespace of the container's own",
                kind.file_name()
            );
            return Err(PlanError::value(field(), value, &allowed));
        }
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(PlanError::value(
                field(),
                name,
                "it is no name of a setting",
            ));
        }
        match domain_name {
            Some(name) if path == "kernel/domainname" && !["", value].contains(&name) => {
                let allowed = format!("it conflicts with domainname, which is `{name}`");
                return Err(PlanError::value(field(), value, &allowed));
            }
            _ => {}
        }
        checked.push((PathBuf::from(path), value.clone()));
    }
    Ok(checked)
}

/// sysctl(8): the first of `.` and `/` in the name is the separator; the other one is then a part of
/// the names, and stands for itself turned around.
fn sysctl_path(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'.' => name
            .chars()
            .map(|letter| match letter {
                '.' => '/',
                '/' => '.',
                letter => letter,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_setting_of_the_host_is_refused() {
        let namespaces = NamespacePlan {
            new: Kind::NETWORK.0,
            ..NamespacePlan::default()
        };
        let check = |name: &str| {
            let settings = HashMap::from([(name.to_owned(), "1".to_owned())]);
            plan(Some(&settings), &namespaces, None)
        };
        let path = |name| check(name).unwrap().remove(0).0;
        assert_eq!(
            path("net.ipv4.ip_forward"),
            Path::new("net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/rp_filter"),
            Path::new("net/ipv4/conf/eth0.1/rp_filter")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.rp_filter"),
            Path::new("net/ipv4/conf/eth0.1/rp_filter")
        );
        for bad in [
            "kernel.panic",
            "kernel.shmmax",
            "net.ipv4/../../kernel",
            "vm.swappiness",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_domain_name_has_one_value() {
        let namespaces = NamespacePlan {
            new: Kind::UTS.0,
            ..NamespacePlan::default()
        };
        let settings = HashMap::from([("kernel.domainname".to_owned(), "here".to_owned())]);
        for (name, fits) in [
            (None, true),
            (Some(""), true),
            (Some("here"), true),
            (Some("there"), false),
        ] {
            let planned = plan(Some(&settings), &namespaces, name);
            assert_eq!(planned.is_ok(), fits, "{name:?}");
        }
    }
}
