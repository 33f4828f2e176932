//! What becomes of a block in trouble that a pass came upon: fenced, read like a guest's request, and moved while it
//! can still be read.

use std::rc::Rc;
use std::sync::Arc;

use super::{REMEMBERED_MAX, Step, Stopped, Turn};
use crate::device::{DeviceIndex, Errno};
use crate::engine::healer::failure::{Failure, FailureClass};
use crate::engine::healer::read::{Budget, ReadRun, Tried, Unread, sectors_of_mask};
use crate::engine::healer::write::Reason;
use crate::engine::healer::{Core, Severity};
use crate::engine::message::Refusal;
use crate::engine::scan::Found;
use crate::engine::view::runs;
use crate::units::{Block, BlockRange, SectorRange, Slot};

/// Weak blocks moved on one day, and blocks moved out of failing slots in one pass, at most.
const WEAK_A_DAY: u32 = 64;
/// The most of all slots that weak blocks may take, and the fewest that must be free where slots fail: one in so many.
const WEAK_SHARE: u64 = 4;
const SECONDS_A_DAY: u64 = 86_400;

/// Why a block is examined.
#[derive(Clone, Copy)]
pub(super) enum Trouble<'a> {
    /// It is pending, was rewritten, or has lost sectors.
    Known,
    /// It did not read on that device just now.
    Failed(DeviceIndex, Errno),
    /// It is slow on that device, for the reason given.
    Slow(DeviceIndex, &'a str),
}

impl<'a> Trouble<'a> {
    /// What is to be read of a block in that trouble: all of it.
    fn unread(self, range: SectorRange) -> Unread {
        let tried = match self {
            Trouble::Failed(device, errno) => Some(Tried { device, errno, times: 1 }),
            _ => None,
        };
        Unread { range, tried }
    }

    /// Why it is slow, unless it has moved since.
    fn slow_on(self, device: DeviceIndex) -> Option<&'a str> {
        match self {
            Trouble::Slow(slow, why) if slow == device => Some(why),
            _ => None,
        }
    }
}

/// Why an examination ended early.
enum Cut {
    Stopped,
    Failed(Failure),
}

impl From<Stopped> for Cut {
    fn from(_: Stopped) -> Cut {
        Cut::Stopped
    }
}

impl From<Failure> for Cut {
    fn from(failure: Failure) -> Cut {
        Cut::Failed(failure)
    }
}

/// What reading a block to the end came to.
struct Seen {
    /// Where it lived.
    device: DeviceIndex,
    slot: Option<Slot>,
    /// Some of it does not read.
    bad: bool,
    /// Some of it was read only after retries.
    recovered: bool,
    /// It was rewritten before, and reads.
    healed: bool,
}

/// A block that reads, but not as it should.
struct Weak {
    block: Block,
    slot: Option<Slot>,
    why: String,
    /// It leaves a slot that fails now and then, and that is retired.
    failing_slot: bool,
}

impl Core {
    /// See to a block in trouble where it lives.
    pub(super) async fn examine(
        self: &Rc<Self>,
        turn: Turn,
        block: Block,
        trouble: Trouble<'_>,
    ) -> Result<Step, Stopped> {
        let failure = match self.look_into(turn, block, trouble).await {
            Ok(()) => return Ok(Step::Done),
            Err(Cut::Stopped) => return Err(Stopped),
            Err(Cut::Failed(failure)) => failure,
        };
        let map = self.map.borrow().clone();
        let geometry = self.geometry();
        let mut step = Step::Done;
        for run in runs(&map, &geometry, geometry.sectors_of(block)) {
            step = self.skip(turn, run.device, run.offset, run.range.bytes(), failure.cause.clone())?;
        }
        Ok(step)
    }

