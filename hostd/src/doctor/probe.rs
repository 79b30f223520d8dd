//! Looks at the host. Takes what it finds as it is; what that means is `judge`'s to say.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use container::users::{IdRange, UserNamespace};
use serde_json::Value;

/// Programs may be in these also where PATH does not say so.
const SYSTEM_PATHS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// What is known of the host.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) kernel: String,
    pub(super) kvm: Device,
    /// Of `kvm_intel`, `kvm_amd`, `kvm_pvm`, …: those that are loaded.
    pub(super) kvm_modules: BTreeSet<String>,
    /// The processor's flag for virtualisation, `vmx` or `svm`.
    pub(super) cpu_flag: Option<&'static str>,
    pub(super) cgroup: Cgroup,
    pub(super) overlayfs: Feature,
    pub(super) erofs: Feature,
    pub(super) mkfs_erofs: bool,
    /// How many user namespaces may be made; `None` if the kernel knows none.
    pub(super) user_namespaces: Option<u64>,
    /// Whether mounts of the state directory can map the owners of files; `None` if that could not be tried.
    pub(super) state_maps_owners: Option<bool>,
    pub(super) tun: Device,
    pub(super) vhost_net: Device,
    pub(super) nft: Nft,
    /// `kernel.io_uring_disabled`; `None` if the kernel does not have it.
    pub(super) io_uring_disabled: Option<u8>,
    pub(super) guest_kernel: bool,
    pub(super) guest_initramfs: bool,
    /// The effective capabilities of this process, a bit each.
    pub(super) capabilities: u64,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Device {
    Missing,
    Denied,
    Broken(String),
    Opens,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Feature {
    Present,
    /// There is a module for it.
    Loadable,
    Missing,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Cgroup {
    /// Not mounted where everyone expects it.
    Missing,
    V1 {
        controllers: BTreeSet<String>,
    },
    /// Version 1 with the controllers, version 2 beside it.
    Hybrid {
        controllers: BTreeSet<String>,
    },
    V2 {
        controllers: BTreeSet<String>,
    },
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Nft {
    Missing,
    Fails(String),
    Works {
        /// Chains of others that drop what is forwarded unless a rule lets it pass.
        dropping: Vec<String>,
    },
}

pub(super) fn look(guest_dir: &Path, state_dir: &Path) -> Facts {
    let kernel = text("/proc/sys/kernel/osrelease").trim().to_owned();
    let guest_file = |names: &[&str]| names.iter().any(|name| guest_dir.join(name).is_file());
    Facts {
        kvm: open("/dev/kvm"),
        kvm_modules: kvm_modules(),
        cpu_flag: cpu_flag(&text("/proc/cpuinfo")),
        cgroup: cgroup(Path::new("/sys/fs/cgroup")),
        overlayfs: file_system("overlay", &kernel),
        erofs: file_system("erofs", &kernel),
        mkfs_erofs: has_program("mkfs.erofs"),
        user_namespaces: text("/proc/sys/user/max_user_namespaces")
            .trim()
            .parse()
            .ok(),
        state_maps_owners: maps_owners(state_dir),
        tun: open("/dev/net/tun"),
        vhost_net: open("/dev/vhost-net"),
        nft: nft(),
        io_uring_disabled: text("/proc/sys/kernel/io_uring_disabled")
            .trim()
            .parse()
            .ok(),
        guest_kernel: guest_file(&["kernel"]),
        guest_initramfs: guest_file(&["initramfs", "initramfs.cpio"]),
        capabilities: capabilities(&text("/proc/self/status")),
        kernel,
    }
}

/// A file's text, or none: what cannot be read is not there.
fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn open(path: &str) -> Device {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Device::Opens,
        Err(error) if error.kind() == ErrorKind::NotFound => Device::Missing,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Device::Denied,
        Err(error) => Device::Broken(error.to_string()),
    }
}

/// Tries it on the directory, or where it would be made. Nothing is mounted anywhere.
fn maps_owners(directory: &Path) -> Option<bool> {
    let there = directory.ancestors().find(|path| path.is_dir())?;
    let users = UserNamespace::new(IdRange { first: 1, count: 1 }).ok()?;
    match users.mapped_tree(there, false) {
        Ok(_) => Some(true),
        Err(error) if error.kind() == ErrorKind::InvalidInput => Some(false),
        Err(_) => None,
    }
}

fn kvm_modules() -> BTreeSet<String> {
    // Modules and what is built in both show here.
    let Ok(entries) = fs::read_dir("/sys/module") else {
        return BTreeSet::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect()
}

fn cpu_flag(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"]
        .into_iter()
        .find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

fn cgroup(root: &Path) -> Cgroup {
    let words = |text: String| text.split_whitespace().map(str::to_owned).collect();
    if let Ok(text) = fs::read_to_string(root.join("cgroup.controllers")) {
        return Cgroup::V2 {
            controllers: words(text),
        };
    }
    let Ok(entries) = fs::read_dir(root) else {
        return Cgroup::Missing;
    };
    // Each hierarchy is a directory, or a link to the one that it shares.
    let controllers: BTreeSet<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| root.join(name).join("cgroup.procs").exists())
        .filter(|name| name != "unified" && name != "systemd")
        .flat_map(|name| name.split(',').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let unified = root.join("unified/cgroup.procs").exists();
    match (controllers.is_empty(), unified) {
        (true, false) => Cgroup::Missing,
        (_, true) => Cgroup::Hybrid { controllers },
        (false, false) => Cgroup::V1 { controllers },
    }
}

fn file_system(name: &str, kernel: &str) -> Feature {
    let known = text("/proc/filesystems");
    if known
        .lines()
        .any(|line| line.split_whitespace().next_back() == Some(name))
    {
        return Feature::Present;
    }
    let modules = text(Path::new("/lib/modules").join(kernel).join("modules.dep"));
    let file = format!("/{name}.ko");
    if modules.lines().any(|line| {
        line.split(':')
            .next()
            .is_some_and(|path| path.contains(&file))
    }) {
        Feature::Loadable
    } else {
        Feature::Missing
    }
}

fn has_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_PATHS.iter().map(Into::into))
        .any(|dir| dir.join(name).is_file())
}

fn nft() -> Nft {
    let path = env::var("PATH").unwrap_or_default();
    let output = Command::new("nft")
        .args(["-j", "list", "chains"])
        .env("PATH", format!("{path}:{}", SYSTEM_PATHS.join(":")))
        .output();
    match output {
        Err(_) => Nft::Missing,
        Ok(output) if output.status.success() => Nft::Works {
            dropping: dropping(&output.stdout),
        },
        Ok(output) => {
            let message = String::from_utf8_lossy(&output.stderr);
            Nft::Fails(
                message
                    .lines()
                    .next()
                    .unwrap_or("no reason given")
                    .to_owned(),
            )
        }
    }
}

/// The chains that drop by default what is forwarded, from `nft -j list chains`.
pub(super) fn dropping(chains: &[u8]) -> Vec<String> {
    let chains: Value = serde_json::from_slice(chains).unwrap_or_default();
    let entries = chains["nftables"].as_array().cloned().unwrap_or_default();
    entries
        .iter()
        .map(|entry| &entry["chain"])
        .filter(|chain| chain["hook"] == "forward" && chain["policy"] == "drop")
        .filter(|chain| chain["table"] != "hostd" && chain["family"] != "ip6")
        .filter_map(|chain| {
            let part = |key: &str| chain[key].as_str();
            Some(format!(
                "{} {} {}",
                part("family")?,
                part("table")?,
                part("name")?
            ))
        })
        .collect()
}

fn capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_flag_is_found_among_its_flags_only() {
        assert_eq!(
            cpu_flag("model name: svm\nflags\t\t: fpu svm lahf_lm\n"),
            Some("svm")
        );
        assert_eq!(cpu_flag("flags : fpu vmx\n"), Some("vmx"));
        assert_eq!(cpu_flag("flags : fpu svm_lock\n"), None);
        assert_eq!(cpu_flag(""), None);
    }

    #[test]
    fn owners_are_mapped_where_the_file_system_can() {
        assert_eq!(maps_owners(Path::new("/proc/nowhere")), Some(false));
        let here = env::current_dir().unwrap();
        assert!(maps_owners(&here).is_some());
        assert_eq!(maps_owners(&here.join("not-made-yet")), maps_owners(&here));
    }

    #[test]
    fn the_cgroup_layout_is_told_by_what_is_mounted() {
        let make = |dirs: &[&str]| {
            let root = tempfile::tempdir().unwrap();
            for dir in dirs {
                fs::create_dir_all(root.path().join(dir)).unwrap();
                fs::write(root.path().join(dir).join("cgroup.procs"), "").unwrap();
            }
            root
        };
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();

        let v1 = make(&["cpu,cpuacct", "memory", "systemd"]);
        let controllers = names(&["cpu", "cpuacct", "memory"]);
        assert_eq!(cgroup(v1.path()), Cgroup::V1 { controllers });
        let hybrid = make(&["memory", "unified"]);
        assert_eq!(
            cgroup(hybrid.path()),
            Cgroup::Hybrid {
                controllers: names(&["memory"])
            }
        );
        let v2 = make(&[]);
        fs::write(v2.path().join("cgroup.controllers"), "cpu io\n").unwrap();
        assert_eq!(
            cgroup(v2.path()),
            Cgroup::V2 {
                controllers: names(&["cpu", "io"])
            }
        );
        assert_eq!(cgroup(make(&[]).path()), Cgroup::Missing);
    }

    #[test]
    fn dockers_forward_chain_is_seen_and_ours_is_not() {
        let chains = br#"{"nftables":[{"metainfo":{}},
            {"chain":{"family":"ip","table":"filter","name":"FORWARD","hook":"forward",
                      "policy":"drop"}},
            {"chain":{"family":"ip","table":"filter","name":"INPUT","hook":"input",
                      "policy":"drop"}},
            {"chain":{"family":"ip","table":"hostd","name":"forward","hook":"forward",
                      "policy":"drop"}},
            {"chain":{"family":"ip","table":"filter","name":"DOCKER"}}]}"#;
        assert_eq!(dropping(chains), ["ip filter FORWARD"]);
        assert_eq!(dropping(b"nonsense"), Vec::<String>::new());
    }
}
