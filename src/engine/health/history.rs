//! What happened to a volume day by day: a bounded record that is kept with the saved counters.

/// Days kept; the oldest goes first. More than the 70 days that the rules look back.
pub const DAYS_MAX: usize = 104;
/// Words a day takes.
const DAY_WORDS: usize = 2;
/// Words the whole record takes.
pub const WORDS: usize = DAYS_MAX * DAY_WORDS;

/// One day. Counts that do not fit into their place on disk stay at the largest that does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Day {
    /// Days since the epoch (UTC).
    pub day: u64,
    /// Blocks that moved to a slot because something failed; by an operator's order is none of these.
    pub remaps: u64,
    /// Sectors recorded as lost.
    pub lost: u64,
    /// Slots in use or retired when it was last looked at on that day.
    pub used: u64,
    /// Failed reads of both devices.
    pub read_errors: u64,
    /// Failed writes of both devices.
    pub write_errors: u64,
    /// Whether a flush failed: of the primary, of the spare.
    pub flush_failed: [bool; 2],
}

/// Counts since the volume was opened, from which the days are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// See [`Day::remaps`].
    pub remaps: u64,
    /// See [`Day::lost`].
    pub lost: u64,
    /// See [`Day::used`].
    pub used: u64,
    /// See [`Day::read_errors`].
    pub read_errors: u64,
    /// See [`Day::write_errors`].
    pub write_errors: u64,
    /// Failed flushes of the primary and of the spare.
    pub flush_errors: [u64; 2],
}

/// The days on which the volume was open, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    days: Vec<Day>,
    seen: Totals,
}

/// Where a number of so many bits lies in a word.
struct Field {
    shift: u32,
    bits: u32,
}

impl Field {
    const fn max(&self) -> u64 {
        (1 << self.bits) - 1
    }

    fn put(&self, value: u64) -> u64 {
        value.min(self.max()) << self.shift
    }

    fn get(&self, word: u64) -> u64 {
        word >> self.shift & self.max()
    }
}

// First word. The day has one added, so that a word of zeros is no day.
const DAY: Field = Field { shift: 0, bits: 16 };
const REMAPS: Field = Field { shift: 16, bits: 24 };
const LOST: Field = Field { shift: 40, bits: 24 };
// Second word. A volume has at most 2^22 slots.
const USED: Field = Field { shift: 0, bits: 23 };
const READ_ERRORS: Field = Field { shift: 23, bits: 19 };
const WRITE_ERRORS: Field = Field { shift: 42, bits: 19 };
const FLUSH_PRIMARY: Field = Field { shift: 61, bits: 1 };
const FLUSH_SPARE: Field = Field { shift: 62, bits: 1 };

impl Day {
    fn words(&self) -> [u64; DAY_WORDS] {
        let [primary, spare] = self.flush_failed.map(u64::from);
        [
            DAY.put(self.day + 1) | REMAPS.put(self.remaps) | LOST.put(self.lost),
            USED.put(self.used)
                | READ_ERRORS.put(self.read_errors)
                | WRITE_ERRORS.put(self.write_errors)
                | FLUSH_PRIMARY.put(primary)
                | FLUSH_SPARE.put(spare),
        ]
    }

    fn of_words(first: u64, second: u64) -> Option<Day> {
        Some(Day {
            day: DAY.get(first).checked_sub(1)?,
            remaps: REMAPS.get(first),
            lost: LOST.get(first),
            used: USED.get(second),
            read_errors: READ_ERRORS.get(second),
            write_errors: WRITE_ERRORS.get(second),
            flush_failed: [FLUSH_PRIMARY.get(second) == 1, FLUSH_SPARE.get(second) == 1],
        })
    }

    /// Add what another day counted.
    fn absorb(&mut self, other: &Day) {
        self.remaps = self.remaps.saturating_add(other.remaps);
        self.lost = self.lost.saturating_add(other.lost);
        self.read_errors = self.read_errors.saturating_add(other.read_errors);
        self.write_errors = self.write_errors.saturating_add(other.write_errors);
        for (mine, theirs) in self.flush_failed.iter_mut().zip(other.flush_failed) {
            *mine |= theirs;
        }
    }
}

impl History {
    /// As kept in `words`; what is no day, or not in its order, is left out.
    pub fn decode(words: &[u64]) -> History {
        let mut days: Vec<Day> = Vec::new();
        let (pairs, _) = words.as_chunks::<DAY_WORDS>();
        for day in pairs.iter().take(DAYS_MAX).filter_map(|[first, second]| Day::of_words(*first, *second)) {
            if days.last().is_none_or(|last| last.day < day.day) {
                days.push(day);
            }
        }
        History { days, seen: Totals::default() }
    }

    /// The words to keep, exactly [`WORDS`].
    pub fn encode(&self) -> Vec<u64> {
        let mut words: Vec<u64> = self.days.iter().flat_map(Day::words).collect();
        words.resize(WORDS, 0);
        words
    }

    /// The days, oldest first.
    pub fn days(&self) -> &[Day] {
        &self.days
    }

