//! The tests that run in simulated hosts: the end-to-end tests of both kinds, and the container crate's
//! own, since these hosts are the only ones here that have cgroup v2 with every controller.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write, pipe};
use std::path::PathBuf;
use std::process::ExitStatus;

use anyhow::{Context, Result, bail};

use super::{programs, tools};
use crate::host_image;
use crate::sim_host::{self, Machine, Options};
use crate::step::{join, step};

/// A test program and where it finds what it tests.
struct Program {
    /// As cargo calls it.
    name: &'static str,
    /// What comes before its path.
    words: &'static [&'static str],
    /// Of the unit tests of a library, those that need such a host. They are left out where only some of
    /// all tests are asked for: to build them takes a while.
    units: Option<&'static str>,
}

impl Program {
    const fn new(name: &'static str, words: &'static [&'static str]) -> Self {
        let units = None;
        Self { name, words, units }
    }

    fn is_wanted(&self, filter: &[String]) -> bool {
        self.units.is_none() || filter.is_empty()
    }
}

/// A simulated host and what is run in it, one after the other, while the other hosts do their part.
///
/// Two hosts of one processor each rather than one of two: see [`Options`].
struct Share {
    /// The first word of each line that its programs print.
    label: &'static str,
    programs: &'static [Program],
    /// Whether some of them use programs of Debian that the host has not.
    with_tools: bool,
}

static SHARES: [Share; 2] = [
    Share {
        label: "vm",
        programs: &[Program::new(
            "e2e",
            &[
                "env",
                "HOSTD_E2E_HOST=installed",
                "HOSTD_E2E_KINDS=vm",
                "HOSTD_E2E_PART=each-kind",
            ],
        )],
        with_tools: false,
    },
    Share {
        label: "container",
        programs: &[
            Program {
                name: "vmm",
                words: &[],
                units: Some("vhost"),
            },
            Program::new("seccomp", &[]),
            Program::new("oci_library", &[]),
            Program::new("cgroup", &[]),
            Program::new(
                "oci",
                // The runtime of the host image, in place of the one that cargo built beside the tests.
                &["env", "CARGO_BIN_EXE_hostd-oci=/usr/bin/hostd-oci"],
            ),
            Program::new(
                "e2e",
                &[
                    "env",
                    "HOSTD_E2E_HOST=installed",
                    "HOSTD_E2E_KINDS=container",
                ],
            ),
            // The other host has enough to do.
            Program::new(
                "e2e",
                &[
                    "env",
                    "HOSTD_E2E_HOST=installed",
                    "HOSTD_E2E_KINDS=vm",
                    "HOSTD_E2E_PART=one-kind",
                ],
            ),
        ],
        with_tools: true,
    },
];

/// Both shares side by side. `filter` is passed to each program.
pub(super) fn run(filter: &[String]) -> Result<()> {
    let programs = step("Build the tests of the simulated hosts", || {
        let all = SHARES.iter().flat_map(|share| share.programs);
        let (libraries, tests): (Vec<_>, Vec<_>) = all
            .filter(|program| program.is_wanted(filter))
            .partition(|program| program.units.is_some());
        let names = |programs: Vec<&Program>| -> BTreeSet<&str> {
            programs.iter().map(|program| program.name).collect()
        };
        programs(&names(libraries), &names(tests))
    })?;
    let tools = tools::archive()?;
    let hosts = boot()?;
    for (_, host) in hosts.iter().filter(|(share, _)| share.with_tools) {
        tools::install(host, &tools)?;
    }
    std::thread::scope(|scope| {
        let shares: Vec<_> = hosts
            .iter()
            .map(|(share, host)| scope.spawn(|| share.run(host, &programs, filter)))
            .collect();
        join(shares)
    })
}

/// A host for each share, all from one image.
fn boot() -> Result<Vec<(&'static Share, Machine)>> {
    let image = host_image::build()?;
    let boot = |share: &'static Share| {
        let dir = sim_host::new_dir().join(share.label);
        Ok((share, Machine::boot(&image, &dir, Options::default())?))
    };
    SHARES.iter().map(boot).collect()
}

impl Share {
    fn run(&self, host: &Machine, paths: &[(&str, PathBuf)], filter: &[String]) -> Result<()> {
        let wanted = |program: &&Program| program.is_wanted(filter);
        for program in self.programs.iter().filter(wanted) {
            let (_, path) = paths
                .iter()
                .find(|(name, _)| *name == program.name)
                .context("Every program is built")?;
            let target = format!("/tmp/{}", program.name);
            host.push(path, &target)?;
            let words = program.words.iter().copied().chain([target.as_str()]);
            let words: Vec<String> = words
                .chain(program.units)
                .map(str::to_owned)
                .chain(filter.iter().cloned())
                .collect();
            if !self.relay(host, &words)?.success() {
                for words in DIAGNOSIS {
                    self.relay(host, &words.map(str::to_owned))?;
                }
                bail!(
                    "Tests failed in the simulated host: {} ({})",
                    program.name,
                    self.label
                );
            }
        }
        let doctor = self.relay(host, &["hostctl", "doctor"].map(str::to_owned))?;
        if !doctor.success() {
            bail!("`hostctl doctor` is not content with the simulated host");
        }
        Ok(())
    }

    /// Runs a command in the host; what it prints goes to standard output line by line, so that the
    /// hosts do not write into each other's lines.
    fn relay(&self, host: &Machine, words: &[String]) -> Result<ExitStatus> {
        let (output, writer) = pipe()?;
        let mut command = host.command(words, false);
        command.stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().context("Cannot run ssh")?;
        // It holds the writing ends, and the output would not end before they are closed.
        drop(command);
        for line in BufReader::new(output).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            writeln!(std::io::stdout(), "{:9} | {line}", self.label)?;
        }
        child.wait().context("Cannot wait for ssh")
    }
}

/// What a failed program's host is asked: most of all whether its memory ran out.
const DIAGNOSIS: [[&str; 3]; 4] = [
    ["tail", "-n60", "/var/log/hostd.log"],
    ["sh", "-c", "dmesg | tail -n 60"],
    ["sh", "-c", "free -m"],
    ["sh", "-c", "df -m; du -amx / | sort -rn | head -n 30"],
];
