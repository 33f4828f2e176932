//! The read ladder (R2): retry, split to the logical block, look where a lost sector was, else fail.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use super::commit::Commit;
use super::failure::{Failure, FailureClass};
use super::write::Failed;
use super::{Core, Severity};
use crate::device::buffer::{AlignedBuf, Iovecs};
use crate::device::{DeviceIndex, Errno};
use crate::engine::io::Took;
use crate::engine::view::{Run, runs};
use crate::units::{Block, SECTOR_SIZE, Sector, SectorRange};
use crate::volume::table::Change;

/// Times a failed sector is read again.
const RETRIES: u32 = 3;
/// Device time one request may take on the ladder, in nanoseconds (10 s).
const READ_BUDGET_NS: u64 = 10_000_000_000;
/// Bad places after which a request has failed well enough; the rest of it is not looked at.
const BAD_MAX: usize = 64;

/// Device time rewriting one request in place may take, in nanoseconds (2 s).
const IN_PLACE_BUDGET_NS: u64 = 2_000_000_000;

/// Device time that is left for operations that fail. What succeeds is not limited: a long request on a slow
/// disk is no failing one.
pub(super) struct Budget(Cell<u64>);

impl Budget {
    /// For reading (R2).
    pub(super) fn of_read() -> Budget {
        Budget(Cell::new(READ_BUDGET_NS))
    }

    /// For rewriting in place (W1).
    pub(super) fn of_write() -> Budget {
        Budget(Cell::new(IN_PLACE_BUDGET_NS))
    }

    pub(super) fn spend(&self, took: Took) {
        self.0.set(self.0.get().saturating_sub(took.0));
    }

    pub(super) fn is_spent(&self) -> bool {
        self.0.get() == 0
    }
}

/// A part of a run that could not be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct BadPart {
    /// Byte offset in the run.
    pub(super) from: usize,
    /// Bytes.
    pub(super) len: usize,
    /// Times its own reads failed on the medium.
    tried: u32,
}

impl BadPart {
    /// It was tried to the last retry; otherwise time was up before.
    pub(super) fn is_proven(self) -> bool {
        self.tried > RETRIES
    }
}

/// A logical block was tried before, and failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tried {
    pub(super) device: DeviceIndex,
    /// How it failed the last time.
    pub(super) errno: Errno,
    /// How often.
    pub(super) times: u32,
}

/// A part of a block that is not known to read, nor to fail to the last retry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unread {
    pub(super) range: SectorRange,
    /// Of a part that was tried as a whole.
    pub(super) tried: Option<Tried>,
}

/// What the ladder brought up.
pub(super) struct Ladder {
    /// The bytes; bad parts are zero and mean nothing.
    pub(super) data: AlignedBuf,
    /// What could not be read.
    pub(super) bad: Vec<BadPart>,
    /// The smallest parts that failed and were read in the end.
    pub(super) recovered: Vec<(usize, usize)>,
    /// The last error.
    pub(super) errno: Option<Errno>,
}

