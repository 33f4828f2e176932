//! What becomes of a block in trouble that a pass came upon: fenced, read like a guest's request, and moved while it
//! can still be read.

use std::rc::Rc;
use std::sync::Arc;

use super::pass::{PATIENCE_LOST, TAKES_DEVICE_AWAY};
use super::read::Piece;
use super::{REMEMBERED_MAX, Step, Stopped, Turn};
use crate::device::{DeviceIndex, Errno};
use crate::engine::errors::{Class, class_of};
use crate::engine::healer::failure::{Failure, FailureClass};
use crate::engine::healer::ladder::Budget;
use crate::engine::healer::read::{Reading, sectors_of_mask};
use crate::engine::healer::write::Reason;
use crate::engine::healer::{Core, EventKind, Severity};
use crate::engine::message::Refusal;
use crate::engine::scan::Found;
use crate::engine::view::Run;
use crate::units::{Block, BlockRange};

/// Weak blocks moved on one day, and blocks moved out of failing slots in one pass, at most.
const WEAK_A_DAY: u32 = 64;
/// The most of all slots that weak blocks may take, and the fewest that must be free for that: one in so many.
const WEAK_SHARE: u64 = 4;
const SECONDS_A_DAY: u64 = 86_400;

/// Why a block is examined.
#[derive(Clone, Copy)]
pub(super) enum Trouble<'a> {
    /// It is pending, was rewritten, or has lost sectors.
    Known,
    /// It did not read just now, alone.
    Failed(&'a Piece, Errno),
    /// It is slow, for the reason given.
    Slow(&'a Piece, &'a str),
}

/// Whether an error of a device that is there may be the medium's.
fn is_of_medium(errno: Errno) -> bool {
    matches!(class_of(errno), Class::Medium | Class::Ambiguous | Class::Target)
}

impl<'a> Trouble<'a> {
    /// How it failed, unless it has moved since.
    fn failed(self, run: Run) -> Option<Errno> {
        match self {
            Trouble::Failed(piece, errno) if piece.is_at(run) => Some(errno).filter(|errno| is_of_medium(*errno)),
            _ => None,
        }
    }

