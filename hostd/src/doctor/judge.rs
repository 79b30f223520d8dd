//! What the facts mean for a user. Pure: the same facts give the same findings.
//!
//! An error is what keeps instances of both kinds from running as asked; a warning is what keeps some
//! from it, or a limit from binding. What is merely different is neither.

use std::collections::BTreeSet;

use crate::api::types::{Finding, FindingLevel};

use super::probe::{Cgroup, Device, Facts, Feature, Nft};

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// Controllers that limits are made of, by their names of version 2.
const CONTROLLERS_V2: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// By their names of version 1, where devices and pause need one each.
const CONTROLLERS_V1: [&str; 7] = [
    "blkio", "cpu", "cpuset", "devices", "freezer", "memory", "pids",
];

pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    [
        kernel,
        kvm,
        guest,
        cgroup,
        overlayfs,
        erofs,
        user_namespaces,
        tun,
        nftables,
        forwarding,
        vhost_net,
        io_uring,
        privileges,
    ]
    .iter()
    .map(|check| check(facts))
    .collect()
}

fn ok(check: &str, detail: impl Into<String>) -> Finding {
    finding(check, FindingLevel::Ok, detail, None)
}

fn warning(check: &str, detail: impl Into<String>, hint: &str) -> Finding {
    finding(check, FindingLevel::Warning, detail, Some(hint))
}

fn error(check: &str, detail: impl Into<String>, hint: &str) -> Finding {
    finding(check, FindingLevel::Error, detail, Some(hint))
}

fn finding(
    check: &str,
    level: FindingLevel,
    detail: impl Into<String>,
    hint: Option<&str>,
) -> Finding {
    Finding {
        check: check.to_owned(),
        level,
        detail: detail.into(),
        hint: hint.map(str::to_owned),
    }
}

/// The oldest kernel that is tested: Debian 12's.
const KERNEL_MIN: (u32, u32) = (6, 1);

fn kernel(facts: &Facts) -> Finding {
    let release = &facts.kernel;
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= KERNEL_MIN {
        return ok("kernel", format!("Linux {release}."));
    }
    warning(
        "kernel",
        format!("Linux {release} is older than 6.1, the oldest that hostd is tested with."),
        "Use a newer kernel, e.g. that of Debian 12.",
    )
}

fn kvm(facts: &Facts) -> Finding {
    const CHECK: &str = "kvm";
    let hardware = facts
        .kvm_modules
        .iter()
        .find(|name| ["kvm_amd", "kvm_intel"].contains(&name.as_str()));
    match (&facts.kvm, hardware, facts.cpu_flag) {
        (Device::Opens, Some(module), _) => ok(
            CHECK,
            format!("KVM uses the processor's own virtualisation ({module})."),
        ),
        (Device::Opens, None, _) if facts.kvm_modules.contains("kvm_pvm") => warning(
            CHECK,
            "KVM is software only (kvm_pvm): it interprets the guest's kernel, too slowly and too \
             incompletely for a stock Linux to boot. Containers work; virtual machines will not \
             come up.",
            "Run virtual machines on a host with kvm_intel or kvm_amd, or in the simulated host \
             (`scripts/sim-host`).",
        ),
        (Device::Opens, None, Some(flag)) => ok(
            CHECK,
            format!("KVM works, and the processor can virtualise ({flag})."),
        ),
        (Device::Opens, None, None) => warning(
            CHECK,
            "/dev/kvm is there, but neither kvm_intel nor kvm_amd is behind it, so it is unclear \
             whether virtual machines come up.",
            "Try one: `hostctl run --rm --isolation vm IMAGE uname -r`.",
        ),
        (Device::Denied, ..) => warning(
            CHECK,
            "/dev/kvm may not be opened by this user.",
            "Run as root, or ask the daemon: it is the one that opens it.",
        ),
        (Device::Broken(reason), ..) => warning(
            CHECK,
            format!("/dev/kvm is there but cannot be opened: {reason}. Containers work."),
            "See `dmesg | grep -i kvm`.",
        ),
        (Device::Missing, _, Some(flag)) => warning(
            CHECK,
            format!(
                "There is no /dev/kvm, though the processor can virtualise ({flag}). Containers \
                 work."
            ),
            "Load the module: `modprobe kvm_amd` or `modprobe kvm_intel`; if that fails, turn \
             virtualisation on in the firmware.",
        ),
        (Device::Missing, _, None) => warning(
            CHECK,
            "There is no /dev/kvm, and the processor offers no virtualisation. Containers work.",
            "Use bare metal, a cloud's nested virtualisation, or the simulated host \
             (`scripts/sim-host`).",
        ),
    }
}

