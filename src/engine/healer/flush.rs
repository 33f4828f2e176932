//! The flush coordinator, and what a failed flush means.
//!
//! One flush is in flight for each device; who comes while it runs shares the next one; a failure fails
//! everybody who waited for it. A failed flush is never tried again until it succeeds: it poisons the
//! volume, durably, until the operator has looked (F2). The one exception is a spare that holds nothing
//! unflushed: then the spare is down and the primary goes on (F3).
//!
//! *Every* flush takes the device's turn, those of metadata too: a flush that succeeds beside one that
//! fails would vouch for what the other has dropped.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::failure::{Failure, FailureClass};
use super::{Core, EventKind, Handed, OnLoss, Severity};
use crate::device::{DeviceIndex, Errno};
use crate::engine::message::{Outcome, Refusal};
use crate::engine::task::{Permits, Promise, join_all, promise};
use crate::engine::view::{PrimaryState, Regions, Written};
use crate::units::SectorRange;
use crate::volume::layout::{LabelLayout, PAGE, Place};
use crate::volume::sidecar::Poison;
use crate::volume::superblock::Seat;

/// Callers that share flushes of one kind.
#[derive(Default)]
struct Round {
    running: Cell<bool>,
    next: RefCell<Vec<Promise<Result<(), Failure>>>>,
}

/// The coordinator's state.
pub(super) struct Flushes {
    devices: [Round; 2],
    /// Held from before a flush is submitted until what its failure means has been decided.
    turns: [Permits; 2],
    volume: Round,
    /// [`crate::engine::view::Progress::slot_writes`] as of the start of the spare's last good flush.
    flushed_slot_writes: Cell<u64>,
    /// Where shards note what they wrote; while a volume grows, some may still do that in an earlier one.
    written: RefCell<Vec<Arc<Written>>>,
    /// Regions taken by a volume flush under way.
    taken: RefCell<Option<Regions>>,
    poison: RefCell<Poison>,
    /// Held while the note of a poison, or of its end, is written: one after the other.
    pub(super) note: Permits,
    /// Whether the poison is on at least one device.
    persistent: Cell<bool>,
}

/// What `status` and `clear` say of a failed flush.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoisonReport {
    /// The device whose flush failed.
    pub device: DeviceIndex,
    /// Its error.
    pub errno: Errno,
    /// Seconds since the epoch.
    pub time: u64,
    /// Whether a restart will remember.
    pub persistent: bool,
    /// What was written since the last good flush: (first sector, sectors).
    pub ranges: Vec<(u64, u64)>,
}

impl Flushes {
    pub(super) fn new(poison: Poison, capacity: u64) -> Flushes {
        Flushes {
            devices: Default::default(),
            turns: [Permits::new(1), Permits::new(1)],
            volume: Round::default(),
            flushed_slot_writes: Cell::new(0),
            written: RefCell::new(vec![Arc::new(Written::new(capacity))]),
            taken: RefCell::default(),
            poison: RefCell::new(poison),
            note: Permits::new(1),
            persistent: Cell::new(true),
        }
    }

    /// Where to note what was written.
    pub(super) fn written(&self) -> Arc<Written> {
        self.written.borrow().last().expect("there is always one").clone()
    }

    /// The volume has grown to `capacity` sectors, which the shards hear of with the next publication.
    pub(super) fn grow(&self, capacity: u64) {
        self.written.borrow_mut().push(Arc::new(Written::new(capacity)));
    }

    /// Every shard has heard of it.
    pub(super) fn grown(&self) {
        self.gather();
        let mut written = self.written.borrow_mut();
        let earlier = written.len() - 1;
        written.drain(..earlier);
    }

    fn gather(&self) {
        let written = self.written();
        let earlier = |other: &&Arc<Written>| !Arc::ptr_eq(other, &written);
        self.written.borrow().iter().filter(earlier).for_each(|other| written.restore(&other.take()));
    }

    /// Take the regions written since the last good flush, leaving none.
    fn take_written(&self) -> Regions {
        self.gather();
        self.written().take()
    }
}

