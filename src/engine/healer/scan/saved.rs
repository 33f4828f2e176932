//! What the scanner keeps across restarts, among the saved counters: where a pass stands, and how the last one ended.

use super::pass::{Cursor, Pass, Share, Stage};
use crate::engine::scan::{Found, LastPass, ScanScope};
use crate::units::{Sector, SectorRange};

/// Where it begins among the saved counters.
pub(in crate::engine::healer) const SAVED_AT: usize = 16;
/// Words of it.
pub(in crate::engine::healer) const WORDS: usize = 32;

const UNDER_WAY: u64 = 1;
const PAUSED: u64 = 2;
const CHECK_ONLY: u64 = 4;
const ORDERED: u64 = 8;
const HAS_RANGE: u64 = 16;
/// Above the flags is the capacity.
const CAPACITY_SHIFT: u32 = 8;
/// Bits of a position; above them is the stage.
const POSITION_BITS: u32 = 56;

/// Bits of the number of weak blocks that moved on a day; above them are the seconds of a pass's trouble, and in the
/// upper half is the day.
const OF_DAY_BITS: u32 = 8;
const TROUBLE_BITS: u32 = 24;

/// No number that is kept is larger.
const NUMBER_MAX: u64 = 1 << 56;

/// What outlives a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Number of the last pass that began.
    pub(super) pass: u64,
    pub(super) last: LastPass,
    /// When the last pass of the whole volume ended in whatever way, seconds since the epoch; 0 for never.
    pub(super) whole_ended: u64,
    /// The same of the last one that was complete.
    pub(super) complete_ended: u64,
    /// Sectors that the disk had then.
    pub(super) complete_capacity: u64,
    /// The last day (since the epoch) on which weak blocks moved, and how many did.
    pub(super) weak_day: u32,
    pub(super) weak_of_day: u32,
    /// Slots that weak blocks have, at most: which of the blocks that were given back was weak is not known.
    pub(super) weak_slots: u64,
}

fn words(found: &Found) -> [u64; 8] {
    let f = found;
    [f.bad, f.recovered, f.slow, f.lost, f.healed, f.moved, f.rewritten, f.metadata]
}

fn found(words: &[u64]) -> Found {
    let [bad, recovered, slow, lost, healed, moved, rewritten, metadata] = std::array::from_fn(|i| words[i]);
    Found { bad, recovered, slow, lost, healed, moved, rewritten, metadata }
}

/// The words of it.
pub(super) fn encode(record: &Record, pass: Option<&Pass>) -> [u64; WORDS] {
    let mut words_of = [0; WORDS];
    words_of[0] = record.complete_capacity << CAPACITY_SHIFT;
    words_of[1] = record.pass;
    if let Some(pass) = pass {
        let flags = [
            (UNDER_WAY, true),
            (PAUSED, pass.paused),
            (CHECK_ONLY, pass.scope.check_only),
            (ORDERED, pass.ordered),
            (HAS_RANGE, pass.scope.range.is_some()),
        ];
        words_of[0] |= flags.iter().filter(|(_, set)| *set).map(|(bit, _)| bit).sum::<u64>();
        words_of[2] = u64::from(pass.cursor.stage.number()) << POSITION_BITS | pass.cursor.position;
        let range = pass.extent;
        let kept = pass.kept();
        let middle = [range.start.0, range.count, pass.started, kept.covered, pass.read, kept.skipped_bytes];
        words_of[3..9].copy_from_slice(&middle);
        words_of[9..17].copy_from_slice(&words(&kept.found));
    }
    let last = &record.last;
    words_of[17..21].copy_from_slice(&[
        last.pass,
        last.started,
        last.ended,
        u64::from(last.complete) | u64::from(last.cancelled) << 1 | record.whole_ended << 2,
    ]);
    words_of[21..29].copy_from_slice(&words(&last.found));
    words_of[29] = record.complete_ended;
    let of_day = u64::from(record.weak_of_day).min((1 << OF_DAY_BITS) - 1);
    let trouble = pass.map_or(0, |pass| pass.trouble_seconds()).min((1 << TROUBLE_BITS) - 1);
    words_of[30] = u64::from(record.weak_day) << 32 | trouble << OF_DAY_BITS | of_day;
    words_of[31] = record.weak_slots;
    words_of
}