fn guest(facts: &Facts) -> Finding {
    let missing = match (facts.guest_kernel, facts.guest_initramfs) {
        (true, true) => return ok("guest", "The guest's kernel and initramfs are there."),
        (false, true) => "kernel is",
        (true, false) => "initramfs is",
        (false, false) => "kernel and initramfs are",
    };
    warning(
        "guest",
        format!("The guest's {missing} missing: virtual machines cannot boot. Containers work."),
        "Build them with `cargo xtask guest` and start hostd with `--guest-dir DIR`.",
    )
}

fn cgroup(facts: &Facts) -> Finding {
    const CHECK: &str = "cgroup";
    const OLD: &str = "Boot with `systemd.unified_cgroup_hierarchy=1` for version 2.";
    let lacking = |needed: &[&str], have: &BTreeSet<String>| {
        let missing: Vec<_> = needed
            .iter()
            .filter(|name| !have.contains(**name))
            .copied()
            .collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    };
    let (layout, missing) = match &facts.cgroup {
        Cgroup::Missing => {
            return error(
                CHECK,
                "No control groups are mounted at /sys/fs/cgroup: nothing can be limited.",
                "Mount them: `mount -t cgroup2 none /sys/fs/cgroup`.",
            );
        }
        Cgroup::V2 { controllers } => ("version 2", lacking(&CONTROLLERS_V2, controllers)),
        Cgroup::Hybrid { controllers } => (
            "hybrid, with the controllers in version 1",
            lacking(&CONTROLLERS_V1, controllers),
        ),
        Cgroup::V1 { controllers } => ("version 1", lacking(&CONTROLLERS_V1, controllers)),
    };
    let v2 = matches!(facts.cgroup, Cgroup::V2 { .. });
    match missing {
        Some(missing) => error(
            CHECK,
            format!("Control groups are {layout} and lack: {missing}. Those limits cannot bind."),
            if v2 {
                "Enable the controllers for the group that hostd runs in (`Delegate=yes` in its \
                 unit), or boot a kernel that has them."
            } else {
                OLD
            },
        ),
        None if v2 => ok(
            CHECK,
            "Control groups are version 2, with every controller needed.",
        ),
        None => warning(
            CHECK,
            format!(
                "Control groups are {layout}. Every limit works, but those on disk rates miss \
                 writes that the page cache makes later."
            ),
            OLD,
        ),
    }
}

fn overlayfs(facts: &Facts) -> Finding {
    match facts.overlayfs {
        Feature::Present => ok("overlayfs", "overlayfs is there."),
        Feature::Loadable => ok("overlayfs", "overlayfs is a module, loaded when needed."),
        Feature::Missing => error(
            "overlayfs",
            "The kernel has no overlayfs: containers cannot have a root file system.",
            "Use a kernel with CONFIG_OVERLAY_FS.",
        ),
    }
}

fn erofs(facts: &Facts) -> Finding {
    if !facts.mkfs_erofs {
        return warning(
            "erofs",
            "`mkfs.erofs` is not installed: virtual machines cannot be started from images.",
            "Install it: `apt-get install erofs-utils`.",
        );
    }
    // Only guests mount these disks, so the host's own erofs does not matter.
    match facts.erofs {
        Feature::Present | Feature::Loadable => ok("erofs", "`mkfs.erofs` and erofs are there."),
        Feature::Missing => ok(
            "erofs",
            "`mkfs.erofs` is there; guests bring their own erofs.",
        ),
    }
}

fn user_namespaces(facts: &Facts) -> Finding {
    const CHECK: &str = "user-namespaces";
    match facts.user_namespaces {
        Some(0) => warning(
            CHECK,
            "User namespaces are forbidden: containers run only with the host's users.",
            "Allow them: `sysctl -w user.max_user_namespaces=65536`.",
        ),
        Some(_) if facts.state_maps_owners == Some(false) => warning(
            CHECK,
            "The file system of the state directory cannot give its files to the users of a container: \
             containers run only with the host's users.",
            "Put hostd's --state-dir on ext4, XFS or Btrfs.",
        ),
        Some(max) => ok(CHECK, format!("Up to {max} user namespaces may be made.")),
        None => warning(
            CHECK,
            "The kernel has no user namespaces: containers run only with the host's users.",
            "Use a kernel with CONFIG_USER_NS.",
        ),
    }
}

fn tun(facts: &Facts) -> Finding {
    const CHECK: &str = "tun";
    let broken = |detail: &str, hint| {
        warning(
            CHECK,
            format!("{detail}: virtual machines get no network."),
            hint,
        )
    };
    match &facts.tun {
        Device::Opens => ok(CHECK, "/dev/net/tun opens."),
        Device::Missing => broken("There is no /dev/net/tun", "Load it: `modprobe tun`."),
        Device::Denied => broken(
            "/dev/net/tun may not be opened by this user",
            "Run as root.",
        ),
        Device::Broken(reason) => broken(
            &format!("/dev/net/tun cannot be opened ({reason})"),
            "Load its module: `modprobe tun`.",
        ),
    }
}

