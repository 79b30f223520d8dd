//! The figures as a table for people.

use std::fmt::Write;

use super::scenes::Row;

/// One block a scene: medians with the smallest and the ninth tenth, and our part of the peer's.
pub(super) fn text(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{}", row.title);
        for figures in &row.results {
            let summary = figures.summary;
            let _ = writeln!(
                text,
                "  {:<10}{:8.1} {} [{:.1} .. {:.1}]",
                figures.engine, summary.median, row.unit, summary.min, summary.p90
            );
        }
        if let [ours, peer] = row.results.as_slice() {
            let ratio = ours.summary.median / peer.summary.median;
            let _ = writeln!(text, "  of {}: {ratio:.2}", peer.engine);
        }
    }
    text
}