    /// Put down what has come to the totals since the last call, on `today`. A day before all that are kept is told by
    /// a clock that is wrong: it counts as the last one. Otherwise it was wrong when it told days after today: what
    /// they counted is today's.
    pub fn note(&mut self, today: u64, totals: Totals) {
        let today = match (self.days.first(), self.days.last()) {
            (Some(first), Some(last)) if today < first.day => last.day,
            _ => today.min(DAY.max() - 1),
        };
        let seen = std::mem::replace(&mut self.seen, totals);
        let mut now = Day {
            day: today,
            remaps: totals.remaps.saturating_sub(seen.remaps),
            lost: totals.lost.saturating_sub(seen.lost),
            used: totals.used,
            read_errors: totals.read_errors.saturating_sub(seen.read_errors),
            write_errors: totals.write_errors.saturating_sub(seen.write_errors),
            flush_failed: std::array::from_fn(|device| totals.flush_errors[device] > seen.flush_errors[device]),
        };
        while let Some(last) = self.days.pop_if(|last| last.day >= today) {
            now.absorb(&last);
        }
        self.days.push(now);
        if self.days.len() > DAYS_MAX {
            self.days.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(remaps: u64, used: u64) -> Totals {
        Totals { remaps, used, ..Totals::default() }
    }

    #[test]
    fn a_day_survives_the_trip_and_what_is_too_large_stays_at_the_most() {
        let day = Day {
            day: 20_787,
            remaps: 3,
            lost: 5,
            used: 4_194_304,
            read_errors: 7,
            write_errors: 9,
            flush_failed: [true, false],
        };
        let [first, second] = day.words();
        assert_eq!(Day::of_words(first, second), Some(day));
        let huge = Day { remaps: u64::MAX, lost: 1 << 24, read_errors: 1 << 40, flush_failed: [false, true], ..day };
        let [first, second] = huge.words();
        let kept = Day { remaps: (1 << 24) - 1, lost: (1 << 24) - 1, read_errors: (1 << 19) - 1, ..huge };
        assert_eq!(Day::of_words(first, second), Some(kept));
        assert_eq!(Day::of_words(0, u64::MAX), None);
    }

    #[test]
    fn what_is_counted_goes_to_the_day_on_which_it_came() {
        let mut history = History::default();
        history.note(10, totals(0, 2));
        history.note(10, totals(3, 5));
        history.note(11, totals(3, 5));
        history.note(13, totals(4, 6));
        let found: Vec<_> = history.days().iter().map(|day| (day.day, day.remaps, day.used)).collect();
        assert_eq!(found, [(10, 3, 5), (11, 0, 5), (13, 1, 6)]);
        // After a restart the totals begin again, and the days go on.
        let mut history = History::decode(&history.encode());
        history.note(13, totals(2, 8));
        let found: Vec<_> = history.days().iter().map(|day| (day.day, day.remaps, day.used)).collect();
        assert_eq!(found, [(10, 3, 5), (11, 0, 5), (13, 3, 8)]);
    }

    #[test]
    fn the_record_is_bounded_and_the_oldest_day_goes_first() {
        let mut history = History::default();
        for day in 0..300 {
            history.note(day, totals(day, 0));
        }
        assert_eq!(history.days().len(), DAYS_MAX);
        assert_eq!((history.days()[0].day, history.days()[DAYS_MAX - 1].day), (196, 299));
        assert_eq!(history.encode().len(), WORDS);
        assert_eq!(History::decode(&history.encode()).days(), history.days());
    }

    #[test]
    fn a_clock_that_was_wrong_leaves_no_day_in_the_future() {
        let mut history = History::default();
        history.note(20_000, totals(1, 1));
        history.note(1 << 40, totals(3, 2));
        history.note(20_001, totals(4, 3));
        let found: Vec<_> = history.days().iter().map(|day| (day.day, day.remaps)).collect();
        assert_eq!(found, [(20_000, 1), (20_001, 3)]);
    }

    #[test]
    fn a_clock_that_begins_anew_dates_nothing_back() {
        let mut history = History::default();
        history.note(20_000, Totals { flush_errors: [1, 0], ..totals(1, 1) });
        history.note(20_001, Totals { flush_errors: [1, 0], ..totals(2, 2) });
        let mut history = History::decode(&history.encode());
        history.note(730, totals(1, 3));
        history.note(20_002, totals(1, 3));
        let found: Vec<_> = history.days().iter().map(|day| (day.day, day.remaps, day.flush_failed[0])).collect();
        assert_eq!(found, [(20_000, 1, true), (20_001, 2, false), (20_002, 0, false)]);
    }

    #[test]
    fn words_that_are_no_record_are_left_out() {
        let mut history = History::default();
        history.note(5, totals(1, 0));
        history.note(6, totals(2, 0));
        let mut words = history.encode();
        words.swap(0, 2);
        words.swap(1, 3);
        assert_eq!(History::decode(&words).days().iter().map(|day| day.day).collect::<Vec<_>>(), [6]);
        assert_eq!(History::decode(&words[..1]).days(), []);
    }
}