fn nftables(facts: &Facts) -> Finding {
    const CHECK: &str = "nftables";
    match &facts.nft {
        Nft::Works { .. } => ok(CHECK, "`nft` and the kernel's nftables work."),
        Nft::Missing => error(
            CHECK,
            "`nft` is not installed: instances get no network.",
            "Install it: `apt-get install nftables`, or use `--network none`.",
        ),
        Nft::Fails(reason) if !has(facts, CAP_NET_ADMIN) => warning(
            CHECK,
            format!("nftables cannot be looked at without privilege ({reason})."),
            "Run as root, or ask the daemon.",
        ),
        Nft::Fails(reason) => error(
            CHECK,
            format!("`nft` fails: {reason}. Instances get no network."),
            "Load the module: `modprobe nf_tables`.",
        ),
    }
}

fn forwarding(facts: &Facts) -> Finding {
    const CHECK: &str = "forwarding";
    match &facts.nft {
        Nft::Works { dropping } if !dropping.is_empty() => warning(
            CHECK,
            format!(
                "Another firewall drops what is forwarded ({}), as Docker's does: instances \
                 do not reach the outside, nor the outside their ports.",
                dropping.join(", ")
            ),
            "Let the bridge pass, with Docker: `iptables -I DOCKER-USER -i hostd0 -j ACCEPT` and \
             `iptables -I DOCKER-USER -o hostd0 -j ACCEPT`.",
        ),
        Nft::Works { .. } => ok(CHECK, "No other firewall drops what is forwarded."),
        Nft::Missing | Nft::Fails(_) => ok(CHECK, "Not looked at, since nftables does not work."),
    }
}

fn vhost_net(facts: &Facts) -> Finding {
    let state = match facts.vhost_net {
        Device::Opens => "is there",
        Device::Missing | Device::Denied | Device::Broken(_) => "is not there",
    };
    let detail = format!(
        "/dev/vhost-net {state}; hostd-vmm moves packets itself unless its configuration says otherwise."
    );
    ok("vhost-net", detail)
}

fn io_uring(facts: &Facts) -> Finding {
    const CHECK: &str = "io_uring";
    match facts.io_uring_disabled {
        // Kernels before 6.6 have no switch; io_uring itself is older than any supported kernel.
        Some(0) | None => ok(CHECK, "io_uring may be used for disks."),
        Some(level) => warning(
            CHECK,
            format!(
                "io_uring is disabled (kernel.io_uring_disabled is {level}): the disks of virtual \
                 machines are slower."
            ),
            "Allow it: `sysctl -w kernel.io_uring_disabled=0`.",
        ),
    }
}

fn privileges(facts: &Facts) -> Finding {
    const CHECK: &str = "privileges";
    if !has(facts, CAP_SYS_ADMIN) || !has(facts, CAP_NET_ADMIN) {
        return warning(
            CHECK,
            "This process is not root, so some checks saw less than hostd would.",
            "Run `hostctl doctor` as root.",
        );
    }
    if !has(facts, CAP_SYS_RESOURCE) {
        return warning(
            CHECK,
            "CAP_SYS_RESOURCE is missing: no instance can be given resource limits (ulimits) \
             above hostd's own.",
            "Give hostd the capability, or accept its own ulimits as the most there is.",
        );
    }
    ok(CHECK, "All that hostd needs.")
}

fn has(facts: &Facts, capability: u32) -> bool {
    facts.capabilities & 1 << capability != 0
}

#[cfg(test)]
mod tests {
    use FindingLevel::{Error, Ok, Warning};

    use super::*;

    /// A host as it should be.
    fn good() -> Facts {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Facts {
            kernel: "6.1.0-56-cloud-amd64".into(),
            kvm: Device::Opens,
            kvm_modules: names(&["kvm_amd"]),
            cpu_flag: Some("svm"),
            cgroup: Cgroup::V2 {
                controllers: names(&CONTROLLERS_V2),
            },
            overlayfs: Feature::Loadable,
            erofs: Feature::Loadable,
            mkfs_erofs: true,
            user_namespaces: Some(1000),
            state_maps_owners: Some(true),
            tun: Device::Opens,
            vhost_net: Device::Missing,
            nft: Nft::Works { dropping: vec![] },
            io_uring_disabled: None,
            guest_kernel: true,
            guest_initramfs: true,
            capabilities: u64::MAX,
        }
    }

