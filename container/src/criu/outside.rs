//! What a container uses that is not its own, by the names that a dump and a restore have for it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Mount, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

use super::CriuError;
use super::rpc::JoinNamespace;
use crate::cgroup::Cgroup;
use crate::masks;
use crate::plan::devices::{self, DevicePlan};
use crate::plan::options::Options;
use crate::root::Root;

/// What hides files.
const NULL: &str = "/dev/null";

/// What CRIU cannot bring back, or would bring back as something else.
pub(super) fn refuse(spec: &Spec) -> Result<(), CriuError> {
    for (index, kind, _) in spec.linux().iter().flat_map(joined) {
        if joining(kind) == Joining::Impossible {
            return Err(CriuError::unsupported(
                format!("linux.namespaces[{index}].path"),
                format!(
                    "a checkpoint cannot have a {kind} namespace that is not the container's own"
                ),
            ));
        }
    }
    let namespaces = spec
        .linux()
        .iter()
        .filter_map(|linux| linux.namespaces().as_ref());
    let is_mount = |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::Mount;
    if !namespaces.flatten().any(is_mount) {
        let reason = "a checkpoint needs a mount namespace of the container's own";
        return Err(CriuError::unsupported("linux.namespaces", reason));
    }
    let devices = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.net_devices().as_ref());
    if devices.is_some_and(|devices| !devices.is_empty()) {
        let reason = "a checkpoint cannot have devices of the host's network";
        return Err(CriuError::unsupported("linux.netDevices", reason));
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let is_mapped = options(mount).id_map.is_some()
            || mount.uid_mappings().is_some()
            || mount.gid_mappings().is_some();
        if is_mapped {
            let field = format!("mounts[{index}].options");
            let reason = "CRIU knows nothing of mounts with mapped owners";
            return Err(CriuError::unsupported(field, reason));
        }
    }
    Ok(())
}

fn options(mount: &Mount) -> Options {
    Options::parse(mount.options().iter().flatten().map(String::as_str))
}

/// A bind mount: what it shows is somebody else's.
fn is_bind(mount: &Mount) -> bool {
    let options = options(mount);
    (options.bind.is_some() || mount.typ().as_deref() == Some("bind")) && !options.remount
}

fn binds(spec: &Spec) -> impl Iterator<Item = &Mount> {
    spec.mounts()
        .iter()
        .flatten()
        .filter(|mount| is_bind(mount))
}

/// The devices that may be the host's nodes, bound, as in a user namespace: they are where the host has them.
fn devices(spec: &Spec) -> impl Iterator<Item = String> {
    let linux = spec.linux().as_ref();
    let given = linux.and_then(|linux| linux.devices().as_deref());
    // They were checked when the container was made.
    let planned = devices::plan(given.unwrap_or_default(), true).unwrap_or_default();
    let mount = |device: DevicePlan| format!("mnt[{0}]:{0}", device.path.display());
    planned.into_iter().map(mount)
}

/// The mounts of control groups, which are the host's: of each the place below a mount, its name, and where
/// the host has it.
fn cgroups(spec: &Spec, cgroup: &Cgroup) -> Vec<(PathBuf, String, PathBuf)> {
    let is_cgroup = |mount: &&Mount| matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"));
    let mounts = spec.mounts().iter().flatten().filter(is_cgroup);
    let views = cgroup.views();
    let shown = |mount: &Mount| {
        let views = views.iter().map(|(name, path)| {
            // Joined with nothing, a path would end with a slash.
            let place = match name.as_str() {
                "" => mount.destination().clone(),
                name => mount.destination().join(name),
            };
            (place, format!("cgroup:{name}"), path.clone())
        });
        views.collect::<Vec<_>>()
    };
    mounts.flat_map(shown).collect()
}

