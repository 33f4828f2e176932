//! How a volume and its devices are: a pure function of plain numbers, with the rule and the numbers behind each word.
//!
//! Rules instead of a prediction: one error makes more of them likely, but no counter tells the day on which a disk
//! dies (Bairavasundaram and others 2007; Schroeder and others 2016). What is looked at, and from what on:
//!
//! | rule | word | from |
//! |---|---|---|
//! | `pending` | WATCH | 1 block whose last read failed |
//! | `recovered-reads` | WATCH | 1 block read only after retries, since the volume was opened |
//! | `lost` | WATCH | 1 lost sector |
//! | `spare-filling` | WATCH | 80 % of the slots used |
//! | `remapped-recently` | AT_RISK | 1 block moved in 70 days because something failed |
//! | `lost-recently` | AT_RISK | 1 sector lost in 70 days |
//! | `error-burst` | AT_RISK | 10 requests that met an error of a device, or blocks that a pass found bad, within 600 s |
//! | `slots-retired` | AT_RISK | 1 slot that failed a write |
//! | `not-answering` | AT_RISK | a device that is gone or down |
//! | `spare-used` | REPLACE | 90 % of the slots used |
//! | `many-remaps` | REPLACE | 1001 blocks that live in slots |
//! | `growing` | REPLACE | blocks moved in each of the last 3 weeks |
//! | `flush-failed` | REPLACE | a failed flush that was not cleared, or one in 70 days |
//! | `place-retired` | REPLACE | one of the two copies of the metadata |
//!
//! A device that is not the one it should be is refused when it is opened, and needs no rule.

pub mod history;
pub mod trend;

use std::collections::VecDeque;

use history::Day;
use trend::Trend;

use crate::units::Time;

/// How far back "recently" reaches, in days.
const RECENT_DAYS: u64 = 70;
/// How far back the rule of bursts looks, in seconds, and for how many failures.
const BURST_SECONDS: u64 = 600;
const BURST_ERRORS: usize = 10;
/// Weeks of growth in a row.
const GROWING_WEEKS: u64 = 3;

/// How it is, from good to bad.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum HealthState {
    /// No rule holds.
    #[default]
    Ok,
    /// Look at it now and then.
    Watch,
    /// More trouble is likely: see that there is a backup.
    AtRisk,
    /// Do not wait.
    Replace,
}

impl HealthState {
    /// For records.
    pub fn name(self) -> &'static str {
        match self {
            HealthState::Ok => "OK",
            HealthState::Watch => "WATCH",
            HealthState::AtRisk => "AT_RISK",
            HealthState::Replace => "REPLACE",
        }
    }

    /// The highest score that goes with it.
    pub fn score_max(self) -> u64 {
        match self {
            HealthState::Ok => 100,
            HealthState::Watch => 94,
            HealthState::AtRisk => 79,
            HealthState::Replace => 39,
        }
    }
}

/// Of which device a rule speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The primary.
    Primary,
    /// The spare.
    Spare,
}

impl Part {
    /// Both.
    pub const ALL: [Part; 2] = [Part::Primary, Part::Spare];

    fn index(self) -> usize {
        match self {
            Part::Primary => 0,
            Part::Spare => 1,
        }
    }
}

/// What is known of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceInputs {
    /// Requests that met an error of it, and blocks that a pass found bad, within the last 600 s; more than 10 are not
    /// told apart.
    pub burst: u64,
    /// Pending blocks that live on it.
    pub pending: u64,
    /// Blocks of it read only after retries, since the volume was opened.
    pub recovered_reads: u64,
    /// It is gone, or down.
    pub gone: bool,
    /// Its flush failed, and that was not cleared.
    pub poisoned: bool,
}

/// What the rules look at.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Days since the epoch (UTC).
    pub today: u64,
    /// Days on which the volume was open, oldest first.
    pub days: &'a [Day],
    /// Primary and spare.
    pub devices: [DeviceInputs; 2],
    /// Blocks that live in slots.
    pub remapped: u64,
    /// Sectors that are lost now.
    pub lost_sectors: u64,
    /// Slots there are.
    pub slots: u64,
    /// Slots that no block can move to: in use, or retired.
    pub slots_used: u64,
    /// Slots that failed a write.
    pub slots_retired: u64,
    /// Places of the metadata that no longer count.
    pub places_retired: u64,
    /// The guest's reads and writes since the volume was opened.
    pub requests: u64,
    /// Requests that met an error of a device, since the volume was opened.
    pub requests_in_error: u64,
}

impl Inputs<'_> {
    fn recent(&self) -> impl Iterator<Item = &Day> {
        self.days.iter().filter(|day| self.today.saturating_sub(day.day) < RECENT_DAYS)
    }

    fn used_percent(&self) -> u64 {
        (self.slots_used * 100).checked_div(self.slots).unwrap_or(0)
    }

    /// Weeks up to now, counted back without a gap, in each of which a block moved.
    fn weeks_of_growth(&self) -> u64 {
        let week = |back: u64| {
            self.days.iter().any(|day| day.remaps > 0 && day.day <= self.today && (self.today - day.day) / 7 == back)
        };
        (0..GROWING_WEEKS).take_while(|back| week(*back)).count() as u64
    }

    fn device(&self, part: Part) -> &DeviceInputs {
        &self.devices[part.index()]
    }
}

