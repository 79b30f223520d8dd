//! What a person sees: lines, tables and JSON on standard output, remarks on standard error.

use std::io::{self, IsTerminal, Write};

use console::{Style, measure_text_width};
use serde::Serialize;

use super::error::CliError;
use crate::api::types::{FindingLevel, InstanceState};

/// Between two columns.
const GAP: usize = 3;

/// How a cell shows that has nothing.
const EMPTY: &str = "-";

/// Writes a line to standard output.
pub(super) fn line(text: &str) -> Result<(), CliError> {
    writeln!(io::stdout().lock(), "{text}").map_err(CliError::Output)
}

/// Writes a value as JSON for people and programs.
pub(super) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(CliError::Answer)?;
    line(&text)
}

/// Writes a value as one line of JSON.
pub(super) fn json_line(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string(value).map_err(CliError::Answer)?;
    line(&text)
}

/// Writes a remark that is not part of the output. Nobody can be told if that fails.
pub(super) fn remark(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Whether somebody watches what is written to standard output.
pub(super) fn is_watched() -> bool {
    io::stdout().is_terminal()
}

/// Rows under headings, in columns as wide as they must be.
#[derive(Clone, Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new<const N: usize>(headings: [&str; N]) -> Table {
        Table {
            rows: vec![headings.map(str::to_owned).to_vec()],
        }
    }

    /// Adds a row. An empty cell shows as [`EMPTY`], so that columns can be told apart, also by programs.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let shown = |cell: String| {
            if cell.is_empty() {
                EMPTY.to_owned()
            } else {
                cell
            }
        };
        self.rows.push(cells.map(shown).to_vec());
    }

    /// Leaves a column out in which no row has anything.
    pub(super) fn hide_if_empty(&mut self, column: usize) {
        let cells = self.rows.iter().skip(1).map(|row| row.get(column));
        if cells.flatten().all(|cell| cell == EMPTY) {
            for row in &mut self.rows {
                if column < row.len() {
                    row.remove(column);
                }
            }
        }
    }

    pub(super) fn render(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                cells
                    .map(|cell| measure_text_width(cell))
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let lines: Vec<String> = self.rows.iter().map(|row| aligned(row, &widths)).collect();
        lines.join("\n")
    }
}

fn aligned(row: &[String], widths: &[usize]) -> String {
    let mut line = String::new();
    for (index, (cell, width)) in row.iter().zip(widths).enumerate() {
        line.push_str(cell);
        if index + 1 < row.len() {
            // By what is seen: a cell may have colours in it.
            line.extend(std::iter::repeat_n(
                ' ',
                width - measure_text_width(cell) + GAP,
            ));
        }
    }
    line
}

/// Names and values, one a line.
pub(super) fn properties(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let shown = pairs.iter().filter(|(_, value)| !value.is_empty());
    let lines: Vec<String> = shown
        .map(|(name, value)| format!("{name:width$}   {value}"))
        .collect();
    lines.join("\n")
}

/// A state, coloured if standard output is a terminal.
pub(super) fn state(state: InstanceState) -> String {
    let (name, style) = match state {
        InstanceState::Created => ("created", Style::new()),
        InstanceState::Starting => ("starting", Style::new().cyan()),
        InstanceState::Running => ("running", Style::new().green()),
        InstanceState::Paused => ("paused", Style::new().yellow()),
        InstanceState::Stopping => ("stopping", Style::new().cyan()),
        InstanceState::Stopped => ("stopped", Style::new().dim()),
        InstanceState::Failed => ("failed", Style::new().red()),
    };
    style.apply_to(name).to_string()
}

/// A level, coloured if standard output is a terminal.
pub(super) fn level(level: FindingLevel) -> String {
    let (name, style) = match level {
        FindingLevel::Ok => ("ok", Style::new().green()),
        FindingLevel::Warning => ("warning", Style::new().yellow()),
        FindingLevel::Error => ("error", Style::new().red().bold()),
    };
    style.apply_to(name).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        let mut table = Table::new(["NAME", "STATE", "IMAGE"]);
        table.row(["web".into(), "running".into(), "busybox".into()]);
        table.row(["a-long-name".into(), String::new(), "x".into()]);
        assert_eq!(
            table.render(),
            "NAME          STATE     IMAGE\n\
             web           running   busybox\n\
             a-long-name   -         x"
        );
    }

    #[test]
    fn a_column_in_which_nobody_has_anything_is_left_out() {
        let mut table = Table::new(["NAME", "STEAL", "PIDS"]);
        table.row(["web".into(), String::new(), "1".into()]);
        let mut other = table.clone();
        other.row(["box".into(), "0%".into(), "2".into()]);
        table.hide_if_empty(1);
        other.hide_if_empty(1);
        assert_eq!(table.render(), "NAME   PIDS\nweb    1");
        assert!(other.render().starts_with("NAME   STEAL   PIDS\nweb    -"));
    }

    #[test]
    fn colours_do_not_disturb_the_columns() {
        let green = Style::new().green().force_styling(true);
        let mut table = Table::new(["STATE", "NAME"]);
        table.row([green.apply_to("running").to_string(), "a".into()]);
        table.row(["stopped".into(), "b".into()]);
        let plain = console::strip_ansi_codes(&table.render()).into_owned();
        assert_eq!(plain, "STATE     NAME\nrunning   a\nstopped   b");
    }

    #[test]
    fn properties_without_a_value_are_left_out() {
        let pairs = [
            ("name", "web".into()),
            ("address", String::new()),
            ("state", "up".into()),
        ];
        assert_eq!(properties(&pairs), "name      web\nstate     up");
    }
}
