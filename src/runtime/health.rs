//! How a volume is, as a document: what [`crate::engine::health`] found, with the devices' names.

use std::time::{Duration, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::handle::VolumeHandle;
use super::report::SCHEMA_VERSION;
use crate::device::DeviceIndex;
use crate::engine::health::history::Day;
use crate::engine::health::trend::{CONFIDENCE_PERCENT, SAMPLES_MIN, SPAN_DAYS_MIN, Trend};
use crate::engine::health::{Assessment, Part, score_word};

/// Beyond this nobody plans for a spare, and no trend reaches.
const DAYS_TOLD_MAX: f64 = 3650.0;

/// How a volume is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HealthReport {
    /// [`SCHEMA_VERSION`].
    pub schema: u32,
    /// The volume's set UUID.
    pub volume: String,
    /// Seconds since the epoch.
    pub time: u64,
    /// `OK`, `WATCH`, `AT_RISK` or `REPLACE`: the worst that a rule says.
    pub state: String,
    /// The devices, each with what the rules say of it.
    pub devices: Vec<DeviceHealth>,
    /// The rules that hold, worst first.
    pub findings: Vec<FindingReport>,
    /// For those who want a number.
    pub score: ScoreReport,
    /// How the slots are used up.
    pub trend: TrendReport,
    /// The days on which the volume was open, oldest first, 104 at most.
    pub days: Vec<DayReport>,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceHealth {
    /// `primary` or `spare`.
    pub role: String,
    /// As given on the command line.
    pub path: String,
    /// As [`HealthReport::state`].
    pub state: String,
}

/// A rule that holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FindingReport {
    /// Its name.
    pub rule: String,
    /// What it says.
    pub state: String,
    /// `primary` or `spare`.
    pub device: String,
    /// The number that was found.
    pub value: u64,
    /// The number from which on the rule holds.
    pub limit: u64,
    /// What the number counts.
    pub what: String,
    /// What to do.
    pub advice: String,
}

/// 100 less the deductions, and at most `max`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScoreReport {
    /// 0 to 100.
    pub value: u64,
    /// dm-remap's word for it: `EXCELLENT`, `GOOD`, `FAIR`, `POOR`, `CRITICAL`.
    pub word: String,
    /// The most that goes with the state.
    pub max: u64,
    /// What was deducted, and for what.
    pub deductions: Vec<DeductionReport>,
}

/// A part of the score.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeductionReport {
    /// What was looked at.
    pub input: String,
    /// Its value.
    pub value: u64,
    /// Points taken.
    pub points: u64,
}

/// The use of slots, by least squares over the daily samples of the last 70 days.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TrendReport {
    /// One line for a person.
    pub summary: String,
    /// Daily samples.
    pub samples: usize,
    /// Days from the first to the last.
    pub span_days: u64,
    /// How sure the ranges are, in percent.
    pub confidence_percent: u32,
    /// Slots used up a day; absent where there is not enough data.
    pub slots_per_day: Option<Estimate>,
    /// Slots that are left.
    pub slots_left: u64,
    /// Days until none is left; absent where there is not enough data, or no growth.
    pub exhausted_in_days: Option<Estimate>,
}

/// A number and the range it lies in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Estimate {
    /// The best guess.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// One day.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DayReport {
    /// `2026-01-31`, UTC.
    pub date: String,
    /// Blocks that moved to a slot because something failed.
    pub remaps: u64,
    /// Sectors recorded as lost.
    pub lost: u64,
    /// Slots in use or retired at the end of the day.
    pub slots_used: u64,
    /// Failed reads.
    pub read_errors: u64,
    /// Failed writes.
    pub write_errors: u64,
    /// Whether a flush failed.
    pub flush_failed: bool,
}

impl VolumeHandle {
    /// How the volume is now; nothing once it is being closed.
    pub fn health(&self) -> Option<HealthReport> {
        let healer = self.healer_status()?;
        let devices = [(Part::Primary, DeviceIndex::PRIMARY), (Part::Spare, DeviceIndex::SPARE)];
        let present = devices.into_iter().filter(|(_, index)| self.has(*index));
        let paths = present.map(|(part, index)| (part, self.path(index))).collect::<Vec<_>>();
        Some(report(&self.set().to_string(), self.now_seconds(), &paths, &healer.health, &healer.days))
    }
}

fn role(part: Part) -> &'static str {
    match part {
        Part::Primary => "primary",
        Part::Spare => "spare",
    }
}

