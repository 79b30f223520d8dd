//! Samples as a table for people, or as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::super::statistics::Summary;
use super::row::{Row, Sample};

/// The samples of one row, for each monitor.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) row: &'static Row,
    pub(crate) samples: Vec<Vec<Sample>>,
}

/// What many samples come to, with the median of the processor time behind them.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    figure: Summary,
    cpu: Option<f64>,
}

impl Outcome {
    fn of(samples: &[Sample]) -> Option<Outcome> {
        let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
        let cpu: Vec<f64> = samples.iter().filter_map(|sample| sample.cpu).collect();
        Some(Outcome {
            figure: Summary::of(&values)?,
            cpu: Summary::of(&cpu).map(|cpu| cpu.median),
        })
    }
}

/// For people: Markdown, a column for each monitor, ours first; then the others' ratios to ours.
pub(crate) fn text(monitors: &[String], all: &[Figures]) -> String {
    let mut table = "| median (least; CPU) | goal |".to_owned();
    for monitor in monitors {
        let _ = write!(table, " {monitor} |");
    }
    for monitor in &monitors[1..] {
        let _ = write!(table, " ours / {monitor} |");
    }
    table += "\n|---|---|";
    table += &"---|".repeat(monitors.len() * 2 - 1);
    for figures in all {
        let goal = figures
            .row
            .goal
            .map_or_else(String::new, |goal| format!("≤ {goal}"));
        let _ = write!(
            table,
            "\n| {}, {} | {goal} |",
            figures.row.name, figures.row.unit
        );
        let results: Vec<_> = figures.samples.iter().map(|all| Outcome::of(all)).collect();
        for result in &results {
            let _ = write!(table, " {} |", result.map_or_else(String::new, cell));
        }
        for peer in &results[1..] {
            let ratio = match (results[0], peer) {
                (Some(ours), Some(peer)) => {
                    format!("{:.2}", ours.figure.median / peer.figure.median)
                }
                _ => String::new(),
            };
            let _ = write!(table, " {ratio} |");
        }
    }
    table
}

fn cell(result: Outcome) -> String {
    let Summary { median, min, .. } = result.figure;
    match result.cpu {
        Some(cpu) => format!("**{median:.2}** ({min:.2}; {cpu:.2})"),
        None => format!("**{median:.2}** ({min:.2})"),
    }
}

/// For programs.
pub(crate) fn json(monitors: &[String], all: &[Figures]) -> Value {
    let rows: Vec<Value> = all
        .iter()
        .map(|figures| {
            let mut results = serde_json::Map::new();
            for (monitor, samples) in monitors.iter().zip(&figures.samples) {
                if let Some(Outcome { figure, cpu }) = Outcome::of(samples) {
                    let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
                    let result = json!({"figure": figure, "cpu": cpu, "samples": values});
                    results.insert(monitor.clone(), result);
                }
            }
            json!({
                "name": figures.row.name,
                "unit": figures.row.unit,
                "goal": figures.row.goal,
                "results": results,
            })
        })
        .collect();
    json!({ "rows": rows })
}

#[cfg(test)]
mod tests {
    use super::super::row::ROWS;
    use super::*;

    #[test]
    fn a_peer_without_the_figure_leaves_its_cells_empty() {
        let sample = Sample {
            value: 2.0,
            cpu: Some(1.0),
        };
        let figures = Figures {
            row: &ROWS[0],
            samples: vec![vec![sample], vec![]],
        };
        let text = text(&["a".into(), "b".into()], &[figures]);
        let line = text.lines().last().unwrap_or_default();
        assert_eq!(
            line,
            "| first guest instruction, ms | ≤ 1.5 | **2.00** (2.00; 1.00) |  |  |"
        );
    }
}
