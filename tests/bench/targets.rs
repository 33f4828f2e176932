//! What the figures should be. Only these numbers are written down; all others are measured.

use serde::Serialize;

use crate::cases::{
    BETWEEN, EMPTY, FIO, HIT, NO_PASS, NONE_HIT, NOT_REMAPPED, OURS, PASS, PASSTHROUGH, POLLING, QSD, STATUS_ASKED,
    UNDISTURBED,
};
use crate::load::Figures;
use crate::rounds::CaseResult;
use crate::scan::IDLE_PASS;
use crate::single::Single;
use crate::stats::{Estimate, ratio};

/// A figure of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Quantity {
    Iops,
    Cpu,
    P50,
    P99,
}

/// What the ratio of two contenders should be.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
    /// Their intervals overlap, or the first is the better.
    Overlap,
}

/// A line of the table of targets: of a case, the quantity, who, against whom, how much.
type Target = (&'static str, Quantity, &'static str, &'static str, Bound);

use Bound::{AtLeast, AtMost, Overlap};
use Quantity::{Cpu, Iops, P50, P99};

const TARGETS: [Target; 30] = [
    ("page-cached 4 KiB random read, QD 128", Iops, OURS, QSD, AtLeast(2.2)),
    ("page-cached 4 KiB random read, QD 128", Cpu, OURS, QSD, AtMost(0.4)),
    ("page-cached 4 KiB random read, QD 32", Iops, OURS, QSD, AtLeast(1.5)),
    ("page-cached 4 KiB random read, QD 32", Cpu, OURS, QSD, AtMost(0.5)),
    ("page-cached 4 KiB random read, QD 128, 2 queues", Iops, OURS, QSD, AtLeast(3.0)),
    ("tmpfs 4 KiB random read, QD 128, polled", Iops, POLLING, FIO, AtLeast(1.25)),
    ("tmpfs 4 KiB random write, QD 128, polled", Iops, POLLING, FIO, AtLeast(1.15)),
    ("O_DIRECT 4 KiB random read, QD 32", Iops, OURS, FIO, Overlap),
    ("O_DIRECT 4 KiB random write, QD 32", Iops, OURS, FIO, Overlap),
    ("O_DIRECT 4 KiB random read, QD 128", Iops, OURS, FIO, Overlap),
    ("O_DIRECT 4 KiB random write, QD 128", Iops, OURS, FIO, Overlap),
    ("O_DIRECT 4 KiB random read, QD 1", P50, POLLING, QSD, AtMost(0.5)),
    ("O_DIRECT 4 KiB random read, QD 1", P99, POLLING, QSD, AtMost(0.5)),
    ("O_DIRECT 4 KiB random read, QD 1", P50, OURS, QSD, AtMost(0.8)),
    ("O_DIRECT 4 KiB random read, QD 1", P99, OURS, QSD, AtMost(0.8)),
    ("page-cached 128 KiB sequential read, QD 16", Iops, OURS, FIO, Overlap),
    ("page-cached 128 KiB sequential write, QD 16", Iops, OURS, FIO, Overlap),
    ("O_DIRECT 128 KiB sequential read, QD 16", Iops, OURS, FIO, Overlap),
    ("O_DIRECT 128 KiB sequential write, QD 16", Iops, OURS, FIO, Overlap),
    ("engine: page-cached 4 KiB random read, QD 128", Cpu, EMPTY, PASSTHROUGH, AtMost(1.01)),
    ("engine: page-cached 4 KiB random write, QD 128", Cpu, EMPTY, PASSTHROUGH, AtMost(1.01)),
    ("remaps elsewhere: page-cached 4 KiB random read, QD 128", Cpu, NONE_HIT, EMPTY, AtMost(1.01)),
    ("remaps elsewhere: page-cached 4 KiB random write, QD 128", Cpu, NONE_HIT, EMPTY, AtMost(1.01)),
    ("remaps between: page-cached 4 KiB random read, QD 128", Cpu, BETWEEN, EMPTY, AtMost(1.01)),
    ("remaps between: page-cached 4 KiB random write, QD 128", Cpu, BETWEEN, EMPTY, AtMost(1.01)),
    ("remaps hit: O_DIRECT 4 KiB random read, QD 128", Iops, HIT, NOT_REMAPPED, AtLeast(0.95)),
    ("remaps hit: O_DIRECT 4 KiB random write, QD 128", Iops, HIT, NOT_REMAPPED, AtLeast(0.95)),
    ("beside: page-cached 4 KiB random read, QD 32", Iops, STATUS_ASKED, UNDISTURBED, Overlap),
    ("scan: O_DIRECT 4 KiB random read, QD 1", P99, PASS, NO_PASS, AtMost(1.1)),
    ("scan: O_DIRECT 4 KiB random read, QD 32", P99, PASS, NO_PASS, AtMost(1.1)),
];

/// The verdict on what was not to be measured.
pub(crate) const NOT_ASKED: &str = "not among BENCH_CASES";

/// Of single measurements: at most so much.
const SINGLE_TARGETS: [(&str, f64); 4] = [
    ("map lookup with 16,384 remaps", 10.0),
    ("map lookup with 1,048,576 remaps", 10.0),
    ("flushes of the spare until a failed write is answered", 2.0),
    // Four fifths of the speed.
    (IDLE_PASS, 1.25),
];

/// A target and what became of it.
#[derive(Debug, Serialize)]
pub(crate) struct Judgement {
    pub(crate) case: String,
    pub(crate) what: String,
    pub(crate) target: String,
    /// Of ratios: over pairs of runs that followed each other.
    pub(crate) figure: Option<Estimate>,
    /// `met`, `missed`, or `open` where the interval holds the target; else why there is no figure.
    pub(crate) verdict: String,
}

impl Quantity {
    /// The figure of a run.
    pub(crate) fn of(self, figures: &Figures) -> Option<f64> {
        match self {
            Quantity::Iops => Some(figures.iops),
            Quantity::Cpu => figures.cpu_us_per_io,
            Quantity::P50 => Some(figures.p50_us),
            Quantity::P99 => Some(figures.p99_us),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Quantity::Iops => "IOPS",
            Quantity::Cpu => "CPU per I/O",
            Quantity::P50 => "p50",
            Quantity::P99 => "p99",
        }
    }
}

/// All targets, with what was measured of them.
pub(crate) fn judge(results: &[CaseResult], singles: &[Single]) -> Vec<Judgement> {
    let ratios = TARGETS.iter().map(|target| judge_ratio(target, results));
    ratios.chain(SINGLE_TARGETS.iter().map(|(name, most)| judge_single(name, *most, singles))).collect()
}

fn judge_ratio((name, quantity, of, against, bound): &Target, results: &[CaseResult]) -> Judgement {
    let what = format!("{} of {of}, against {against}", quantity.name());
    let target = match bound {
        AtLeast(factor) => format!(">= {factor} x"),
        AtMost(factor) => format!("<= {factor} x"),
        Overlap => "intervals overlap, or better".to_owned(),
    };
    let judgement = |figure, verdict: String| Judgement { case: (*name).to_owned(), what, target, figure, verdict };
    let Some(result) = results.iter().find(|result| result.case.name == *name) else {
        return judgement(None, NOT_ASKED.into());
    };
    for name in [of, against] {
        if let Some(why) = result.why_missing(name) {
            return judgement(None, format!("not measured: {name}: {why}"));
        }
    }
    let [ours, theirs] = [of, against].map(|name| result.series(name, *quantity));
    let Some(figure) = ratio(&ours, &theirs) else {
        return judgement(None, "not measured: no two undisturbed runs that followed each other".into());
    };
    let verdict = match bound {
        AtLeast(factor) => verdict(figure.low >= *factor, figure.high < *factor),
        AtMost(factor) => verdict(figure.high <= *factor, figure.low > *factor),
        Overlap => {
            let [ours, theirs] = [of, against].map(|name| result.estimate(name, *quantity));
            let overlap = ours.zip(theirs).is_some_and(|(ours, theirs)| ours.high >= theirs.low);
            verdict(overlap, !overlap)
        }
    };
    judgement(Some(figure), verdict.to_owned())
}

fn judge_single(name: &str, most: f64, singles: &[Single]) -> Judgement {
    let found = singles.iter().find(|single| single.name == name);
    let figure = found.and_then(|single| single.figure);
    let verdict = match (found, figure) {
        (None, _) => NOT_ASKED.to_owned(),
        (Some(single), None) => format!("not measured: {}", single.note),
        (_, Some(figure)) => verdict(figure.high <= most, figure.low > most).to_owned(),
    };
    let unit = found.map_or("", |single| single.unit);
    Judgement { case: "single".into(), what: name.into(), target: format!("<= {most} {unit}"), figure, verdict }
}

fn verdict(met: bool, missed: bool) -> &'static str {
    match (met, missed) {
        (true, _) => "met",
        (_, true) => "missed",
        _ => "open",
    }
}
