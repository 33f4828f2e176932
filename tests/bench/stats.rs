//! Medians, and intervals around them that assume nothing about how figures are distributed.

use serde::Serialize;

/// A median with an interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Estimate {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// The probability that the median of all runs there could be lies in the interval, in percent. From six runs on
    /// this is at least 95; fewer have no such interval, and this is that of their extremes.
    pub(crate) confidence_percent: f64,
    pub(crate) runs: usize,
}

/// The narrowest pair of order statistics, as many from either end, that holds the median with 95 % confidence.
/// `None` without figures.
pub(crate) fn estimate(figures: &[f64]) -> Option<Estimate> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let runs = sorted.len();
    if runs == 0 {
        return None;
    }
    let within = (0..runs.div_ceil(2)).take_while(|from_end| confidence(runs, *from_end) >= 0.95).last().unwrap_or(0);
    Some(Estimate {
        median: (sorted[(runs - 1) / 2] + sorted[runs / 2]) / 2.0,
        low: sorted[within],
        high: sorted[runs - 1 - within],
        confidence_percent: 100.0 * confidence(runs, within),
        runs,
    })
}

/// That the median lies between the figures `from_end` places from either end: by the binomial distribution, as
/// each figure is above the median or below it like the two sides of a coin.
fn confidence(runs: usize, from_end: usize) -> f64 {
    let mut ways = 1.0;
    let mut outside = 0.0;
    for below in 0..=from_end {
        outside += ways;
        ways *= (runs - below) as f64 / (below + 1) as f64;
    }
    (1.0 - 2.0 * outside / 2_f64.powi(i32::try_from(runs).expect("few"))).max(0.0)
}

/// The estimate of `a / b` over the rounds that have both.
pub(crate) fn ratio(a: &[Option<f64>], b: &[Option<f64>]) -> Option<Estimate> {
    let pairs = a.iter().zip(b).filter_map(|(a, b)| Some((*a)? / (*b)?)).filter(|ratio| ratio.is_finite());
    estimate(&pairs.collect::<Vec<_>>())
}