/// The mounts of a running container that show somebody else's files, for a dump: where they are, and
/// under which name they will be asked for.
pub(super) fn mounts(spec: &Spec, cgroup: &Cgroup, pid: i32) -> io::Result<Vec<String>> {
    let root = Root::open_host(Path::new(&format!("/proc/{pid}/root")))?;
    let mut external = Vec::new();
    for mount in binds(spec) {
        let name = mount.destination().display();
        let place = place(&root.find(mount.destination())?)?;
        external.push(format!("mnt[{}]:{name}", place.display()));
    }
    for (path, name, _) in cgroups(spec, cgroup) {
        let place = place(&root.find(&path)?)?;
        external.push(format!("mnt[{}]:{name}", place.display()));
    }
    for path in masked_paths(spec) {
        let Some(found) = masks::find(path, &root)? else {
            continue;
        };
        if !FileType::from_raw_mode(fstat(&found)?.st_mode).is_dir() {
            external.push(format!("mnt[{}]:{NULL}", place(&found)?.display()));
        }
    }
    external.extend(devices(spec));
    Ok(external)
}

/// The path of an open file, without links, in the mount namespace that it is in.
fn place(file: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn masked_paths(spec: &Spec) -> impl Iterator<Item = &Path> {
    let linux = spec.linux().as_ref();
    let paths = linux.and_then(|linux| linux.masked_paths().as_ref());
    paths.into_iter().flatten().map(Path::new)
}

/// What those names stand for, for a restore.
pub(super) fn sources(spec: &Spec, cgroup: &Cgroup, bundle: &Path) -> Vec<String> {
    let binds = binds(spec).filter_map(|mount| {
        let source = bundle.join(mount.source().as_ref()?);
        Some(format!(
            "mnt[{}]:{}",
            mount.destination().display(),
            source.display()
        ))
    });
    let cgroups = cgroups(spec, cgroup).into_iter();
    let cgroups = cgroups.map(|(_, name, path)| format!("mnt[{name}]:{}", path.display()));
    let mut external: Vec<String> = binds.chain(cgroups).chain(devices(spec)).collect();
    let null = format!("mnt[{NULL}]:{NULL}");
    if masked_paths(spec).next().is_some() && !external.contains(&null) {
        external.push(null);
    }
    external
}

/// Makes the places of mounts that the root file system does not have, as when it was just unpacked: those
/// in new file systems CRIU brings back with these.
pub(super) fn make_mount_points(spec: &Spec, bundle: &Path, rootfs: &Path) -> io::Result<()> {
    let mounts: Vec<&Mount> = spec.mounts().iter().flatten().collect();
    for (index, mount) in mounts.iter().enumerate() {
        let destination = Path::new("/").join(mount.destination());
        let around = mounts[..index].iter().rev().find(|other| {
            let place = Path::new("/").join(other.destination());
            destination != place && destination.starts_with(place)
        });
        let source = |mount: &Mount| mount.source().as_ref().map(|source| bundle.join(source));
        let (root, inside) = match around {
            None => (rootfs.to_owned(), destination),
            Some(around) => {
                let place = Path::new("/").join(around.destination());
                let inside = destination.strip_prefix(place).map_err(io::Error::other)?;
                match source(around).filter(|_| is_bind(around)) {
                    Some(source) => (source, inside.to_owned()),
                    None => continue,
                }
            }
        };
        let root = Root::open_host(&root)?;
        let is_file = is_bind(mount) && source(mount).is_some_and(|source| source.is_file());
        if is_file {
            root.make_file(&inside)?;
        } else {
            root.make_directory(&inside)?;
        }
    }
    Ok(())
}

/// What is done about a namespace that the container was told to join.
#[derive(Eq, PartialEq)]
enum Joining {
    /// A dump leaves it out: its file in /proc/PID/ns, and the name by which a restore is given another.
    Outside(&'static str, &'static str),
    /// It is dumped, and not used: a restore joins another by its path.
    ByPath,
    Impossible,
}

fn joining(kind: LinuxNamespaceType) -> Joining {
    match kind {
        LinuxNamespaceType::Network => Joining::Outside("net", "extRootNetNS"),
        LinuxNamespaceType::Pid => Joining::Outside("pid", "extRootPidNS"),
        LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts => Joining::ByPath,
        LinuxNamespaceType::Mount
        | LinuxNamespaceType::User
        | LinuxNamespaceType::Cgroup
        | LinuxNamespaceType::Time => Joining::Impossible,
    }
}

/// The namespaces that a container was told to join: number, type and path.
fn joined(linux: &Linux) -> impl Iterator<Item = (usize, LinuxNamespaceType, &Path)> {
    let namespaces = linux.namespaces().iter().flatten().enumerate();
    namespaces.filter_map(|(index, namespace)| {
        let path = namespace.path().as_deref();
        let path = path.filter(|path| !path.as_os_str().is_empty())?;
        Some((index, namespace.typ(), path))
    })
}

/// Those that a dump leaves out.
pub(super) fn namespaces(spec: &Spec, pid: i32) -> io::Result<Vec<String>> {
    let mut external = Vec::new();
    for (_, kind, _) in spec.linux().iter().flat_map(joined) {
        if let Joining::Outside(name, key) = joining(kind) {
            let stat = fs::metadata(format!("/proc/{pid}/ns/{name}"))?;
            external.push(format!("{name}[{}]:{key}", stat.ino()));
        }
    }
    Ok(external)
}

/// Descriptors by the names of what they replace.
pub(super) type Given = Vec<(String, OwnedFd)>;

/// What a restore uses for them: by descriptor, or by path.
pub(super) fn replaced_namespaces(spec: &Spec) -> io::Result<(Given, Vec<JoinNamespace>)> {
    let (mut given, mut paths) = (Vec::new(), Vec::new());
    for (_, kind, path) in spec.linux().iter().flat_map(joined) {
        match joining(kind) {
            Joining::Outside(_, key) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                given.push((key.to_owned(), openat(CWD, path, flags, Mode::empty())?));
            }
            Joining::ByPath => paths.push(JoinNamespace {
                kind: kind.to_string(),
                file: path.display().to_string(),
            }),
            // It was refused.
            Joining::Impossible => {}
        }
    }
    Ok((given, paths))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_cannot_be_brought_back_is_refused_by_its_field() {
        let field = |linux: &str, mounts: &str| {
            let text = format!(r#"{{"ociVersion":"1.0.0","linux":{linux},"mounts":{mounts}}}"#);
            refuse(&spec(&text)).map_err(|error| error.to_string())
        };
        let own = r#"{"namespaces":[{"type":"mount"},{"type":"network","path":"/n"}]}"#;
        assert_eq!(field(own, "[]"), Ok(()));
        for (linux, mounts, named) in [
            ("{}", "[]", "linux.namespaces"),
            (
                r#"{"namespaces":[{"type":"mount"},{"type":"user","path":"/u"}]}"#,
                "[]",
                "linux.namespaces[1].path",
            ),
            (
                r#"{"namespaces":[{"type":"mount"}],"netDevices":{"eth0":{}}}"#,
                "[]",
                "linux.netDevices",
            ),
            (
                own,
                r#"[{"destination":"/a","source":"/a","options":["bind","idmap"]}]"#,
                "mounts[0].options",
            ),
        ] {
            let message = field(linux, mounts).unwrap_err();
            assert!(message.contains(&format!(" {named}: ")), "{message}");
        }
    }

    #[test]
    fn places_of_mounts_are_made_where_they_will_be_looked_for() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        for made in ["rootfs", "data"] {
            fs::create_dir(at(made)).unwrap();
        }
        fs::write(at("file"), "").unwrap();
        let spec = spec(
            r#"{"ociVersion":"1.0.0","mounts":[
                {"destination":"/proc","type":"proc"},
                {"destination":"/run","type":"tmpfs"},
                {"destination":"/run/inside","type":"bind","source":"file"},
                {"destination":"/data","source":"data","options":["rbind"]},
                {"destination":"/data/etc/file","source":"file","options":["bind"]},
                {"destination":"/../etc/hosts","source":"file","options":["bind"]}]}"#,
        );
        make_mount_points(&spec, directory.path(), &at("rootfs")).unwrap();
        for path in ["rootfs/proc", "rootfs/run", "rootfs/data"] {
            assert!(at(path).is_dir(), "{path}");
        }
        assert!(at("rootfs/etc/hosts").is_file());
        assert!(at("data/etc/file").is_file());
        assert!(!at("rootfs/run/inside").exists());
        let sources = sources(&spec, &Cgroup::open("").unwrap(), directory.path());
        let expected = format!("mnt[/run/inside]:{}", at("file").display());
        assert!(sources.contains(&expected), "{sources:?}");
        assert!(sources.contains(&"mnt[/dev/tty]:/dev/tty".to_owned()));
    }
}
