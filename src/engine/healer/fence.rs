//! Fences: before the healer touches a block, every shard has stopped touching it.
//!
//! A job fences its whole range once and never grows it; overlapping jobs queue in the order they came;
//! lifting a fence and publishing the new map are one message. Work handed to the healer does not count
//! as under way in its shard, so a job never waits for itself.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use super::failure::Failure;
use super::{Core, EventKind, FenceId, Mode, Severity, ToShard, View};
use crate::device::DeviceIndex;
use crate::engine::task::{Promise, first_of, promise};
use crate::units::{Block, BlockRange, SectorRange};
use crate::volume::map::BlockState;

/// After so long without an answer a fence is given up and the device asked whether it is there.
const FENCE_SECONDS: u64 = 5;
/// Times a fence is raised before its job fails: well below the 30 s after which guests lose patience.
const FENCE_TRIES: usize = 4;

struct Waiting {
    id: FenceId,
    range: BlockRange,
    start: Promise<()>,
}

struct Standing {
    id: FenceId,
    range: BlockRange,
    /// Shards that have not answered.
    unanswered: usize,
    all_clear: Option<Promise<()>>,
}

/// All fences, standing and waiting to stand.
#[derive(Default)]
pub(super) struct Fences {
    next: Cell<u64>,
    standing: RefCell<Vec<Standing>>,
    waiting: RefCell<Vec<Waiting>>,
}

impl Fences {
    /// A shard has answered.
    pub(super) fn clear(&self, id: FenceId) {
        let promise = {
            let mut standing = self.standing.borrow_mut();
            // A fence that was given up is no longer here.
            let Some(fence) = standing.iter_mut().find(|fence| fence.id == id) else { return };
            fence.unanswered -= 1;
            if fence.unanswered > 0 {
                return;
            }
            fence.all_clear.take()
        };
        if let Some(promise) = promise {
            promise.keep(());
        }
    }

    /// Fences that stand.
    pub(super) fn standing(&self) -> usize {
        self.standing.borrow().len()
    }
}

/// Views that shards have been asked to confirm.
#[derive(Default)]
pub(super) struct Adoptions {
    next: Cell<u64>,
    waiting: RefCell<BTreeMap<u64, (usize, Promise<()>)>>,
}

impl Adoptions {
    /// A shard works with the view of that number.
    pub(super) fn adopted(&self, ack: u64) {
        let mut waiting = self.waiting.borrow_mut();
        let Some((missing, _)) = waiting.get_mut(&ack) else { return };
        *missing -= 1;
        if *missing == 0 {
            let (_, promise) = waiting.remove(&ack).expect("just found");
            drop(waiting);
            promise.keep(());
        }
    }
}

impl Core {
    /// Fence `range`: when this returns, no shard works on it, until [`Core::lift`].
    ///
    /// A fence that a hung operation leaves unanswered is lifted after a while, so that what is parked at
    /// it moves on, and raised again a few times before the job gives up.
    pub(super) async fn fence(self: &Rc<Self>, range: BlockRange) -> Result<FenceId, Failure> {
        let start = range.start.start();
        let sectors = SectorRange { start, count: range.end.start().0 - start.0 };
        let cause = format!("a device operation has not returned for {FENCE_SECONDS} s");
        for _ in 0..FENCE_TRIES {
            if let Some(id) = self.try_fence(range).await {
                return Ok(id);
            }
            let core = self.clone();
            self.spawn(async move { core.suspect(DeviceIndex::PRIMARY).await });
            self.event(
                Severity::Warn,
                EventKind::FenceGivenUp,
                None,
                sectors,
                &*cause,
                "repair put off; asking the primary",
            );
            self.refuse_gone(DeviceIndex::PRIMARY)?;
        }
        Err(Failure::new(None, cause).at(sectors))
    }