impl Core {
    /// Read a run whole, or as much of it as the device gives.
    ///
    /// # Errors
    /// When the device is gone or the error is not one of the medium.
    pub(super) async fn read_ladder(
        self: &Rc<Self>,
        device: DeviceIndex,
        offset: u64,
        len: usize,
        before: Option<Tried>,
        budget: &Budget,
    ) -> Result<Ladder, Failure> {
        let unit = usize::try_from(self.geometry().logical_block).expect("512 or 4096");
        let errno = before.map(|before| before.errno);
        let mut ladder = Ladder { data: AlignedBuf::zeroed(len), bad: Vec::new(), recovered: Vec::new(), errno };
        let mut failing: Vec<(usize, usize)> = before.map(|_| (0, len)).into_iter().collect();
        let mut parts = vec![(0, len)];
        while let Some((from, len)) = parts.pop() {
            if budget.is_spent() || ladder.bad.len() >= BAD_MAX {
                ladder.bad.push(BadPart { from, len, tried: 0 });
                continue;
            }
            let is_unit = len <= unit;
            let mut tried = before.filter(|_| is_unit && len == ladder.data.len()).map_or(0, |before| before.times);
            loop {
                let (result, took) = self.io.read(device, offset + from as u64, len).await;
                let errno = match result {
                    Ok(buf) => {
                        ladder.data[from..from + len].copy_from_slice(&buf);
                        break;
                    }
                    Err(errno) => errno,
                };
                budget.spend(took);
                failing.push((from, len));
                ladder.errno = Some(errno);
                let asked = self.io.now();
                self.diagnose(device, errno, true, SectorRange::default()).await?;
                budget.spend(Took(self.io.now().since_ns(asked)));
                tried += 1;
                if is_unit && tried <= RETRIES && !budget.is_spent() {
                    continue;
                }
                if is_unit {
                    ladder.bad.push(BadPart { from, len, tried });
                } else {
                    let half = (len / 2).next_multiple_of(unit);
                    parts.push((from + half, len - half));
                    parts.push((from, half));
                }
                break;
            }
        }
        if !ladder.bad.is_empty() {
            self.confirm(device).await?;
        }
        ladder.bad.sort_by_key(|part| part.from);
        let unreadable = |(from, len): &(usize, usize)| {
            ladder.bad.iter().any(|bad| bad.from < from + len && *from < bad.from + bad.len)
        };
        ladder.recovered = innermost(&failing, |part| (part.0 as u64, (part.0 + part.1) as u64));
        ladder.recovered.retain(|part| !unreadable(part));
        Ok(ladder)
    }

    /// Serve a chunk of a guest's read into its memory.
    pub(super) async fn read_chunk(
        self: &Rc<Self>,
        range: SectorRange,
        guest: &Iovecs,
        from: usize,
        failed: Option<Failed>,
        budget: &Budget,
    ) -> Result<(), Failure> {
        let fence = self.fence(range.blocks()).await?;
        let result = self.read_fenced(range, guest, from, failed, budget).await;
        self.lift(fence);
        result
    }

    async fn read_fenced(
        self: &Rc<Self>,
        range: SectorRange,
        guest: &Iovecs,
        from: usize,
        failed: Option<Failed>,
        budget: &Budget,
    ) -> Result<(), Failure> {
        self.refuse_doubted(range, false)?;
        let map = self.map.borrow().clone();
        let mut unreadable: Option<Failure> = None;
        for run in runs(&map, &self.geometry(), range) {
            self.refuse_gone(run.device)?;
            let first_try = |Failed { device, errno, .. }| Tried { device, errno, times: 1 };
            let before = failed.filter(|failed| failed.device == run.device).map(first_try);
            let read = self.read_run(run, before, budget).await?;
            let at = from + usize::try_from((run.range.start.0 - range.start.0) * SECTOR_SIZE).expect("a chunk fits");
            guest.copy_from(at, &read.data[read.skip..read.skip + bytes(run.range)]);
            for bad in &read.bad {
                let failure = Failure { device: Some(run.device), ..read.failure.clone() };
                unreadable.get_or_insert(failure.of(FailureClass::Medium).at(*bad));
            }
        }
        for block in range.blocks().iter() {
            let lost = map.get(block).lost & range.mask_in(block);
            for sector in sectors_of_mask(block, lost) {
                match self.read_lost(block, sector, budget).await? {
                    Some(data) => {
                        let at =
                            from + usize::try_from((sector.0 - range.start.0) * SECTOR_SIZE).expect("a chunk fits");
                        guest.copy_from(at, &data);
                    }
                    None => {
                        let failure =
                            Failure::new(Some(DeviceIndex::SPARE), "a lost sector: no device holds its content");
                        unreadable.get_or_insert(failure.at(SectorRange { start: sector, count: 1 }));
                    }
                }
            }
        }
        unreadable.map_or(Ok(()), Err)
    }

