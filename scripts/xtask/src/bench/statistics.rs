//! What a list of measurements comes down to.

use serde::Serialize;

/// Of one quantity, in its own unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    /// Nine tenths are at most this.
    pub(crate) p90: f64,
}

impl Summary {
    /// Nothing of nothing.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        Some(Self {
            median: f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)]),
            min: sorted[0],
            p90: sorted[(last * 9).div_ceil(10)],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_one_in_ten_is_above_p90() {
        let summary = |values: &[f64]| Summary::of(values).unwrap();
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(
            summary(&[7.0]),
            Summary {
                median: 7.0,
                min: 7.0,
                p90: 7.0
            }
        );
        let eleven: Vec<f64> = (0..11).rev().map(f64::from).collect();
        assert_eq!(
            summary(&eleven),
            Summary {
                median: 5.0,
                min: 0.0,
                p90: 9.0
            }
        );
        assert!((summary(&[1.0, 2.0]).median - 1.5).abs() < f64::EPSILON);
    }
}