    /// Why it is slow, unless it has moved since.
    fn slow(self, run: Run) -> Option<&'a str> {
        match self {
            Trouble::Slow(piece, why) if piece.is_at(run) => Some(why),
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

/// What was seen of a block.
#[derive(Default)]
struct Seen {
    /// How far reading it has come, where it lived when it was read last.
    reading: Option<Reading>,
    /// Which rewrite of it in place was the last one then; see [`super::Scanner`].
    rewritten: Option<u64>,
    /// Some of it was proven bad, also if it has moved or was rewritten since.
    bad: bool,
    recovered: bool,
    healed: u64,
    lost: u64,
}

/// A block that reads, but not as it should.
struct Weak {
    run: Run,
    why: String,
    /// Some of it was read only after retries.
    recovered: bool,
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
        let leaves_alone = self.of_pass(turn, |pass| pass.takes_device_away(&[block]))?;
        let looked = match leaves_alone {
            true => Err(Failure::new(None, TAKES_DEVICE_AWAY).into()),
            false => self.look_into(turn, block, trouble).await,
        };
        let step = match looked {
            Ok(()) => Step::Done,
            Err(Cut::Stopped) => return Err(Stopped),
            Err(Cut::Failed(failure)) => {
                let run = self.run_of(block);
                self.skip(turn, run.device, run.offset, run.range.bytes(), failure.cause)?
            }
        };
        self.of_pass(turn, |pass| match step {
            Step::Done => pass.sees_to(block),
            Step::Again if leaves_alone => {}
            Step::Again => pass.went_at(&[block]),
        })?;
        Ok(step)
    }

    async fn look_into(self: &Rc<Self>, turn: Turn, block: Block, trouble: Trouble<'_>) -> Result<(), Cut> {
        let (mut seen, device) = (Seen::default(), self.run_of(block).device);
        let is_known = self.pending.borrow().mask(block) != 0;
        let looked = self.look(turn, block, trouble, &mut seen).await;
        // What was proven bad is so, whatever came later.
        if !seen.bad && looked.is_err() {
            return looked;
        }
        let first = self.of_pass(turn, |pass| pass.meets(block))?;
        self.count(turn, first, |found| {
            found.bad += u64::from(seen.bad);
            found.recovered += u64::from(seen.recovered);
            found.healed += seen.healed;
            found.lost += seen.lost;
        });
        if seen.bad {
            if !is_known {
                self.health.found_error(device, self.io.now());
            }
            self.hit(turn, block);
            return looked;
        }
        let run = self.run_of(block);
        if seen.reading.is_none_or(|reading| reading.run != run) {
            // It has moved since.
            return Ok(());
        }
        self.see_to_weak(turn, first, run, seen.recovered, trouble.slow(run)).await
    }

    /// Read a block, and look for its lost sectors.
    async fn look(self: &Rc<Self>, turn: Turn, block: Block, trouble: Trouble<'_>, seen: &mut Seen) -> Result<(), Cut> {
        self.read_to_the_end(turn, block, trouble, seen).await?;
        self.look_for_lost(turn, block, seen).await
    }

    /// Do something with a fenced block when it is this pass's turn to read so many bytes.
    async fn fenced<T>(
        self: &Rc<Self>,
        turn: Turn,
        block: Block,
        bytes: u64,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Cut> {
        self.may_go_on(turn).await?;
        if self.of_pass(turn, |pass| pass.has_lost_patience())? {
            return Err(Failure::new(None, PATIENCE_LOST).into());
        }
        self.await_pace(turn, bytes).await?;
        let fence = self.fence(BlockRange::one(block)).await?;
        let began = self.io.now();
        let in_doubt = self.map.borrow().get(block).in_doubt;
        let done = if in_doubt { Err(Failure::refused(Refusal::InDoubt)) } else { work.await };
        self.lift(fence);
        self.has_failed_for(turn, self.io.now().since_ns(began));
        Ok(done?)
    }

    /// Read a block until each of its sectors was read or tried to the last. What a request of the guest would have no
    /// time for is tried in the next round, and the guest may use the block between them.
    async fn read_to_the_end(
        self: &Rc<Self>,
        turn: Turn,
        block: Block,
        trouble: Trouble<'_>,
        seen: &mut Seen,
    ) -> Result<(), Cut> {
        loop {
            let left = seen.reading.as_ref().map(|reading| reading.ladder.bytes_left() as u64);
            let bytes = left.unwrap_or(self.geometry().sectors_of(block).bytes());
            if self.fenced(turn, block, bytes, self.read_round(block, trouble, seen)).await? {
                return Ok(());
            }
        }
    }

    /// One round of it; whether it was the last.
    async fn read_round(self: &Rc<Self>, block: Block, trouble: Trouble<'_>, seen: &mut Seen) -> Result<bool, Failure> {
        let run = self.run_of(block);
        self.refuse_gone(run.device)?;
        // It may have moved since the last one, or been rewritten in place: what failed before says nothing then.
        let rewritten = self.scan.unproven.borrow().get(&block).copied();
        let anew = rewritten.is_some() && rewritten != seen.rewritten;
        seen.rewritten = rewritten;
        let failed = match seen.reading.take_if(|reading| reading.run != run || anew) {
            Some(_) => None,
            None => trouble.failed(run),
        };
        let is_first = seen.reading.is_none();
        let begin = || Reading::new(run, self.geometry().logical_block, failed);
        let reading = seen.reading.get_or_insert_with(begin);
        let is_bad = self.read_on(reading, &Budget::of_read()).await?;
        seen.bad |= is_bad;
        if !reading.ladder.is_done() {
            return Ok(false);
        }
        seen.recovered = self.report_recovered(reading) > 0;
        if is_first && !is_bad && !seen.recovered && self.scan.unproven.borrow_mut().remove(&block).is_some() {
            self.tally.borrow_mut().healed += 1;
            seen.healed += 1;
            let cause = "a rewritten block was read by a pass";
            self.event(Severity::Info, EventKind::Healed, Some(run.device), run.range, cause, "it counts as healed");
        }
        Ok(true)
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
        first: bool,
        run: Run,
        recovered: bool,
        slow: Option<&str>,
    ) -> Result<(), Cut> {
        let block = run.range.start.block();
        if slow.is_some() {
            self.count(turn, first, |found| found.slow += 1);
            let mut slow = self.scan.slow.borrow_mut();
            if slow.len() < REMEMBERED_MAX {
                Arc::make_mut(&mut slow).insert(block);
            }
        }
        if !recovered && slow.is_none() {
            return Ok(());
        }
        self.hit(turn, block);
        let why = slow.map_or_else(|| "it was read only after retries".to_owned(), |slow| format!("slow: {slow}"));
        let failing_slot = run.device == DeviceIndex::SPARE && recovered;
        let may_move = if failing_slot { self.may_leave_slot(turn) } else { self.may_move_weak() };
        if may_move && self.acts(turn) {
            return self.move_weak(turn, Weak { run, why, recovered, failing_slot }).await;
        }
        if slow.is_some() {
            let action = "weak; it stays where it is";
            self.event(Severity::Warn, EventKind::SlowBlock, Some(run.device), run.range, why, action);
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

    /// Try the lost sectors of a block again where the primary still has their last content.
    async fn look_for_lost(self: &Rc<Self>, turn: Turn, block: Block, seen: &mut Seen) -> Result<(), Cut> {
        let unit = u64::from(self.geometry().logical_block);
        let state = || self.map.borrow().get(block);
        for sector in sectors_of_mask(block, state().lost) {
            let is_wanted = || state().lost >> sector.within_block() & 1 == 1 && !state().primary_stale;
            if !is_wanted() || !self.acts(turn) {
                continue;
            }
            let look = async {
                if !is_wanted() {
                    // The guest has written it meanwhile.
                    return Ok(0);
                }
                let before = state().lost.count_ones();
                // A success is put into the slot and counted there.
                self.read_lost(block, sector, &Budget::of_read()).await?;
                Ok(before - state().lost.count_ones())
            };
            seen.healed += u64::from(self.fenced(turn, block, unit, look).await?);
        }
        seen.lost = u64::from(state().lost.count_ones());
        Ok(())
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
            && self.keeps_slots_free()
    }

    /// Whether a block may leave a slot that fails now and then, and that is retired with it.
    fn may_leave_slot(&self, turn: Turn) -> bool {
        let moved = self.of_pass(turn, |pass| pass.left_slots).unwrap_or(u64::MAX);
        moved < u64::from(WEAK_A_DAY) && self.keeps_slots_free()
    }

    /// Whether one more may be taken for what can still be read: blocks that cannot must find a slot.
    fn keeps_slots_free(&self) -> bool {
        let (free, slots) = (self.table.borrow().available() as u64, u64::from(self.geometry().slots));
        free > slots / WEAK_SHARE
    }

    /// Move a block that was read to a slot, or to another one.
    async fn move_weak(self: &Rc<Self>, turn: Turn, weak: Weak) -> Result<(), Cut> {
        let (block, bytes) = (weak.run.range.start.block(), weak.run.range.bytes());
        if self.fenced(turn, block, bytes, self.move_fenced(turn, weak)).await? {
            return Ok(());
        }
        // It reads no more: by itself a read error loses nothing (R4), and is known from now on.
        let mut seen = Seen::default();
        let read = self.read_to_the_end(turn, block, Trouble::Known, &mut seen).await;
        self.count(turn, true, |found| {
            found.bad += u64::from(seen.bad);
            found.healed += seen.healed;
        });
        read
    }

    /// Do it; whether the block could still be read.
    async fn move_fenced(self: &Rc<Self>, turn: Turn, weak: Weak) -> Result<bool, Failure> {
        let Weak { run, why, recovered, failing_slot } = weak;
        let block = run.range.start.block();
        if self.run_of(block) != run {
            // It has moved since.
            return Ok(true);
        }
        let lost = self.map.borrow().get(block).lost;
        let mut placement = match self.rescue(block, 0).await {
            Ok(placement) if placement.lost == lost => placement,
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
        placement.reason = if recovered { Reason::Weak(why) } else { Reason::Slow(why) };
        if let Err(failure) = self.place(vec![placement]).await {
            let action = "weak, and could not be moved";
            self.event(Severity::Warn, EventKind::SlowBlock, failure.device, run.range, failure.cause, action);
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
