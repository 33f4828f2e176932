//! How a pass reads: large pieces while all is well, down to the block where one fails or is slow.

use std::collections::BTreeSet;
use std::rc::Rc;

use super::examine::Trouble;
use super::pass::{Cursor, PATIENCE_AT_AN_END, PATIENCE_LOST, Stage};
use super::{REMEMBERED_MAX, Step, Stopped, Turn, bytes_of};
use crate::device::buffer::AlignedBuf;
use crate::device::{DeviceIndex, Errno};
use crate::engine::healer::Core;
use crate::engine::scan::Skipped;
use crate::engine::scan::plan::UNIT_SLOTS;
use crate::engine::task::join_all;
use crate::engine::view::{Run, runs};
use crate::units::{BLOCK_SIZE, Block, SectorRange, Slot};
use crate::volume::table::SlotState;

const BLOCK_LEN: usize = BLOCK_SIZE as usize;
/// Blocks of a piece that is looked at block by block once it failed or was slow (64 KiB).
pub(super) const PART_BLOCKS: usize = 16;
/// A read that takes less is never slow, in nanoseconds (30 ms): a disk may have to turn and seek.
pub(super) const SLOW_NS: u64 = 30_000_000;
/// After a read that takes longer the disk rests also if it succeeds, in nanoseconds (1 s): the guest waited for it.
const LONG_NS: u64 = 1_000_000_000;
/// A piece is looked at more closely if it takes so many times as long as usual.
const SLOW_PIECE: u64 = 3;
/// Blocks that lie behind each other on a device.
pub(super) struct Piece {
    pub(super) device: DeviceIndex,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) blocks: Vec<Block>,
}

impl Piece {
    /// Whether it is a block that lives there.
    pub(super) fn is_at(&self, run: Run) -> bool {
        (self.device, self.offset) == (run.device, run.offset)
    }

    /// A part of it: so many blocks from one of them on.
    pub(super) fn part(&self, from: usize, blocks: usize) -> Piece {
        let blocks = self.blocks[from..(from + blocks).min(self.blocks.len())].to_vec();
        let start = from as u64 * BLOCK_SIZE;
        let len = (blocks.len() as u64 * BLOCK_SIZE).min(self.len - start);
        Piece { device: self.device, offset: self.offset + start, len, blocks }
    }

    pub(super) fn parts(&self, blocks: usize) -> Vec<Piece> {
        (0..self.blocks.len()).step_by(blocks).map(|from| self.part(from, blocks)).collect()
    }
}

/// How the read of a piece went.
pub(super) enum Read {
    Well,
    Slowly,
    Not,
    /// The device has gone, which says nothing of the piece.
    Gone,
}

impl Core {
    /// Read the next units of the primary; the position behind them.
    pub(super) async fn read_units(self: &Rc<Self>, turn: Turn) -> Result<(Step, u64), Stopped> {
        let order = self.scan_order_of(turn)?;
        let (_, parallel) = self.reads_now();
        let (units, from, next, urgent) = self.of_pass(turn, |pass| {
            let from = pass.cursor.position;
            let mut next = from;
            // One at a time, so that it is known what it came to.
            if let Some(unit) = pass.urgent.front().copied() {
                pass.begin_step(from);
                return (vec![unit], from, next, Some(unit));
            }
            let mut units = Vec::new();
            while units.len() < parallel && next < order.positions() {
                units.extend(order.unit_at(next).filter(|unit| !pass.is_near(*unit)));
                next += 1;
            }
            pass.begin_step(next);
            (units, from, next, None)
        })?;
        let ranges: Vec<SectorRange> = units.iter().map(|unit| order.sectors_of(*unit)).collect();
        let map = self.map.borrow().clone();
        let geometry = self.geometry();
        let runs = ranges.iter().flat_map(|range| runs(&map, &geometry, *range));
        let (here, moved): (Vec<Run>, Vec<Run>) = runs.partition(|run| run.device == DeviceIndex::PRIMARY);
        let pieces = here.iter().map(|run| Piece {
            device: run.device,
            offset: run.offset,
            len: run.range.bytes(),
            blocks: run.range.blocks().iter().collect(),
        });
        if self.read_pieces(turn, pieces.collect()).await? == Step::Again {
            return Ok((Step::Again, next));
        }
        for block in moved.iter().flat_map(|run| run.range.blocks().iter()) {
            if self.read_dead(turn, block).await? == Step::Again {
                return Ok((Step::Again, next));
            }
        }
        for range in ranges {
            for block in self.to_be_seen_to(range) {
                if self.see_to(turn, block).await? == Step::Again {
                    return Ok((Step::Again, next));
                }
            }
        }
        self.of_pass(turn, |pass| match urgent {
            Some(unit) => {
                pass.urgent.pop_front();
                pass.end_urgent_step(unit);
            }
            None => pass.end_step(next, (from..next).filter_map(|position| order.unit_at(position))),
        })?;
        Ok((Step::Done, next))
    }

