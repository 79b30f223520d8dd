//! In which order the functions of a program are to lie in its file.
//!
//! A runtime is executed for a few milliseconds, and what a monitor of virtual machines executes is mostly
//! for its start. Their memory is mostly their own code, in pages that the kernel maps around each place
//! that is used. So what every run uses lies together, in the order in which it is used: less memory, and
//! less time. The linker is told so by a list of names (`build.rs` of each). Names of Rust's functions
//! have a digest in them that changes with the compiler and with their types; those that have gone do no
//! harm, and the list is made anew now and then.

mod trace;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use self::trace::Trace;
use crate::paths;
use crate::step::{command, run, step};

/// Calls of the program, and what they are about.
pub(super) type Scene = (&'static str, Vec<Command>);

/// A list that is to be made.
pub(super) struct List {
    pub(super) program: &'static str,
    /// Where it is, below the root of the tree.
    pub(super) file: &'static str,
    /// Who makes it.
    pub(super) bench: &'static str,
    /// Functions by parts of their names that shall do nothing meanwhile: they let go of the program's code,
    /// and so would of all that a trace has put there.
    pub(super) hindered: &'static [&'static str],
}

impl List {
    /// Has the program do this, in the order of what it is to be fast for, and writes the list.
    pub(super) fn write(&self, scenes: &[Scene]) -> Result<()> {
        let program = paths::binaries().join(self.program);
        let functions = functions(&program)?;
        let hindered = self.hindered(&functions)?;
        let mut trace = Trace::of(&program, functions.keys().copied(), hindered)?;
        for (title, calls) in scenes {
            step(title, || calls.iter().try_for_each(|call| trace.run(call)))?;
        }
        let names = trace
            .executed
            .iter()
            .filter_map(|address| functions.get(address));
        let names: Vec<&str> = names.flatten().map(String::as_str).collect();
        let header = format!(
            "# What {} executes, in the order of the first time; made by `scripts/bench {} --order`.\n",
            self.program, self.bench
        );
        let text = names.iter().fold(header, |text, name| text + name + "\n");
        let what = format!(
            "Write the names of {} functions to {}",
            names.len(),
            self.file
        );
        step(&what, || {
            fs::write(paths::root().join(self.file), text).context("Cannot write the list")
        })
    }

    /// Where the functions are that shall do nothing.
    fn hindered(&self, functions: &BTreeMap<u64, Vec<String>>) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        for part in self.hindered {
            let named = |names: &[String]| names.iter().any(|name| name.contains(part));
            let found = functions.iter().filter(|(_, names)| named(names));
            let found: Vec<u64> = found.map(|(address, _)| *address).collect();
            ensure!(
                !found.is_empty(),
                "{} has no function `{part}`",
                self.program
            );
            all.extend(found);
        }
        Ok(all)
    }
}

/// Where the functions are, and their names. Functions that are the same lie in one place under several.
fn functions(program: &Path) -> Result<BTreeMap<u64, Vec<String>>> {
    let table = run(command("nm", ["--defined-only"]).arg(program))?;
    let mut functions: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for line in table.lines() {
        let mut words = line.split_whitespace();
        if let (Some(address), Some("t" | "T" | "w" | "W" | "i"), Some(name)) =
            (words.next(), words.next(), words.next())
        {
            let address = u64::from_str_radix(address, 16).context("nm names no address")?;
            functions.entry(address).or_default().push(name.to_owned());
        }
    }
    Ok(functions)
}
