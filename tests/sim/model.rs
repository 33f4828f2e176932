//! What the guest may see: for each sector, the values that are admissible now and after a crash.
//!
//! A write that was answered OK replaces what ended before it began. One that failed, was withdrawn or
//! was under way at a crash may or may not have happened (W7), as may a discard. A read fixes such a
//! sector until the next crash. A flush answered OK fixes what was answered before it was submitted.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};

use smallvec::{SmallVec, smallvec};

use crate::guest::{SECTOR, Value, value_of};

/// The model's clock: it ticks with every call.
pub(crate) type Tick = u32;

/// A value a sector may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Element {
    value: Value,
    start: Tick,
    end: Tick,
    /// Whether the write was answered OK (and so replaced what was before it).
    ok: bool,
}

/// Mostly one, or a few.
type Elements = SmallVec<[Element; 2]>;

#[derive(Clone, Debug)]
struct SectorState {
    /// Admissible for reads now.
    now: Elements,
    /// As `now`, without what reads have shown since the last crash.
    unread: Elements,
    /// Admissible after a power cut.
    durable: Elements,
    /// Writes under way.
    flying: SmallVec<[Element; 1]>,
    /// What left `now`, and when, for reads that were under way.
    replaced: SmallVec<[(Value, Tick); 2]>,
    /// When a write last began or ended.
    changed: Tick,
    /// The last power cut, if no write has ended since.
    settling: bool,
    /// Writes that began before cannot be made durable by a flush: a flush has failed since.
    distrusted_until: Tick,
}

impl SectorState {
    fn new(initial: Value, distrusted_until: Tick) -> SectorState {
        let first = Element { value: initial, start: 0, end: 0, ok: true };
        SectorState {
            now: smallvec![first],
            unread: smallvec![first],
            durable: smallvec![first],
            flying: SmallVec::new(),
            replaced: SmallVec::new(),
            changed: 0,
            settling: false,
            distrusted_until,
        }
    }

    /// Whether it has one value, for good.
    fn is_at_rest(&self) -> bool {
        self.flying.is_empty() && self.now.len() == 1 && self.unread.len() == 1 && self.durable.len() == 1
    }
}

/// The whole volume.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    tick: Tick,
    initial: Value,
    /// From that sector on there were zeros at first.
    zeros_from: u64,
    /// By sector: its place in the list plus one, or 0 where nothing has happened.
    places: Vec<u32>,
    states: Vec<SectorState>,
    /// Places of the sectors that a power cut may leave at more than one value; others too, and some twice.
    unflushed: Vec<usize>,
    distrusted_until: Tick,
}

/// Whether a crash takes what no flush has covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The process ends; the devices go on.
    Kill,
    /// Volatile caches are lost.
    PowerCut,
}

impl Model {
    pub(crate) fn new(initial: Value) -> Model {
        Model {
            tick: 0,
            initial,
            zeros_from: u64::MAX,
            places: Vec::new(),
            states: Vec::new(),
            unflushed: Vec::new(),
            distrusted_until: 0,
        }
    }

    /// The volume has no more sectors than that yet.
    pub(crate) fn ends_at(&mut self, capacity: u64) {
        self.zeros_from = capacity;
    }

    fn initial(&self, sector: u64) -> Value {
        if sector < self.zeros_from { self.initial } else { 0 }
    }

    /// The place of a sector's state, if anything has happened to it.
    fn place(&self, sector: u64) -> Option<usize> {
        let place = self.places.get(usize::try_from(sector).expect("small volumes"))?;
        (*place as usize).checked_sub(1)
    }

    fn place_or_new(&mut self, sector: u64) -> usize {
        self.place(sector).unwrap_or_else(|| {
            let at = usize::try_from(sector).expect("small volumes");
            if at >= self.places.len() {
                self.places.resize(at + 1, 0);
            }
            self.states.push(SectorState::new(self.initial(sector), self.distrusted_until));
            self.places[at] = u32::try_from(self.states.len()).expect("small volumes");
            self.states.len() - 1
        })
    }

    fn state(&mut self, sector: u64) -> &mut SectorState {
        let place = self.place_or_new(sector);
        &mut self.states[place]
    }