/// A row of the table.
struct Rule {
    name: &'static str,
    state: HealthState,
    /// The devices it looks at.
    parts: &'static [Part],
    value: fn(&Inputs<'_>, Part) -> u64,
    /// It holds from this value on.
    limit: u64,
    /// What the value counts.
    what: &'static str,
    advice: &'static str,
}

const PRIMARY: &[Part] = &[Part::Primary];
const SPARE: &[Part] = &[Part::Spare];

/// The rules, mildest first.
static RULES: [Rule; 14] = [
    Rule {
        name: "pending",
        state: HealthState::Watch,
        parts: &Part::ALL,
        value: |inputs, part| inputs.device(part).pending,
        limit: 1,
        what: "blocks whose last read failed",
        advice: "see `list --pending`; a rewrite heals them",
    },
    Rule {
        name: "recovered-reads",
        state: HealthState::Watch,
        parts: &Part::ALL,
        value: |inputs, part| inputs.device(part).recovered_reads,
        limit: 1,
        what: "blocks read only after retries",
        advice: "look again in some days",
    },
    Rule {
        name: "lost",
        state: HealthState::Watch,
        parts: PRIMARY,
        value: |inputs, _| inputs.lost_sectors,
        limit: 1,
        what: "lost sectors",
        advice: "see `list --lost`; restore the files on them from a backup",
    },
    Rule {
        name: "spare-filling",
        state: HealthState::Watch,
        parts: PRIMARY,
        value: |inputs, _| inputs.used_percent(),
        limit: 80,
        what: "percent of the slots used",
        advice: "plan to replace the primary",
    },
    Rule {
        name: "remapped-recently",
        state: HealthState::AtRisk,
        parts: PRIMARY,
        value: |inputs, _| inputs.recent().map(|day| day.remaps).fold(0, u64::saturating_add),
        limit: 1,
        what: "blocks moved in the last 70 days because they failed",
        advice: "see that there is a backup; more failures are likely in the coming weeks",
    },
    Rule {
        name: "lost-recently",
        state: HealthState::AtRisk,
        parts: PRIMARY,
        value: |inputs, _| inputs.recent().map(|day| day.lost).fold(0, u64::saturating_add),
        limit: 1,
        what: "sectors lost in the last 70 days",
        advice: "see that there is a backup; more failures are likely in the coming weeks",
    },
    Rule {
        name: "error-burst",
        state: HealthState::AtRisk,
        parts: &Part::ALL,
        value: |inputs, part| inputs.device(part).burst,
        limit: BURST_ERRORS as u64,
        what: "requests that met an error of the device, and blocks that a pass found bad, within 600 s",
        advice: "look at the device and its cable; see `events`",
    },
    Rule {
        name: "slots-retired",
        state: HealthState::AtRisk,
        parts: SPARE,
        value: |inputs, _| inputs.slots_retired,
        limit: 1,
        what: "slots that failed a write",
        advice: "plan to replace the spare",
    },
    Rule {
        name: "not-answering",
        state: HealthState::AtRisk,
        parts: &Part::ALL,
        value: |inputs, part| u64::from(inputs.device(part).gone),
        limit: 1,
        what: "devices that do not answer",
        advice: "reattach it; see `status`",
    },
    Rule {
        name: "spare-used",
        state: HealthState::Replace,
        parts: PRIMARY,
        value: |inputs, _| inputs.used_percent(),
        limit: 90,
        what: "percent of the slots used",
        advice: "replace the primary",
    },
    Rule {
        name: "many-remaps",
        state: HealthState::Replace,
        parts: PRIMARY,
        value: |inputs, _| inputs.remapped,
        limit: 1001,
        what: "blocks that live in slots",
        advice: "replace the primary",
    },
    Rule {
        name: "growing",
        state: HealthState::Replace,
        parts: PRIMARY,
        value: |inputs, _| inputs.weeks_of_growth(),
        limit: GROWING_WEEKS,
        what: "weeks in a row in which blocks failed and moved",
        advice: "replace the primary",
    },
    Rule {
        name: "flush-failed",
        state: HealthState::Replace,
        parts: &Part::ALL,
        value: |inputs, part| {
            let days = inputs.recent().filter(|day| day.flush_failed[part.index()]).count() as u64;
            days.max(u64::from(inputs.device(part).poisoned))
        },
        limit: 1,
        what: "days of the last 70 on which a flush failed",
        advice: "replace the device; see `status`",
    },
    Rule {
        name: "place-retired",
        state: HealthState::Replace,
        parts: SPARE,
        value: |inputs, _| inputs.places_retired,
        limit: 1,
        what: "copies of the metadata, of two, that no longer take writes",
        advice: "replace the spare",
    },
];

/// A rule that holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The rule.
    pub rule: &'static str,
    /// What it says.
    pub state: HealthState,
    /// Of which device.
    pub part: Part,
    /// The number that was found.
    pub value: u64,
    /// The number from which on the rule holds.
    pub limit: u64,
    /// What the number counts.
    pub what: &'static str,
    /// What to do.
    pub advice: &'static str,
}

