//! Commits: the only writer of table pages.
//!
//! A commit writes each changed page to the home that is not its anchor, in every live place, flushes the
//! spare, and moves the anchor. Bringing the other home to the same sequence happens afterwards, off the
//! path; the next commit of that page waits for it. Everything that waits while a commit runs goes into
//! the next one together.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::failure::Failure;
use super::{Core, EventKind, Severity};
use crate::device::{DeviceIndex, Errno};
use crate::engine::message::Refusal;
use crate::engine::task::{Promise, join_all, promise};
use crate::units::{Block, SectorRange, Slot};
use crate::volume::layout::{Home, Place};
use crate::volume::table::{Change, Page, PageSeat, PageState, page_of};

/// A change of the table that is to become durable as one.
pub(super) struct Commit {
    pub(super) changes: Vec<Change>,
    /// Blocks concerned, with the sectors the guest's write covers.
    pub(super) blocks: Vec<(Block, u8)>,
}

struct Queued {
    commit: Commit,
    /// A page to be written although nothing of it changes, and its home that is damaged.
    rewrite: Option<(u32, Home)>,
    promise: Promise<Result<(), Failure>>,
}

/// The committer's state.
#[derive(Default)]
pub(super) struct Commits {
    queue: RefCell<Vec<Queued>>,
    running: Cell<bool>,
    /// Pages whose second home is being brought up, and who waits for that.
    second_homes: RefCell<BTreeMap<u32, Vec<Promise<()>>>>,
    /// Tasks that free or retire slots and have not ended.
    freeing: Cell<usize>,
    /// Slots whose freeing (or, `true`, retiring) commit failed: tried again when the spare is back.
    orphans: RefCell<Vec<(Vec<Slot>, bool)>>,
    /// Commits in doubt: their slots are kept from use until a higher sequence is durable.
    in_doubt: RefCell<Vec<Commit>>,
}

impl Core {
    /// Make the changes durable. On success the table has them; the map is the caller's to change.
    /// On failure the commit is in doubt unless nothing was written.
    pub(super) async fn commit(self: &Rc<Self>, commit: Commit) -> Result<(), Failure> {
        self.enqueue(commit, None).await
    }

    /// Write a page of the table to both homes in all places as it is, the damaged one first, and wait until it is
    /// there.
    pub(super) async fn rewrite_page(self: &Rc<Self>, number: u32, damaged: Home) -> Result<(), Failure> {
        self.enqueue(Commit { changes: Vec::new(), blocks: Vec::new() }, Some((number, damaged))).await?;
        self.second_home_is_up(number).await;
        Ok(())
    }

    async fn enqueue(self: &Rc<Self>, commit: Commit, rewrite: Option<(u32, Home)>) -> Result<(), Failure> {
        let (promise, awaited) = promise();
        self.commits.queue.borrow_mut().push(Queued { commit, rewrite, promise });
        if !self.commits.running.replace(true) {
            let core = self.clone();
            self.spawn(async move {
                loop {
                    let batch = std::mem::take(&mut *core.commits.queue.borrow_mut());
                    if batch.is_empty() {
                        core.commits.running.set(false);
                        return;
                    }
                    core.commit_batch(batch).await;
                }
            });
        }
        awaited.await
    }

