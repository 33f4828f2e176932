//! What each sector may hold.

use std::ops::Range;

use crate::sector::{Run, SECTOR, Stamp};

/// One sector.
#[derive(Clone)]
struct State {
    /// The last write that was answered, and all that were not, or failed, since.
    possible: Vec<Stamp>,
    /// Of these, what no read since the server started has excluded.
    now: Vec<Stamp>,
    /// Reads may fail: it was on a medium that did not read, and may have been lost with that.
    may_fail: bool,
}

/// The part of the disk that is written.
pub(crate) struct Expected {
    pub(crate) run: Run,
    pub(crate) area: Range<u64>,
    states: Vec<State>,
    /// What does not read now, on the primary.
    unreadable: Vec<Range<u64>>,
    /// Sectors that were found to be what they should.
    pub(crate) verified: u64,
}

fn add(stamps: &mut Vec<Stamp>, stamp: Stamp) {
    if !stamps.contains(&stamp) {
        stamps.push(stamp);
    }
}

impl Expected {
    /// Zeros, as on a new volume.
    pub(crate) fn zeros(run: Run, area: Range<u64>) -> Expected {
        let zeros = vec![Stamp::ZEROS];
        let state = State { possible: zeros.clone(), now: zeros, may_fail: false };
        let states = vec![state; usize::try_from(area.end - area.start).expect("small")];
        Expected { run, area, states, unreadable: Vec::new(), verified: 0 }
    }

    fn states(&mut self, sectors: &Range<u64>) -> &mut [State] {
        let at = |sector: u64| usize::try_from(sector - self.area.start).expect("small");
        let range = at(sectors.start)..at(sectors.end);
        &mut self.states[range]
    }

    /// A write is sent, or a discard, which may leave zeros.
    pub(crate) fn sent(&mut self, sectors: &Range<u64>, stamp: Stamp) {
        for state in self.states(sectors) {
            add(&mut state.possible, stamp);
            add(&mut state.now, stamp);
        }
    }

    /// A write was answered with success.
    pub(crate) fn written(&mut self, sectors: &Range<u64>, stamp: Stamp) {
        let unreadable = self.unreadable.clone();
        for (sector, state) in sectors.clone().zip(self.states(sectors)) {
            let may_fail = unreadable.iter().any(|range| range.contains(&sector));
            *state = State { possible: vec![stamp], now: vec![stamp], may_fail };
        }
    }

    /// The server was killed: what a read has excluded is open again (a write that was not answered may have
    /// reached the medium that is read from now on).
    pub(crate) fn crashed(&mut self) {
        self.unreadable.clear();
        for state in &mut self.states {
            if state.now != state.possible {
                state.now.clone_from(&state.possible);
            }
        }
    }

    /// From now on, and until the server is killed, these do not read where they lie on the primary.
    pub(crate) fn break_reads(&mut self, sectors: Range<u64>) {
        self.states(&sectors).iter_mut().for_each(|state| state.may_fail = true);
        self.unreadable.push(sectors);
    }

    /// Whether a read of all of these may fail.
    pub(crate) fn may_fail(&mut self, sectors: &Range<u64>) -> bool {
        self.states(sectors).iter().any(|state| state.may_fail)
    }

    /// Compare what was read.
    pub(crate) fn check(&mut self, sectors: &Range<u64>, data: &[u8]) {
        let run = self.run;
        for ((sector, state), bytes) in sectors.clone().zip(self.states(sectors)).zip(data.chunks(SECTOR)) {
            let (place, stamp) = run.identify(bytes).unwrap_or_else(|what| panic!("sector {sector} {what}"));
            assert!(
                place.is_none_or(|place| place == sector),
                "sector {sector} has what belongs to sector {}: {stamp}",
                place.expect("checked")
            );
            if !state.now.contains(&stamp) {
                let texts = |stamps: &[Stamp]| stamps.iter().map(Stamp::to_string).collect::<Vec<_>>().join(", ");
                panic!(
                    "sector {sector} has {stamp}; it may have {} (before it was read: {})",
                    texts(&state.now),
                    texts(&state.possible)
                );
            }
            state.now = vec![stamp];
        }
        self.verified += sectors.end - sectors.start;
    }
}
