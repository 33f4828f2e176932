//! What becomes of a block in trouble that a pass came upon: fenced, read like a guest's request, and moved while it
//! can still be read.

use std::rc::Rc;
use std::sync::Arc;

use super::{REMEMBERED_MAX, Step, Stopped, Turn};
use crate::device::{DeviceIndex, Errno};
use crate::engine::healer::failure::Failure;
use crate::engine::healer::read::{Budget, sectors_of_mask};
use crate::engine::healer::write::Reason;
use crate::engine::healer::{Core, Severity};
use crate::engine::message::Refusal;
use crate::engine::scan::Found;
use crate::engine::view::{Run, runs};
use crate::units::{Block, BlockRange};

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

impl Core {
    /// See to a block in trouble where it lives.
    pub(super) async fn examine(
        self: &Rc<Self>,
        turn: Turn,
        block: Block,
        trouble: Trouble<'_>,
    ) -> Result<Step, Stopped> {
        self.of_pass(turn, |_| ())?;
        let done = match self.fence(BlockRange::one(block)).await {
            Ok(fence) => {
                let done = self.examine_fenced(turn, block, trouble).await;
                self.lift(fence);
                done
            }
            Err(failure) => Err(failure),
        };
        let Err(failure) = done else { return Ok(Step::Done) };
        let map = self.map.borrow().clone();
        let geometry = self.geometry();
        let mut step = Step::Done;
        for run in runs(&map, &geometry, geometry.sectors_of(block)) {
            step = self.skip(turn, run.device, run.offset, run.range.bytes(), failure.cause.clone())?;
        }
        Ok(step)
    }

    async fn examine_fenced(self: &Rc<Self>, turn: Turn, block: Block, trouble: Trouble<'_>) -> Result<(), Failure> {
        let before = self.map.borrow().get(block);
        if before.in_doubt {
            return Err(Failure::refused(Refusal::InDoubt));
        }
        let range = self.geometry().sectors_of(block);
        let map = self.map.borrow().clone();
        let Some(run) = runs(&map, &self.geometry(), range).first().copied() else { return Ok(()) };
        self.refuse_gone(run.device)?;
        // It may have moved since.
        let (failed, slow) = match trouble {
            Trouble::Failed(device, errno) if device == run.device => (Some(errno), None),
            Trouble::Slow(device, why) if device == run.device => (None, Some(why)),
            _ => (None, None),
        };
        let budget = Budget::of_read();
        let read = self.read_run(run, failed, &budget).await?;
        let first = self.of_pass(turn, |pass| pass.meets(block)).unwrap_or(false);
        let is_bad = !read.bad.is_empty();
        if is_bad {
            self.count(turn, first, |found| found.bad += 1);
            self.hit(turn, block);
        } else if self.scan.unproven.borrow_mut().remove(&block) {
            self.tally.borrow_mut().healed += 1;
            self.count(turn, first, |found| found.healed += 1);
            let cause = "a rewritten block was read by a pass";
            self.event(Severity::Info, "healed", Some(run.device), range, cause, "it counts as healed");
        }
        if read.unread {
            return Err(Failure::new(Some(run.device), "reading it takes too long"));
        }
        if before.lost != 0 {
            let (healed, lost) = self.look_for_lost(turn, block, &budget).await?;
            self.count(turn, first, |found| (found.healed, found.lost) = (found.healed + healed, found.lost + lost));
        }
        if read.recovered {
            self.count(turn, first, |found| found.recovered += 1);
        }
        if slow.is_some() {
            self.count(turn, first, |found| found.slow += 1);
            let mut slow = self.scan.slow.borrow_mut();
            if slow.len() < REMEMBERED_MAX {
                Arc::make_mut(&mut slow).insert(block);
            }
        }
        if is_bad || !(read.recovered || slow.is_some()) {
            return Ok(());
        }
        self.hit(turn, block);
        self.see_to_weak(turn, run, first, read.recovered, slow).await
    }

    /// Count what was seen of a block once, however often the pass comes by.
    fn count(&self, turn: Turn, first: bool, add: impl FnOnce(&mut Found)) {
        if first {
            _ = self.of_pass(turn, |pass| add(&mut pass.found));
        }
    }

    /// Move a block that was read, but not as it should, if that is to be done; or say so.
    async fn see_to_weak(
        self: &Rc<Self>,
        turn: Turn,
        run: Run,
        first: bool,
        recovered: bool,
        slow: Option<&str>,
    ) -> Result<(), Failure> {
        let why = slow.map_or_else(|| "it was read only after retries".to_owned(), |slow| format!("slow: {slow}"));
        let failing_slot = run.device == DeviceIndex::SPARE && recovered;
        let may_move = if failing_slot { self.may_leave_slot(turn) } else { self.may_move_weak() };
        if first && may_move && self.acts(turn) {
            return self.move_weak(turn, run, why, failing_slot).await;
        }
        if slow.is_some() {
            let action = "weak; it stays where it is";
            self.event(Severity::Warn, "slow-block", Some(run.device), run.range, why, action);
        }
        Ok(())
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
    async fn look_for_lost(self: &Rc<Self>, turn: Turn, block: Block, budget: &Budget) -> Result<(u64, u64), Failure> {
        let before = self.map.borrow().get(block).lost;
        let lost_now = || self.map.borrow().get(block).lost;
        if self.acts(turn) {
            for sector in sectors_of_mask(block, before) {
                let bit = 1 << sector.within_block();
                if lost_now() & bit != 0 {
                    // A success is put into the slot and counted there.
                    self.read_lost(block, sector, budget).await?;
                }
            }
        }
        let lost = lost_now().count_ones();
        Ok((u64::from(before.count_ones() - lost), u64::from(lost)))
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
            && record.weak_total < u64::from(self.geometry().slots) / WEAK_SHARE
            && self.table.borrow().available() > 0
    }

    /// Whether a block may leave a slot that fails now and then, and that is retired with it.
    fn may_leave_slot(&self, turn: Turn) -> bool {
        let moved = self.of_pass(turn, |pass| pass.left_slots).unwrap_or(u64::MAX);
        let (free, slots) = (self.table.borrow().available() as u64, u64::from(self.geometry().slots));
        moved < u64::from(WEAK_A_DAY) && free > slots / WEAK_SHARE
    }

    /// Move a block that was read to a slot, or to another one.
    async fn move_weak(self: &Rc<Self>, turn: Turn, run: Run, why: String, failing_slot: bool) -> Result<(), Failure> {
        let block = run.range.blocks().start;
        let before = self.map.borrow().get(block);
        let mut placement = self.rescue(block, 0).await?;
        if placement.lost != before.lost {
            // It reads no more: by itself a read error loses nothing (R4), and is known from now on.
            if !self.read_run(run, None, &Budget::of_read()).await?.bad.is_empty() {
                self.count(turn, true, |found| found.bad += 1);
            }
            return Ok(());
        }
        if failing_slot {
            // What looks like a bad slot may be the spare's going.
            self.confirm(DeviceIndex::SPARE).await?;
        }
        if !self.acts(turn) {
            return Ok(());
        }
        placement.reason = Reason::Weak(why);
        if let Err(failure) = self.place(vec![placement]).await {
            let range = self.geometry().sectors_of(block);
            let action = "weak, and could not be moved";
            self.event(Severity::Warn, "slow-block", failure.device, range, failure.cause, action);
            return Ok(());
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
            record.weak_total += 1;
        }
        Ok(())
    }
}