    async fn commit_batch(self: &Rc<Self>, batch: Vec<Queued>) {
        let changes: Vec<Change> = batch.iter().flat_map(|queued| queued.commit.changes.iter().copied()).collect();
        let changed = changes.iter().map(|change| page_of(change.slot));
        let damaged: BTreeMap<u32, Home> = batch.iter().filter_map(|queued| queued.rewrite).collect();
        let pages: BTreeSet<u32> = changed.chain(damaged.keys().copied()).collect();
        if pages.is_empty() {
            return batch.into_iter().for_each(|queued| queued.promise.keep(Ok(())));
        }
        for page in &pages {
            self.second_home_is_up(*page).await;
        }
        let mode = self.mode.get();
        if mode.poisoned {
            return self.refuse_batch(batch, &Failure::refused(Refusal::Poisoned));
        }
        if !mode.spare_up {
            return self.refuse_batch(batch, &Failure::spare_down());
        }
        // A damaged anchor is nothing to fall back on: the other home, which has the same, is, once it is durable.
        if damaged.iter().any(|(number, home)| self.table.borrow().page(*number).anchor == *home)
            && let Err(failure) = self.flush(DeviceIndex::SPARE).await
        {
            return self.refuse_batch(batch, &failure);
        }
        let written: Vec<(u32, Page, Home)> = pages
            .iter()
            .map(|number| {
                let state = self.table.borrow().page(*number);
                let page = self.table.borrow().page_with(*number, state.sequence + 1, &changes);
                (*number, page, damaged.get(number).copied().unwrap_or(state.anchor.other()))
            })
            .collect();
        let result = async {
            self.write_pages(&written).await?;
            self.flush(DeviceIndex::SPARE).await
        }
        .await;
        // In doubt or not, the next commit of the page must be numbered higher than this one.
        for (number, page, home) in &written {
            let anchor = if result.is_ok() { *home } else { home.other() };
            self.table.borrow_mut().set_page(*number, PageState { sequence: page.sequence, anchor });
        }
        match &result {
            Ok(()) => {
                self.tally.borrow_mut().commits += 1;
                let mut table = self.table.borrow_mut();
                changes.iter().for_each(|change| table.set(*change));
                drop(table);
                for queued in &batch {
                    self.unreserve_all(&queued.commit);
                }
                self.bring_up_second_homes(written);
            }
            Err(failure) => {
                self.doubt(&batch);
                // Doubts are resolved by comparing everything, as when a spare comes back.
                self.spare_down(&format!("a commit of the map failed: {}", failure.cause));
            }
        }
        for queued in batch {
            queued.promise.keep(result.clone());
        }
    }

    /// Nothing was written.
    fn refuse_batch(&self, batch: Vec<Queued>, failure: &Failure) {
        for queued in batch {
            self.unreserve_all(&queued.commit);
            queued.promise.keep(Err(failure.clone()));
        }
    }

    /// Whether pages are being written, or about to be.
    pub(super) fn commits_under_way(&self) -> bool {
        self.commits.running.get() || !self.commits.second_homes.borrow().is_empty()
    }