impl Core {
    /// See to a guest's FLUSH, or to the durability of a write-through write.
    pub(super) async fn make_durable(self: &Rc<Self>, handed: Handed) {
        let mode = self.mode.get();
        if mode.read_only {
            return self.hand_back(handed, Outcome::Durable);
        }
        if mode.poisoned {
            return self.fail(handed, &Failure::refused(Refusal::Poisoned));
        }
        if mode.primary == PrimaryState::Gone {
            return self.fail_or_hold(handed, Failure::refused(Refusal::PrimaryGone));
        }
        match self.flush_volume().await {
            Ok(()) => self.hand_back(handed, Outcome::Durable),
            Err(failure) => self.fail(handed, &failure),
        }
    }

    /// Make every completed write durable, on the primary and, where it is dirty, on the spare.
    pub(super) async fn flush_volume(self: &Rc<Self>) -> Result<(), Failure> {
        let (promise, awaited) = promise();
        self.flushes.volume.next.borrow_mut().push(promise);
        if !self.flushes.volume.running.replace(true) {
            let core = self.clone();
            self.spawn(async move {
                loop {
                    let waiters = std::mem::take(&mut *core.flushes.volume.next.borrow_mut());
                    if waiters.is_empty() {
                        core.flushes.volume.running.set(false);
                        return;
                    }
                    let result = core.flush_both().await;
                    waiters.into_iter().for_each(|waiter| waiter.keep(result.clone()));
                }
            });
        }
        awaited.await
    }

    async fn flush_both(self: &Rc<Self>) -> Result<(), Failure> {
        *self.flushes.taken.borrow_mut() = Some(self.flushes.take_written());
        let mut devices = vec![DeviceIndex::PRIMARY];
        if self.spare_is_dirty() {
            devices.push(DeviceIndex::SPARE);
        }
        let results = join_all(devices.into_iter().map(|device| self.flush(device))).await;
        let result: Result<(), Failure> = results.into_iter().collect();
        // On failure `poison` has already taken the bits; what is left belongs to a failure without poison.
        if let (Some(bits), Err(_)) = (self.flushes.taken.borrow_mut().take(), &result) {
            self.flushes.written().restore(&bits);
        }
        result
    }

    fn spare_is_dirty(&self) -> bool {
        self.progress.slot_writes.load(Ordering::SeqCst) > self.flushes.flushed_slot_writes.get()
    }

    /// To be compared before and after: slot writes in between may have been lost with a flush that failed.
    pub(super) fn spare_flush_failures(&self) -> u64 {
        self.progress.spare_flush_failures.load(Ordering::SeqCst)
    }

    /// Flush the spare after slot writes that began when [`Core::spare_flush_failures`] was `before`.
    pub(super) async fn flush_slots(self: &Rc<Self>, before: u64) -> Result<(), Failure> {
        self.flush(DeviceIndex::SPARE).await?;
        if self.spare_flush_failures() == before {
            return Ok(());
        }
        Err(Failure::new(Some(DeviceIndex::SPARE), "a flush of the spare failed meanwhile").of(FailureClass::Flush))
    }

    /// Flush one device, together with everybody else who wants that now.
    pub(super) async fn flush(self: &Rc<Self>, device: DeviceIndex) -> Result<(), Failure> {
        let round = &self.flushes.devices[usize::from(device.0)];
        let (promise, awaited) = promise();
        round.next.borrow_mut().push(promise);
        if !round.running.replace(true) {
            let core = self.clone();
            self.spawn(async move { core.flush_rounds(device).await });
        }
        awaited.await
    }

    async fn flush_rounds(self: &Rc<Self>, device: DeviceIndex) {
        let round = &self.flushes.devices[usize::from(device.0)];
        loop {
            let waiters = std::mem::take(&mut *round.next.borrow_mut());
            if waiters.is_empty() {
                round.running.set(false);
                return;
            }
            let result = self.flush_once(device).await;
            waiters.into_iter().for_each(|waiter| waiter.keep(result.clone()));
        }
    }

    async fn flush_once(self: &Rc<Self>, device: DeviceIndex) -> Result<(), Failure> {
        let turn = &self.flushes.turns[usize::from(device.0)];
        turn.acquire().await;
        if self.mode.get().poisoned {
            turn.release();
            return Err(Failure::refused(Refusal::Poisoned));
        }
        let spare = device == DeviceIndex::SPARE;
        let slot_writes = self.progress.slot_writes.load(Ordering::Acquire);
        let result =
            if spare && !self.mode.get().spare_up { Err(Errno(libc::ENODEV)) } else { self.io.flush(device).await };
        let Err(errno) = result else {
            if spare {
                self.flushes.flushed_slot_writes.set(slot_writes);
            }
            turn.release();
            return Ok(());
        };
        // Rare and large: a flush that succeeds does not carry it around.
        Err(Box::pin(self.flush_failed(device, errno)).await)
    }

