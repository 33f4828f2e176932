//! The write ladder (W1, W2, W4): rewrite in place and read back, else move to a slot with what can be
//! saved of the old content.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use super::commit::Commit;
use super::failure::{Failure, FailureClass};
use super::ladder::{Budget, Ladder, innermost};
use super::read::sectors_of_mask;
use super::{Core, EventKind, OnLoss, Severity, used_slots};
use crate::device::buffer::{AlignedBuf, Iovecs};
use crate::device::{DeviceIndex, Errno};
use crate::engine::message::Refusal;
use crate::engine::task::join_all;
use crate::engine::view::Run;
use crate::units::{BLOCK_SIZE, Block, SECTOR_SIZE, SECTORS_PER_BLOCK, Sector, SectorRange, Slot, sector_mask};
use crate::volume::table::{Change, Entry, SlotState};

/// Slots tried for one block before the write fails.
const SLOT_TRIES: usize = 8;
/// Blocks remembered as rewritten, at most.
const REWRITTEN_MAX: usize = 65_536;
const BLOCK_LEN: usize = BLOCK_SIZE as usize;

/// The healer's own copy of a guest's data, from `start` on: what every retry works from.
#[derive(Clone)]
struct Copied {
    data: Arc<AlignedBuf>,
    start: Sector,
}

impl Copied {
    fn offset(&self, sector: Sector) -> usize {
        usize::try_from((sector.0 - self.start.0) * SECTOR_SIZE).expect("a chunk fits in memory")
    }

    fn bytes(&self, range: SectorRange) -> &[u8] {
        &self.data[self.offset(range.start)..self.offset(range.end())]
    }
}

/// The failure that brought a request here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    /// Whose.
    pub(super) device: DeviceIndex,
    pub(super) errno: Errno,
    /// What the failed operations covered: where a chunk is all of it, the chunk itself is known to fail.
    pub(super) request: SectorRange,
}

/// A block's whole content on its way to a slot.
pub(super) struct Placement {
    pub(super) block: Block,
    image: Vec<u8>,
    /// Sectors nobody could read.
    pub(super) lost: u8,
    stale: bool,
    /// Sectors of the guest's write.
    written: u8,
    pub(super) reason: Reason,
}

/// Why a block moves.
pub(super) enum Reason {
    /// It failed, or its slot did.
    Failed,
    /// The operator wants it.
    Ordered,
    /// It was read only after retries, for the reason given.
    Weak(String),
    /// It is slow, for the reason given.
    Slow(String),
}

impl Core {
    /// Serve a chunk of a guest's write; without memory, of zeros.
    pub(super) async fn write_chunk(
        self: &Rc<Self>,
        range: SectorRange,
        guest: Option<(&Iovecs, usize)>,
        failed: Option<Failed>,
        budget: &Budget,
    ) -> Result<(), Failure> {
        let fence = self.fence(range.blocks()).await?;
        let result = self.write_fenced(range, guest, failed, budget).await;
        self.lift(fence);
        result
    }

    async fn write_fenced(
        self: &Rc<Self>,
        range: SectorRange,
        guest: Option<(&Iovecs, usize)>,
        failed: Option<Failed>,
        budget: &Budget,
    ) -> Result<(), Failure> {
        self.refuse_doubted(range, true)?;
        if self.mode.get().poisoned {
            return Err(Failure::refused(Refusal::Poisoned));
        }
        let wide = self.widen(range);
        let mut data = AlignedBuf::zeroed(usize::try_from(wide.bytes()).expect("a chunk fits in memory"));
        if let Some((iovecs, from)) = guest {
            let skip = usize::try_from((range.start.0 - wide.start.0) * SECTOR_SIZE).expect("less than a block");
            let len = usize::try_from(range.bytes()).expect("a chunk fits in memory");
            iovecs.copy_to(from, &mut data[skip..skip + len]);
        }
        let mut placements = Vec::new();
        if wide != range {
            // The devices know no smaller unit than a block: fill up the edges with what is there.
            let copied = Copied { data: Arc::new(data), start: wide.start };
            data = AlignedBuf::copy_of(&copied.data);
            for block in range.blocks().iter().filter(|block| range.within(*block) != wide.within(*block)) {
                let merged = self.merge(block, range, &copied).await?;
                let at = copied.offset(block.start());
                let len = copied.bytes(wide.within(block)).len();
                data[at..at + len].copy_from_slice(&merged.image[..len]);
                if merged.lost != 0 {
                    placements.push(merged);
                }
            }
        }
        let copied = Copied { data: Arc::new(data), start: wide.start };
        let mut moving = self.write_where_they_live(wide, &copied, failed, &placements, budget).await?;
        moving.retain(|block| placements.iter().all(|placement| placement.block != *block));
        for block in moving {
            placements.push(self.merge(block, wide, &copied).await?);
        }
        self.place(placements).await
    }

