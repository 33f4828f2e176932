//! How one pass stands.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::engine::scan::plan::Order;
use crate::engine::scan::{Found, ScanScope, ScanState, Skipped};
use crate::units::{Block, SectorRange, Time};

/// Parts that a pass could not look at of which it is told, at most; all of them are counted.
const SKIPPED_MAX: usize = 64;
/// Blocks in trouble that a pass remembers, so as not to count one twice.
const MET_MAX: usize = 65_536;
/// Units round hits that a pass remembers.
const NEAR_MAX: usize = 65_536;
/// The speed now is that of so many seconds.
const SPEED_SECONDS: u64 = 10;
const NS: u64 = 1_000_000_000;
/// Time that a pass gives in all to reads that fail and to blocks in trouble, in nanoseconds (1 day): where a large
/// part of a disk is dead it comes to an end all the same.
const PATIENCE_NS: u64 = 86_400 * NS;
/// What it gives at most before it ends, whatever is left: after the first day one read of each piece still tells
/// whether it fails.
const PATIENCE_IN_ALL_NS: u64 = 2 * PATIENCE_NS;
/// What it counts for when a device went during a step and came back, in nanoseconds (10 minutes).
const WENT_NS: u64 = 600 * NS;
/// A block is not read again once a device has gone so many times while it alone was looked at.
const WENT_MAX: u32 = 3;
/// Why it leaves out what fails then.
pub(super) const PATIENCE_LOST: &str = "this pass has given a day to what fails, and leaves out the rest of it";
/// Why it leaves out everything then.
pub(super) const PATIENCE_AT_AN_END: &str = "this pass has given two days to what fails, and ends here";
/// Why it leaves out a block.
pub(super) const TAKES_DEVICE_AWAY: &str = "the device goes whenever the block is read";

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

/// What a part of a pass came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) covered: u64,
    pub(super) skipped_bytes: u64,
    pub(super) found: Found,
}

impl Share {
    fn since(&self, earlier: &Share) -> Share {
        Share {
            covered: self.covered.saturating_sub(earlier.covered),
            skipped_bytes: self.skipped_bytes.saturating_sub(earlier.skipped_bytes),
            found: self.found.since(&earlier.found),
        }
    }

    fn add(&mut self, more: &Share) {
        self.covered += more.covered;
        self.skipped_bytes += more.skipped_bytes;
        self.found = self.found.plus(&more.found);
    }
}

/// A pass that is under way.
pub(super) struct Pass {
    pub(super) number: u64,
    pub(super) scope: ScanScope,
    /// The sectors that it goes over: those that were asked for, or the disk as large as it was when the pass began.
    pub(super) extent: SectorRange,
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
    /// What reads that failed and blocks in trouble took, in nanoseconds.
    trouble_ns: u64,
    /// Blocks moved out of slots, since the volume was opened.
    pub(super) left_slots: u64,
    pub(super) skipped: Vec<Skipped>,
    pub(super) skipped_bytes: u64,
    /// Units round hits: to be read next, and all that were, with what they came to where the cursor has not passed
    /// them yet.
    pub(super) urgent: VecDeque<u64>,
    near: BTreeMap<u64, Share>,
    /// What all came to that lies behind the cursor: a restart goes on from there, and reads again what was near.
    behind: Share,
    /// What all had come to when the last step ended, and how many parts were named.
    mark: Share,
    mark_skipped: usize,
    /// Positions below are read, or in this step.
    step_end: u64,
    /// Copies of pages of metadata that its last stage goes over.
    pub(super) pages: usize,
    /// Blocks in trouble, found already in this stage.
    met: BTreeSet<Block>,
    /// Blocks looked at in this step.
    seen_to: BTreeSet<Block>,
    /// Blocks of this step during whose look a device went, and how many times; and the fewest blocks read at a time
    /// of which it is one when a device went.
    went: BTreeMap<Block, u32>,
    went_with: BTreeMap<Block, usize>,
    /// What was covered, at times of the last seconds and when it began or went on.
    covered_at: VecDeque<(Time, u64)>,
    began: Option<(Time, u64)>,
}