    async fn try_fence(self: &Rc<Self>, range: BlockRange) -> Option<FenceId> {
        let id = FenceId(self.fences.next.get());
        self.fences.next.set(id.0 + 1);
        let in_the_way = {
            let standing = self.fences.standing.borrow();
            let waiting = self.fences.waiting.borrow();
            standing.iter().map(|f| f.range).chain(waiting.iter().map(|f| f.range)).any(|r| r.overlaps(range))
        };
        if in_the_way {
            let (start, awaited) = promise();
            self.fences.waiting.borrow_mut().push(Waiting { id, range, start });
            awaited.await;
        } else {
            self.raise(id, range);
        }
        let (all_clear, awaited) = promise();
        {
            let mut standing = self.fences.standing.borrow_mut();
            let fence = standing.iter_mut().find(|fence| fence.id == id).expect("raised above or by `lift`");
            if fence.unanswered == 0 {
                return Some(id);
            }
            fence.all_clear = Some(all_clear);
        }
        let deadline = self.io.now().plus_secs(FENCE_SECONDS);
        if first_of(awaited, self.io.sleep_until(deadline)).await.is_ok() {
            return Some(id);
        }
        self.lift(id);
        None
    }

    fn raise(&self, id: FenceId, range: BlockRange) {
        let standing = Standing { id, range, unanswered: self.shards, all_clear: None };
        self.fences.standing.borrow_mut().push(standing);
        for shard in 0..self.shards {
            self.send(shard, ToShard::Fence { fence: id, range });
        }
    }

    /// Publish the map as it is now and lift the fence, in one message; then raise what waited for it.
    pub(super) fn lift(&self, id: FenceId) {
        self.fences.standing.borrow_mut().retain(|fence| fence.id != id);
        self.publish_lifting(vec![id], None);
        let ready: Vec<Waiting> = {
            let mut waiting = self.fences.waiting.borrow_mut();
            let standing = self.fences.standing.borrow();
            let mut earlier: Vec<BlockRange> = standing.iter().map(|fence| fence.range).collect();
            let (ready, kept) = std::mem::take(&mut *waiting).into_iter().partition(|fence: &Waiting| {
                let free = !earlier.iter().any(|range| range.overlaps(fence.range));
                earlier.push(fence.range);
                free
            });
            *waiting = kept;
            ready
        };
        for fence in ready {
            self.raise(fence.id, fence.range);
            fence.start.keep(());
        }
    }

    /// Change what is known of a block; shards see it with the next publication.
    pub(super) fn update_map(&self, block: Block, change: impl FnOnce(&mut BlockState)) {
        let mut map = self.map.borrow_mut();
        let mut state = map.get(block);
        let lost = state.lost.count_ones();
        change(&mut state);
        self.health.lost_changed(lost, state.lost.count_ones());
        map.set(block, state);
        self.view_stale.set(true);
    }

    /// Change what is allowed and tell the shards.
    pub(super) fn change_mode(&self, change: impl FnOnce(&mut Mode)) {
        self.set_mode(change);
        self.publish_lifting(Vec::new(), None);
    }

    /// Change what is allowed; the shards hear of it with the next publication.
    pub(super) fn set_mode(&self, change: impl FnOnce(&mut Mode)) {
        let mut mode = self.mode.get();
        change(&mut mode);
        self.mode.set(mode);
        self.view_stale.set(true);
    }

    /// Wait until every shard works with the view as it is now, or for as long as a fence may take; whether they do.
    pub(super) async fn tell_everywhere(&self) -> bool {
        let ack = self.adoptions.next.get();
        self.adoptions.next.set(ack + 1);
        if self.shards == 0 {
            return true;
        }
        let (all, awaited) = promise();
        self.adoptions.waiting.borrow_mut().insert(ack, (self.shards, all));
        self.publish_lifting(Vec::new(), Some(ack));
        let deadline = self.io.now().plus_secs(FENCE_SECONDS);
        first_of(awaited, self.io.sleep_until(deadline)).await.is_ok()
    }

    fn publish_lifting(&self, lift: Vec<FenceId>, ack: Option<u64>) {
        if self.view_stale.replace(false) {
            let dense = self.pending.borrow().dense();
            let (geometry, map, mode) = (self.geometry(), self.map.borrow().clone(), self.mode.get());
            let view = View { geometry, map, mode, dense, written: self.flushes.written() };
            *self.view.borrow_mut() = Arc::new(view);
        }
        for shard in 0..self.shards {
            let view = self.view.borrow().clone();
            self.send(shard, ToShard::Publish { view, lift: lift.clone(), ack });
        }
    }
}