    async fn look_into(self: &Rc<Self>, turn: Turn, block: Block, trouble: Trouble<'_>) -> Result<(), Cut> {
        let seen = self.read_to_the_end(turn, block, trouble).await?;
        let first = self.of_pass(turn, |pass| pass.meets(block))?;
        if seen.bad {
            self.count(turn, first, |found| found.bad += 1);
            self.hit(turn, block);
        }
        let (healed, lost) = self.look_for_lost(turn, block).await?;
        let healed = healed + u64::from(seen.healed);
        self.count(turn, first, |found| (found.healed, found.lost) = (found.healed + healed, found.lost + lost));
        if seen.recovered {
            self.count(turn, first, |found| found.recovered += 1);
        }
        let slow = trouble.slow_on(seen.device);
        if slow.is_some() {
            self.count(turn, first, |found| found.slow += 1);
            let mut slow = self.scan.slow.borrow_mut();
            if slow.len() < REMEMBERED_MAX {
                Arc::make_mut(&mut slow).insert(block);
            }
        }
        if seen.bad || !(seen.recovered || slow.is_some()) {
            return Ok(());
        }
        self.hit(turn, block);
        let why = slow.map_or_else(|| "it was read only after retries".to_owned(), |slow| format!("slow: {slow}"));
        let failing_slot = seen.device == DeviceIndex::SPARE && seen.recovered;
        let may_move = if failing_slot { self.may_leave_slot(turn) } else { self.may_move_weak() };
        if first && may_move && self.acts(turn) {
            return self.move_weak(turn, Weak { block, slot: seen.slot, why, failing_slot }).await;
        }
        if slow.is_some() {
            let range = self.geometry().sectors_of(block);
            self.event(Severity::Warn, "slow-block", Some(seen.device), range, why, "weak; it stays where it is");
        }
        Ok(())
    }

