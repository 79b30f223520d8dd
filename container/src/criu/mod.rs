//! Checkpoints of containers by [CRIU](https://criu.org): its processes are written to files, and brought
//! back from them, on this host or another.
//!
//! CRIU sees the container from the host, where a part of what it uses is not the container's own:
//! sources of bind mounts, namespaces of others, the engine's ends of the standard streams. Each of
//! these gets a name in a dump, by which it is given again in a restore ([`outside`], [`streams`]).

mod allow;
mod dump;
mod outside;
mod restore;
mod rpc;
mod streams;
mod worker;

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, accessat, fchmod, fchown, fstat, mkdirat, openat,
};
use rustix::io::Errno;

pub use self::allow::{Allowed, CgroupsMode, PageServer};
pub(crate) use self::dump::Dump;
pub use self::dump::DumpOptions;
pub use self::restore::Source;
pub(crate) use self::restore::{Point, Restore};
use self::rpc::{Kind, NetworkLock, Options, Request};
pub(crate) use self::worker::Served;
use self::worker::{Place, Worker};
use crate::program::PATH_DEFAULT;
use crate::rights::is_host_root;
use crate::sys::place_descriptor;

/// The first with everything that is used: pid namespaces of others, and the freezer of cgroup v2.
const VERSION_MIN: (i32, i32) = (3, 15);

/// The first that takes its own table of nftables away in a restore, and does not leave a network closed.
const NFTABLES_VERSION_MIN: (i32, i32) = (4, 1);

/// How much of CRIU's log is told when it fails: the lines with errors, the last ones.
const LOG_LINES_MAX: usize = 3;

/// Everything but what is for CRIU's developers: its errors tell little without what came before.
const LOG_LEVEL: i32 = 4;

/// How many images may build on each other, if the container has users of its own.
const PARENTS_MAX: usize = 64;

/// Options that hosts set for all their containers, as for runc.
const CONFIG_FILE: &str = "/etc/criu/runc.conf";
/// The annotation that names another file; empty for none.
pub(crate) const CONFIG_ANNOTATION: &str = "org.criu.config";

/// Why a container was not checkpointed or restored.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    #[error(
        "checkpoint and restore need CRIU, and there is no program `{}`: install it (apt-get install \
         criu), or name it with --criu", program.display()
    )]
    Missing { program: PathBuf },
    #[error("checkpoint and restore need CRIU {}.{} or newer; this is {major}.{minor}", VERSION_MIN.0, VERSION_MIN.1)]
    TooOld { major: i32, minor: i32 },
    #[error("checkpoint and restore need the rights of the host's root, which CRIU needs")]
    Rights,
    #[error("config.json: {field}: {reason}")]
    Unsupported { field: String, reason: String },
    #[error("CRIU could not {act} the container{lines}; see {}", log.display())]
    Failed {
        act: &'static str,
        /// What its log says.
        lines: String,
        log: PathBuf,
    },
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
    #[error("cannot open the directory {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
}

impl CriuError {
    fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> CriuError + Copy {
        move |error| CriuError::Step {
            step,
            source: error.into(),
        }
    }

    fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> CriuError {
        CriuError::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// The program, found and new enough.
#[derive(Debug)]
pub(crate) struct Criu {
    program: PathBuf,
    /// What holds packets back while a container is away.
    network_lock: NetworkLock,
}

/// The directories of a checkpoint.
#[derive(Clone, Debug)]
pub struct Images {
    /// Where the images are.
    pub directory: PathBuf,
    /// Where CRIU's log goes; with the images if not given.
    pub work: Option<PathBuf>,
}

/// They are open.
#[derive(Debug)]
struct OpenImages {
    directory: Directory,
    work: Option<Directory>,
    log: PathBuf,
}

/// An open directory of the host.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    descriptor: OwnedFd,
}

impl Directory {
    fn open(path: &Path) -> rustix::io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            path: path.to_owned(),
            descriptor: openat(CWD, path, flags, Mode::empty())?,
        })
    }
}

