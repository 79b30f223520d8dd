//! `list`.

use std::fmt::Write;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use container::verbs::list::list;
use container::verbs::run::default_root;
use container::verbs::state::State;

use super::{Global, print};

#[derive(Args, Debug)]
pub(super) struct List {
    /// Format of the output
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Only the names
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

impl List {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        // Without any container yet there need be no directory; one that was named should be there.
        if global.root != default_root() {
            let named = std::fs::metadata(&global.root);
            named.with_context(|| format!("cannot read {}", global.root.display()))?;
        }
        let states = list(&global.root)?;
        if self.quiet {
            let names: String = states
                .iter()
                .fold(String::new(), |names, state| names + &state.id + "\n");
            print(&names)?;
        } else if self.format == Format::Json {
            print(&format!("{}\n", serde_json::to_string(&states)?))?;
        } else {
            print(&table(&states)?)?;
        }
        Ok(0)
    }
}

fn table(states: &[State]) -> Result<String> {
    let width = |name: &str, values: &dyn Fn(&State) -> usize| {
        states
            .iter()
            .map(values)
            .chain([name.len()])
            .max()
            .unwrap_or(0)
    };
    let id = width("ID", &|state| state.id.len());
    let bundle = width("BUNDLE", &|state| state.bundle.as_os_str().len());
    let mut text = String::new();
    writeln!(
        text,
        "{:id$}  {:<8}  {:<8}  {:bundle$}  {:<30}  OWNER",
        "ID", "PID", "STATUS", "BUNDLE", "CREATED"
    )?;
    for state in states {
        writeln!(
            text,
            "{:id$}  {:<8}  {:<8}  {:bundle$}  {:<30}  {}",
            state.id,
            state.pid,
            state.status.to_string(),
            state.bundle.display().to_string(),
            state.created.to_string(),
            state.owner
        )?;
    }
    Ok(text)
}