/// What was kept; of a page from before there was a scanner, nothing.
pub(super) fn decode(saved: &[u64]) -> (Record, Option<Pass>) {
    let mut w = [0; WORDS];
    w.iter_mut().zip(saved.iter().skip(SAVED_AT)).for_each(|(word, saved)| *word = *saved);
    // Of a page that says what cannot be, nothing may overflow; flags, and numbers put together, are taken apart below.
    (0..WORDS).filter(|at| ![0, 2, 20, 30].contains(at)).for_each(|at| w[at] = w[at].min(NUMBER_MAX));
    let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).expect("masked");
    let record = Record {
        pass: w[1],
        last: LastPass {
            pass: w[17],
            started: w[18],
            ended: w[19],
            complete: w[20] & 1 == 1,
            cancelled: w[20] & 2 == 2,
            found: found(&w[21..29]),
        },
        whole_ended: (w[20] >> 2).min(NUMBER_MAX),
        complete_ended: w[29],
        complete_capacity: w[0] >> CAPACITY_SHIFT,
        weak_day: low(w[30] >> 32),
        weak_of_day: low(w[30]) & ((1 << OF_DAY_BITS) - 1),
        weak_slots: w[31],
    };
    let stage = Stage::of_number(w[2] >> POSITION_BITS).filter(|_| w[0] & UNDER_WAY != 0);
    let pass = stage.map(|stage| {
        let range = SectorRange { start: Sector(w[3]), count: w[4] };
        let scope = ScanScope {
            range: (w[0] & HAS_RANGE != 0).then_some(range).filter(|range| range.checked_end().is_some()),
            check_only: w[0] & CHECK_ONLY != 0,
        };
        let mut pass = Pass::new(w[1], scope, w[0] & ORDERED != 0, w[5]);
        pass.extent = if range.checked_end().is_some() { range } else { SectorRange::default() };
        pass.paused = w[0] & PAUSED != 0;
        pass.cursor = Cursor { stage, position: w[2] & ((1 << POSITION_BITS) - 1) };
        pass.read = w[7];
        pass.had_trouble_for(u64::from(low(w[30]) >> OF_DAY_BITS));
        pass.restore(Share { covered: w[6], skipped_bytes: w[8], found: found(&w[9..17]) });
        pass
    });
    (record, pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back() {
        assert_eq!(decode(&[]).0, Record::default());
        assert!(decode(&[7; SAVED_AT]).1.is_none());
        let some = |n: u64| Found {
            bad: n,
            recovered: n + 1,
            slow: n + 2,
            lost: n + 3,
            healed: n + 4,
            moved: n + 5,
            rewritten: n + 6,
            metadata: n + 7,
        };
        let record = Record {
            pass: 3,
            last: LastPass { pass: 2, started: 10, ended: 20, complete: true, cancelled: true, found: some(100) },
            whole_ended: 20,
            complete_ended: 19,
            complete_capacity: 1 << 40,
            weak_day: 20_000,
            weak_of_day: 64,
            weak_slots: 70,
        };
        let range = SectorRange { start: Sector(8), count: 16 };
        let scope = ScanScope { range: Some(range), check_only: true };
        let mut pass = Pass::new(3, scope, true, 4);
        pass.paused = true;
        pass.cursor = Cursor { stage: Stage::Slots, position: 5 };
        pass.read = 7;
        pass.restore(Share { covered: 6, skipped_bytes: 8, found: some(9) });
        pass.had_trouble_for(86_399);
        let mut saved = vec![0; SAVED_AT];
        saved.extend(encode(&record, Some(&pass)));
        let (record_again, again) = decode(&saved);
        let again = again.unwrap();
        assert_eq!(record_again, record);
        assert_eq!(encode(&record_again, Some(&again)), encode(&record, Some(&pass)));
        assert_eq!((again.scope, again.cursor, again.found), (scope, pass.cursor, pass.found));
        assert_eq!(again.trouble_seconds(), 86_399);
        saved[SAVED_AT..].copy_from_slice(&encode(&record, None));
        assert!(decode(&saved).1.is_none());
    }
}