    #[test]
    fn a_good_host_is_all_green() {
        for finding in all(&good()) {
            assert_eq!(finding.level, Ok, "{finding:?}");
            assert_eq!(finding.hint, None, "{finding:?}");
        }
    }

    /// What is wrong with a good host, and which one finding then says so, how and in which words.
    type Case = (fn(&mut Facts), &'static str, FindingLevel, &'static str);

    const TABLE: &[Case] = &[
        (
            |f| f.kernel = "5.10.0-30-amd64".into(),
            "kernel",
            Warning,
            "older than 6.1",
        ),
        (
            |f| f.kvm_modules = ["kvm_pvm".to_owned()].into(),
            "kvm",
            Warning,
            "software only",
        ),
        (
            |f| (f.kvm, f.cpu_flag) = (Device::Missing, None),
            "kvm",
            Warning,
            "no virtualisation",
        ),
        (
            |f| f.kvm = Device::Missing,
            "kvm",
            Warning,
            "can virtualise (svm)",
        ),
        (
            |f| f.kvm = Device::Denied,
            "kvm",
            Warning,
            "may not be opened",
        ),
        (
            |f| f.kvm = Device::Broken("EBUSY".into()),
            "kvm",
            Warning,
            "EBUSY",
        ),
        (
            |f| {
                f.kvm_modules.clear();
                f.cpu_flag = None;
            },
            "kvm",
            Warning,
            "unclear",
        ),
        (
            |f| f.guest_kernel = false,
            "guest",
            Warning,
            "kernel is missing",
        ),
        (
            |f| f.guest_initramfs = false,
            "guest",
            Warning,
            "initramfs is missing",
        ),
        (
            |f| f.cgroup = Cgroup::Missing,
            "cgroup",
            Error,
            "nothing can be limited",
        ),
        (
            |f| {
                f.cgroup = Cgroup::V2 {
                    controllers: ["cpu".to_owned()].into(),
                }
            },
            "cgroup",
            Error,
            "cpuset, io, memory, pids",
        ),
        (
            |f| {
                f.cgroup = Cgroup::Hybrid {
                    controllers: CONTROLLERS_V1.map(str::to_owned).into(),
                }
            },
            "cgroup",
            Warning,
            "hybrid",
        ),
        (
            |f| {
                f.cgroup = Cgroup::V1 {
                    controllers: ["memory".to_owned()].into(),
                }
            },
            "cgroup",
            Error,
            "blkio, cpu, cpuset, devices, freezer, pids",
        ),
        (
            |f| f.overlayfs = Feature::Missing,
            "overlayfs",
            Error,
            "no overlayfs",
        ),
        (
            |f| f.mkfs_erofs = false,
            "erofs",
            Warning,
            "`mkfs.erofs` is not installed",
        ),
        (
            |f| f.user_namespaces = Some(0),
            "user-namespaces",
            Warning,
            "forbidden",
        ),
        (
            |f| f.state_maps_owners = Some(false),
            "user-namespaces",
            Warning,
            "cannot give its files",
        ),
        (
            |f| f.user_namespaces = None,
            "user-namespaces",
            Warning,
            "has no user namespaces",
        ),
        (
            |f| f.tun = Device::Missing,
            "tun",
            Warning,
            "no /dev/net/tun",
        ),
        (|f| f.nft = Nft::Missing, "nftables", Error, "not installed"),
        (
            |f| f.nft = Nft::Fails("no".into()),
            "nftables",
            Error,
            "fails: no",
        ),
        (
            |f| {
                f.nft = Nft::Works {
                    dropping: vec!["ip filter FORWARD".into()],
                }
            },
            "forwarding",
            Warning,
            "ip filter FORWARD",
        ),
        (
            |f| f.io_uring_disabled = Some(2),
            "io_uring",
            Warning,
            "is 2",
        ),
        (
            |f| f.capabilities &= !(1 << CAP_SYS_RESOURCE),
            "privileges",
            Warning,
            "CAP_SYS_RESOURCE",
        ),
    ];

    #[test]
    fn each_fault_gives_one_finding_with_a_hint_and_leaves_the_others_green() {
        for (index, (spoil, check, level, words)) in TABLE.iter().enumerate() {
            let mut facts = good();
            spoil(&mut facts);
            let bad: Vec<_> = all(&facts)
                .into_iter()
                .filter(|finding| finding.level != Ok)
                .collect();
            let [finding] = bad.as_slice() else {
                panic!("case {index}: {bad:#?}")
            };
            assert_eq!(
                (finding.check.as_str(), finding.level),
                (*check, *level),
                "case {index}"
            );
            assert!(finding.detail.contains(words), "case {index}: {finding:?}");
            assert!(finding.hint.is_some(), "case {index}: {finding:?}");
        }
    }
}
