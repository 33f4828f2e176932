//! The metadata beside the table: superblocks, retired places, the spare's going and coming, and saved counters.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::failure::{Failure, Hold};
use super::scan::SAVED_AT;
use super::{Core, EventKind, Severity, Tally};
use crate::device::{DeviceIndex, Errno};
use crate::engine::message::Refusal;
use crate::engine::open;
use crate::engine::task::Permits;
use crate::units::SectorRange;
use crate::volume::layout::{Home, LabelLayout, PAGE, Place};
use crate::volume::sidecar::SavedCounters;
use crate::volume::superblock::{CloseStamp, Seat, Superblock};
use crate::volume::table::{Page, PageSeat, PageState};

/// A spare that is down is asked again after so many seconds.
const RETRY_SECONDS: u64 = 1;
/// Counters and the label are brought up to date this often, in seconds, where something changed.
const SAVE_SECONDS: u64 = 60;

/// State of everything here.
pub(super) struct Places {
    /// Counters of earlier runs, in the order of [`saved_values`].
    base: Vec<u64>,
    pub(super) saved_sequence: Cell<u64>,
    /// Commits when the label was last stamped.
    pub(super) stamped_commits: Cell<Option<u64>>,
    /// Held while the label is written, or the capacity: one after the other.
    pub(super) label: Permits,
    /// Where the label lies by a superblock that was written and may not be durable: a poison is noted there too.
    pub(super) next_label: Cell<Option<LabelLayout>>,
    /// Held while counters are saved.
    pub(super) saving: Permits,
    /// A resize is under way.
    pub(super) resizing: Cell<bool>,
    /// The last refresh of the label failed; and how many times in a row the primary went during one.
    pub(super) label_fails: Cell<bool>,
    pub(super) label_goes: Cell<u32>,
    returning: Cell<bool>,
    /// Why the spare is down.
    down_cause: RefCell<String>,
    /// Held while the superblock changes: two changes at a time would not know of each other.
    pub(super) turn: Permits,
    /// The highest generation written anywhere, durably or not.
    tried: Cell<u64>,
    /// Samples of the primary that could be read at the last [`Core::sample_primary`].
    sampled: Cell<u16>,
}

impl Places {
    pub(super) fn new(base: Vec<u64>, saved_sequence: u64) -> Places {
        Places {
            base,
            saved_sequence: Cell::new(saved_sequence),
            stamped_commits: Cell::new(None),
            label: Permits::new(1),
            next_label: Cell::new(None),
            saving: Permits::new(1),
            resizing: Cell::new(false),
            label_fails: Cell::new(false),
            label_goes: Cell::new(0),
            returning: Cell::new(false),
            down_cause: RefCell::default(),
            turn: Permits::new(1),
            tried: Cell::new(0),
            sampled: Cell::new(0),
        }
    }
}

/// Counters kept across restarts: requests first, then the tally, then requests to slots. Only ever append.
pub(super) fn saved_values(requests: [u64; 6], tally: &Tally, slot_requests: u64) -> Vec<u64> {
    let t = tally;
    let healed = [t.guest_errors, t.recovered_reads, t.rewritten, t.remaps, t.lost, t.healed];
    [&requests[..], &healed, &[t.health_scans, t.commits, t.metadata_repairs, slot_requests]].concat()
}

impl Core {
    /// The places that are written.
    pub(super) fn live_places(&self) -> Vec<Place> {
        let superblock = self.superblock.borrow();
        Place::ALL.into_iter().filter(|place| !superblock.is_retired(*place)).collect()
    }

    /// Write a superblock to the copy its generation goes to, in the given places.
    async fn write_superblock_pages(&self, superblock: &Superblock, places: &[Place]) -> Result<(), (Place, Errno)> {
        self.places.tried.set(superblock.generation);
        let copy = Superblock::copy_for(superblock.generation);
        for place in places {
            let bytes = superblock.encode(Seat::Spare(*place), copy);
            let written = self.io.write(DeviceIndex::SPARE, self.layout.superblock(*place, copy), &bytes).await;
            written.map_err(|errno| (*place, errno))?;
        }
        Ok(())
    }

    /// The superblock of the next generation, above every one that was ever tried: of two with one number,
    /// nobody could say at open which is true. It goes to the copy that the last good one does not use.
    fn next_superblock(&self) -> Superblock {
        let mut next = self.superblock.borrow().next_generation();
        while next.generation <= self.places.tried.get() {
            next.generation += 2;
        }
        next
    }