    /// Write to the spare that comes back, and flush it, for the sake of its metadata: it is not in use yet, and what
    /// it holds of the guest's is judged as ever. Writing is part of the turn, as another flush that failed meanwhile
    /// would drop what was written.
    pub(super) async fn flush_returning_spare<T>(
        self: &Rc<Self>,
        writing: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let device = DeviceIndex::SPARE;
        let turn = &self.flushes.turns[usize::from(device.0)];
        turn.acquire().await;
        let written = writing.await.inspect_err(|_| turn.release())?;
        let slot_writes = self.progress.slot_writes.load(Ordering::Acquire);
        match self.io.flush(device).await {
            Ok(()) => {
                if !self.mode.get().poisoned {
                    self.flushes.flushed_slot_writes.set(slot_writes);
                }
                turn.release();
                Ok(written)
            }
            Err(errno) => Err(self.flush_failed(device, errno).await),
        }
    }

    /// Decide what a failed flush means before the device's turn passes on, and answer for it.
    async fn flush_failed(self: &Rc<Self>, device: DeviceIndex, errno: Errno) -> Failure {
        let failure = Failure::new(Some(device), format!("flush failed: {errno}")).of(FailureClass::Flush);
        self.health.met_error(device, self.io.now());
        self.event(
            Severity::Error,
            EventKind::FlushFailed,
            Some(device),
            SectorRange::default(),
            errno.to_string(),
            "not tried again",
        );
        if device == DeviceIndex::SPARE {
            self.progress.spare_flush_failures.fetch_add(1, Ordering::SeqCst);
        }
        let poisons = device != DeviceIndex::SPARE || self.spare_is_dirty();
        let first = poisons && !self.mode.get().poisoned;
        if first {
            self.set_mode(|mode| mode.poisoned = true);
        } else if !poisons {
            self.spare_down(&failure.cause);
        }
        self.flushes.turns[usize::from(device.0)].release();
        if first {
            self.poison(device, errno).await;
        } else if poisons {
            // Nobody is told before the note is written.
            self.flushes.note.acquire().await;
            self.flushes.note.release();
        }
        failure
    }

    /// Nothing written since the last good flush can be trusted to be durable, and no more writes are
    /// taken: write that down everywhere before anybody is told.
    async fn poison(self: &Rc<Self>, device: DeviceIndex, errno: Errno) {
        self.flushes.note.acquire().await;
        self.tell_everywhere().await;
        if let Some(taken) = self.flushes.taken.borrow_mut().take() {
            self.flushes.written().restore(&taken);
        }
        let Regions { shift, words } = self.flushes.take_written();
        let page = Poison {
            sequence: self.flushes.poison.borrow().sequence + 1,
            poisoned: true,
            device: device.0,
            errno: errno.0,
            time: self.wall_seconds(),
            shift,
            regions: words,
        };
        let kept = self.write_poison(&page).await;
        *self.flushes.poison.borrow_mut() = page;
        self.flushes.persistent.set(kept > 0);
        self.flushes.note.release();
        let action = match kept {
            0 => "writes and flushes fail until `clear`; not persistent: no device took the note".to_owned(),
            n => format!("writes and flushes fail until `clear`; noted in {n} places"),
        };
        self.event(
            Severity::Error,
            EventKind::Poisoned,
            Some(device),
            SectorRange::default(),
            errno.to_string(),
            action,
        );
    }

    /// Write the page to every place and label, flush, and count those that took it.
    async fn write_poison(self: &Rc<Self>, page: &Poison) -> usize {
        let pages = Place::ALL.map(|place| (self.layout.poison(place), page.encode(self.set, Seat::Spare(place))));
        let mut kept = self.flush_note(DeviceIndex::SPARE, &pages).await.unwrap_or(0);
        let labels = [self.label.get(), self.places.next_label.get()].into_iter().flatten();
        let pages: Vec<_> = labels.map(|label| (label.poison(), page.encode(self.set, Seat::Label))).collect();
        if !pages.is_empty() {
            kept += self.flush_note(DeviceIndex::PRIMARY, &pages).await.unwrap_or(0);
        }
        kept
    }