/// What was taken from a full score, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deduction {
    /// What was looked at.
    pub input: &'static str,
    /// Its value.
    pub value: u64,
    /// Points taken.
    pub points: u64,
}

/// How a volume is.
#[derive(Clone, Debug, PartialEq)]
pub struct Assessment {
    /// The worst that a rule says.
    pub state: HealthState,
    /// The same for primary and spare.
    pub devices: [HealthState; 2],
    /// The rules that hold, worst first.
    pub findings: Vec<Finding>,
    /// 0 to 100: what is left of 100 after the deductions, at most [`HealthState::score_max`].
    pub score: u64,
    /// What was deducted.
    pub deductions: Vec<Deduction>,
    /// How the slots are used up.
    pub trend: Trend,
    /// Slots that are left to be used.
    pub slots_left: u64,
}

impl Assessment {
    /// The worst that a rule says of one device.
    pub fn of(&self, part: Part) -> HealthState {
        self.devices[part.index()]
    }
}

/// Judge.
pub fn assess(inputs: &Inputs<'_>) -> Assessment {
    let holds = |rule: &'static Rule, part: Part| {
        let value = (rule.value)(inputs, part);
        let Rule { name, state, limit, what, advice, .. } = *rule;
        (value >= limit).then_some(Finding { rule: name, state, part, value, limit, what, advice })
    };
    let mut findings: Vec<Finding> =
        RULES.iter().flat_map(|rule| rule.parts.iter().filter_map(move |part| holds(rule, *part))).collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.state));
    let worst = |part: Option<Part>| {
        let of_part = findings.iter().filter(|finding| part.is_none_or(|part| part == finding.part));
        of_part.map(|finding| finding.state).max().unwrap_or_default()
    };
    let state = worst(None);
    let deductions = deductions(inputs);
    let left = deductions.iter().fold(100_u64, |left, deduction| left.saturating_sub(deduction.points));
    Assessment {
        state,
        devices: Part::ALL.map(|part| worst(Some(part))),
        score: left.min(state.score_max()),
        deductions,
        trend: trend::trend(inputs.days, inputs.today),
        slots_left: inputs.slots.saturating_sub(inputs.slots_used),
        findings,
    }
}

/// Points of the first row that the value reaches.
fn points(value: u64, steps: &[(u64, u64)]) -> u64 {
    steps.iter().find(|(from, _)| value >= *from).map_or(0, |(_, points)| *points)
}

/// What is taken from the score. Rates, bursts and the steps of the third are dm-remap's, whose score had these inputs.
fn deductions(inputs: &Inputs<'_>) -> Vec<Deduction> {
    // Below ten thousand requests one in error counts as one in ten thousand: a fresh start is no catastrophe.
    let rate = inputs.requests_in_error.saturating_mul(10_000) / inputs.requests.max(10_000);
    let burst = inputs.devices.iter().map(|device| device.burst).max().unwrap_or(0);
    let pending = inputs.devices.iter().map(|device| device.pending).sum();
    let used = inputs.used_percent();
    let all = [
        ("requests in 10,000 that met an error of a device", rate, points(rate, &[(101, 50), (11, 20), (2, 5)])),
        (
            "requests that met an error of a device, and blocks that a pass found bad, within 600 s",
            burst,
            points(burst, &[(10, 30), (6, 15)]),
        ),
        ("pending blocks", pending, points(pending, &[(21, 25), (11, 10), (1, 5)])),
        ("percent of the slots used", used, used / 2),
        ("lost sectors", inputs.lost_sectors, points(inputs.lost_sectors, &[(1, 20)])),
    ];
    let taken = all.into_iter().filter(|(_, _, points)| *points > 0);
    taken.map(|(input, value, points)| Deduction { input, value, points }).collect()
}

/// dm-remap's word for a score.
pub fn score_word(score: u64) -> &'static str {
    match score {
        95.. => "EXCELLENT",
        80.. => "GOOD",
        60.. => "FAIR",
        40.. => "POOR",
        _ => "CRITICAL",
    }
}

/// When requests met an error of a device lately.
#[derive(Clone, Debug, Default)]
pub struct Burst(VecDeque<Time>);

impl Burst {
    /// A request met an error, or a pass found a bad block.
    pub fn note(&mut self, now: Time) {
        if self.0.len() == BURST_ERRORS {
            self.0.pop_front();
        }
        self.0.push_back(now);
    }

    /// Errors within the last 600 s, as far as they are kept.
    pub fn count(&self, now: Time) -> u64 {
        self.0.iter().filter(|then| now.since_ns(**then) <= BURST_SECONDS * 1_000_000_000).count() as u64
    }
}

#[cfg(test)]
mod tests;