    /// Write pages to one home in every live place. A place that does not take one is retired; this fails
    /// only when no place is left.
    async fn write_pages(self: &Rc<Self>, pages: &[(u32, Page, Home)]) -> Result<(), Failure> {
        let mut writes = Vec::new();
        for place in self.live_places() {
            for (number, page, home) in pages {
                writes.push(self.write_page(place, *home, *number, page));
            }
        }
        for (place, result) in join_all(writes).await {
            if let Err(errno) = result {
                self.retire_place(place, errno).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn write_page(
        &self,
        place: Place,
        home: Home,
        number: u32,
        page: &Page,
    ) -> (Place, Result<(), Errno>) {
        let bytes = page.encode(self.set, number, PageSeat::Spare(place, home));
        (place, self.io.write(DeviceIndex::SPARE, self.layout.table(place, home, number), &bytes).await)
    }

    /// Bring the homes that were anchors until now to the same sequence, off the path.
    fn bring_up_second_homes(self: &Rc<Self>, pages: Vec<(u32, Page, Home)>) {
        let mut second_homes = self.commits.second_homes.borrow_mut();
        for (number, _, _) in &pages {
            second_homes.insert(*number, Vec::new());
        }
        drop(second_homes);
        let core = self.clone();
        self.spawn(async move {
            let pages: Vec<_> = pages.into_iter().map(|(number, page, home)| (number, page, home.other())).collect();
            // A failure has retired the place or brought the spare down, which is all there is to do.
            let _ = core.write_pages(&pages).await;
            for (number, _, _) in pages {
                let waiters = core.commits.second_homes.borrow_mut().remove(&number);
                waiters.into_iter().flatten().for_each(|waiter| waiter.keep(()));
            }
        });
    }

    async fn second_home_is_up(&self, number: u32) {
        let awaited = {
            let mut second_homes = self.commits.second_homes.borrow_mut();
            let Some(waiters) = second_homes.get_mut(&number) else { return };
            let (promise, awaited) = promise();
            waiters.push(promise);
            awaited
        };
        awaited.await;
    }

    fn unreserve_all(&self, commit: &Commit) {
        let mut table = self.table.borrow_mut();
        for change in &commit.changes {
            table.unreserve(change.slot);
        }
    }

    fn doubt(&self, batch: &[Queued]) {
        for queued in batch {
            let Commit { changes, blocks } = &queued.commit;
            for (block, mask) in blocks {
                self.update_map(*block, |state| {
                    state.in_doubt = true;
                    state.doubt |= mask;
                });
                let range = self.geometry().sectors_of(*block);
                let cause = "a write or flush of the commit failed";
                self.event(
                    Severity::Error,
                    EventKind::InDoubt,
                    Some(DeviceIndex::SPARE),
                    range,
                    cause,
                    "writes to it fail for now",
                );
            }
            let commit = Commit { changes: changes.clone(), blocks: blocks.clone() };
            self.commits.in_doubt.borrow_mut().push(commit);
        }
    }

    /// Pages that a commit in doubt may have changed.
    pub(super) fn pages_in_doubt(&self) -> BTreeSet<u32> {
        let in_doubt = self.commits.in_doubt.borrow();
        in_doubt.iter().flat_map(|commit| &commit.changes).map(|change| page_of(change.slot)).collect()
    }

    /// A higher sequence of every page in doubt is durable in every live place: the table in memory, from
    /// before those commits, is the truth.
    pub(super) fn resolve_doubts(&self) {
        for commit in std::mem::take(&mut *self.commits.in_doubt.borrow_mut()) {
            self.unreserve_all(&commit);
            for (block, _) in commit.blocks {
                self.update_map(block, |state| {
                    state.in_doubt = false;
                    state.doubt = 0;
                });
            }
        }
    }

    /// Free slots (or retire them, after a failure) in a commit of their own, once nothing uses them: a
    /// move is durable before its old slot is let go.
    async fn free_slots(self: &Rc<Self>, slots: Vec<Slot>, retire: bool) {
        use crate::volume::table::Entry;
        let entry = if retire { Entry::RETIRED } else { Entry::FREE };
        let changes = slots.iter().map(|slot| Change { slot: *slot, entry }).collect();
        self.table.borrow_mut().hold_all(&slots);
        match self.commit(Commit { changes, blocks: Vec::new() }).await {
            Ok(()) if !retire => self.resume_held(super::failure::Hold::SpareFull),
            Ok(()) => {}
            Err(_) => self.commits.orphans.borrow_mut().push((slots, retire)),
        }
    }

    /// Wait until slots that blocks have left are durably retired. An entry that outlived its block's later
    /// one would count again.
    pub(super) async fn moves_are_over(self: &Rc<Self>) -> Result<(), Failure> {
        // What frees slots commits in turn: an empty commit after it waits for it.
        while self.commits.freeing.get() > 0 {
            self.commit(Commit { changes: Vec::new(), blocks: Vec::new() }).await?;
        }
        if self.commits.orphans.borrow().is_empty() {
            return Ok(());
        }
        Err(Failure::new(Some(DeviceIndex::SPARE), "slots that failed are not recorded yet; try again"))
    }

    /// Free again what could not be freed when the spare went down.
    pub(super) fn retry_orphans(self: &Rc<Self>) {
        for (slots, retire) in std::mem::take(&mut *self.commits.orphans.borrow_mut()) {
            self.free_later(slots, retire);
        }
    }

    /// Free or retire slots off the path.
    pub(super) fn free_later(self: &Rc<Self>, slots: Vec<Slot>, retire: bool) {
        // Counted before the task runs, so that nobody takes the move for over in between.
        self.commits.freeing.set(self.commits.freeing.get() + 1);
        let core = self.clone();
        self.spawn(async move {
            core.free_slots(slots, retire).await;
            core.commits.freeing.set(core.commits.freeing.get() - 1);
        });
    }

    /// Refuse what a commit in doubt touches.
    pub(super) fn refuse_doubted(&self, range: SectorRange, write: bool) -> Result<(), Failure> {
        let map = self.map.borrow();
        for block in range.blocks().iter() {
            let state = map.get(block);
            if state.in_doubt && (write || state.doubt & range.mask_in(block) != 0) {
                return Err(Failure::refused(Refusal::InDoubt).at(range.within(block)));
            }
        }
        Ok(())
    }
}
