//! Orders of the operator, and the state they ask for.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::commit::Commit;
use super::flush::PoisonReport;
use super::write::Reason;
use super::{Class, Core, EventKind, FailureClass, NotResized, Severity, Tally};
use crate::device::DeviceIndex;
use crate::engine::health::Assessment;
use crate::engine::health::history::Day;
use crate::engine::request::Operation;
use crate::engine::scan::{ScanOrder, ScanStatus};
use crate::engine::task::join_all;
use crate::engine::view::{Mode, PrimaryState};
use crate::units::{BLOCK_SIZE, Block, BlockRange, Sector, SectorRange, Time};
use crate::volume::map::BlockState;
use crate::volume::superblock::CloseStamp;
use crate::volume::table::{Change, Entry};

/// An order's number; its answer carries the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderId(pub u64);

/// What the operator wants.
#[derive(Clone, Debug)]
pub enum Order {
    /// The state.
    Status,
    /// Special blocks from a sector on, at most so many.
    List {
        /// First sector.
        from: Sector,
        /// At most so many blocks.
        limit: usize,
    },
    /// Lift poison and tripped breakers.
    Clear,
    /// Move blocks to slots.
    Remap(SectorRange),
    /// Move blocks back to the primary.
    Release(SectorRange),
    /// Save counters and the label's table.
    Save,
    /// Begin, pause, continue or give up a pass of the scanner.
    Scan(ScanOrder),
    /// See that a primary of so many bytes can be extended: to be given before that is done for [`Order::Resize`].
    PrepareResize(u64),
    /// Grow the volume on a primary that has grown.
    Resize {
        /// Sectors that the guest is to see.
        capacity: u64,
        /// Bytes that the primary has.
        primary_size: u64,
    },
    /// See that every shard hears and answers, within the time that a fence may take.
    Pulse,
    /// Everything durable, before closing.
    Settle,
    /// The last write of a clean close.
    Seal(CloseStamp),
}

/// What the healer is busy with: a part of its status that costs little.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Repairs under way and waiting.
    pub repairs: usize,
    /// Requests held.
    pub held: usize,
    /// Whether the commit of any block is in doubt.
    pub is_in_doubt: bool,
    /// Slots that can be given out.
    pub free: usize,
}

