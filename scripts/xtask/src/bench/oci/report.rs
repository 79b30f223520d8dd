//! The figures as a table for people, and as JSON for programs.

use std::fmt::Write;

use anyhow::Result;
use serde_json::json;

use super::goals::{Goal, MEMORY_KIB_MAX};
use super::runtime::Runtime;
use super::scenes::{Figures, Row};

/// The runtime that the goals are measured by.
const YARDSTICK: &str = "crun";

pub(super) fn json(runtimes: &[Runtime], rows: &[Row]) -> Result<String> {
    let names: Vec<_> = runtimes
        .iter()
        .map(|runtime| json!({ "name": runtime.name, "version": runtime.version }))
        .collect();
    let mut text = serde_json::to_string_pretty(&json!({ "runtimes": names, "rows": rows }))?;
    text.push('\n');
    Ok(text)
}

/// One block a scene: medians with the smallest and the ninth tenth, and ratios to crun.
pub(super) fn text(runtimes: &[Runtime], rows: &[Row]) -> String {
    let mut text = String::new();
    let yardstick = runtimes.iter().position(|it| it.name == YARDSTICK);
    for row in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{}", row.title);
        let yardstick = yardstick.and_then(|index| row.results.get(index));
        for (runtime, figures) in runtimes.iter().zip(&row.results) {
            let name = format!("{} {}", runtime.name, runtime.version);
            let _ = writeln!(text, "  {name:<20}{}", line(figures, yardstick));
        }
        if let (Some(ours), Some(verdict)) = (row.results.first(), row.goal)
            && let Some(yardstick) = yardstick
        {
            let _ = writeln!(text, "  {}", verdict_on(ours, yardstick, verdict));
        } else if let Some(Figures::Memory(ours)) = row.results.first() {
            let met = met(ours.median <= MEMORY_KIB_MAX);
            let _ = writeln!(text, "  goal: at most {MEMORY_KIB_MAX:.0} KiB: {met}");
        }
    }
    text
}

fn line(figures: &Figures, yardstick: Option<&Figures>) -> String {
    match (figures, yardstick) {
        (Figures::Time { wall, processor }, yardstick) => {
            let mut text = format!(
                "wall {:6.1} ms [{:.1} .. {:.1}]  processor {:6.1} ms [{:.1} .. {:.1}]",
                wall.median, wall.min, wall.p90, processor.median, processor.min, processor.p90
            );
            if let Some(Figures::Time {
                wall: their_wall,
                processor: their_processor,
            }) = yardstick
            {
                let _ = write!(
                    text,
                    "  of {YARDSTICK}: {:.2}, {:.2}",
                    wall.median / their_wall.median,
                    processor.median / their_processor.median
                );
            }
            text
        }
        (Figures::Memory(memory), yardstick) => {
            let mut text = format!("{:6.0} KiB", memory.median);
            if let Some(Figures::Memory(theirs)) = yardstick {
                let ratio = memory.median / theirs.median;
                let _ = write!(text, "  of {YARDSTICK}: {ratio:.2}");
            }
            text
        }
    }
}

fn verdict_on(ours: &Figures, theirs: &Figures, goal: Goal) -> String {
    let (
        Figures::Time { wall, processor },
        Figures::Time {
            wall: their_wall,
            processor: their_processor,
        },
    ) = (ours, theirs)
    else {
        return String::new();
    };
    let ratio = wall.median / their_wall.median;
    let mut text = format!(
        "goal: wall {:.2} of {YARDSTICK}: {}",
        goal.wall,
        met(ratio <= goal.wall)
    );
    if let Some(limit) = goal.processor {
        let ratio = processor.median / their_processor.median;
        let _ = write!(text, "; processor {limit:.2}: {}", met(ratio <= limit));
    }
    text
}

fn met(is_met: bool) -> &'static str {
    if is_met { "met" } else { "not met" }
}