    /// Equal for models that admit the same values of every sector and were told alike of failed flushes.
    pub(crate) fn fingerprint(&self, hasher: &mut impl Hasher) {
        for sector in 0..self.places.len() {
            let Some(place) = self.place(sector as u64) else { continue };
            let state = &self.states[place];
            for admissible in [&state.now, &state.durable] {
                let values: BTreeSet<Value> = admissible.iter().map(|element| element.value).collect();
                (sector, values).hash(hasher);
            }
        }
    }

    /// A moment that nothing else shares.
    pub(crate) fn tick(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }

    /// A write (zeroing, discard) of `value` is submitted.
    pub(crate) fn begin(&mut self, sectors: impl Iterator<Item = u64>, value: Value) -> Tick {
        let start = self.tick();
        sectors.for_each(|sector| {
            let state = self.state(sector);
            state.flying.push(Element { value, start, end: Tick::MAX, ok: false });
            state.changed = start;
        });
        start
    }

    /// It has ended: for good with `ok`; otherwise each sector is old or new.
    pub(crate) fn end(&mut self, sectors: impl Iterator<Item = u64>, start: Tick, ok: bool) {
        let end = self.tick();
        sectors.for_each(|sector| {
            let place = self.place_or_new(sector);
            let state = &mut self.states[place];
            let Some(at) = state.flying.iter().position(|element| element.start == start) else { return };
            let element = Element { end, ok, ..state.flying.swap_remove(at) };
            state.changed = end;
            state.settling = false;
            if ok {
                for old in state.now.iter().filter(|old| old.end < start) {
                    state.replaced.push((old.value, end));
                }
                supersede(&mut state.now, element);
                supersede(&mut state.unread, element);
            } else {
                state.now.push(element);
                state.unread.push(element);
            }
            state.durable.push(element);
            if state.durable.len() == 2 {
                self.unflushed.push(place);
            }
        });
    }

    /// A read submitted at `start` brought `bytes` of a sector.
    pub(crate) fn read(&mut self, sector: u64, start: Tick, bytes: &[u8]) -> Result<(), String> {
        debug_assert_eq!(bytes.len(), SECTOR);
        let value = value_of(sector, bytes).map_err(|what| format!("sector {sector} reads as {what}"))?;
        if value == self.initial(sector) && self.place(sector).is_none() {
            return Ok(());
        }
        let state = self.state(sector);
        let matches = |element: &&Element| element.value == value;
        if let Some(element) = state.now.iter().find(matches).copied() {
            if state.flying.is_empty() && state.changed < start && state.now.len() > 1 {
                // A read that began earlier may have been served before the last write ended.
                let others = state.now.iter().filter(|other| **other != element);
                state.replaced.extend(others.map(|other| (other.value, start)));
                state.now = smallvec![element];
                if state.settling {
                    state.unread = smallvec![element];
                    state.durable = smallvec![element];
                }
            }
            return Ok(());
        }
        let under_way = state.flying.iter().any(|element| element.value == value);
        let was = state.replaced.iter().any(|(old, when)| *old == value && *when > start);
        if under_way || was {
            return Ok(());
        }
        let admissible: Vec<Value> = state.now.iter().chain(&state.flying).map(|element| element.value).collect();
        Err(format!("sector {sector} reads as write {value}; admissible: {admissible:?} ({state:?})"))
    }

    /// A flush submitted at `submitted` succeeded.
    pub(crate) fn flushed(&mut self, submitted: Tick) {
        let states = &mut self.states;
        self.unflushed.retain(|place| {
            let state = &mut states[*place];
            pin(state, submitted);
            state.durable.len() > 1
        });
    }

    /// The write-through write that was submitted at `start` succeeded.
    pub(crate) fn pinned(&mut self, sectors: impl Iterator<Item = u64>, start: Tick) {
        for sector in sectors {
            let state = self.state(sector);
            if start >= state.distrusted_until {
                state.durable.retain(|old| old.end >= start);
            }
        }
    }

    /// No read is under way: what was replaced does not matter any more.
    pub(crate) fn quiet(&mut self, sectors: impl Iterator<Item = u64>) {
        sectors.for_each(|sector| {
            if let Some(place) = self.place(sector) {
                self.states[place].replaced.clear();
            }
        });
    }

