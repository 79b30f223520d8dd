//! `ps`.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use container::verbs::ps::ps;

use super::{Global, print};

#[derive(Args, Debug)]
pub(super) struct Ps {
    /// Format of the output
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Name of the container
    id: String,
    /// Options of ps(1) for the table
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Format {
    Table,
    Json,
}

impl Ps {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let pids = ps(&global.root, &self.id)?;
        if self.format == Format::Json {
            print(&format!("{}\n", serde_json::to_string(&pids)?))?;
            return Ok(0);
        }
        let options = if self.options.is_empty() {
            vec!["-ef".to_owned()]
        } else {
            self.options
        };
        let output = Command::new("ps")
            .args(options)
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run ps(1), which makes the table")?;
        if !output.status.success() {
            bail!("ps(1) ended with {}", output.status);
        }
        print(&keep(&String::from_utf8_lossy(&output.stdout), &pids)?)?;
        Ok(0)
    }
}

/// The heading, and the lines of the given processes.
fn keep(table: &str, pids: &[i32]) -> Result<String> {
    let mut lines = table.lines();
    let heading = lines.next().unwrap_or_default();
    let column = heading.split_whitespace().position(|name| name == "PID");
    let column = column.context("ps(1) was not asked for a column PID")?;
    let ours = |line: &&str| {
        let pid = line.split_whitespace().nth(column);
        pid.and_then(|pid| pid.parse().ok())
            .is_some_and(|pid: i32| pids.contains(&pid))
    };
    let kept = lines.filter(ours).map(|line| format!("{line}\n"));
    Ok(format!("{heading}\n") + &kept.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_containers_lines_are_kept() {
        let table = "UID PID CMD\nroot 1 init\nroot 7 sh 1\n";
        assert_eq!(keep(table, &[7]).unwrap(), "UID PID CMD\nroot 7 sh 1\n");
        keep("CMD\nsh\n", &[7]).unwrap_err();
    }
}
