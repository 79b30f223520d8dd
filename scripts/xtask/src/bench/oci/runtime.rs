//! The runtimes that are compared, and how each is called.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::bench::program::forget_pages;
use crate::paths;
use crate::step::run;

/// A runtime as named on the command line.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    name: String,
    program: Option<PathBuf>,
}

impl FromStr for Peer {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let (name, program) = match text.split_once('=') {
            Some((name, program)) => (name, Some(PathBuf::from(program))),
            None => (text, None),
        };
        Ok(Self {
            name: name.to_owned(),
            program,
        })
    }
}

impl Peer {
    /// The Debian package to have it from.
    pub(super) fn package(&self) -> Option<&str> {
        let packaged = ["crun", "runc"].contains(&self.name.as_str());
        (packaged && self.program.is_none()).then_some(&self.name)
    }
}

/// A runtime, with a directory of its own for its containers' states.
#[derive(Debug)]
pub(super) struct Runtime {
    pub(super) name: String,
    pub(super) version: String,
    program: PathBuf,
    states: PathBuf,
}

impl Runtime {
    /// The one of this tree.
    pub(super) fn ours(states: &Path) -> Result<Self> {
        Self::new("hostd-oci", paths::binaries().join("hostd-oci"), states)
    }

    pub(super) fn of(peer: &Peer, states: &Path) -> Result<Self> {
        let program = match &peer.program {
            Some(program) => program.canonicalize(),
            None => find(&peer.name),
        };
        let program = program.with_context(|| format!("There is no program for {}", peer.name))?;
        Self::new(&peer.name, program, states)
    }

    fn new(name: &str, program: PathBuf, states: &Path) -> Result<Self> {
        let version = run(Command::new(&program).arg("--version"))?;
        forget_pages(&program)
            .with_context(|| format!("Cannot have {} read anew", program.display()))?;
        let version = version.split_whitespace().find(|word| {
            word.starts_with(|first: char| first.is_ascii_digit()) && word.contains('.')
        });
        Ok(Self {
            name: name.to_owned(),
            version: version.unwrap_or("?").to_owned(),
            program,
            states: states.join(name),
        })
    }

    /// A call of the runtime with the words of a verb.
    pub(super) fn call<const N: usize>(&self, words: [&str; N]) -> Command {
        let mut call = Command::new(&self.program);
        call.arg("--root").arg(&self.states).args(words);
        call
    }

    /// What `state` says, as a word.
    pub(super) fn status(&self, id: &str) -> Result<String> {
        let state: serde_json::Value = serde_json::from_str(&run(&mut self.call(["state", id]))?)?;
        match state["status"].as_str() {
            Some(status) => Ok(status.to_owned()),
            None => bail!("{} does not say what {id} does", self.name),
        }
    }
}

fn find(name: &str) -> std::io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|program| program.is_file())
        .ok_or_else(|| std::io::ErrorKind::NotFound.into())
}

/// A container that runs in the background until it is dropped.
#[derive(Debug)]
pub(super) struct Background<'a> {
    runtime: &'a Runtime,
    pub(super) id: String,
}

impl<'a> Background<'a> {
    pub(super) fn is_of(&self, runtime: &Runtime) -> bool {
        self.runtime.name == runtime.name
    }

    pub(super) fn start(runtime: &'a Runtime, bundle: &Path, id: &str) -> Result<Self> {
        let container = Self {
            runtime,
            id: id.to_owned(),
        };
        let mut call = runtime.call(["run", "--detach", "--bundle"]);
        call.arg(bundle).arg(id).stdin(std::process::Stdio::null());
        // It would keep a pipe open for as long as it runs.
        call.stdout(std::process::Stdio::null());
        call.stderr(std::process::Stdio::null());
        let status = call.status().context("Cannot run the runtime")?;
        if !status.success() {
            bail!("{} cannot run a container: {status}", runtime.name);
        }
        Ok(container)
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        // If it does not go there is nothing else to try.
        let _ = run(&mut self.runtime.call(["delete", "--force", &self.id]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_a_package_unless_its_program_is_named() {
        let package = |text: &str| text.parse::<Peer>().unwrap().package().map(str::to_owned);
        assert_eq!(package("crun").as_deref(), Some("crun"));
        assert_eq!(package("crun=/opt/crun"), None);
        assert_eq!(package("youki"), None);
    }
}