/// The document.
fn report(volume: &str, time: u64, paths: &[(Part, String)], found: &Assessment, days: &[Day]) -> HealthReport {
    HealthReport {
        schema: SCHEMA_VERSION,
        volume: volume.to_owned(),
        time,
        state: found.state.name().to_owned(),
        devices: paths
            .iter()
            .map(|(part, path)| DeviceHealth {
                role: role(*part).to_owned(),
                path: path.clone(),
                state: found.of(*part).name().to_owned(),
            })
            .collect(),
        findings: found
            .findings
            .iter()
            .map(|finding| FindingReport {
                rule: finding.rule.to_owned(),
                state: finding.state.name().to_owned(),
                device: role(finding.part).to_owned(),
                value: finding.value,
                limit: finding.limit,
                what: finding.what.to_owned(),
                advice: finding.advice.to_owned(),
            })
            .collect(),
        score: ScoreReport {
            value: found.score,
            word: score_word(found.score).to_owned(),
            max: found.state.score_max(),
            deductions: found
                .deductions
                .iter()
                .map(|taken| DeductionReport {
                    input: taken.input.to_owned(),
                    value: taken.value,
                    points: taken.points,
                })
                .collect(),
        },
        trend: trend_report(&found.trend, found.slots_left),
        days: days.iter().map(day_report).collect(),
    }
}

fn day_report(day: &Day) -> DayReport {
    let midnight = UNIX_EPOCH + Duration::from_secs(day.day * 86_400);
    let mut date = humantime::format_rfc3339_seconds(midnight).to_string();
    date.truncate("2026-01-31".len());
    DayReport {
        date,
        remaps: day.remaps,
        lost: day.lost,
        slots_used: day.used,
        read_errors: day.read_errors,
        write_errors: day.write_errors,
        flush_failed: day.flush_failed.contains(&true),
    }
}

fn trend_report(trend: &Trend, left: u64) -> TrendReport {
    let exhaustion = trend.slope.and_then(|slope| slope.exhaustion(left));
    TrendReport {
        summary: summary(trend, left),
        samples: trend.samples,
        span_days: trend.span_days,
        confidence_percent: CONFIDENCE_PERCENT,
        slots_per_day: trend.slope.map(|slope| Estimate { value: slope.per_day, low: slope.low, high: slope.high }),
        slots_left: left,
        exhausted_in_days: exhaustion.map(|when| Estimate { value: when.days, low: when.earliest, high: when.latest }),
    }
}

fn summary(trend: &Trend, left: u64) -> String {
    let data = format!("{} daily samples over {} days", trend.samples, trend.span_days);
    let Some(slope) = trend.slope else {
        if trend.samples < SAMPLES_MIN || trend.span_days < SPAN_DAYS_MIN {
            return format!("not enough data: {data}; {SAMPLES_MIN} over {SPAN_DAYS_MIN} are needed");
        }
        return format!("not enough data: {data}, which depend on each other too much");
    };
    let speed = format!(
        "{:.1} slots a day ({:.1} to {:.1}, {CONFIDENCE_PERCENT} % sure), from {data}",
        slope.per_day, slope.low, slope.high
    );
    match slope.exhaustion(left) {
        None => format!("no growth that could be told from none: {speed}"),
        Some(when) => {
            let days = |days: f64| {
                if days > DAYS_TOLD_MAX { "more than 3650".to_owned() } else { format!("{days:.0}") }
            };
            format!(
                "if it goes on like this, the {left} slots that are left are used in {} days ({} to {}): {speed}",
                days(when.days),
                days(when.earliest),
                days(when.latest)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::health::trend::Slope;

    fn trend(slope: Option<Slope>) -> Trend {
        Trend { samples: 20, span_days: 30, slope }
    }

    #[test]
    fn the_trend_says_what_it_knows_and_no_more() {
        let few = Trend { samples: 2, span_days: 1, slope: None };
        assert_eq!(summary(&few, 9), "not enough data: 2 daily samples over 1 days; 8 over 14 are needed");
        assert!(summary(&trend(None), 9).contains("depend on each other"));
        let slope = |per_day, low, high| trend(Some(Slope { per_day, low, high }));
        let found = summary(&slope(0.5, -0.1, 1.1), 100);
        assert!(found.starts_with("no growth that could be told from none: 0.5 slots a day (-0.1 to 1.1, 95 % sure)"));
        let found = summary(&slope(2.0, 1.0, 4.0), 100);
        assert!(found.contains("the 100 slots that are left are used in 50 days (25 to 100): 2.0 slots"), "{found}");
        let found = summary(&slope(0.01, 0.001, 0.02), 16_384);
        assert!(found.contains("in more than 3650 days (more than 3650 to more than 3650)"), "{found}");
        let report = trend_report(&slope(2.0, 1.0, 4.0), 100);
        assert_eq!(report.exhausted_in_days, Some(Estimate { value: 50.0, low: 25.0, high: 100.0 }));
        assert_eq!(trend_report(&slope(0.0, 0.0, 0.0), 100).exhausted_in_days, None);
    }

    #[test]
    fn a_day_has_a_date() {
        let day = Day { day: 20_787, flush_failed: [false, true], ..Day::default() };
        let report = day_report(&day);
        assert_eq!((report.date.as_str(), report.flush_failed), ("2026-11-30", true));
    }
}