impl Criu {
    /// Finds the program, `criu` in PATH if none is named, and asks for its version.
    pub(crate) fn find(named: Option<&Path>) -> Result<Self, CriuError> {
        if !is_host_root() {
            return Err(CriuError::Rights);
        }
        let name = named.unwrap_or_else(|| Path::new("criu"));
        let missing = || CriuError::Missing {
            program: name.to_owned(),
        };
        let program = look(name).ok_or_else(missing)?;
        let request = Request {
            kind: Kind::Version.into(),
            ..Request::default()
        };
        let worker = Worker::start(&program, Place::HERE)?;
        let version = match worker.serve(&request, &mut |_, _| Ok::<_, Infallible>(())) {
            Ok(response) => response.version.unwrap_or_default(),
            Err(Served::Criu(error)) => return Err(error),
            Err(Served::Caller(never)) => match never {},
        };
        let (major, minor) = (version.major, version.minor);
        if (major, minor) < VERSION_MIN {
            return Err(CriuError::TooOld { major, minor });
        }
        // It may be missed only by who has to hold packets back, and CRIU says so.
        let has_iptables = look(Path::new("iptables-restore")).is_some();
        let network_lock = if has_iptables || (major, minor) < NFTABLES_VERSION_MIN {
            NetworkLock::Iptables
        } else {
            NetworkLock::Nftables
        };
        Ok(Self {
            program,
            network_lock,
        })
    }
}

/// A program by its path, or by its name in PATH.
fn look(name: &Path) -> Option<PathBuf> {
    let is_program = |path: &PathBuf| {
        let access = rustix::fs::Access::EXEC_OK;
        path.is_file() && accessat(CWD, path, access, AtFlags::EACCESS).is_ok()
    };
    if name.components().count() > 1 {
        return Some(name.to_owned()).filter(is_program);
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| PATH_DEFAULT.into());
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(is_program)
}

impl Images {
    /// Opens the directories, made where they are missing and this is `new`.
    fn open(&self, new: bool, log: &str) -> Result<OpenImages, CriuError> {
        let open = |path: &Path, new: bool| {
            let made = if new {
                mkdirat(CWD, path, Mode::RWXU)
            } else {
                Ok(())
            };
            let opened = match made {
                Ok(()) | Err(Errno::EXIST) => Directory::open(path),
                Err(error) => Err(error),
            };
            opened.map_err(|error| CriuError::Directory {
                path: path.to_owned(),
                source: error.into(),
            })
        };
        let work = self.work.as_deref().map(|path| open(path, true));
        Ok(OpenImages {
            directory: open(&self.directory, new)?,
            work: work.transpose()?,
            log: self.work.as_ref().unwrap_or(&self.directory).join(log),
        })
    }
}

/// The options that every request has.
fn options(
    criu: &Criu,
    images: &OpenImages,
    allowed: &Allowed,
    annotations: &BTreeMap<String, String>,
) -> Options {
    let log = images.log.file_name().unwrap_or_default();
    let work = images.work.as_ref();
    let mut options = Options {
        images_dir_fd: images.directory.descriptor.as_raw_fd(),
        work_dir_fd: work.map(|work| work.descriptor.as_raw_fd()),
        log_level: Some(LOG_LEVEL),
        log_file: Some(log.to_string_lossy().into_owned()),
        notify_scripts: Some(true),
        // The engine's side of a terminal is outside.
        orphan_pts_master: Some(true),
        network_lock: Some(criu.network_lock.into()),
        config_file: match annotations.get(CONFIG_ANNOTATION).map(String::as_str) {
            Some("") => None,
            Some(file) => Some(file.to_owned()),
            None => Some(CONFIG_FILE.to_owned()),
        },
        ..Options::default()
    };
    allowed.enter_into(&mut options);
    options
}