/// What `status` wants to know of the healer.
#[derive(Clone, Debug)]
pub struct HealerStatus {
    /// What is allowed.
    pub mode: Mode,
    /// Sectors the guest sees.
    pub capacity: u64,
    /// Bytes of the primary, as recorded.
    pub primary_size: u64,
    /// Why no order is taken now that changes something, if so.
    pub refusal: Option<String>,
    /// A failed flush.
    pub poison: Option<PoisonReport>,
    /// Why the spare is down, if it is.
    pub spare_down: Option<String>,
    /// Places retired, by name.
    pub retired_places: Vec<&'static str>,
    /// Since the server started.
    pub tally: Tally,
    /// Requests (reads, writes, flushes, discards, bytes read, bytes written), then the tally, then requests to
    /// slots, of all runs.
    pub lifetime: Vec<u64>,
    /// Failed operations by device: reads, writes, flushes.
    pub errors: [[u64; 3]; 2],
    /// The same by device, kind (`read`, `write`, `flush`) and what they mean.
    pub errors_by_class: BTreeMap<(DeviceIndex, &'static str, Class), u64>,
    /// When an operation last failed, on the volume's clock.
    pub last_error: Option<Time>,
    /// Requests answered with an error since the server started, by what they were and why.
    pub guest_errors: BTreeMap<(Operation, FailureClass), u64>,
    /// Slots in use.
    pub live: usize,
    /// Blocks that live in a slot.
    pub remapped: usize,
    /// Slots that can be given out.
    pub free: usize,
    /// Slots that failed.
    pub retired: usize,
    /// Pending blocks.
    pub pending: usize,
    /// Lost sectors.
    pub lost_sectors: u64,
    /// Blocks in doubt.
    pub in_doubt: u64,
    /// Repairs under way and waiting.
    pub repairs: usize,
    /// Requests held.
    pub held: usize,
    /// Fences that stand.
    pub fences: usize,
    /// The guest's writes that failed on the primary since one last succeeded there.
    pub failed_writes_in_a_row: usize,
    /// The scanner.
    pub scan: ScanStatus,
    /// How volume and devices are.
    pub health: Assessment,
    /// The days on which the volume was open.
    pub days: Vec<Day>,
}

/// The answer to an order.
#[derive(Clone, Debug)]
pub enum Reply {
    /// To [`Order::Status`].
    Status(Box<HealerStatus>),
    /// To [`Order::List`]: blocks with their state and the sectors (bit mask) whose last read failed.
    List(Vec<(Block, BlockState, u8)>),
    /// To [`Order::Settle`]: a checksum over sampled blocks.
    Settled(Result<u32, String>),
    /// To [`Order::Resize`].
    Resized(Result<String, NotResized>),
    /// To everything else.
    Done(Result<String, String>),
}

/// Why an order on these sectors changed nothing; an operator who gave it took the map for another.
fn nothing_to_do(range: SectorRange, state: &str) -> String {
    match range.count {
        1 => format!("sector {} is {state}, so there is nothing to do; see `list`", range.start),
        _ => {
            format!("sectors {}-{} are {state}, so there is nothing to do; see `list`", range.start, range.end().0 - 1)
        }
    }
}

impl Core {
    /// Carry out an order, in a task of its own where it needs a device.
    pub(super) fn order(self: &Rc<Self>, id: OrderId, order: Order) {
        match order {
            Order::Status => return self.reply(id, Reply::Status(Box::new(self.status()))),
            Order::List { from, limit } => return self.reply(id, Reply::List(self.list(from, limit))),
            _ => {}
        }
        let core = self.clone();
        self.spawn(async move {
            let reply = match order {
                Order::Clear => Reply::Done(core.clear().await),
                Order::Remap(range) => Reply::Done(core.remap_blocks(range).await),
                Order::Release(range) => Reply::Done(core.release_blocks(range).await),
                Order::Save => Reply::Done(core.save().await),
                Order::Scan(order) => Reply::Done(core.scan_order(order).await),
                Order::PrepareResize(size) => {
                    Reply::Done(core.prepare_resize(size).await.map(|()| "prepared".to_owned()))
                }
                Order::Resize { capacity, primary_size } => Reply::Resized(core.resize(capacity, primary_size).await),
                Order::Pulse => {
                    let answer = if core.tell_everywhere().await { Ok(String::new()) } else { Err(String::new()) };
                    Reply::Done(answer)
                }
                Order::Settle => Reply::Settled(core.settle().await.map_err(|failure| failure.cause)),
                Order::Seal(stamp) => {
                    let sealed = core.seal(stamp).await;
                    Reply::Done(sealed.map(|()| "closed".to_owned()).map_err(|failure| failure.cause))
                }
                Order::Status | Order::List { .. } => unreachable!("answered above"),
            };
            core.reply(id, reply);
        });
    }

    /// Once the volume is being closed no order begins, and none begins another block. It is not waited for those
    /// under way: what they wait for may be workers that have ended.
    pub(super) fn refuse_closing(&self) -> Result<(), String> {
        if self.closing.get() { Err("the volume is being closed".into()) } else { Ok(()) }
    }

    fn reply(&self, id: OrderId, reply: Reply) {
        self.replies.borrow_mut().push((id, reply));
    }

    fn repairs(&self) -> usize {
        self.running.get() + self.waiting.borrow().len()
    }

    pub(super) fn present_work(&self) -> Work {
        Work {
            repairs: self.repairs(),
            held: self.held.borrow().len(),
            is_in_doubt: self.map.borrow().iter_from(Block(0)).any(|(_, state)| state.in_doubt),
            free: self.table.borrow().available(),
        }
    }

