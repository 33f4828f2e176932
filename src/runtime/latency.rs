//! Latency histograms with fixed buckets: each power of two of nanoseconds has sixteen, so that a quantile is at most
//! a sixteenth (6.25 %) too high.

/// Log2 of the width of the narrowest buckets, in nanoseconds.
const UNIT_SHIFT: u32 = 6;
/// Log2 of the buckets that a power of two is cut into.
const STEPS_SHIFT: u32 = 4;
/// Log2 of the longest latency that has a bucket of its own, in nanoseconds (68.7 seconds).
const LONGEST_SHIFT: u32 = 36;
/// Number of the last bucket, which has all that took longer.
const LAST: usize = ((LONGEST_SHIFT - UNIT_SHIFT - STEPS_SHIFT + 1) as usize) << STEPS_SHIFT;
/// Number of buckets.
pub const BUCKETS: usize = LAST + 1;

/// The bucket of a latency in nanoseconds.
#[inline]
pub fn bucket(ns: u64) -> usize {
    // Bucket limits belong to the bucket below them, as in Prometheus.
    let units = ns.saturating_sub(1) >> UNIT_SHIFT;
    let shift = 63 - (units | 1 << STEPS_SHIFT).leading_zeros() - STEPS_SHIFT;
    let steps = usize::try_from(units >> shift).expect("at most two times the steps");
    ((shift << STEPS_SHIFT) as usize + steps).min(LAST)
}

/// The longest latency of a bucket in nanoseconds; `None` for the last one, which has no end.
pub fn upper_bound(bucket: usize) -> Option<u64> {
    if bucket >= LAST {
        return None;
    }
    let shift = (bucket >> STEPS_SHIFT).saturating_sub(1);
    let steps = bucket - (shift << STEPS_SHIFT);
    Some((steps as u64 + 1) << shift << UNIT_SHIFT)
}

/// Counts by bucket, and what buckets cannot tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// By bucket.
    pub counts: Vec<u64>,
    /// Sum of the latencies, in nanoseconds.
    pub sum_ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
}

impl Histogram {
    /// Nothing counted.
    pub fn new() -> Histogram {
        Histogram { counts: vec![0; BUCKETS], sum_ns: 0, max_ns: 0 }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The latency in nanoseconds that so many in a million did not exceed; `None` where nothing was counted.
    pub fn quantile_ns(&self, millionths: u32) -> Option<u64> {
        let wanted = u128::from(self.count()) * u128::from(millionths);
        let rank = u64::try_from(wanted.div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1);
        let mut below = 0;
        let found = self.counts.iter().position(|count| {
            below += count;
            below >= rank
        })?;
        Some(upper_bound(found).map_or(self.max_ns, |bound| bound.min(self.max_ns)))
    }

    /// How many took no longer than the power of two of nanoseconds with that exponent, for those that are limits of
    /// buckets: 10 to 36.
    pub fn count_within(&self, shift: u32) -> u64 {
        assert!((UNIT_SHIFT + STEPS_SHIFT..=LONGEST_SHIFT).contains(&shift), "2^{shift} ns is no limit of a bucket");
        self.counts[..=bucket(1 << shift)].iter().sum()
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram::new()
    }
}

/// Nanoseconds as seconds.
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_latency_is_in_the_bucket_that_ends_with_it_or_after_it() {
        let mut before = 0;
        for number in 0..LAST {
            let bound = upper_bound(number).unwrap();
            assert_eq!((bucket(before + 1), bucket(bound), bucket(bound + 1)), (number, number, number + 1));
            assert!(bound - before <= 64 || (bound - before) * 16 <= bound, "{before} to {bound}");
            before = bound;
        }
        assert_eq!((before, upper_bound(LAST)), (1 << LONGEST_SHIFT, None));
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, LAST));
    }

    #[test]
    fn quantiles_are_those_of_what_was_counted() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile_ns(500_000), None);
        for us in 1..=1000_u64 {
            let ns = us * 1000;
            histogram.counts[bucket(ns)] += 1;
            histogram.sum_ns += ns;
            histogram.max_ns = histogram.max_ns.max(ns);
        }
        for (millionths, exact) in [(500_000, 500_000), (990_000, 990_000), (999_000, 999_000), (1, 1000)] {
            let found = histogram.quantile_ns(millionths).unwrap();
            assert!(found >= exact && found <= exact + exact / 16 + 64, "{millionths}: {found}, not {exact}");
        }
        assert_eq!(histogram.quantile_ns(1_000_000), Some(1_000_000));
        assert_eq!(histogram.count_within(10), 1);
        assert_eq!(histogram.count_within(19), 524);
        assert_eq!(histogram.count_within(36), 1000);
    }
}