impl OpenImages {
    fn directories(&self) -> impl Iterator<Item = &Directory> {
        [Some(&self.directory), self.work.as_ref()]
            .into_iter()
            .flatten()
    }

    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.directories()
            .map(|directory| directory.descriptor.as_fd())
    }

    /// Opens the directories again, under their numbers, in a mount namespace that this process has just
    /// come to: from a directory of another one nothing can be mounted. For a process that is about to
    /// execute CRIU.
    fn reopen(&self) -> io::Result<()> {
        for directory in self.directories() {
            let again = Directory::open(&directory.path)?;
            let number = directory.descriptor.as_raw_fd();
            place_descriptor(again.descriptor.as_fd(), number)?;
        }
        Ok(())
    }

    /// Lets a group of the host's open the images, which the container's root reads in its user namespace. They
    /// hold the container's memory: nobody else gets in.
    fn let_in(&self, group: u32) -> io::Result<()> {
        let mut directory = self.directory.descriptor.try_clone()?;
        for _ in 0..PARENTS_MAX {
            let stat = fstat(&directory)?;
            let mode = Mode::from_raw_mode(stat.st_mode);
            let is_let_in =
                mode.contains(Mode::XOTH) || (stat.st_gid == group && mode.contains(Mode::XGRP));
            if !is_let_in {
                fchown(&directory, None, Some(Gid::from_raw(group)))?;
                fchmod(&directory, mode | Mode::XGRP)?;
            }
            // Those that it was built on.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match openat(&directory, "parent", flags, Mode::empty()) {
                Ok(parent) => directory = parent,
                Err(Errno::NOENT) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::LOOP.into())
    }

    /// CRIU says that it failed, and only in its log why.
    fn failure(&self, act: &'static str) -> CriuError {
        CriuError::Failed {
            act,
            lines: errors_of(&self.log),
            log: self.log.clone(),
        }
    }
}

/// The last lines of a log that tell of errors, as `: ONE; OTHER`.
fn errors_of(log: &Path) -> String {
    let Ok(file) = File::open(log) else {
        return String::new();
    };
    let mut last = VecDeque::new();
    for line in BufReader::new(file).lines().map_while(Result::ok) {
        if !line.contains("Error (") {
            continue;
        }
        if last.len() == LOG_LINES_MAX {
            last.pop_front();
        }
        last.push_back(told(&line).to_owned());
    }
    let lines = Vec::from(last).join("; ");
    if lines.is_empty() {
        return lines;
    }
    format!(": {lines}")
}

/// Without the time, the place in the source, and the mark of an error: `(00.0123)     12: Error (a.c:7): …`.
fn told(line: &str) -> &str {
    line.split_once("Error (")
        .and_then(|(_, rest)| rest.split_once("): "))
        .map_or(line, |(_, rest)| rest)
        .trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_log_the_last_errors_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("dump.log");
        assert_eq!(errors_of(&log), "");
        let lines = [
            "(00.000000) Version: 3.17.1",
            "(00.001000) Error (criu/a.c:1): one",
            "(00.002000)     12: Error (criu/b.c:22): two: No such file or directory",
            "(00.003000) Error (criu/c.c:3): three",
            "(00.004000) Warn (criu/c.c:3): not this",
            "(00.005000) Error (criu/cr-dump.c:1781): Dumping FAILED.",
        ];
        std::fs::write(&log, lines.join("\n")).unwrap();
        let told = ": two: No such file or directory; three; Dumping FAILED.";
        assert_eq!(errors_of(&log), told);
    }

    #[test]
    fn a_program_is_found_by_path_or_by_name() {
        assert!(look(Path::new("sh")).is_some());
        assert!(look(Path::new("/bin/sh")).is_some());
        for none in ["no-such-program", "/etc/passwd", "/etc"] {
            assert_eq!(look(Path::new(none)), None, "{none}");
        }
    }
}