    fn status(&self) -> HealerStatus {
        let table = self.table.borrow();
        let map = self.map.borrow();
        let (mut remapped, mut lost_sectors, mut in_doubt) = (0, 0, 0);
        for (_, state) in map.iter_from(Block(0)) {
            // Not the table's live entries: a block that moves has two for a while.
            remapped += usize::from(state.slot.is_some());
            lost_sectors += u64::from(state.lost.count_ones());
            in_doubt += u64::from(state.in_doubt);
        }
        let places = self.live_places();
        HealerStatus {
            mode: self.mode.get(),
            capacity: self.geometry().capacity,
            primary_size: self.superblock.borrow().primary_size,
            refusal: self.may_write().err(),
            poison: self.poison_report(),
            spare_down: self.spare_down_cause(),
            retired_places: crate::volume::layout::Place::ALL
                .into_iter()
                .filter(|place| !places.contains(place))
                .map(|place| place.name())
                .collect(),
            tally: self.tally.borrow().clone(),
            lifetime: self.lifetime_values(),
            errors: *self.io.errors.borrow(),
            errors_by_class: self.io.errors_by_class.borrow().clone(),
            last_error: self.io.last_error.get(),
            guest_errors: self.guest_errors.borrow().clone(),
            remapped,
            live: table.live(),
            free: table.available(),
            retired: table.retired(),
            pending: self.pending.borrow().len(),
            lost_sectors,
            in_doubt,
            repairs: self.repairs(),
            held: self.held.borrow().len(),
            fences: self.fences.standing(),
            failed_writes_in_a_row: self.failed_writes_in_a_row(),
            scan: self.scan_status(),
            health: self.assess(),
            days: self.days(),
        }
    }

    fn list(&self, from: Sector, limit: usize) -> Vec<(Block, BlockState, u8)> {
        let pending = self.pending.borrow();
        let map = self.map.borrow();
        map.iter_from(from.block()).take(limit).map(|(block, state)| (block, state, pending.mask(block))).collect()
    }

    async fn clear(self: &Rc<Self>) -> Result<String, String> {
        self.refuse_closing()?;
        let mode = self.mode.get();
        let mut done = Vec::new();
        if mode.primary == PrimaryState::Gone {
            self.clear_breaker().await?;
            done.push("the primary is used again".to_owned());
        }
        if let Some(report) = self.poison_report() {
            let seen = self.poison_sequence();
            if mode.read_only {
                return Err("the volume is read-only: open it for writing to clear a failed flush".into());
            }
            self.clear_poison(seen).await?;
            done.push(format!(
                "writes are taken again; {} ranges were written since the last good flush: check them",
                report.ranges.len()
            ));
        }
        if done.is_empty() {
            Err("nothing to clear: no flush has failed and the primary is up".into())
        } else {
            Ok(done.join("; "))
        }
    }

    pub(super) fn blocks_of(&self, range: SectorRange) -> Result<BlockRange, String> {
        if range.is_empty() || !self.geometry().contains(range) {
            let last = self.geometry().capacity - 1;
            let count = range.count;
            return Err(format!(
                "{count} sectors from {} are not all on the disk; its last sector is {last}",
                range.start
            ));
        }
        Ok(range.blocks())
    }

    pub(super) fn may_write(&self) -> Result<(), String> {
        self.refuse_closing()?;
        let mode = self.mode.get();
        if mode.read_only {
            return Err("the volume is served read-only; serve it without --read-only first".into());
        }
        if mode.poisoned {
            return Err("a flush failed before: `clear` first".into());
        }
        let device = if mode.primary == PrimaryState::Gone { Some(DeviceIndex::PRIMARY) } else { None };
        match device.or((!mode.spare_up).then_some(DeviceIndex::SPARE)) {
            Some(device) => Err(format!("the {device} cannot be used at the moment; see `status` for what to do")),
            None => Ok(()),
        }
    }

    async fn remap_blocks(self: &Rc<Self>, range: SectorRange) -> Result<String, String> {
        self.may_write()?;
        let mut moved = 0;
        for block in self.blocks_of(range)?.iter() {
            self.refuse_closing().map_err(|error| format!("{error} ({moved} blocks were moved before)"))?;
            let fence = self.fence(BlockRange::one(block)).await.map_err(|failure| failure.cause)?;
            let done = self.remap_fenced(block).await;
            self.lift(fence);
            moved += done.map_err(|error| format!("{error} ({moved} blocks were moved before)"))?;
        }
        match moved {
            0 => Err(nothing_to_do(range, "already remapped")),
            _ => Ok(format!("blocks moved to the spare: {moved}")),
        }
    }

    async fn remap_fenced(self: &Rc<Self>, block: Block) -> Result<u64, String> {
        let state = self.map.borrow().get(block);
        if state.slot.is_some() {
            return Ok(0);
        }
        let mut placement = self.rescue(block, 0).await.map_err(|failure| failure.cause)?;
        placement.reason = Reason::Ordered;
        if placement.lost != 0 {
            // R4: a read error alone marks nothing lost.
            return Err(format!("sector {} cannot be read: rewrite it first, then nothing is lost", block.start()));
        }
        self.place(vec![placement]).await.map_err(|failure| failure.cause)?;
        Ok(1)
    }

