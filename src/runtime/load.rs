//! How the guest is served right now, made of what workers count: the scanner goes by it.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::counters::Counters;
use super::latency::Histogram;
use crate::engine::scan::GuestLoad;
use crate::units::Time;

/// A quantile is made anew after so long, in nanoseconds (100 ms).
const MEASURE_NS: u64 = 100_000_000;
/// What was answered longer ago says nothing of now, in nanoseconds (10 s).
const STALE_NS: u64 = 10_000_000_000;
/// Of fewer answers there is no quantile.
const ANSWERS_MIN: u64 = 20;
/// 99 of 100.
const P99_MILLIONTHS: u32 = 990_000;

/// Says how the guest is served; asked by the healer's thread while a pass is under way.
pub type LoadSource = Box<dyn FnMut(Time) -> GuestLoad + Send>;

/// The system's time zone, read once: later a server may open no file.
#[derive(Clone, Debug)]
pub struct Zone(TimeZone);

impl Zone {
    /// As the system has it; UTC, and why, where it has none that is understood.
    pub fn system() -> (Zone, Option<String>) {
        match TimeZone::try_system() {
            Ok(zone) => (Zone(zone), None),
            Err(error) => (Zone(TimeZone::UTC), Some(error.to_string())),
        }
    }

    /// Seconds that local time is ahead of UTC, at so many seconds since the epoch.
    fn offset(&self, epoch_seconds: u64) -> i64 {
        let at = i64::try_from(epoch_seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
        at.map_or(0, |at| i64::from(self.0.to_offset(at).seconds()))
    }
}

/// Measures a volume's load.
pub struct LoadMeter {
    counters: Counters,
    zone: Zone,
    /// Seconds since the epoch at the clock's start.
    epoch: u64,
    /// When it was measured last, and all that had been answered until then.
    last: Option<(Time, Histogram)>,
    p99_ns: Option<u64>,
}

impl LoadMeter {
    /// Of the guest whose requests are counted there.
    pub fn new(counters: Counters, zone: Zone, epoch: u64) -> LoadMeter {
        LoadMeter { counters, zone, epoch, last: None, p99_ns: None }
    }

    /// The load now.
    pub fn measure(&mut self, now: Time) -> GuestLoad {
        let age_ns = self.last.as_ref().map(|(then, _)| now.since_ns(*then));
        if age_ns.is_none_or(|age| age >= MEASURE_NS) {
            let all = self.counters.latency();
            let before = self.last.take().filter(|_| age_ns.is_some_and(|age| age <= STALE_NS));
            self.p99_ns = before.and_then(|(_, before)| p99(&all, &before));
            self.last = Some((now, all));
        }
        GuestLoad {
            in_flight: self.counters.under_way(),
            p99_ns: self.p99_ns,
            local_offset: self.zone.offset(self.epoch.saturating_add(now.0 / 1_000_000_000)),
        }
    }
}

/// What 99 of 100 took at most of those that came after `before`.
fn p99(all: &Histogram, before: &Histogram) -> Option<u64> {
    let since = all.counts.iter().zip(&before.counts).map(|(all, before)| all.saturating_sub(*before));
    // The longest of all is no less than the longest of these.
    let since = Histogram { counts: since.collect(), sum_ns: 0, max_ns: all.max_ns };
    if since.count() < ANSWERS_MIN { None } else { since.quantile_ns(P99_MILLIONTHS) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::Operation;

    const MS: u64 = 1_000_000;

    fn meter(workers: u32) -> (Counters, LoadMeter) {
        let counters = Counters::new(workers);
        (counters.clone(), LoadMeter::new(counters, Zone(TimeZone::UTC), 0))
    }

    fn answer(counters: &Counters, worker: usize, operation: Operation, count: u64, ms: u64) {
        (0..count).for_each(|_| counters.workers[worker].answered(operation, ms * MS, Some(512)));
    }

    #[track_caller]
    fn check(p99_ns: Option<u64>, ms: u64) {
        let p99 = p99_ns.expect("enough were answered");
        assert!(p99 >= ms * MS && p99 <= ms * MS + ms * MS / 16 + 64, "{p99} ns, not {ms} ms");
    }

    #[test]
    fn the_p99_is_that_of_what_was_answered_since_the_last_look() {
        let (counters, mut meter) = meter(2);
        answer(&counters, 0, Operation::Read, 1000, 500);
        assert_eq!(meter.measure(Time(0)).p99_ns, None, "nobody looked before");
        answer(&counters, 0, Operation::Read, 99, 2);
        answer(&counters, 1, Operation::Write, 1, 90);
        check(meter.measure(Time(100 * MS)).p99_ns, 2);
        answer(&counters, 1, Operation::Flush, 20, 7);
        check(meter.measure(Time(250 * MS)).p99_ns, 7);
        answer(&counters, 1, Operation::Flush, 19, 7);
        assert_eq!(meter.measure(Time(350 * MS)).p99_ns, None, "too few");
    }

    #[test]
    fn it_is_made_anew_ten_times_a_second_at_most() {
        let (counters, mut meter) = meter(1);
        meter.measure(Time(0));
        answer(&counters, 0, Operation::Read, 50, 3);
        assert_eq!(meter.measure(Time(99 * MS)).p99_ns, None);
        check(meter.measure(Time(100 * MS)).p99_ns, 3);
        answer(&counters, 0, Operation::Read, 50, 30);
        check(meter.measure(Time(199 * MS)).p99_ns, 3);
        check(meter.measure(Time(200 * MS)).p99_ns, 30);
        // What came in a long time without a look says nothing of now.
        answer(&counters, 0, Operation::Read, 50, 3);
        assert_eq!(meter.measure(Time(200 * MS + STALE_NS + 1)).p99_ns, None);
    }

    #[test]
    fn requests_under_way_are_those_of_all_kinds_and_workers_at_any_time() {
        let (counters, mut meter) = meter(2);
        let (idle, of) = ((0, None), |count| (count, Some(Time(1))));
        assert_eq!(meter.measure(Time(1)).in_flight, 0);
        counters.workers[0].set_under_way(&[of(3), of(1), idle, idle, idle]);
        counters.workers[1].set_under_way(&[idle, idle, idle, idle, of(2)]);
        assert_eq!(meter.measure(Time(2)).in_flight, 6);
    }

    #[test]
    fn local_time_follows_the_zone_and_the_season() {
        let berlin = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").expect("a time zone of POSIX");
        let mut meter = LoadMeter::new(Counters::new(1), Zone(berlin), 1_795_996_800);
        assert_eq!(meter.measure(Time(0)).local_offset, 3600, "in November");
        meter.epoch = 1_783_000_000;
        assert_eq!(meter.measure(Time(0)).local_offset, 7200, "in July");
        meter.epoch = u64::MAX;
        assert_eq!(meter.measure(Time(0)).local_offset, 0);
    }
}