    fn widen(&self, range: SectorRange) -> SectorRange {
        let unit = u64::from(self.geometry().logical_block) / SECTOR_SIZE;
        let start = range.start.0 / unit * unit;
        SectorRange { start: Sector(start), count: range.end().0.next_multiple_of(unit) - start }
    }

    /// Write each block where it lives; the result is the blocks that need another slot.
    async fn write_where_they_live(
        self: &Rc<Self>,
        range: SectorRange,
        copied: &Copied,
        failed: Option<Failed>,
        skip: &[Placement],
        budget: &Budget,
    ) -> Result<Vec<Block>, Failure> {
        let map = self.map.borrow().clone();
        let mut on_primary: Vec<SectorRange> = Vec::new();
        let mut in_slots = Vec::new();
        let mut moving = Vec::new();
        for block in range.blocks().iter().filter(|block| skip.iter().all(|other| other.block != *block)) {
            let part = range.within(block);
            match (map.get(block).slot, on_primary.last_mut()) {
                (Some(slot), _) => in_slots.push((block, slot)),
                (None, _) if self.failed_since_rewritten(block) => moving.push(block),
                (None, Some(last)) if last.end() == part.start => last.count += part.count,
                (None, _) => on_primary.push(part),
            }
        }
        let failed_on = |device| failed.filter(|failed| failed.device == device);
        for part in on_primary {
            self.refuse_gone(DeviceIndex::PRIMARY)?;
            moving.extend(self.write_in_place(part, copied, failed_on(DeviceIndex::PRIMARY), budget).await?);
        }
        if !in_slots.is_empty() {
            self.refuse_gone(DeviceIndex::SPARE)?;
            moving.extend(self.write_to_slots(range, copied, &in_slots).await?);
        }
        Ok(moving)
    }

    /// Whether sectors of the block have failed a read since they were rewritten in place: its second failure,
    /// which moves it (W1) as long as there is somewhere to go.
    fn failed_since_rewritten(&self, block: Block) -> bool {
        let failed = self.pending.borrow().mask(block);
        self.rewritten.borrow().get(&block).is_some_and(|rewritten| rewritten & failed != 0)
            && self.mode.get().spare_up
            && self.table.borrow().available() > 0
    }

    /// Rewrite a part of the primary, flush, read back; the result is the blocks that failed again, or
    /// that were rewritten before and fail now.
    async fn write_in_place(
        self: &Rc<Self>,
        range: SectorRange,
        copied: &Copied,
        failed: Option<Failed>,
        budget: &Budget,
    ) -> Result<BTreeSet<Block>, Failure> {
        let pending: Vec<Block> = range.blocks().iter().filter(|block| self.is_pending(*block)).collect();
        let mut moving = BTreeSet::new();
        let mut cause = failed.map(|failed| failed.errno);
        // Extents seen failing, largest first; and those that were written in the end.
        let mut failing: Vec<SectorRange> = Vec::new();
        if failed.is_some_and(|failed| failed.request == range) {
            failing.push(range);
        }
        let mut written: Vec<SectorRange> = Vec::new();
        let mut parts = Vec::new();
        if failed.is_some() {
            self.retry_parts(range, &mut parts, &mut moving)
        } else {
            parts.push((range, false))
        }
        while let Some((part, again)) = parts.pop() {
            let (from, len) = (copied.offset(part.start), copied.bytes(part).len());
            let (result, took) =
                self.io.write_part(DeviceIndex::PRIMARY, part.start.bytes(), &copied.data, from, len).await;
            match result {
                Ok(()) => {
                    self.note_primary_write();
                    written.push(part);
                }
                Err(errno) => {
                    budget.spend(took);
                    self.diagnose(DeviceIndex::PRIMARY, errno, false, part).await?;
                    if !again {
                        self.count_failed_write(errno, part)?;
                    }
                    cause = Some(errno);
                    failing.push(part);
                    // Out of time: every part is still tried once, but what fails is neither split nor tried again
                    // and moves as a whole, half a chunk at most. To look for the bad block among its good ones
                    // takes seven more failures, and a disk that spends all its time on one takes many seconds for
                    // each: slots are there to be used, and can be released; a guest gives up after 30 seconds.
                    if budget.is_spent() || (again && part.blocks().len() == 1) {
                        moving.extend(part.blocks().iter());
                    } else {
                        self.retry_parts(part, &mut parts, &mut moving);
                    }
                }
            }
        }
        if failed.is_none() && failing.is_empty() && pending.is_empty() {
            return Ok(moving);
        }
        if !written.is_empty() {
            self.flush(DeviceIndex::PRIMARY).await?;
        }
        for part in &written {
            moving.extend(self.read_back(*part, copied, budget).await?);
        }
        self.note_rewritten(range, &pending, &failing, &moving, cause);
        Ok(moving)
    }