    /// Write to a label that may become the volume's what is noted; from then on it gets every note.
    pub(super) async fn copy_note(&self, label: LabelLayout) -> Result<(), Errno> {
        self.flushes.note.acquire().await;
        let page = self.flushes.poison.borrow().encode(self.set, Seat::Label);
        let copied = self.io.write(DeviceIndex::PRIMARY, label.poison(), &page).await;
        self.places.next_label.set(copied.is_ok().then_some(label));
        self.flushes.note.release();
        copied
    }

    /// Write pages of a note, flush, and count those that were taken. The volume is poisoned: the flush vouches for
    /// nothing else. Writing is part of the turn, as another flush that failed meanwhile would drop the pages.
    async fn flush_note(&self, device: DeviceIndex, pages: &[(u64, [u8; PAGE])]) -> Result<usize, Errno> {
        let turn = &self.flushes.turns[usize::from(device.0)];
        turn.acquire().await;
        let mut written = 0;
        for (offset, page) in pages {
            written += usize::from(self.io.write(device, *offset, page).await.is_ok());
        }
        let result = self.io.flush(device).await;
        turn.release();
        result.map(|()| written)
    }

    /// What a failed flush left behind, if one failed.
    pub(super) fn poison_report(&self) -> Option<PoisonReport> {
        let poison = self.flushes.poison.borrow();
        poison.poisoned.then(|| PoisonReport {
            device: DeviceIndex(poison.device),
            errno: Errno(poison.errno),
            time: poison.time,
            persistent: self.flushes.persistent.get(),
            ranges: poison
                .ranges()
                .into_iter()
                .map(|(start, count)| (start, count.min(self.geometry().capacity.saturating_sub(start))))
                .collect(),
        })
    }

    /// The number of the note that stands.
    pub(super) fn poison_sequence(&self) -> u64 {
        self.flushes.poison.borrow().sequence
    }

    /// The operator has looked at the note of that number: both devices must take a flush and the next note, then
    /// writes are taken again.
    pub(super) async fn clear_poison(self: &Rc<Self>, seen: u64) -> Result<(), String> {
        self.flushes.note.acquire().await;
        let cleared = match self.poison_sequence() == seen {
            true => self.clear_in_turn().await,
            false => Err("what is to be cleared has changed meanwhile: see `status` and `clear` again".to_owned()),
        };
        self.flushes.note.release();
        cleared
    }

    async fn clear_in_turn(self: &Rc<Self>) -> Result<(), String> {
        for device in [DeviceIndex::PRIMARY, DeviceIndex::SPARE] {
            self.flush_note(device, &[]).await.map_err(|errno| {
                format!("the {device} still fails to flush: {errno}; replace it or its cable first")
            })?;
        }
        let page = Poison { sequence: self.flushes.poison.borrow().sequence + 1, ..Poison::default() };
        if self.write_poison(&page).await == 0 {
            // It may have landed all the same: a restart must not believe it.
            let again = Poison { sequence: page.sequence + 1, ..self.flushes.poison.borrow().clone() };
            self.write_poison(&again).await;
            *self.flushes.poison.borrow_mut() = again;
            return Err("no device took the note that the volume is cleared; it stays as it was".to_owned());
        }
        *self.flushes.poison.borrow_mut() = page;
        self.flushes.flushed_slot_writes.set(self.progress.slot_writes.load(Ordering::Acquire));
        self.change_mode(|mode| mode.poisoned = false);
        self.retry_orphans();
        // Nothing was written to it while no flush was possible.
        let core = self.clone();
        self.spawn(async move { core.stamp_label().await });
        self.event(
            Severity::Warn,
            EventKind::Cleared,
            None,
            SectorRange::default(),
            "the operator's order",
            "writes and flushes are taken again",
        );
        Ok(())
    }

    /// Whether requests that meet a gone primary wait for it.
    pub(super) fn holds_for_primary(&self) -> bool {
        self.policy.primary_gone != OnLoss::Fail
    }
}