    async fn release_blocks(self: &Rc<Self>, range: SectorRange) -> Result<String, String> {
        self.may_write()?;
        let mut released = 0;
        for block in self.blocks_of(range)?.iter() {
            self.refuse_closing().map_err(|error| format!("{error} ({released} blocks were released before)"))?;
            let fence = self.fence(BlockRange::one(block)).await.map_err(|failure| failure.cause)?;
            let done = self.release_fenced(block).await;
            self.lift(fence);
            released += done.map_err(|error| format!("{error} ({released} blocks were released before)"))?;
        }
        match released {
            0 => Err(nothing_to_do(range, "not remapped")),
            _ => Ok(format!("blocks moved back to the primary: {released}")),
        }
    }

    /// Write the primary's block, flush, read it back, and only then free the slot (W6).
    async fn release_fenced(self: &Rc<Self>, block: Block) -> Result<u64, String> {
        let state = self.map.borrow().get(block);
        let Some(slot) = state.slot else { return Ok(0) };
        let sector = block.start();
        if state.lost != 0 || state.in_doubt || state.pending {
            return Err(format!(
                "the block at sector {sector} has lost, pending or doubtful sectors: rewrite it first"
            ));
        }
        let bytes = usize::try_from(self.geometry().sectors_of(block).bytes()).expect("at most a block");
        let offset = self.geometry().slot_offset(slot);
        let (read, _) = self.io.read(DeviceIndex::SPARE, offset, bytes).await;
        let data = read.map_err(|errno| format!("spare, slot {slot}: {errno}"))?;
        let primary = |errno| format!("primary, sector {sector}: {errno}; the block stays on the spare");
        // Held for every write to the primary: a close that comes meanwhile waits until it has ended before it looks at
        // the primary for the last time.
        self.places.label.acquire().await;
        let written = match self.refuse_closing() {
            Ok(()) => self.io.write(DeviceIndex::PRIMARY, block.bytes(), &data).await.map_err(primary),
            Err(why) => Err(why),
        };
        self.places.label.release();
        written?;
        self.note_primary_write();
        self.flush(DeviceIndex::PRIMARY).await.map_err(|failure| failure.cause)?;
        let (back, _) = self.io.read(DeviceIndex::PRIMARY, block.bytes(), bytes).await;
        if *back.map_err(primary)? != *data {
            return Err(format!("primary, sector {sector}: reads back differently; the block stays on the spare"));
        }
        self.moves_are_over().await.map_err(|failure| failure.cause)?;
        self.table.borrow_mut().hold(slot);
        let commit = Commit { changes: vec![Change { slot, entry: Entry::FREE }], blocks: vec![(block, 0)] };
        self.commit(commit).await.map_err(|failure| failure.cause)?;
        self.update_map(block, |state| *state = BlockState::default());
        self.scan.weak_are_among(self.table.borrow().live() as u64);
        let range = self.geometry().sectors_of(block);
        let (cause, action) = ("the operator's order", format!("moved back from slot {slot}"));
        self.event(Severity::Info, EventKind::Released, Some(DeviceIndex::PRIMARY), range, cause, action);
        // So that it is told again when it is used again.
        self.warn_of_exhaustion();
        self.resume_held(super::failure::Hold::SpareFull);
        Ok(1)
    }

    async fn save(self: &Rc<Self>) -> Result<String, String> {
        self.may_write()?;
        self.save_counters().await.map_err(|failure| format!("spare: {}", failure.cause))?;
        self.stamp_label().await;
        let devices = [DeviceIndex::PRIMARY, DeviceIndex::SPARE];
        for device in devices {
            self.refuse_gone(device).map_err(|failure| failure.cause)?;
        }
        let flushes = join_all(devices.map(|device| self.flush(device))).await;
        flushes.into_iter().collect::<Result<(), _>>().map_err(|failure| failure.cause)?;
        let live = self.table.borrow().live();
        let label = if self.is_label_failing() { "; the label was not written, see `events`" } else { "" };
        Ok(format!("counters saved; the map is always saved ({BLOCK_SIZE}-byte blocks, {live} live){label}"))
    }
}