impl Pass {
    pub(super) fn new(number: u64, scope: ScanScope, ordered: bool, started: u64) -> Pass {
        Pass {
            number,
            scope,
            extent: scope.range.unwrap_or_default(),
            ordered,
            started,
            paused: false,
            waits: None,
            cursor: Cursor { stage: Stage::Primary, position: 0 },
            covered: 0,
            read: 0,
            found: Found::default(),
            trouble_ns: 0,
            left_slots: 0,
            skipped: Vec::new(),
            skipped_bytes: 0,
            urgent: VecDeque::new(),
            near: BTreeMap::new(),
            behind: Share::default(),
            mark: Share::default(),
            mark_skipped: 0,
            step_end: 0,
            pages: 0,
            met: BTreeSet::new(),
            seen_to: BTreeSet::new(),
            went: BTreeMap::new(),
            went_with: BTreeMap::new(),
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
            self.step_end = 0;
        }
        next.is_some()
    }

    /// Whether a block in trouble is met for the first time.
    pub(super) fn meets(&mut self, block: Block) -> bool {
        self.met.len() >= MET_MAX || self.met.insert(block)
    }

    /// A block was looked at, or is listed as skipped.
    pub(super) fn sees_to(&mut self, block: Block) {
        self.seen_to.insert(block);
    }

    /// Whether a block was seen to in this step.
    pub(super) fn has_seen_to(&self, block: Block) -> bool {
        self.seen_to.contains(&block)
    }

    /// A device went while blocks were read at a time.
    pub(super) fn went_at(&mut self, blocks: &[Block]) {
        match blocks {
            [block] => *self.went.entry(*block).or_default() += 1,
            _ => self.went_with.extend(blocks.iter().map(|block| (*block, blocks.len()))),
        }
    }

    /// Whether blocks are not to be read at a time, as a device goes whenever one of them is: of several, which are
    /// then read fewer at a time, one time is enough.
    pub(super) fn takes_device_away(&self, blocks: &[Block]) -> bool {
        match blocks {
            [block] => self.went.get(block).is_some_and(|times| *times >= WENT_MAX),
            _ => blocks.iter().any(|block| self.went_with.get(block).is_some_and(|with| *with <= blocks.len())),
        }
    }

    /// A step is to be taken again.
    pub(super) fn has_to_go_back(&mut self) {
        self.has_trouble_for(WENT_NS);
    }

    /// Trouble took so long.
    pub(super) fn has_trouble_for(&mut self, ns: u64) {
        self.trouble_ns = self.trouble_ns.saturating_add(ns);
    }

    /// The same in seconds, which are kept over a restart.
    pub(super) fn trouble_seconds(&self) -> u64 {
        self.trouble_ns / NS
    }

    /// What it took before a restart, in seconds.
    pub(super) fn had_trouble_for(&mut self, seconds: u64) {
        self.trouble_ns = seconds.saturating_mul(NS);
    }

    /// What fails is not looked at any more.
    pub(super) fn has_lost_patience(&self) -> bool {
        self.trouble_ns >= PATIENCE_NS
    }

    /// Nothing is looked at any more.
    pub(super) fn is_at_its_end(&self) -> bool {
        self.trouble_ns >= PATIENCE_IN_ALL_NS
    }

    /// Trouble in a unit: read those around it next which were not read yet.
    pub(super) fn hit(&mut self, order: &Order, unit: u64) {
        if self.cursor.stage != Stage::Primary {
            return;
        }
        for other in order.neighbours(unit) {
            let read = order.position_of(other) < self.cursor.position.max(self.step_end);
            if !read && self.near.len() < NEAR_MAX && !self.near.contains_key(&other) {
                self.near.insert(other, Share::default());
                self.urgent.push_back(other);
            }
        }
    }

    /// Whether a unit was, or will be, read because of a hit.
    pub(super) fn is_near(&self, unit: u64) -> bool {
        self.near.contains_key(&unit)
    }

    /// What all came to.
    pub(super) fn so_far(&self) -> Share {
        Share { covered: self.covered, skipped_bytes: self.skipped_bytes, found: self.found }
    }