    /// A place did not take a write: record on the other that it no longer counts, before anything that
    /// was to be written there is called done. Without another place the spare is down.
    pub(super) async fn retire_place(self: &Rc<Self>, place: Place, errno: Errno) -> Result<(), Failure> {
        self.places.turn.acquire().await;
        let retired = self.retire_in_turn(place, errno).await;
        self.places.turn.release();
        retired
    }

    async fn retire_in_turn(self: &Rc<Self>, place: Place, errno: Errno) -> Result<(), Failure> {
        if !self.mode.get().spare_up {
            return Err(Failure::spare_down());
        }
        if self.superblock.borrow().is_retired(place) {
            return Ok(());
        }
        let others: Vec<Place> = self.live_places().into_iter().filter(|other| *other != place).collect();
        let written = match others.is_empty() {
            true => Err(Failure::errno(DeviceIndex::SPARE, errno)),
            false => self.write_next_superblock(others, |_| {}).await,
        };
        let durable = match written {
            Ok(next) => self.flush(DeviceIndex::SPARE).await.map(|()| next),
            Err(failure) => Err(failure),
        };
        let Ok(next) = durable else {
            self.spare_down(&format!("metadata at the spare's {}: {errno}", place.name()));
            return Err(Failure::spare_down());
        };
        self.use_superblock(next, &errno.to_string());
        Ok(())
    }

    /// The spare cannot be used. The primary goes on without it.
    pub(super) fn spare_down(self: &Rc<Self>, cause: &str) {
        if !self.mode.get().spare_up {
            return;
        }
        self.note_departure(DeviceIndex::SPARE);
        *self.places.down_cause.borrow_mut() = cause.to_owned();
        let none = SectorRange::default();
        let action = format!("remapped blocks fail until it is back; asking every {RETRY_SECONDS} s");
        self.event(Severity::Error, EventKind::SpareDown, Some(DeviceIndex::SPARE), none, cause, action);
        self.change_mode(|mode| mode.spare_up = false);
        if !self.places.returning.replace(true) {
            let core = self.clone();
            self.spawn(async move { core.await_spare().await });
        }
    }

    /// Why the spare is down, if it is.
    pub(super) fn spare_down_cause(&self) -> Option<String> {
        (!self.mode.get().spare_up).then(|| self.places.down_cause.borrow().clone())
    }

    async fn await_spare(self: &Rc<Self>) {
        loop {
            self.io.sleep_until(self.io.now().plus_secs(RETRY_SECONDS)).await;
            if self.commits_under_way() {
                // What they wrote is compared once they have ended, in doubt.
                continue;
            }
            if self.probe(DeviceIndex::SPARE).await.is_err() || self.check_returned().await.is_err() {
                continue;
            }
            if self.mode.get().read_only || self.rewrite_differing().await.is_ok() {
                break;
            }
        }
        self.resolve_doubts();
        self.places.returning.set(false);
        self.change_mode(|mode| mode.spare_up = true);
        let none = SectorRange::default();
        let action = "its metadata was compared and brought up to date";
        self.event(Severity::Info, EventKind::SpareBack, Some(DeviceIndex::SPARE), none, "the probe passed", action);
        self.retry_orphans();
        self.resume_held(Hold::SpareFull);
    }

    /// Whether what came back is the spare that went: a superblock of our set and generation.
    async fn check_returned(&self) -> Result<(), ()> {
        let known = self.superblock.borrow().clone();
        let copy = Superblock::copy_for(known.generation);
        for place in self.live_places() {
            let (page, _) = self.io.read(DeviceIndex::SPARE, self.layout.superblock(place, copy), PAGE).await;
            let Ok(page) = page else { continue };
            if let Ok(found) = Superblock::decode(&page, Seat::Spare(place), copy) {
                let same = found.set == known.set && found.generation == known.generation;
                return if same { Ok(()) } else { Err(()) };
            }
        }
        Err(())
    }

    /// Compare every page on the returned spare with memory, and give those that differ or are in doubt a
    /// higher sequence in both homes of every live place (W8). A place that does not take that is retired
    /// like any other.
    async fn rewrite_differing(self: &Rc<Self>) -> Result<(), Failure> {
        let doubted = self.pages_in_doubt();
        let mut places = self.live_places();
        for number in 0..self.layout.table_pages {
            let state = self.table.borrow().page(number);
            let known = self.table.borrow().page_with(number, state.sequence, &[]);
            let mut differs = doubted.contains(&number);
            for (place, home) in places.iter().flat_map(|place| Home::ALL.map(|home| (*place, home))) {
                let (page, _) = self.io.read(DeviceIndex::SPARE, self.layout.table(place, home, number), PAGE).await;
                let seat = PageSeat::Spare(place, home);
                differs |= !page.is_ok_and(|page| Page::decode(&page, self.set, number, seat).as_ref() == Some(&known));
            }
            if !differs {
                continue;
            }
            let page = Page { sequence: state.sequence + 1, ..known };
            for home in [state.anchor.other(), state.anchor] {
                places = self.flush_returning_spare(self.write_home(places, home, number, &page)).await?;
                // From here on this home is the one to keep: a failure at the other one starts from it.
                let state = PageState { sequence: page.sequence, anchor: home };
                self.table.borrow_mut().set_page(number, state);
            }
        }
        self.places.turn.acquire().await;
        let settled = self.settle_superblock(places).await;
        self.places.turn.release();
        settled
    }