    /// Read the place on the primary that a block has moved away from, once and by itself. If it fails, nobody's data
    /// does; if it reads, the operator may have the block back there.
    async fn read_dead(self: &Rc<Self>, turn: Turn, block: Block) -> Result<Step, Stopped> {
        let sectors = self.geometry().sectors_of(block);
        let (offset, len) = (sectors.start.bytes(), sectors.bytes());
        if self.of_pass(turn, |pass| pass.has_lost_patience())? {
            return self.skip(turn, DeviceIndex::PRIMARY, offset, len, PATIENCE_LOST.to_owned());
        }
        if self.of_pass(turn, |pass| pass.takes_device_away(&[block]))? {
            return Ok(Step::Done);
        }
        let piece = Piece { device: DeviceIndex::PRIMARY, offset, len, blocks: vec![block] };
        let Some((result, took)) = self.read_there(turn, &piece).await? else { return Ok(Step::Again) };
        let mut releasable = self.scan.releasable.borrow_mut();
        if result.is_ok() && took < SLOW_NS && releasable.len() < REMEMBERED_MAX {
            releasable.insert(block);
        }
        Ok(Step::Done)
    }

    /// Blocks on the primary that failed before and may be well now, whatever the read of their piece said.
    fn to_be_seen_to(&self, range: SectorRange) -> BTreeSet<Block> {
        let blocks = range.blocks();
        let mut found: BTreeSet<Block> = self.pending.borrow().in_range(blocks).collect();
        found.extend(self.scan.unproven.borrow().range(blocks.start..blocks.end).map(|(block, _)| *block));
        found.retain(|block| self.map.borrow().get(*block).slot.is_none());
        found
    }

    /// Read the slots of a unit that are in use.
    pub(super) async fn read_slots(self: &Rc<Self>, turn: Turn, unit: u64) -> Result<Step, Stopped> {
        let range = self.of_pass(turn, |pass| pass.scope.range)?;
        let first = u32::try_from(unit).unwrap_or(u32::MAX).saturating_mul(UNIT_SLOTS);
        let last = first.saturating_add(UNIT_SLOTS).min(self.geometry().slots);
        let mut pieces: Vec<Piece> = Vec::new();
        let mut lossy = Vec::new();
        for slot in (first..last).map(Slot) {
            let entry = self.table.borrow().entry(slot);
            let state = self.map.borrow().get(entry.block);
            let wanted = range.is_none_or(|range| range.blocks().contains(entry.block));
            // Of a block that is moving the table has two.
            if entry.state != SlotState::Live || state.slot != Some(slot) || !wanted {
                continue;
            }
            if state.lost != 0 || state.pending {
                lossy.push(entry.block);
            }
            let offset = self.geometry().slot_offset(slot);
            match pieces.last_mut() {
                Some(piece) if piece.offset + piece.len == offset => {
                    piece.len += BLOCK_SIZE;
                    piece.blocks.push(entry.block);
                }
                _ => pieces.push(Piece {
                    device: DeviceIndex::SPARE,
                    offset,
                    len: BLOCK_SIZE,
                    blocks: vec![entry.block],
                }),
            }
        }
        if self.read_pieces(turn, pieces).await? == Step::Again {
            return Ok(Step::Again);
        }
        for block in lossy {
            if self.see_to(turn, block).await? == Step::Again {
                return Ok(Step::Again);
            }
        }
        Ok(Step::Done)
    }

