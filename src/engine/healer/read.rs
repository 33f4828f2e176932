//! Reads that a device failed: up the ladder, and what that proves (R2); where a lost sector was (R3); else they fail.

use std::rc::Rc;
use std::sync::Arc;

use super::commit::Commit;
use super::failure::{Failure, FailureClass};
use super::ladder::{Budget, Ladder, RETRIES};
use super::write::Failed;
use super::{Core, EventKind, Severity};
use crate::device::buffer::{AlignedBuf, Iovecs};
use crate::device::{DeviceIndex, Errno};
use crate::engine::view::{Run, runs};
use crate::units::{Block, SECTOR_SIZE, Sector, SectorRange};
use crate::volume::table::Change;

/// A run of the guest's sectors as it is read, widened to logical blocks.
pub(super) struct Reading {
    pub(super) run: Run,
    pub(super) ladder: Ladder,
    /// Bytes before the guest's first.
    skip: usize,
}

impl Reading {
    /// Of a run that failed once already where there is an error.
    pub(super) fn new(run: Run, logical_block: u32, failed: Option<Errno>) -> Reading {
        let unit = u64::from(logical_block);
        let start = run.offset / unit * unit;
        let end = (run.offset + run.range.bytes()).next_multiple_of(unit);
        let ladder = Ladder::new(in_memory(end - start), failed);
        Reading { run, ladder, skip: in_memory(run.offset - start) }
    }

    /// Byte offset on the device.
    fn start(&self) -> u64 {
        self.run.offset - self.skip as u64
    }

    /// The guest's bytes.
    fn content(&self) -> &[u8] {
        &self.ladder.data[self.skip..self.skip + in_memory(self.run.range.bytes())]
    }

    /// The guest's sectors in some of what is read.
    fn sectors(&self, from: usize, len: usize) -> SectorRange {
        let first = from.max(self.skip) - self.skip;
        let last = (from + len).min(self.skip + in_memory(self.run.range.bytes())).saturating_sub(self.skip);
        let count = last.saturating_sub(first) as u64 / SECTOR_SIZE;
        SectorRange { start: Sector(self.run.range.start.0 + first as u64 / SECTOR_SIZE), count }
    }
}

impl Core {
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
        let at = |sector: Sector| from + in_memory((sector.0 - range.start.0) * SECTOR_SIZE);
        let mut unreadable: Option<Failure> = None;
        for run in runs(&map, &self.geometry(), range) {
            self.refuse_gone(run.device)?;
            let failed = failed.filter(|failed| failed.device == run.device).map(|failed| failed.errno);
            let mut reading = Reading::new(run, self.geometry().logical_block, failed);
            self.read_on(&mut reading, budget).await?;
            self.report_recovered(&reading);
            guest.copy_from(at(run.range.start), reading.content());
            if let Some(failure) = self.failure_of(&reading) {
                unreadable.get_or_insert(failure);
            }
        }
        for block in range.blocks().iter() {
            let lost = map.get(block).lost & range.mask_in(block);
            for sector in sectors_of_mask(block, lost) {
                match self.read_lost(block, sector, budget).await? {
                    Some(data) => guest.copy_from(at(sector), &data),
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

    /// Where a block lives now.
    pub(super) fn run_of(&self, block: Block) -> Run {
        let (map, geometry) = (self.map.borrow(), self.geometry());
        *runs(&map, &geometry, geometry.sectors_of(block)).first().expect("a block has sectors")
    }

    /// Read as much of a run as there is time for, and note what that proves; whether some of the guest's sectors are
    /// proven bad by it.
    pub(super) async fn read_on(self: &Rc<Self>, reading: &mut Reading, budget: &Budget) -> Result<bool, Failure> {
        self.climb(reading.run.device, reading.start(), &mut reading.ladder, budget).await?;
        let mut is_bad = false;
        for part in std::mem::take(&mut reading.ladder.news) {
            let range = reading.sectors(part.from, part.len);
            if !part.is_proven() {
                self.note_good(range);
                continue;
            }
            for (range, mask) in self.with_content(range) {
                self.note_bad(range.start.block(), mask);
                is_bad = true;
                let action = "pending: fails until it reads again or is rewritten";
                self.event(
                    Severity::Warn,
                    EventKind::ReadError,
                    Some(reading.run.device),
                    range,
                    cause_of(reading),
                    action,
                );
            }
        }
        Ok(is_bad)
    }

    /// Of some sectors those of each block, and a mask of those that hold something. What a slot holds for a lost
    /// sector is nobody's data: its failing says nothing.
    fn with_content(&self, range: SectorRange) -> Vec<(SectorRange, u8)> {
        let map = self.map.borrow();
        let of_block = |block: Block| (range.within(block), range.mask_in(block) & !map.get(block).lost);
        range.blocks().iter().map(of_block).filter(|(_, mask)| *mask != 0).collect()
    }

    /// Say what was read only after retries; how much that is.
    pub(super) fn report_recovered(&self, reading: &Reading) -> usize {
        let recovered = reading.ladder.recovered();
        for (from, len) in &recovered {
            let range = reading.sectors(*from, *len);
            if !range.is_empty() {
                let blocks = range.blocks().len();
                self.tally.borrow_mut().recovered_reads += blocks;
                if reading.run.device == DeviceIndex::SPARE {
                    self.health.recovered_in_slots(blocks);
                }
                let (device, cause) = (Some(reading.run.device), cause_of(reading));
                self.event(Severity::Warn, EventKind::RecoveredRead, device, range, cause, "read after retries");
            }
        }
        recovered.len()
    }

    /// Why the guest does not get all of a run, if it does not. What was left before its last retry is told: a pass
    /// of the scanner goes on with it, and a request does not.
    fn failure_of(&self, reading: &Reading) -> Option<Failure> {
        let (device, mut failure) = (Some(reading.run.device), None);
        for part in reading.ladder.unread() {
            for (range, _) in self.with_content(reading.sectors(part.from, part.len)) {
                let cause = match part.is_proven() {
                    true => format!("unreadable after {RETRIES} retries: {}", cause_of(reading)),
                    false => format!("left before its last retry: {}", cause_of(reading)),
                };
                if !part.is_proven() {
                    let action = "fails now; the next request tries it again";
                    self.event(Severity::Warn, EventKind::ReadError, device, range, &*cause, action);
                }
                failure.get_or_insert(Failure::new(device, cause).of(FailureClass::Medium).at(range));
            }
        }
        failure
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
        let mut ladder = Ladder::new(len, None);
        self.climb(DeviceIndex::PRIMARY, start, &mut ladder, budget).await?;
        if !ladder.is_whole() {
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
        self.event(
            Severity::Info,
            EventKind::Healed,
            Some(DeviceIndex::PRIMARY),
            range,
            "a lost sector came back",
            action,
        );
        Ok(())
    }
}

/// The last error, where there was time for one.
fn cause_of(reading: &Reading) -> String {
    reading.ladder.errno.map_or_else(|| "time was up before".to_owned(), |errno| errno.to_string())
}

/// So many bytes of a chunk.
fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a chunk fits")
}

/// The sectors of `block` whose bits are set.
pub(super) fn sectors_of_mask(block: Block, mask: u8) -> impl Iterator<Item = Sector> {
    (0..8).filter(move |bit| mask >> bit & 1 == 1).map(move |bit| Sector(block.start().0 + bit))
}
