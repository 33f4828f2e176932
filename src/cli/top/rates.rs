//! What happened between two reports.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::runtime::stats::{LatencyReport, OperationReport, StatsReport};

/// One kind of requests, lately.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rate {
    /// Answered in a second.
    pub(super) requests: f64,
    /// Bytes of those in a second.
    pub(super) bytes: f64,
    /// Half of them took no longer, in nanoseconds; absent where there were none.
    pub(super) p50_ns: Option<u64>,
    /// 99 in a hundred took no longer.
    pub(super) p99_ns: Option<u64>,
}

/// By operation; nothing where the counters began anew meanwhile, or no time went by.
pub(super) fn between(before: &StatsReport, after: &StatsReport, elapsed: Duration) -> Option<BTreeMap<String, Rate>> {
    let seconds = elapsed.as_secs_f64();
    if seconds <= 0.0 || (&before.volume, before.started) != (&after.volume, after.started) {
        return None;
    }
    let mut rates = BTreeMap::new();
    for new in &after.operations {
        let old = before.operations.iter().find(|old| old.operation == new.operation);
        rates.insert(new.operation.clone(), of(old?, new, seconds)?);
    }
    Some(rates)
}

fn of(old: &OperationReport, new: &OperationReport, seconds: f64) -> Option<Rate> {
    let requests = new.completed.checked_sub(old.completed)?;
    let bytes = new.bytes.checked_sub(old.bytes)?;
    let latency = |percent| quantile(&old.latency, &new.latency, percent);
    Some(Rate {
        requests: approximate(requests) / seconds,
        bytes: approximate(bytes) / seconds,
        p50_ns: latency(50),
        p99_ns: latency(99),
    })
}

/// A count as it is divided and shown.
pub(super) fn approximate(count: u64) -> f64 {
    count as f64
}

/// What so many in a hundred of the requests between two reports did not exceed.
fn quantile(old: &LatencyReport, new: &LatencyReport, percent: u64) -> Option<u64> {
    let before: BTreeMap<_, _> = old.buckets.iter().map(|bucket| (bucket.le_ns, bucket.count)).collect();
    let since = |le_ns, count: u64| count.saturating_sub(before.get(&le_ns).copied().unwrap_or(0));
    let counts: Vec<_> = new.buckets.iter().map(|bucket| (bucket.le_ns, since(bucket.le_ns, bucket.count))).collect();
    let all: u64 = counts.iter().map(|(_, count)| *count).sum();
    let rank = all.saturating_mul(percent).div_ceil(100).max(1);
    let mut below = 0;
    let (limit, _) = counts.into_iter().find(|(_, count)| {
        below += count;
        below >= rank
    })?;
    Some(limit.unwrap_or(new.max_ns).min(new.max_ns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::stats::LatencyBucket;

    fn report(completed: u64, bytes: u64, buckets: &[(u64, u64)]) -> StatsReport {
        let buckets = buckets.iter().map(|&(le, count)| LatencyBucket { le_ns: Some(le), count }).collect();
        let latency = LatencyReport { max_ns: 90_000, buckets, ..LatencyReport::default() };
        let read = OperationReport { operation: "read".into(), completed, bytes, latency, ..Default::default() };
        StatsReport { started: 7, operations: vec![read], ..StatsReport::default() }
    }

    #[test]
    fn rates_and_latencies_are_of_what_came_since() {
        let before = report(100, 1000, &[(10_000, 90), (80_000, 10)]);
        let after = report(300, 5096, &[(10_000, 91), (20_000, 197), (80_000, 11), (160_000, 1)]);
        let rate = between(&before, &after, Duration::from_secs(2)).unwrap()["read"];
        let expected = Rate { requests: 100.0, bytes: 2048.0, p50_ns: Some(20_000), p99_ns: Some(20_000) };
        assert_eq!(rate, expected);
        // The last bucket is cut where the longest was.
        assert_eq!(quantile(&before.operations[0].latency, &after.operations[0].latency, 100), Some(90_000));
        let idle = between(&after, &after, Duration::from_millis(500)).unwrap()["read"];
        assert_eq!(idle, Rate::default());
    }

    #[test]
    fn counters_that_began_anew_give_no_rate() {
        let (few, many) = (report(1, 1, &[]), report(2, 2, &[]));
        assert_eq!(between(&many, &few, Duration::from_secs(1)), None);
        assert_eq!(between(&few, &StatsReport { started: 8, ..many.clone() }, Duration::from_secs(1)), None);
        assert_eq!(between(&few, &many, Duration::ZERO), None);
        assert!(between(&few, &many, Duration::from_secs(1)).is_some());
    }
}