    /// Write a page to that home in `places`; those that take it. This fails only when none does.
    async fn write_home(
        &self,
        places: Vec<Place>,
        home: Home,
        number: u32,
        page: &Page,
    ) -> Result<Vec<Place>, Failure> {
        let mut took = Vec::new();
        let mut failed = None;
        for place in places {
            match self.write_page(place, home, number, page).await {
                (place, Ok(())) => took.push(place),
                (_, Err(errno)) => failed = Some(errno),
            }
        }
        match failed.filter(|_| took.is_empty()) {
            Some(errno) => Err(Failure::errno(DeviceIndex::SPARE, errno)),
            None => Ok(took),
        }
    }

    /// Say on the returned spare which places count, where that is not what its newest superblock may say:
    /// `places` took everything, and an attempt to retire one may have been left half done.
    async fn settle_superblock(self: &Rc<Self>, places: Vec<Place>) -> Result<(), Failure> {
        if places == self.live_places() && self.places.tried.get() <= self.superblock.borrow().generation {
            return Ok(());
        }
        let next = self.flush_returning_spare(self.write_next_superblock(places, |_| {})).await?;
        self.use_superblock(next, "not taken");
        Ok(())
    }

    /// Write a superblock of the next generation to `places`, as `change` makes it. Places that are not among
    /// them, or do not take it, are retired by it; this fails only when none is left.
    async fn write_next_superblock(
        &self,
        mut places: Vec<Place>,
        change: impl Fn(&mut Superblock),
    ) -> Result<Superblock, Failure> {
        loop {
            let mut next = self.next_superblock();
            change(&mut next);
            let lost = self.live_places().into_iter().filter(|place| !places.contains(place));
            lost.for_each(|place| next.retired |= 1 << place.number());
            match self.write_superblock_pages(&next, &places).await {
                Ok(()) => return Ok(next),
                Err((place, errno)) => {
                    places.retain(|other| *other != place);
                    if places.is_empty() {
                        return Err(Failure::errno(DeviceIndex::SPARE, errno));
                    }
                }
            }
        }
    }

    /// A superblock is durable: it is the volume's, and what it retires is retired, for the reason given.
    fn use_superblock(&self, next: Superblock, why: &str) {
        let before = self.live_places();
        *self.superblock.borrow_mut() = next;
        for place in before.into_iter().filter(|place| self.superblock.borrow().is_retired(*place)) {
            let cause = format!("metadata at the spare's {}: {why}", place.name());
            let action = "retired; the other place goes on alone";
            let none = SectorRange::default();
            self.event(Severity::Error, EventKind::PlaceRetired, Some(DeviceIndex::SPARE), none, cause, action);
        }
    }

    /// Keep the saved counters and the label's table current while the volume is open.
    pub(super) async fn keep_sidecars_fresh(self: Rc<Self>) {
        self.stamp_label().await;
        loop {
            self.io.sleep_until(self.io.now().plus_secs(SAVE_SECONDS)).await;
            if self.mode.get().spare_up {
                let _ = self.save_counters().await;
            }
            self.stamp_label().await;
            // A day or a burst may be over.
            self.judge_health();
        }
    }

    /// Requests (reads, writes, flushes, discards, bytes read, bytes written) and tally, of all runs.
    pub(super) fn lifetime_values(&self) -> Vec<u64> {
        use std::sync::atomic::Ordering::Relaxed;
        let p = &self.progress;
        let requests = [&p.reads, &p.writes, &p.flushes, &p.discards, &p.read_bytes, &p.written_bytes];
        let requests = requests.map(|counter| counter.load(Relaxed));
        let now = saved_values(requests, &self.tally.borrow(), p.slot_requests.load(Relaxed));
        let base = self.places.base.iter().copied().chain(std::iter::repeat(0));
        now.into_iter().zip(base).map(|(now, base)| now.saturating_add(base)).collect()
    }