    /// What all came to that is not read again after a restart.
    pub(super) fn kept(&self) -> Share {
        self.behind
    }

    /// What was kept before a restart.
    pub(super) fn restore(&mut self, kept: Share) {
        (self.covered, self.skipped_bytes, self.found) = (kept.covered, kept.skipped_bytes, kept.found);
        (self.behind, self.mark) = (kept, kept);
    }

    /// A step begins, up to that position; one that was not ended is done again, and nothing of it is counted twice:
    /// blocks in trouble are remembered by name.
    pub(super) fn begin_step(&mut self, end: u64) {
        (self.covered, self.skipped_bytes) = (self.mark.covered, self.mark.skipped_bytes);
        self.skipped.truncate(self.mark_skipped);
        self.seen_to.clear();
        self.step_end = end;
    }

    /// A step is done that read the unit because of a hit.
    pub(super) fn end_urgent_step(&mut self, unit: u64) {
        let more = self.end_of_step();
        self.near.entry(unit).or_default().add(&more);
    }

    /// A step is done that came as far as `position`; units that it passed are among those behind.
    pub(super) fn end_step(&mut self, position: u64, passed: impl Iterator<Item = u64>) {
        for unit in passed {
            if let Some(share) = self.near.get_mut(&unit) {
                self.behind.add(&std::mem::take(share));
            }
        }
        let more = self.end_of_step();
        self.behind.add(&more);
        self.cursor.position = position;
        self.went.clear();
        self.went_with.clear();
    }

    /// What came since the last one.
    fn end_of_step(&mut self) -> Share {
        let so_far = self.so_far();
        let before = std::mem::replace(&mut self.mark, so_far);
        self.mark_skipped = self.skipped.len();
        self.mark.since(&before)
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
    use crate::device::DeviceIndex;
    use crate::units::Sector;

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
    fn what_was_read_ahead_is_kept_once_the_cursor_has_passed_it() {
        let order = Order::new(SectorRange { start: Sector(0), count: 2048 * 30 });
        let mut pass = Pass::new(1, ScanScope::default(), true, 0);
        let read = |pass: &mut Pass, bytes: u64, bad: u64| {
            pass.cover(Time(0), bytes);
            pass.found.bad += bad;
        };
        pass.begin_step(4);
        read(&mut pass, 40, 1);
        pass.hit(&order, 3);
        assert_eq!(pass.urgent, (4..=13).collect::<Vec<_>>(), "the others are in this step");
        pass.end_step(4, 0..4);
        pass.begin_step(4);
        read(&mut pass, 10, 2);
        pass.end_urgent_step(4);
        assert_eq!((pass.so_far().covered, pass.kept().covered, pass.kept().found.bad), (50, 40, 1));
        // A step that was not ended.
        pass.begin_step(6);
        read(&mut pass, 10, 0);
        pass.begin_step(6);
        read(&mut pass, 10, 0);
        pass.end_step(6, 4..6);
        let all = Share { covered: 60, skipped_bytes: 0, found: Found { bad: 3, ..Found::default() } };
        assert_eq!((pass.so_far(), pass.kept(), pass.cursor.position), (all, all, 6));
        let mut again = Pass::new(1, ScanScope::default(), true, 0);
        again.restore(all);
        again.begin_step(8);
        assert_eq!((again.so_far(), again.kept()), (all, all));
    }

    #[test]
    fn a_step_that_is_taken_again_sees_to_what_it_had_skipped() {
        let mut pass = Pass::new(1, ScanScope::default(), true, 0);
        let skipped = Skipped { device: DeviceIndex::PRIMARY, offset: 0, len: 4096, why: String::new() };
        for _ in 0..2 {
            pass.begin_step(1);
            assert!(!pass.has_seen_to(Block(0)));
            pass.skip(skipped.clone());
            pass.sees_to(Block(0));
            assert!(pass.has_seen_to(Block(0)));
        }
        pass.end_step(1, 0..1);
        assert_eq!((pass.skipped.len(), pass.skipped_bytes), (1, 4096));
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
