//! How one pass stands.

use std::collections::{BTreeSet, VecDeque};

use crate::engine::scan::plan::Order;
use crate::engine::scan::{Found, ScanScope, ScanState, Skipped};
use crate::units::{Block, Time};

/// Parts that a pass could not look at of which it is told, at most; all of them are counted.
const SKIPPED_MAX: usize = 64;
/// Blocks in trouble that a pass remembers, so as not to count one twice.
const MET_MAX: usize = 65_536;
/// Units round hits that a pass remembers.
const NEAR_MAX: usize = 65_536;
/// The speed now is that of so many seconds.
const SPEED_SECONDS: u64 = 10;
const NS: u64 = 1_000_000_000;

/// What a pass goes over, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Primary,
    Slots,
    Metadata,
}

impl Stage {
    const ALL: [Stage; 3] = [Stage::Primary, Stage::Slots, Stage::Metadata];

    pub(super) fn number(self) -> u8 {
        match self {
            Stage::Primary => 0,
            Stage::Slots => 1,
            Stage::Metadata => 2,
        }
    }

    pub(super) fn of_number(number: u64) -> Option<Stage> {
        Stage::ALL.into_iter().find(|stage| u64::from(stage.number()) == number)
    }

    fn next(self) -> Option<Stage> {
        Stage::of_number(u64::from(self.number()) + 1)
    }
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    pub(super) stage: Stage,
    pub(super) position: u64,
}

/// A pass that is under way.
pub(super) struct Pass {
    pub(super) number: u64,
    pub(super) scope: ScanScope,
    /// Somebody asked for it: it does not wait for its window.
    pub(super) ordered: bool,
    /// Seconds since the epoch.
    pub(super) started: u64,
    pub(super) paused: bool,
    /// Why it does not go on, and since when the operator has to know.
    pub(super) waits: Option<(ScanState, String)>,
    pub(super) cursor: Cursor,
    pub(super) covered: u64,
    pub(super) read: u64,
    pub(super) found: Found,
    pub(super) skipped: Vec<Skipped>,
    pub(super) skipped_bytes: u64,
    /// Units round hits: to be read next, and all that were.
    pub(super) urgent: VecDeque<u64>,
    pub(super) near: BTreeSet<u64>,
    /// Blocks in trouble, found already in this stage.
    met: BTreeSet<Block>,
    /// What was covered, at times of the last seconds and when it began or went on.
    covered_at: VecDeque<(Time, u64)>,
    began: Option<(Time, u64)>,
}

impl Pass {
    pub(super) fn new(number: u64, scope: ScanScope, ordered: bool, started: u64) -> Pass {
        Pass {
            number,
            scope,
            ordered,
            started,
            paused: false,
            waits: None,
            cursor: Cursor { stage: Stage::Primary, position: 0 },
            covered: 0,
            read: 0,
            found: Found::default(),
            skipped: Vec::new(),
            skipped_bytes: 0,
            urgent: VecDeque::new(),
            near: BTreeSet::new(),
            met: BTreeSet::new(),
            covered_at: VecDeque::new(),
            began: None,
        }
    }

    /// Take the next stage up; whether there is one.
    pub(super) fn next_stage(&mut self) -> bool {
        let next = self.cursor.stage.next().filter(|stage| *stage != Stage::Metadata || self.scope.range.is_none());
        if let Some(stage) = next {
            self.met.clear();
            self.cursor = Cursor { stage, position: 0 };
        }
        next.is_some()
    }

    /// Whether a block in trouble is met for the first time.
    pub(super) fn meets(&mut self, block: Block) -> bool {
        self.met.len() < MET_MAX && self.met.insert(block)
    }

    /// Trouble in a unit: read those around it next which were not read yet.
    pub(super) fn hit(&mut self, order: &Order, unit: u64) {
        for other in order.neighbours(unit) {
            let read = order.position_of(other) < self.cursor.position;
            if !read && self.near.len() < NEAR_MAX && self.near.insert(other) {
                self.urgent.push_back(other);
            }
        }
    }

    pub(super) fn skip(&mut self, skipped: Skipped) {
        self.skipped_bytes += skipped.len;
        if self.skipped.len() < SKIPPED_MAX {
            self.skipped.push(skipped);
        }
    }

    /// It goes on: its speed is measured from now.
    pub(super) fn goes_on(&mut self, now: Time) {
        self.began = Some((now, self.covered));
        self.covered_at = VecDeque::from([(now, self.covered)]);
    }

    /// More was covered.
    pub(super) fn cover(&mut self, now: Time, bytes: u64) {
        self.covered += bytes;
        if self.covered_at.back().is_none_or(|(time, _)| now.since_ns(*time) >= NS) {
            self.covered_at.push_back((now, self.covered));
        }
        while self.covered_at.len() > 2 && now.since_ns(self.covered_at[1].0) >= SPEED_SECONDS * NS {
            self.covered_at.pop_front();
        }
    }

    /// Bytes of a second covered lately, and since it went on.
    pub(super) fn speeds(&self, now: Time) -> (u64, u64) {
        let since = |from: Option<&(Time, u64)>| {
            let (time, covered) = from?;
            let bytes = u128::from(self.covered.saturating_sub(*covered)) * u128::from(NS);
            u64::try_from(bytes.checked_div(u128::from(now.since_ns(*time)))?).ok()
        };
        let lately = since(self.covered_at.front()).unwrap_or(0);
        (lately, since(self.began.as_ref()).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Sector, SectorRange};

    #[test]
    fn a_hit_has_its_neighbours_read_once_unless_they_were() {
        let order = Order::new(SectorRange { start: Sector(0), count: 2048 * 100 });
        let mut pass = Pass::new(1, ScanScope::default(), true, 0);
        pass.cursor.position = 6;
        pass.hit(&order, 5);
        assert_eq!(pass.urgent, (6..=15).collect::<Vec<_>>());
        pass.hit(&order, 7);
        assert_eq!(pass.urgent.len(), 12, "16 and 17 came along, and nothing came twice");
    }

    #[test]
    fn stages_follow_each_other_and_a_range_has_no_metadata() {
        let mut pass = Pass::new(1, ScanScope::default(), true, 0);
        assert!(pass.next_stage() && pass.next_stage() && !pass.next_stage());
        let scope = ScanScope { range: Some(SectorRange { start: Sector(0), count: 8 }), check_only: false };
        let mut pass = Pass::new(1, scope, true, 0);
        assert!(pass.next_stage() && !pass.next_stage());
    }

    #[test]
    fn speeds_are_those_of_the_last_seconds_and_of_all() {
        let mut pass = Pass::new(1, ScanScope::default(), true, 0);
        let at = |seconds: u64| Time(seconds * NS);
        assert_eq!(pass.speeds(at(5)), (0, 0));
        pass.goes_on(at(0));
        (1..=20).for_each(|second| pass.cover(at(second), 100));
        (21..=40).for_each(|second| pass.cover(at(second), 300));
        assert_eq!(pass.speeds(at(40)), (300, 200));
    }
}