    /// What to try after `part` failed: its halves, or once more where it is one block that has not been
    /// rewritten before.
    fn retry_parts(&self, part: SectorRange, parts: &mut Vec<(SectorRange, bool)>, moving: &mut BTreeSet<Block>) {
        let blocks = part.blocks();
        if blocks.len() > 1 {
            let middle = Block(blocks.start.0 + blocks.len() / 2).start();
            parts.push((SectorRange { start: middle, count: part.end().0 - middle.0 }, true));
            parts.push((SectorRange { start: part.start, count: middle.0 - part.start.0 }, true));
        } else if self.rewritten.borrow().contains_key(&blocks.start) {
            moving.insert(blocks.start);
        } else {
            parts.push((part, true));
        }
    }

    /// Read back what was rewritten and compare; the result is the blocks that differ or do not read.
    async fn read_back(
        self: &Rc<Self>,
        range: SectorRange,
        copied: &Copied,
        budget: &Budget,
    ) -> Result<Vec<Block>, Failure> {
        let expected = copied.bytes(range);
        let (read, took) = self.io.read(DeviceIndex::PRIMARY, range.start.bytes(), expected.len()).await;
        match read {
            Ok(data) if *data == *expected => {
                self.note_good(range);
                return Ok(Vec::new());
            }
            Ok(_) => {}
            Err(errno) => {
                budget.spend(took);
                self.diagnose(DeviceIndex::PRIMARY, errno, true, range).await?;
            }
        }
        let mut bad = Vec::new();
        for block in range.blocks().iter() {
            let part = range.within(block);
            let expected = copied.bytes(part);
            if budget.is_spent() {
                // Not proven to hold what was written: it moves.
                bad.push(block);
                continue;
            }
            let (read, took) = self.io.read(DeviceIndex::PRIMARY, part.start.bytes(), expected.len()).await;
            match read {
                Ok(data) if *data == *expected => self.note_good(part),
                Ok(_) => bad.push(block),
                Err(errno) => {
                    budget.spend(took);
                    self.diagnose(DeviceIndex::PRIMARY, errno, true, part).await?;
                    bad.push(block);
                }
            }
        }
        Ok(bad)
    }

    /// Count the blocks that were rewritten in place after a failure, and remember those known to the
    /// block: their next failure moves them.
    fn note_rewritten(
        &self,
        range: SectorRange,
        pending: &[Block],
        failing: &[SectorRange],
        moving: &BTreeSet<Block>,
        cause: Option<Errno>,
    ) {
        let smallest = innermost(failing, |extent| (extent.start.0, extent.end().0));
        let mut rewritten: BTreeSet<Block> = pending.iter().copied().collect();
        let mut known: BTreeSet<Block> = rewritten.clone();
        for extent in smallest {
            if extent.blocks().len() == 1 {
                known.insert(extent.start.block());
            }
            rewritten.extend(extent.blocks().iter());
        }
        rewritten.retain(|block| !moving.contains(block));
        known.retain(|block| !moving.contains(block));
        if rewritten.is_empty() {
            return;
        }
        self.tally.borrow_mut().rewritten += rewritten.len() as u64;
        rewritten.iter().for_each(|block| self.scan.was_rewritten(*block));
        let cause = cause.map_or_else(|| "its last read had failed".to_owned(), |errno| errno.to_string());
        let first = rewritten.first().expect("not empty");
        let last = rewritten.last().expect("not empty");
        let start = range.start.max(first.start());
        let end = range.end().min(Sector(last.start().0 + SECTORS_PER_BLOCK));
        let extent = SectorRange { start, count: end.0 - start.0 };
        let action = format!("rewritten in place and read back, blocks: {}", rewritten.len());
        self.event(Severity::Warn, EventKind::Rewritten, Some(DeviceIndex::PRIMARY), extent, cause, action);
        let mut remembered = self.rewritten.borrow_mut();
        for block in known {
            if remembered.len() < REWRITTEN_MAX || remembered.contains_key(&block) {
                *remembered.entry(block).or_default() |= range.mask_in(block);
            }
        }
    }