    /// Do something with a fenced block when it is this pass's turn to; the disk then rests as long as it took.
    async fn fenced<T>(
        self: &Rc<Self>,
        turn: Turn,
        block: Block,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Cut> {
        self.await_pace(turn, self.geometry().sectors_of(block).bytes()).await?;
        let fence = self.fence(BlockRange::one(block)).await?;
        let began = self.io.now();
        let in_doubt = self.map.borrow().get(block).in_doubt;
        let done = if in_doubt { Err(Failure::refused(Refusal::InDoubt)) } else { work.await };
        self.lift(fence);
        if let Some(pace) = self.scan.pace.borrow_mut().as_mut() {
            let now = self.io.now();
            pace.pause(now, now.since_ns(began));
        }
        Ok(done?)
    }

    /// Read a block until each of its sectors was read or tried to the last. What a request of the guest would have no
    /// time for is tried in the next round, and the guest may use the block between them.
    async fn read_to_the_end(self: &Rc<Self>, turn: Turn, block: Block, trouble: Trouble<'_>) -> Result<Seen, Cut> {
        let whole = self.geometry().sectors_of(block);
        let first = self.read_part(block, trouble.unread(whole));
        let (device, slot, read, healed) = self.fenced(turn, block, first).await?;
        let is_bad = |read: &ReadRun| read.bad.len() > read.unread.len();
        let mut seen = Seen { device, slot, bad: is_bad(&read), recovered: read.recovered, healed };
        let mut left = read.unread;
        // What has to wait for another round has failed.
        let has_failed = !left.is_empty();
        while let Some(part) = left.pop() {
            let (_, _, read, _) = self.fenced(turn, block, self.read_part(block, part)).await?;
            seen.bad |= is_bad(&read);
            seen.recovered |= read.recovered;
            left.extend(read.unread);
        }
        seen.recovered |= has_failed && !seen.bad;
        Ok(seen)
    }

    /// Read some of a block, wherever it lives now: where that was, and whether it is healed thereby.
    async fn read_part(
        self: &Rc<Self>,
        block: Block,
        part: Unread,
    ) -> Result<(DeviceIndex, Option<Slot>, ReadRun, bool), Failure> {
        let map = self.map.borrow().clone();
        let run = *runs(&map, &self.geometry(), part.range).first().expect("some of a block");
        self.refuse_gone(run.device)?;
        // It may have moved since.
        let tried = part.tried.filter(|tried| tried.device == run.device);
        let read = self.read_run(run, tried, &Budget::of_read()).await?;
        let whole = self.geometry().sectors_of(block);
        let is_well = part.range == whole && read.bad.is_empty();
        let healed = is_well && self.scan.unproven.borrow_mut().remove(&block);
        if healed {
            self.tally.borrow_mut().healed += 1;
            let cause = "a rewritten block was read by a pass";
            self.event(Severity::Info, "healed", Some(run.device), whole, cause, "it counts as healed");
        }
        Ok((run.device, map.get(block).slot, read, healed))
    }

    /// Count what was seen of a block once, however often the pass comes by.
    fn count(&self, turn: Turn, first: bool, add: impl FnOnce(&mut Found)) {
        if first {
            _ = self.of_pass(turn, |pass| add(&mut pass.found));
        }
    }

    /// Whether a pass may change anything now.
    pub(super) fn acts(&self, turn: Turn) -> bool {
        self.of_pass(turn, |pass| !pass.scope.check_only).unwrap_or(false) && self.may_write().is_ok()
    }

    fn hit(&self, turn: Turn, block: Block) {
        if self.map.borrow().get(block).slot.is_some() {
            return;
        }
        _ = self.scan_order_of(turn).and_then(|order| {
            let unit = order.unit_of(block.start());
            self.of_pass(turn, |pass| pass.hit(&order, unit))
        });
    }

    /// Try the lost sectors of a block again where the primary still has their last content: how many were healed,
    /// and how many stay lost.
    async fn look_for_lost(self: &Rc<Self>, turn: Turn, block: Block) -> Result<(u64, u64), Cut> {
        let lost = || self.map.borrow().get(block).lost;
        let mut healed = 0;
        for sector in sectors_of_mask(block, lost()) {
            if lost() >> sector.within_block() & 1 == 0 || !self.acts(turn) {
                continue;
            }
            let look = async {
                let before = lost().count_ones();
                // A success is put into the slot and counted there.
                self.read_lost(block, sector, &Budget::of_read()).await?;
                Ok(before - lost().count_ones())
            };
            healed += u64::from(self.fenced(turn, block, look).await?);
        }
        Ok((healed, u64::from(lost().count_ones())))
    }

    fn weak_day(&self) -> u32 {
        u32::try_from(self.wall_seconds() / SECONDS_A_DAY).unwrap_or(u32::MAX)
    }

    /// Whether a weak block may take a slot now.
    fn may_move_weak(&self) -> bool {
        let record = self.scan.record.borrow();
        let of_day = if record.weak_day == self.weak_day() { record.weak_of_day } else { 0 };
        self.scan.params.move_weak
            && of_day < WEAK_A_DAY
            && record.weak_slots < u64::from(self.geometry().slots) / WEAK_SHARE
            && self.table.borrow().available() > 0
    }

    /// Whether a block may leave a slot that fails now and then, and that is retired with it.
    fn may_leave_slot(&self, turn: Turn) -> bool {
        let moved = self.of_pass(turn, |pass| pass.left_slots).unwrap_or(u64::MAX);
        let (free, slots) = (self.table.borrow().available() as u64, u64::from(self.geometry().slots));
        moved < u64::from(WEAK_A_DAY) && free > slots / WEAK_SHARE
    }

    /// Move a block that was read to a slot, or to another one.
    async fn move_weak(self: &Rc<Self>, turn: Turn, weak: Weak) -> Result<(), Cut> {
        let block = weak.block;
        if self.fenced(turn, block, self.move_fenced(turn, weak)).await? {
            return Ok(());
        }
        // It reads no more: by itself a read error loses nothing (R4), and is known from now on.
        if self.read_to_the_end(turn, block, Trouble::Known).await?.bad {
            self.count(turn, true, |found| found.bad += 1);
        }
        Ok(())
    }

    /// Do it; whether the block could still be read.
    async fn move_fenced(self: &Rc<Self>, turn: Turn, weak: Weak) -> Result<bool, Failure> {
        let Weak { block, slot, why, failing_slot } = weak;
        let before = self.map.borrow().get(block);
        if before.slot != slot {
            // It has moved since.
            return Ok(true);
        }
        let mut placement = match self.rescue(block, 0).await {
            Ok(placement) if placement.lost == before.lost => placement,
            Err(failure) if failure.class != FailureClass::Medium => return Err(failure),
            _ => return Ok(false),
        };
        if failing_slot {
            // What looks like a bad slot may be the spare's going.
            self.confirm(DeviceIndex::SPARE).await?;
        }
        if !self.acts(turn) {
            return Ok(true);
        }
        placement.reason = Reason::Weak(why);
        if let Err(failure) = self.place(vec![placement]).await {
            let range = self.geometry().sectors_of(block);
            let action = "weak, and could not be moved";
            self.event(Severity::Warn, "slow-block", failure.device, range, failure.cause, action);
            return Ok(true);
        }
        _ = self.of_pass(turn, |pass| {
            pass.found.moved += 1;
            pass.left_slots += u64::from(failing_slot);
        });
        if !failing_slot {
            let today = self.weak_day();
            let mut record = self.scan.record.borrow_mut();
            let of_day = if record.weak_day == today { record.weak_of_day } else { 0 };
            (record.weak_day, record.weak_of_day) = (today, of_day + 1);
            record.weak_slots += 1;
        }
        Ok(true)
    }
}
