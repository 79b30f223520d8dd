//! The flags of `run` and `create`, and the instance that they describe.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::error::CliError;
use super::limits::LimitFlags;
use crate::api::types::{
    InstanceSpec, Isolation, MountSpec, NetworkMode, NetworkSpec, PortSpec, Protocol,
    RestartPolicy, UserNamespaceMode,
};

#[derive(Args, Clone, Debug)]
pub(super) struct SpecFlags {
    /// Name of the instance; one is chosen if absent
    #[arg(long)]
    name: Option<String>,
    /// What stands between the workload and the host
    #[arg(long, value_enum, default_value_t)]
    isolation: IsolationFlag,
    /// Keep standard input open
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Give the workload a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Remove the instance once it has stopped
    #[arg(long)]
    pub(super) rm: bool,
    /// Set an environment variable; without a value, to its value here
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Read environment variables from a file of KEY=VALUE lines
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Who the users of a container are on the host
    #[arg(long, value_enum)]
    user_namespace: Option<UserNamespaceFlag>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Host name
    #[arg(long)]
    hostname: Option<String>,
    /// Replace the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = label)]
    label: Vec<(String, String)>,
    /// Start it again when it ends
    #[arg(long, value_enum, default_value_t)]
    restart: RestartFlag,
    /// Seconds between the polite signal of `stop` and the kill
    #[arg(long, value_name = "SECONDS")]
    stop_timeout: Option<u32>,
    /// Network to join
    #[arg(long, value_enum, default_value_t)]
    network: NetworkFlag,
    /// Publish a port on the host
    #[arg(short, long, value_name = "[IP:]HOST:INSTANCE[/udp]", value_parser = port)]
    publish: Vec<PortSpec>,
    /// Mount a directory of the host or a named volume
    #[arg(short, long, value_name = "SOURCE:TARGET[:ro]", value_parser = mount)]
    volume: Vec<MountSpec>,
    #[command(flatten)]
    limits: LimitFlags,
    /// The image, as `hostctl image list` shows it
    pub(super) image: String,
    /// Replaces the image's command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum IsolationFlag {
    /// Namespaces and control groups; the host's kernel is shared
    #[default]
    Container,
    /// A virtual machine with a kernel of its own
    Vm,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum UserNamespaceFlag {
    /// Users that nobody else on the host is (the default for containers)
    Own,
    /// The host's: root is root
    Host,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum RestartFlag {
    /// Never
    #[default]
    No,
    /// When it failed
    OnFailure,
    /// However it ended
    Always,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum NetworkFlag {
    /// An address on hostd's bridge, with NAT to the outside
    #[default]
    Bridge,
    /// Loopback only
    None,
}

impl SpecFlags {
    pub(super) fn into_spec(self) -> Result<InstanceSpec, CliError> {
        let mut variables = BTreeMap::new();
        for path in &self.env_file {
            let read = fs::read_to_string(path);
            let text = read.map_err(|source| CliError::File {
                path: path.clone(),
                source,
            })?;
            let lines = text.lines().map(str::trim_start);
            let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
            variables.extend(lines.filter_map(|line| variable(line, from_here)));
        }
        variables.extend(self.env.iter().filter_map(|text| variable(text, from_here)));
        Ok(InstanceSpec {
            name: self.name,
            from_snapshot: None,
            isolation: match self.isolation {
                IsolationFlag::Container => Isolation::Container,
                IsolationFlag::Vm => Isolation::Vm,
            },
            image: self.image,
            entrypoint: self.entrypoint.map(|program| vec![program]),
            command: (!self.command.is_empty()).then_some(self.command),
            env: variables,
            user: self.user,
            user_namespace: self.user_namespace.map(|mode| match mode {
                UserNamespaceFlag::Own => UserNamespaceMode::Own,
                UserNamespaceFlag::Host => UserNamespaceMode::Host,
            }),
            working_dir: self.workdir,
            hostname: self.hostname,
            tty: self.tty,
            stdin: self.interactive,
            limits: self.limits.to_limits(),
            network: NetworkSpec {
                mode: match self.network {
                    NetworkFlag::Bridge => NetworkMode::Bridge,
                    NetworkFlag::None => NetworkMode::None,
                },
                ports: self.publish,
            },
            mounts: self
                .volume
                .into_iter()
                .map(absolute)
                .collect::<Result<_, _>>()?,
            labels: self.label.into_iter().collect(),
            restart: match self.restart {
                RestartFlag::No => RestartPolicy::No,
                RestartFlag::OnFailure => RestartPolicy::OnFailure,
                RestartFlag::Always => RestartPolicy::Always,
            },
            auto_remove: self.rm,
            stop_timeout_s: self.stop_timeout,
        })
    }
}

/// The variables of `-e` flags.
pub(super) fn variables(texts: &[String]) -> BTreeMap<String, String> {
    texts
        .iter()
        .filter_map(|text| variable(text, from_here))
        .collect()
}

fn from_here(key: &str) -> Option<String> {
    env::var(key).ok()
}

/// `KEY=VALUE`, or `KEY` for its value here; nothing if it has none.
fn variable(text: &str, lookup: impl FnOnce(&str) -> Option<String>) -> Option<(String, String)> {
    match text.split_once('=') {
        Some((key, value)) => Some((key.to_owned(), value.to_owned())),
        None => lookup(text).map(|value| (text.to_owned(), value)),
    }
}

/// `KEY=VALUE`, or `KEY` for an empty value.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() {
        return Err("a label needs a key".into());
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn port(text: &str) -> Result<PortSpec, String> {
    let wrong = |what: String| format!("{what}; a port is [IP:]HOST:INSTANCE[/udp], e.g. 8080:80");
    let (ports, protocol) = match text.rsplit_once('/') {
        None | Some((_, "tcp")) => (text.strip_suffix("/tcp").unwrap_or(text), Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((_, other)) => return Err(wrong(format!("`{other}` is not a protocol"))),
    };
    let (host_ip, host, instance) = match ports.split(':').collect::<Vec<_>>()[..] {
        [host, instance] => (None, host, instance),
        [ip, host, instance] => {
            let ip: Ipv4Addr = ip
                .parse()
                .map_err(|_| wrong(format!("`{ip}` is not an IPv4 address")))?;
            (Some(ip), host, instance)
        }
        _ => return Err(wrong(format!("`{text}` does not name two ports"))),
    };
    let number = |text: &str| match text.parse::<u16>() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(wrong(format!("`{text}` is not a port"))),
    };
    Ok(PortSpec {
        host_ip,
        host: number(host)?,
        instance: number(instance)?,
        protocol,
    })
}

fn mount(text: &str) -> Result<MountSpec, String> {
    let wrong = || format!("`{text}` is not SOURCE:TARGET[:ro], e.g. /srv/data:/data:ro");
    let (source, target, read_only) = match text.split(':').collect::<Vec<_>>()[..] {
        [source, target] | [source, target, "rw"] => (source, target, false),
        [source, target, "ro"] => (source, target, true),
        _ => return Err(wrong()),
    };
    if source.is_empty() || !target.starts_with('/') {
        return Err(wrong());
    }
    Ok(MountSpec {
        source: source.to_owned(),
        target: target.to_owned(),
        read_only,
    })
}

/// A source that looks like a path is one from here; any other is a volume's name.
fn absolute(mut mount: MountSpec) -> Result<MountSpec, CliError> {
    if mount.source.starts_with('.') {
        mount.source = absolute_path(Path::new(&mount.source))?;
    }
    Ok(mount)
}

/// A path as hostd finds it, which has a working directory of its own.
pub(super) fn absolute_path(path: &Path) -> Result<String, CliError> {
    let found = fs::canonicalize(path);
    let found = found.map_err(|source| CliError::File {
        path: path.into(),
        source,
    })?;
    Ok(found.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        spec: SpecFlags,
    }

    fn spec(line: &[&str]) -> InstanceSpec {
        let words = ["run"].iter().chain(line);
        Line::try_parse_from(words)
            .unwrap()
            .spec
            .into_spec()
            .unwrap()
    }

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        let table = [
            ("8080:80", Some((None, 8080, 80, Protocol::Tcp))),
            ("8080:80/tcp", Some((None, 8080, 80, Protocol::Tcp))),
            ("53:5353/udp", Some((None, 53, 5353, Protocol::Udp))),
            (
                "127.0.0.1:8080:80",
                Some((Some("127.0.0.1"), 8080, 80, Protocol::Tcp)),
            ),
            ("80", None),
            ("0:80", None),
            ("80:0", None),
            ("80:65536", None),
            ("80:80/sctp", None),
            ("host:80:80", None),
            ("::1:80:80", None),
            ("", None),
        ];
        for (text, expected) in table {
            let found = port(text).ok().map(|port| {
                (
                    port.host_ip.map(|ip| ip.to_string()),
                    port.host,
                    port.instance,
                    port.protocol,
                )
            });
            let expected = expected.map(|(ip, host, instance, protocol)| {
                (ip.map(str::to_owned), host, instance, protocol)
            });
            assert_eq!(found, expected, "{text:?}");
        }
    }

    #[test]
    fn mounts_are_read_as_docker_reads_them() {
        let table = [
            ("/srv:/data", Some(("/srv", "/data", false))),
            ("/srv:/data:ro", Some(("/srv", "/data", true))),
            ("volume:/data:rw", Some(("volume", "/data", false))),
            ("/srv:data", None),
            ("/srv", None),
            (":/data", None),
            ("/srv:/data:x", None),
            ("/a:/b:ro:x", None),
        ];
        for (text, expected) in table {
            let found = mount(text).ok();
            let found = found.as_ref().map(|mount| {
                (
                    mount.source.as_str(),
                    mount.target.as_str(),
                    mount.read_only,
                )
            });
            assert_eq!(found, expected, "{text:?}");
        }
    }

    #[test]
    fn a_variable_without_a_value_has_the_one_from_here() {
        let lookup = |key: &str| (key == "HERE").then(|| "yes".to_owned());
        let table = [
            ("A=b=c", Some(("A", "b=c"))),
            ("A=", Some(("A", ""))),
            ("HERE", Some(("HERE", "yes"))),
            ("NOT_HERE", None),
        ];
        for (text, expected) in table {
            let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
            assert_eq!(variable(text, lookup), expected, "{text}");
        }
    }

    #[test]
    fn what_follows_the_image_is_the_command_even_if_it_looks_like_a_flag() {
        let spec = spec(&["-it", "--rm", "busybox", "sh", "-c", "--rm -d"]);
        assert_eq!(spec.image, "busybox");
        assert_eq!(spec.command.unwrap(), ["sh", "-c", "--rm -d"]);
        assert!(spec.tty && spec.stdin && spec.auto_remove);
    }

    #[test]
    fn flags_win_over_files_and_comments_are_skipped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "# comment\n\nA=file\n  B=file\n").unwrap();
        let path = file.path().to_str().unwrap();
        let spec = spec(&["--env-file", path, "-e", "A=flag", "busybox"]);
        let expected = [("A", "flag"), ("B", "file")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(spec.env, BTreeMap::from(expected));
        assert_eq!(spec.command, None);
    }

    #[test]
    fn a_relative_source_is_made_absolute_and_a_name_stays() {
        let spec = spec(&["-v", "./src:/src", "-v", "data:/data", "busybox"]);
        assert!(spec.mounts[0].source.ends_with("/src") && spec.mounts[0].source.starts_with('/'));
        assert_eq!(spec.mounts[1].source, "data");
    }
}