    /// Write to the slots blocks live in, flush, and clear what is no longer lost; the result is the
    /// blocks whose slots do not take it.
    async fn write_to_slots(
        self: &Rc<Self>,
        range: SectorRange,
        copied: &Copied,
        blocks: &[(Block, Slot)],
    ) -> Result<Vec<Block>, Failure> {
        let flush_failures = self.spare_flush_failures();
        let writes = blocks.iter().map(|(block, slot)| {
            let part = range.within(*block);
            let offset = self.geometry().slot_offset(*slot) + u64::from(part.start.within_block()) * SECTOR_SIZE;
            let (from, len) = (copied.offset(part.start), copied.bytes(part).len());
            async move { self.io.write_part(DeviceIndex::SPARE, offset, &copied.data, from, len).await.0 }
        });
        let mut moving = Vec::new();
        let mut changes = Vec::new();
        let mut kept = Vec::new();
        for ((block, slot), result) in blocks.iter().zip(join_all(writes).await) {
            let part = range.within(*block);
            if let Err(errno) = result {
                self.diagnose(DeviceIndex::SPARE, errno, false, part).await?;
                moving.push(*block);
                continue;
            }
            let mut entry = self.table.borrow().entry(*slot);
            if entry.lost & part.mask_in(*block) != 0 {
                entry.lost &= !part.mask_in(*block);
                changes.push(Change { slot: *slot, entry });
            }
            kept.push((*block, *slot, entry));
        }
        self.flush_slots(flush_failures).await?;
        for (block, slot, _) in &kept {
            let part = range.within(*block);
            if !self.is_pending(*block) {
                continue;
            }
            let offset = self.geometry().slot_offset(*slot) + u64::from(part.start.within_block()) * SECTOR_SIZE;
            let expected = copied.bytes(part);
            match self.io.read(DeviceIndex::SPARE, offset, expected.len()).await.0 {
                Ok(data) if *data == *expected => self.note_good(part),
                _ => moving.push(*block),
            }
        }
        changes.retain(|change| !moving.contains(&change.entry.block));
        if !changes.is_empty() {
            let blocks = changes.iter().map(|c| (c.entry.block, range.mask_in(c.entry.block))).collect();
            self.commit(Commit { changes: changes.clone(), blocks }).await?;
            for Change { entry, .. } in changes {
                self.update_map(entry.block, |state| state.lost = entry.lost);
            }
        }
        Ok(moving)
    }