    /// Examine a block, unless it failed just now and has been.
    async fn see_to(self: &Rc<Self>, turn: Turn, block: Block) -> Result<Step, Stopped> {
        if self.of_pass(turn, |pass| pass.has_seen_to(block))? {
            return Ok(Step::Done);
        }
        self.examine(turn, block, Trouble::Known).await
    }

    /// How much may be read at a time now, and how often side by side.
    fn reads_now(&self) -> (usize, usize) {
        let now = self.io.now();
        let (bytes, parallel) = match self.scan.pace.borrow_mut().as_mut() {
            None => (BLOCK_SIZE, 1),
            Some(pace) => {
                // What was seen before the last reads, which may have waited for long, is no longer so.
                pace.look(now, self.requests_answered(), self.scan.load.get());
                pace.reads(now)
            }
        };
        (usize::try_from(bytes / BLOCK_SIZE).expect("a few hundred"), parallel)
    }

    async fn read_pieces(self: &Rc<Self>, turn: Turn, pieces: Vec<Piece>) -> Result<Step, Stopped> {
        let (blocks, parallel) = self.reads_now();
        let pieces: Vec<Piece> = pieces.iter().flat_map(|piece| piece.parts(blocks)).collect();
        for some in pieces.chunks(parallel) {
            if self.of_pass(turn, |pass| pass.is_at_its_end())? {
                // All of this step is left out.
                return Ok(Step::Again);
            }
            let reads = join_all(some.iter().map(|piece| self.read_piece(turn, piece))).await;
            for (piece, read) in some.iter().zip(reads) {
                piece.blocks.iter().for_each(|block| self.scan.not_slow(*block));
                let step = match read? {
                    Read::Well => Step::Done,
                    Read::Slowly | Read::Not => self.narrow(turn, piece).await?,
                    Read::Gone => Step::Again,
                };
                if step == Step::Again {
                    return Ok(Step::Again);
                }
                let now = self.io.now();
                let bytes = self.bytes_living_in(piece);
                self.of_pass(turn, |pass| pass.cover(now, bytes))?;
            }
        }
        Ok(Step::Done)
    }

    /// Bytes of the guest that a piece has.
    fn bytes_living_in(&self, piece: &Piece) -> u64 {
        piece.blocks.iter().map(|block| bytes_of(self.geometry().sectors_of(*block))).sum()
    }

    pub(super) async fn read_piece(self: &Rc<Self>, turn: Turn, piece: &Piece) -> Result<Read, Stopped> {
        if self.of_pass(turn, |pass| pass.takes_device_away(&piece.blocks))? {
            // It is looked at more closely.
            return Ok(Read::Not);
        }
        Ok(match self.read_there(turn, piece).await? {
            None => Read::Gone,
            Some((Err(_), _)) => Read::Not,
            Some((Ok(()), took)) if self.took_long(piece, took) => Read::Slowly,
            Some((Ok(()), _)) => Read::Well,
        })
    }

    /// Read a piece; how that ended and the nanoseconds it took, unless the device has gone.
    pub(super) async fn read_there(
        self: &Rc<Self>,
        turn: Turn,
        piece: &Piece,
    ) -> Result<Option<(Result<(), Errno>, u64)>, Stopped> {
        let before = self.departures(piece.device);
        let (result, took) = self.paced_read(turn, piece.device, piece.offset, piece.len).await?;
        let has_gone = result.is_err() && self.has_gone(turn, piece.device, &piece.blocks, before).await?;
        Ok((!has_gone).then_some((result, took)))
    }

    /// Whether a read of those blocks failed because the device went, which says nothing of them. Before the read it
    /// had gone so many times: it may be back.
    async fn has_gone(
        self: &Rc<Self>,
        turn: Turn,
        device: DeviceIndex,
        blocks: &[Block],
        before: u64,
    ) -> Result<bool, Stopped> {
        let asked = self.io.now();
        // Opens the breaker if so.
        let _ = self.confirm(device).await;
        self.has_failed_for(turn, self.io.now().since_ns(asked));
        let has_gone = self.refuse_gone(device).is_err() || self.departures(device) != before;
        if has_gone {
            self.of_pass(turn, |pass| pass.went_at(blocks))?;
        }
        Ok(has_gone)
    }