    /// Read a run of the guest's sectors, widened to logical blocks, and note what that proves.
    pub(super) async fn read_run(
        self: &Rc<Self>,
        run: Run,
        before: Option<Tried>,
        budget: &Budget,
    ) -> Result<ReadRun, Failure> {
        let unit = u64::from(self.geometry().logical_block);
        let start = run.offset / unit * unit;
        let end = (run.offset + run.range.bytes()).next_multiple_of(unit);
        let len = usize::try_from(end - start).expect("a chunk fits");
        let skip = run.offset - start;
        let ladder = self.read_ladder(run.device, start, len, before, budget).await?;
        // Guest sectors of a part of the widened run, clipped to the run.
        let sectors = |from: usize, len: usize| {
            let first = (from as u64).max(skip) - skip;
            let last = ((from + len) as u64).min(skip + run.range.bytes()).saturating_sub(skip);
            let count = last.saturating_sub(first) / SECTOR_SIZE;
            SectorRange { start: Sector(run.range.start.0 + first / SECTOR_SIZE), count }
        };
        let map = self.map.borrow().clone();
        let (mut bad, mut unread) = (Vec::new(), Vec::new());
        let mut good_from = run.range.start;
        for part in &ladder.bad {
            let range = sectors(part.from, part.len);
            if range.is_empty() {
                continue;
            }
            self.note_good(SectorRange { start: good_from, count: range.start.0.saturating_sub(good_from.0) });
            good_from = range.end();
            for block in range.blocks().iter() {
                // What a slot holds for a lost sector is nobody's data: its failing says nothing.
                let mask = range.mask_in(block) & !map.get(block).lost;
                if mask == 0 {
                    continue;
                }
                bad.push(range.within(block));
                if part.is_proven() {
                    self.note_bad(block, mask);
                } else {
                    let tried = ladder.errno.filter(|_| part.tried > 0);
                    let tried = tried.map(|errno| Tried { device: run.device, errno, times: part.tried });
                    unread.push(Unread { range: range.within(block), tried });
                }
            }
        }
        self.note_good(SectorRange { start: good_from, count: run.range.end().0 - good_from.0 });
        self.report_read(&run, &ladder, (&bad, &unread), sectors);
        let cause = ladder.errno.map_or_else(String::new, |errno| errno.to_string());
        let cause = format!("unreadable after {RETRIES} retries: {cause}");
        let failure = Failure::new(Some(run.device), cause).of(FailureClass::Medium);
        let recovered = !ladder.recovered.is_empty();
        let skip = usize::try_from(skip).expect("less than a block");
        Ok(ReadRun { data: ladder.data, skip, bad, unread, recovered, failure })
    }

    fn report_read(
        &self,
        run: &Run,
        ladder: &Ladder,
        (bad, unread): (&[SectorRange], &[Unread]),
        sectors: impl Fn(usize, usize) -> SectorRange,
    ) {
        let cause = ladder.errno.map_or_else(String::new, |errno| errno.to_string());
        for (from, len) in &ladder.recovered {
            let range = sectors(*from, *len);
            if !range.is_empty() {
                self.tally.borrow_mut().recovered_reads += range.blocks().len();
                self.event(Severity::Warn, "recovered-read", Some(run.device), range, &*cause, "read after retries");
            }
        }
        for range in bad {
            let action = match unread.iter().any(|part| part.range == *range) {
                false => "pending: fails until it reads again or is rewritten",
                true => "fails now: time is up before its last retry",
            };
            self.event(Severity::Warn, "read-error", Some(run.device), *range, &*cause, action);
        }
    }

    /// Look for a lost sector where the primary still holds its last content; heal it into its slot.
    pub(super) async fn read_lost(
        self: &Rc<Self>,
        block: Block,
        sector: Sector,
        budget: &Budget,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let state = self.map.borrow().get(block);
        if state.primary_stale || self.refuse_gone(DeviceIndex::PRIMARY).is_err() || budget.is_spent() {
            return Ok(None);
        }
        let unit = u64::from(self.geometry().logical_block);
        let start = sector.bytes() / unit * unit;
        let len = usize::try_from(unit).expect("512 or 4096");
        let ladder = self.read_ladder(DeviceIndex::PRIMARY, start, len, None, budget).await?;
        if !ladder.bad.is_empty() {
            return Ok(None);
        }
        let skip = usize::try_from(sector.bytes() - start).expect("less than a block");
        let data = ladder.data[skip..skip + 512].to_vec();
        // The answer is right whether or not it can be kept.
        let _ = self.heal_lost(block, start, ladder.data).await;
        Ok(Some(data))
    }