    /// A failed flush was cleared; it concerned these sectors, or all.
    pub(crate) fn distrust(&mut self, ranges: Option<&[(u64, u64)]>) {
        let now = self.tick();
        let Some(ranges) = ranges else {
            self.distrusted_until = now;
            return self.states.iter_mut().for_each(|state| state.distrusted_until = now);
        };
        for (start, count) in ranges {
            for sector in *start..(start + count).min(self.places.len() as u64) {
                if let Some(place) = self.place(sector) {
                    self.states[place].distrusted_until = now;
                }
            }
        }
    }

    /// The process or the power is gone, with everything that was under way.
    pub(crate) fn crash(&mut self, crash: Crash) {
        let now = self.tick();
        for (place, state) in self.states.iter_mut().enumerate() {
            state.replaced.clear();
            if state.is_at_rest() {
                continue;
            }
            let mut flying = std::mem::take(&mut state.flying);
            flying.iter_mut().for_each(|element| element.end = now);
            state.settling &= flying.is_empty();
            state.unread.extend_from_slice(&flying);
            state.durable.extend_from_slice(&flying);
            state.changed = now;
            if crash == Crash::PowerCut {
                let all = state.durable.iter().chain(&state.unread).map(|element| element.value);
                let mut values: SmallVec<[Value; 8]> = all.collect();
                values.sort_unstable();
                values.dedup();
                let left = values.into_iter().map(|value| Element { value, start: now, end: now, ok: false });
                state.durable = left.collect();
                state.unread = Elements::from_slice(&state.durable);
                state.settling = true;
            }
            state.now = Elements::from_slice(&state.unread);
            if state.durable.len() > 1 {
                self.unflushed.push(place);
            }
        }
    }
}

/// `element` takes the place of what ended before it began.
fn supersede(elements: &mut Elements, element: Element) {
    match &mut elements[..] {
        [only] if only.end < element.start => *only = element,
        _ => {
            elements.retain(|old| old.end > element.start);
            elements.push(element);
        }
    }
}

fn pin(state: &mut SectorState, submitted: Tick) {
    if state.durable.len() == 1 {
        return;
    }
    let newest = state
        .durable
        .iter()
        .filter(|element| element.ok && element.end <= submitted && element.start >= state.distrusted_until)
        .map(|element| element.start)
        .max();
    if let Some(start) = newest {
        state.durable.retain(|old| old.end >= start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{fill_with, word};

    fn content(value: Value) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        fill_with(&mut bytes, word(0, value));
        bytes
    }

    fn write(model: &mut Model, value: Value, ok: bool) {
        let start = model.begin(0..1, value);
        model.end(0..1, start, ok);
    }

    fn may_read(model: &Model, value: Value) -> bool {
        let mut copy = model.clone();
        let start = copy.tick();
        copy.read(0, start, &content(value)).is_ok()
    }

    #[test]
    fn a_failed_write_is_old_or_new_until_it_is_read() {
        let mut model = Model::new(0);
        write(&mut model, 1, true);
        write(&mut model, 2, false);
        assert!(!may_read(&model, 0) && may_read(&model, 1) && may_read(&model, 2));
        let start = model.tick();
        model.read(0, start, &content(1)).unwrap();
        assert!(may_read(&model, 1) && !may_read(&model, 2));
        model.crash(Crash::Kill);
        assert!(may_read(&model, 1) && may_read(&model, 2) && !may_read(&model, 0));
    }

    #[test]
    fn a_power_cut_takes_what_no_flush_has_covered() {
        let mut model = Model::new(0);
        write(&mut model, 1, true);
        let submitted = model.tick();
        write(&mut model, 2, true);
        model.flushed(submitted);
        model.crash(Crash::PowerCut);
        assert!(!may_read(&model, 0) && may_read(&model, 1) && may_read(&model, 2));
    }

    #[test]
    fn after_a_failed_flush_an_old_write_is_never_certain() {
        let mut model = Model::new(0);
        write(&mut model, 1, true);
        model.distrust(None);
        let submitted = model.tick();
        model.flushed(submitted);
        model.crash(Crash::PowerCut);
        assert!(may_read(&model, 0) && may_read(&model, 1));
    }
}