    /// The whole content of a block: the guest's sectors from the copy, the others from where they live.
    /// Those that cannot be read are lost; any error but the medium's fails the write (W4).
    async fn merge(self: &Rc<Self>, block: Block, range: SectorRange, copied: &Copied) -> Result<Placement, Failure> {
        let part = range.within(block);
        let mut placement = self.rescue(block, range.mask_in(block)).await?;
        if !part.is_empty() {
            let at = usize::try_from(part.start.within_block()).expect("0 to 7") * 512;
            let bytes = copied.bytes(part);
            placement.image[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Ok(placement)
    }

    /// Read the sectors of a block that are not in `written`, from where it lives.
    pub(super) async fn rescue(self: &Rc<Self>, block: Block, written: u8) -> Result<Placement, Failure> {
        let state = self.map.borrow().get(block);
        let exists = self.geometry().sectors_of(block);
        let rest = sector_mask(0, exists.count) & !written;
        let mut placement = Placement {
            block,
            image: vec![0; BLOCK_LEN],
            lost: state.lost & rest,
            stale: state.primary_stale && state.lost & rest != 0,
            written,
            reason: Reason::Failed,
        };
        let wanted = rest & !state.lost;
        if wanted == 0 {
            return Ok(placement);
        }
        let Run { device, offset: base, .. } = self.run_of(block);
        self.refuse_gone(device)?;
        let budget = Budget::of_read();
        let unit = self.geometry().logical_block;
        for (first, last) in extents(wanted, unit) {
            let (from, to) = (first * 512, last * 512);
            let mut ladder = Ladder::new(to - from, None);
            self.climb(device, base + from as u64, &mut ladder, &budget).await?;
            placement.image[from..to].copy_from_slice(&ladder.data);
            let unread = ladder.unread();
            if let Some(bad) = unread.iter().find(|bad| state.slot.is_some() && !bad.is_proven()) {
                // Time was up before its last retry. The primary would be asked for a lost sector again later,
                // but a slot is left for good.
                let start = Sector(block.start().0 + (from + bad.from) as u64 / SECTOR_SIZE);
                let range = SectorRange { start, count: bad.len as u64 / SECTOR_SIZE };
                let failure = Failure::new(Some(device), "reading the rest of its block takes too long");
                return Err(failure.of(FailureClass::Medium).at(range));
            }
            for bad in unread {
                let first = u32::try_from((from + bad.from) / 512).expect("0 to 7");
                placement.lost |= sector_mask(first, bad.len as u64 / 512) & wanted;
                // A sector that was valid in a slot: what the primary holds of it is old.
                placement.stale |= state.slot.is_some();
            }
        }
        Ok(placement)
    }

    /// Move blocks to slots (W2): write the slots, flush the spare, commit, and only then use them.
    pub(super) async fn place(self: &Rc<Self>, placements: Vec<Placement>) -> Result<(), Failure> {
        if placements.is_empty() {
            return Ok(());
        }
        self.refuse_gone(DeviceIndex::SPARE).map_err(|_| Failure::spare_down())?;
        if placements.iter().any(|placement| self.map.borrow().get(placement.block).slot.is_none()) {
            self.confirm(DeviceIndex::PRIMARY).await?;
        }
        let mut failed_slots = Vec::new();
        let mut reserved = Vec::new();
        let flush_failures = self.spare_flush_failures();
        let filled = self.fill_slots(&placements, &mut reserved, &mut failed_slots).await;
        let filled = match filled {
            Ok(()) => self.flush_slots(flush_failures).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = filled {
            let mut table = self.table.borrow_mut();
            reserved.iter().for_each(|slot| table.unreserve(*slot));
            drop(table);
            if !failed_slots.is_empty() {
                // Given back, they would be the first to be tried by the next write too.
                self.free_later(failed_slots, true);
            }
            return Err(failure);
        }
        let map = self.map.borrow().clone();
        let mut changes: Vec<Change> =
            failed_slots.iter().map(|slot| Change { slot: *slot, entry: Entry::RETIRED }).collect();
        let mut left = Vec::new();
        for (placement, slot) in placements.iter().zip(&reserved) {
            let old = map.get(placement.block).slot;
            let incarnation = old.map_or(0, |old| (self.table.borrow().entry(old).incarnation + 1) & 15);
            left.extend(old);
            changes.push(Change {
                slot: *slot,
                entry: Entry {
                    block: placement.block,
                    lost: placement.lost,
                    incarnation,
                    copy: 0,
                    state: SlotState::Live,
                    primary_stale: placement.stale,
                },
            });
        }
        let blocks = placements.iter().map(|placement| (placement.block, placement.written)).collect();
        self.commit(Commit { changes, blocks }).await?;
        for (placement, slot) in placements.iter().zip(&reserved) {
            self.adopt_slot(placement, *slot);
        }
        if !left.is_empty() {
            self.free_later(left, true);
        }
        self.warn_of_exhaustion();
        Ok(())
    }

    /// Find and write a slot for each placement; slots that fail are set aside.
    async fn fill_slots(
        self: &Rc<Self>,
        placements: &[Placement],
        reserved: &mut Vec<Slot>,
        failed: &mut Vec<Slot>,
    ) -> Result<(), Failure> {
        for _ in placements {
            let Some(slot) = self.table.borrow_mut().reserve() else { return Err(self.exhausted()) };
            reserved.push(slot);
        }
        let mut todo: Vec<usize> = (0..placements.len()).collect();
        for _ in 0..SLOT_TRIES {
            let writes = todo.iter().map(|i| {
                let offset = self.geometry().slot_offset(reserved[*i]);
                self.io.write(DeviceIndex::SPARE, offset, &placements[*i].image)
            });
            let results = join_all(writes).await;
            let mut again = Vec::new();
            for (i, result) in todo.into_iter().zip(results) {
                let Err(errno) = result else { continue };
                let range = self.geometry().sectors_of(placements[i].block);
                self.diagnose(DeviceIndex::SPARE, errno, false, range).await?;
                let Some(next) = self.table.borrow_mut().reserve() else { return Err(self.exhausted()) };
                let slot = std::mem::replace(&mut reserved[i], next);
                failed.push(slot);
                let action = "retired; another one is tried";
                self.event(
                    Severity::Warn,
                    EventKind::SlotFailed,
                    Some(DeviceIndex::SPARE),
                    range,
                    format!("slot {slot}: {errno}"),
                    action,
                );
                again.push(i);
            }
            todo = again;
            if todo.is_empty() {
                return Ok(());
            }
        }
        let cause = format!("{SLOT_TRIES} slots in a row failed");
        Err(Failure::new(Some(DeviceIndex::SPARE), cause).of(FailureClass::Spare))
    }

    fn exhausted(&self) -> Failure {
        Failure::spare_full(self.geometry().slots)
    }

    /// The commit is durable: from now on the block lives in its slot.
    fn adopt_slot(&self, placement: &Placement, slot: Slot) {
        let block = placement.block;
        self.pending.borrow_mut().forget(block);
        self.rewritten.borrow_mut().remove(&block);
        self.scan.has_moved(block);
        let before = self.map.borrow().get(block);
        self.update_map(block, |state| {
            state.slot = Some(slot);
            state.lost = placement.lost;
            state.primary_stale = placement.stale;
            state.pending = false;
        });
        let newly_lost = placement.lost & !before.lost;
        let mut tally = self.tally.borrow_mut();
        tally.remaps += 1;
        tally.lost += u64::from(newly_lost.count_ones());
        drop(tally);
        if before.slot.is_some() || !matches!(placement.reason, Reason::Failed | Reason::Weak(_)) {
            self.health.moved_for_other_reasons();
        }
        let range = self.geometry().sectors_of(block);
        let (severity, cause) = match &placement.reason {
            Reason::Failed if before.slot.is_some() => (Severity::Warn, "its slot failed"),
            Reason::Failed => (Severity::Warn, "the block failed again"),
            Reason::Ordered => (Severity::Info, "the operator's order"),
            Reason::Weak(why) | Reason::Slow(why) => (Severity::Warn, &**why),
        };
        self.event(
            severity,
            EventKind::Remapped,
            Some(DeviceIndex::PRIMARY),
            range,
            cause,
            format!("moved to slot {slot}"),
        );
        for sector in sectors_of_mask(block, newly_lost) {
            let range = SectorRange { start: sector, count: 1 };
            let cause = "unreadable when its block moved";
            self.event(Severity::Error, EventKind::Lost, None, range, cause, "reads of it fail until it is written");
        }
    }

    /// Say it once when a share of the slots is used, or all are (E2). Several can be taken at a time, so the share may
    /// be passed without being met.
    pub(super) fn warn_of_exhaustion(&self) {
        let table = self.table.borrow();
        let (all, used) = (u64::from(table.max_remaps()), used_slots(&table));
        let full = match self.policy.spare_full {
            OnLoss::Fail => "writes to further bad blocks fail; replace the primary",
            _ => "writes to further bad blocks wait; replace the primary",
        };
        let shares = [
            (100, Severity::Error, EventKind::SpareFull, full),
            (90, Severity::Error, EventKind::SpareFilling, "replace the primary soon"),
            (80, Severity::Warn, EventKind::SpareFilling, "replace the primary soon"),
        ];
        let reached = shares.into_iter().find(|(percent, ..)| used * 100 >= all * percent);
        let before = self.told_used.replace(reached.map_or(0, |(percent, ..)| percent));
        let Some((_, severity, kind, action)) = reached.filter(|(percent, ..)| *percent > before) else { return };
        let cause = format!("{used} of {all} slots are used ({} %)", used * 100 / all);
        self.event(severity, kind, Some(DeviceIndex::SPARE), SectorRange::default(), cause, action);
    }
}

/// Runs of set bits, as (first, one past the last) sectors, widened to units of `unit` bytes.
fn extents(mask: u8, unit: u32) -> Vec<(usize, usize)> {
    if unit > 512 && mask != 0 {
        return vec![(0, 8)];
    }
    let mut extents: Vec<(usize, usize)> = Vec::new();
    for bit in (0..8).filter(|bit| mask >> bit & 1 == 1) {
        match extents.last_mut() {
            Some((_, end)) if *end == bit => *end += 1,
            _ => extents.push((bit, bit + 1)),
        }
    }
    extents
}