    /// Put the content of a lost sector (of all that are lost in a logical block) into the slot: data first,
    /// flushed, then the mask.
    async fn heal_lost(self: &Rc<Self>, block: Block, start: u64, mut data: AlignedBuf) -> Result<(), Failure> {
        let state = self.map.borrow().get(block);
        let Some(slot) = state.slot else { return Ok(()) };
        if self.mode.get().read_only {
            return Ok(());
        }
        let range = SectorRange { start: Sector(start / SECTOR_SIZE), count: data.len() as u64 / SECTOR_SIZE };
        let offset = self.geometry().slot_offset(slot) + start - block.bytes();
        let len = data.len();
        if range.mask_in(block) & !state.lost != 0 {
            // The slot's other sectors are newer than the primary's.
            let (kept, _) = self.io.read(DeviceIndex::SPARE, offset, len).await;
            let mut kept = kept.map_err(|errno| Failure::errno(DeviceIndex::SPARE, errno))?;
            for sector in sectors_of_mask(block, range.mask_in(block) & state.lost) {
                let at = usize::try_from((sector.0 - range.start.0) * SECTOR_SIZE).expect("less than a block");
                kept[at..at + 512].copy_from_slice(&data[at..at + 512]);
            }
            data = kept;
        }
        let flush_failures = self.spare_flush_failures();
        let (written, _) = self.io.write_part(DeviceIndex::SPARE, offset, &Arc::new(data), 0, len).await;
        written.map_err(|errno| Failure::errno(DeviceIndex::SPARE, errno))?;
        self.flush_slots(flush_failures).await?;
        let mut entry = self.table.borrow().entry(slot);
        let healed = entry.lost & range.mask_in(block);
        entry.lost &= !range.mask_in(block);
        self.commit(Commit { changes: vec![Change { slot, entry }], blocks: vec![(block, 0)] }).await?;
        self.update_map(block, |state| state.lost = entry.lost);
        self.tally.borrow_mut().healed += u64::from(healed.count_ones());
        let action = "read from the primary again and kept in its slot";
        self.event(Severity::Info, "healed", Some(DeviceIndex::PRIMARY), range, "a lost sector came back", action);
        Ok(())
    }
}

/// A run as the guest asked for it.
pub(super) struct ReadRun {
    data: AlignedBuf,
    /// Bytes before the guest's first.
    skip: usize,
    /// What does not read.
    pub(super) bad: Vec<SectorRange>,
    /// What of that was not tried to the last, as time was up.
    pub(super) unread: Vec<Unread>,
    /// Some of it was read only after retries.
    pub(super) recovered: bool,
    failure: Failure,
}

fn bytes(range: SectorRange) -> usize {
    usize::try_from(range.bytes()).expect("a chunk fits")
}

/// Of the extents that failed, those with no other failed one inside: where the trouble was, as far as it
/// was narrowed down. `bounds` gives first and end.
pub(super) fn innermost<T: Copy>(failing: &[T], bounds: impl Fn(&T) -> (u64, u64)) -> Vec<T> {
    let mut inner: Vec<T> = Vec::new();
    for (i, extent) in failing.iter().enumerate() {
        let (start, end) = bounds(extent);
        let inside = |(j, other): (usize, &T)| {
            let (first, last) = bounds(other);
            // Of the same extent, failed several times, the last stands for all.
            start <= first && last <= end && ((first, last) != (start, end) || j > i)
        };
        if !failing.iter().enumerate().any(inside) {
            inner.push(*extent);
        }
    }
    inner
}

/// The sectors of `block` whose bits are set.
pub(super) fn sectors_of_mask(block: Block, mask: u8) -> impl Iterator<Item = Sector> {
    (0..8).filter(move |bit| mask >> bit & 1 == 1).map(move |bit| Sector(block.start().0 + bit))
}