    /// Whether a piece took so long that one of its blocks may be weak. What it took counts towards what is usual, but
    /// one that is slow does not make others look fast.
    fn took_long(&self, piece: &Piece, took: u64) -> bool {
        let large = usize::from(piece.blocks.len() > PART_BLOCKS);
        let usual = &self.scan.usual_ns[usize::from(piece.device.0)][large];
        let slow_ns = SLOW_NS.max(usual.get() * SLOW_PIECE);
        usual.set(if usual.get() == 0 { took.min(SLOW_NS) } else { (usual.get() * 15 + took.min(slow_ns)) / 16 });
        took >= slow_ns
    }

    /// Read when it is this pass's turn to; what is read is not looked at.
    async fn paced_read(
        self: &Rc<Self>,
        turn: Turn,
        device: DeviceIndex,
        offset: u64,
        len: u64,
    ) -> Result<(Result<(), Errno>, u64), Stopped> {
        self.await_pace(turn, len).await?;
        let len = usize::try_from(len).expect("a piece fits in memory");
        let kept = self.scan.buffers.borrow_mut().pop().filter(|kept| kept.len() == len);
        let buffer = kept.unwrap_or_else(|| AlignedBuf::zeroed(len));
        let (result, buffer, took) = self.io.read_into(device, offset, buffer).await;
        // Large ones are of one size, as a rule, and their pages are not taken anew for each read.
        if len > PART_BLOCKS * BLOCK_LEN {
            self.scan.buffers.borrow_mut().push(buffer);
        }
        match result {
            Err(_) => self.has_failed_for(turn, took.0),
            Ok(()) if took.0 >= LONG_NS => self.rest_for(took.0),
            Ok(()) => {}
        }
        Ok((result, took.0))
    }

    /// The disk rests for as long as that, or as a pass rests at most.
    fn rest_for(&self, ns: u64) {
        if let Some(pace) = self.scan.pace.borrow_mut().as_mut() {
            pace.pause(self.io.now(), ns);
        }
    }

    /// Trouble took so long.
    pub(super) fn has_failed_for(&self, turn: Turn, ns: u64) {
        self.rest_for(ns);
        _ = self.of_pass(turn, |pass| pass.has_trouble_for(ns));
    }

    /// Wait until so many bytes may be read.
    pub(super) async fn await_pace(self: &Rc<Self>, turn: Turn, len: u64) -> Result<(), Stopped> {
        let now = self.io.now();
        let begin = {
            let mut pace = self.scan.pace.borrow_mut();
            let Some(pace) = pace.as_mut() else { return Err(Stopped) };
            pace.look(now, self.requests_answered(), self.scan.load.get());
            pace.begin(now, len)
        };
        self.io.sleep_until(begin).await;
        self.of_pass(turn, |pass| pass.read += len)
    }

    /// Part of what is to be covered is not read; whether the step goes on.
    pub(super) fn skip(
        &self,
        turn: Turn,
        device: DeviceIndex,
        offset: u64,
        len: u64,
        why: String,
    ) -> Result<Step, Stopped> {
        if self.refuse_gone(device).is_err() {
            return Ok(Step::Again);
        }
        self.of_pass(turn, |pass| pass.skip(Skipped { device, offset, len, why }))?;
        Ok(Step::Done)
    }

    /// All that the pass has not come to, from its place on in its order, is skipped.
    pub(super) fn leave_out_the_rest(&self, turn: Turn, cursor: Cursor) -> Result<(), Stopped> {
        let (total, order) = (self.scan_total(), self.scan_order_of(turn)?);
        let skipped = |device, offset, len| Skipped { device, offset, len, why: PATIENCE_AT_AN_END.to_owned() };
        self.of_pass(turn, |pass| {
            pass.begin_step(cursor.position);
            let mut left = total.saturating_sub(pass.covered).max(1);
            for range in order.rest(cursor.position).filter(|_| cursor.stage == Stage::Primary) {
                let len = bytes_of(range).min(left);
                if len > 0 {
                    pass.skip(skipped(DeviceIndex::PRIMARY, range.start.bytes(), len));
                }
                left -= len;
            }
            // Slots and metadata.
            if left > 0 {
                pass.skip(skipped(DeviceIndex::SPARE, 0, left));
            }
        })
    }
}