    /// All that is kept beside each other: the counters, what others keep behind them, the days.
    fn values_to_save(&self) -> Vec<u64> {
        let mut values = self.lifetime_values();
        assert!(values.len() <= SAVED_AT, "the scanner's come behind them");
        values.resize(SAVED_AT, 0);
        values.extend(self.scan.values());
        values.append(&mut self.days_to_save());
        values
    }

    /// Save the counters; one after the other, as an older page must not land on a newer one.
    pub(super) async fn save_counters(self: &Rc<Self>) -> Result<(), Failure> {
        self.places.saving.acquire().await;
        let saved = self.save_counters_in_turn().await;
        self.places.saving.release();
        saved
    }

    /// Write the counters to one place after the other: a power cut tears one of them at most. A place that
    /// does not take them does without; this fails only when none takes them.
    async fn save_counters_in_turn(self: &Rc<Self>) -> Result<(), Failure> {
        let sequence = self.places.saved_sequence.get() + 1;
        self.places.saved_sequence.set(sequence);
        let saved = SavedCounters { sequence, values: self.values_to_save() };
        let mut saved_somewhere = Err(Failure::spare_down());
        for place in self.live_places() {
            if saved_somewhere.is_ok() {
                self.flush(DeviceIndex::SPARE).await?;
            }
            let bytes = saved.encode(self.set, Seat::Spare(place));
            match self.io.write(DeviceIndex::SPARE, self.layout.counters(place), &bytes).await {
                Ok(()) => saved_somewhere = Ok(()),
                Err(errno) if saved_somewhere.is_err() => {
                    saved_somewhere = Err(Failure::errno(DeviceIndex::SPARE, errno));
                }
                Err(_) => {}
            }
        }
        saved_somewhere
    }

    /// Close the volume: everything durable, counters and label current. What is left to write is the
    /// stamp of the primary as it is then, by [`Core::seal`].
    pub(super) async fn settle(self: &Rc<Self>) -> Result<u32, Failure> {
        if self.mode.get().read_only {
            return Err(Failure::refused(Refusal::ReadOnly));
        }
        self.closing.set(true);
        let none = SectorRange::default();
        self.flush_volume().await.inspect_err(|failure| {
            self.event(
                Severity::Error,
                EventKind::Close,
                failure.device,
                none,
                &*failure.cause,
                "left as after a crash",
            );
        })?;
        if self.mode.get().spare_up
            && let Err(failure) = self.save_counters().await
        {
            self.event(Severity::Warn, EventKind::Close, failure.device, none, failure.cause, "counters are not saved");
        }
        self.stamp_label_for_close().await;
        if self.label.get().is_some() {
            self.flush_label().await?;
        }
        Ok(self.sample_primary().await)
    }

    /// A checksum over blocks spread over the primary; those that can be read are noted for the seal.
    pub(super) async fn sample_primary(&self) -> u32 {
        // Of the capacity that who opens next goes by: a resize may have ended between the two.
        let capacity = self.superblock.borrow().capacity;
        let logical_block = self.geometry().logical_block;
        let (crc, readable) = open::sample(&self.io, capacity, logical_block, open::ALL_SAMPLES).await;
        self.places.sampled.set(readable);
        crc
    }

    /// Write the superblock that says the volume was closed cleanly, and how the primary looked.
    pub(super) async fn seal(self: &Rc<Self>, stamp: CloseStamp) -> Result<(), Failure> {
        if self.mode.get().read_only {
            return Err(Failure::refused(Refusal::ReadOnly));
        }
        let sampled = self.places.sampled.get();
        self.change_superblock(|last| (last.clean, last.stamp, last.sampled) = (true, Some(stamp), sampled)).await
    }

    /// Make a superblock of the next generation durable, as `change` makes it.
    pub(super) async fn change_superblock(self: &Rc<Self>, change: impl Fn(&mut Superblock)) -> Result<(), Failure> {
        self.places.turn.acquire().await;
        let changed = self.change_superblock_in_turn(change).await;
        self.places.turn.release();
        changed
    }

    async fn change_superblock_in_turn(self: &Rc<Self>, change: impl Fn(&mut Superblock)) -> Result<(), Failure> {
        // Of a spare that is down nobody knows what it holds.
        self.refuse_gone(DeviceIndex::SPARE)?;
        let next = self.write_next_superblock(self.live_places(), change).await?;
        self.flush(DeviceIndex::SPARE).await?;
        self.use_superblock(next, "not taken");
        Ok(())
    }

    /// Whether a superblock was tried that may count at the next open, and is not the volume's.
    pub(super) fn superblock_is_in_doubt(&self) -> bool {
        self.places.tried.get() > self.superblock.borrow().generation
    }
}
