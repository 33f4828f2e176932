//! What a shard needs to know of the volume to serve a request alone: an immutable snapshot, replaced
//! by message.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::device::DeviceIndex;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::units::{BLOCK_SIZE, Block, BlockRange, SECTOR_SIZE, SECTORS_PER_BLOCK, Sector, SectorRange, Slot};
use crate::volume::map::Map;

/// The measures of an open volume. Only its capacity ever changes, and only upwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Sectors the guest sees.
    pub capacity: u64,
    /// The larger of the devices' logical block sizes: 512 or 4096 bytes.
    pub logical_block: u32,
    /// Byte offset of slot 0 on the spare.
    pub slots_start: u64,
    /// Number of slots.
    pub slots: u32,
}

impl Geometry {
    /// Blocks, a short last one included.
    pub fn blocks(&self) -> u64 {
        self.capacity.div_ceil(SECTORS_PER_BLOCK)
    }

    /// Byte offset of a slot on the spare.
    pub fn slot_offset(&self, slot: Slot) -> u64 {
        self.slots_start + u64::from(slot.0) * BLOCK_SIZE
    }

    /// The sectors of `block` that exist (the last block may be short).
    pub fn sectors_of(&self, block: Block) -> SectorRange {
        let start = block.start();
        SectorRange { start, count: self.capacity.saturating_sub(start.0).min(SECTORS_PER_BLOCK) }
    }

    /// Whether the range lies inside the volume.
    pub fn contains(&self, range: SectorRange) -> bool {
        range.checked_end().is_some_and(|end| end <= Sector(self.capacity))
    }

    /// Whether the range starts and ends on logical blocks of the devices.
    pub fn is_aligned(&self, range: SectorRange) -> bool {
        let unit = u64::from(self.logical_block) / SECTOR_SIZE;
        range.start.0.is_multiple_of(unit) && range.count.is_multiple_of(unit)
    }
}

/// Whether the primary can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrimaryState {
    /// It works.
    Up,
    /// The breaker is open: nothing is sent to it.
    Gone,
}

/// What is allowed at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// A flush failed: writes and flushes fail until `clear`.
    pub poisoned: bool,
    /// The breaker's state.
    pub primary: PrimaryState,
    /// Whether the spare can be used.
    pub spare_up: bool,
    /// Nothing may be written.
    pub read_only: bool,
}

/// A snapshot of map, mode and measures.
#[derive(Clone, Debug)]
pub struct View {
    /// The measures that the map is for.
    pub geometry: Geometry,
    /// Blocks that are not simply on the primary.
    pub map: Map,
    /// What is allowed.
    pub mode: Mode,
    /// Regions with more pending blocks than are kept: writes there are verified like writes to pending
    /// blocks.
    pub dense: Arc<BTreeSet<u64>>,
    /// Where to note what was written.
    pub written: Arc<Written>,
}

impl View {
    /// Blocks in a region of [`View::dense`] (4 MiB).
    pub const REGION_BLOCKS: u64 = 1024;

    /// Whether the range touches a region with too many pending blocks.
    pub fn is_dense(&self, range: BlockRange) -> bool {
        !self.dense.is_empty()
            && (range.start.0 / Self::REGION_BLOCKS..range.end.0.div_ceil(Self::REGION_BLOCKS))
                .any(|region| self.dense.contains(&region))
    }
}

/// Regions of a volume, a bit each, as [`Written::take`] gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// Log2 of the sectors in a region.
    pub shift: u32,
    /// The bits.
    pub words: Vec<u64>,
}

/// One bit for each region of the volume written since the last good flush, shared by all shards.
///
/// A region is large enough that the bits fit into the poison page beside its header; a volume that grows gets
/// another of these, whose regions may be larger.
#[derive(Debug)]
pub struct Written {
    bits: Box<[AtomicU64]>,
    shift: u32,
}

impl Written {
    /// The most regions there are.
    pub const REGIONS_MAX: u64 = 16_384;
    /// Log2 of the sectors in the smallest region (1 MiB).
    const SHIFT_MIN: u32 = 11;

    /// No region of a volume of `capacity` sectors is written.
    pub fn new(capacity: u64) -> Written {
        let mut shift = Self::SHIFT_MIN;
        while (capacity >> shift) >= Self::REGIONS_MAX {
            shift += 1;
        }
        let words = ((capacity >> shift) + 1).div_ceil(64);
        Written { bits: (0..words).map(|_| AtomicU64::new(0)).collect(), shift }
    }

    /// Note a write, before the guest is told of it.
    #[inline]
    pub fn note(&self, range: SectorRange) {
        if range.is_empty() {
            return;
        }
        for region in (range.start.0 >> self.shift)..=((range.end().0 - 1) >> self.shift) {
            let word = &self.bits[usize::try_from(region / 64).expect("at most 16,384 regions")];
            let bit = 1 << (region % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// Take all bits, leaving none.
    pub fn take(&self) -> Regions {
        let words = self.bits.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect();
        Regions { shift: self.shift, words }
    }

    /// Put bits back, as [`Written::take`] gave them here or at a volume that has grown since.
    pub fn restore(&self, regions: &Regions) {
        for (index, word) in (0_u64..).zip(&regions.words) {
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                let region = (index * 64 + bit) >> (self.shift - regions.shift);
                let word = usize::try_from(region / 64).expect("at most 16,384 regions");
                self.bits[word].fetch_or(1 << (region % 64), Ordering::AcqRel);
            }
        }
    }
}

/// How much of what blocks can move to is used: the percentage of slots by which the operator is warned (E2).
#[derive(Debug)]
pub struct Reserve(AtomicU64);

impl Reserve {
    /// There are no slots.
    const NONE: u64 = u64::MAX;

    /// Tell it anew; `None` where there are no slots.
    pub fn set_used(&self, percent: Option<u64>) {
        self.0.store(percent.unwrap_or(Self::NONE), Ordering::Relaxed);
    }

    /// As last told.
    pub fn used_percent(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|percent| *percent != Self::NONE)
    }
}

impl Default for Reserve {
    fn default() -> Self {
        Reserve(AtomicU64::new(Self::NONE))
    }
}

/// Counters the shards share with the healer and with whoever reports.
#[derive(Debug)]
pub struct Progress {
    /// Sectors that every shard serves: what the guest may be told.
    pub capacity: Arc<AtomicU64>,
    /// Writes to slots that were completed; the spare is dirty while this is ahead of its last flush.
    pub slot_writes: AtomicU64,
    /// Flushes of the spare that failed while no completed slot write was unflushed: a slot write under way
    /// then may have been lost with them, and must not be answered as done.
    pub spare_flush_failures: AtomicU64,
    /// Device writes to the primary that succeeded: the breaker wants to know of any.
    pub primary_writes_ok: AtomicU64,
    /// For guests that ask.
    pub reserve: Reserve,
    /// Answered reads.
    pub reads: AtomicU64,
    /// Answered writes and zeroings.
    pub writes: AtomicU64,
    /// Answered flushes.
    pub flushes: AtomicU64,
    /// Answered discards.
    pub discards: AtomicU64,
    /// Bytes of successful reads.
    pub read_bytes: AtomicU64,
    /// Bytes of successful writes.
    pub written_bytes: AtomicU64,
    /// Reads and writes that shards served with slots.
    pub slot_requests: AtomicU64,
}

impl Progress {
    /// Counters at zero, for a volume of `capacity` sectors.
    pub fn new(capacity: u64) -> Arc<Progress> {
        let zero = || AtomicU64::new(0);
        Arc::new(Progress {
            capacity: Arc::new(AtomicU64::new(capacity)),
            slot_writes: zero(),
            spare_flush_failures: zero(),
            primary_writes_ok: zero(),
            reserve: Reserve::default(),
            reads: zero(),
            writes: zero(),
            flushes: zero(),
            discards: zero(),
            read_bytes: zero(),
            written_bytes: zero(),
            slot_requests: zero(),
        })
    }
}

/// Which device a run of sectors lies on, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The guest's sectors.
    pub range: SectorRange,
    /// The device.
    pub device: DeviceIndex,
    /// Byte offset there.
    pub offset: u64,
}

/// Cut `range` into runs that are contiguous on one device.
pub fn runs(map: &Map, geometry: &Geometry, range: SectorRange) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for block in range.blocks().iter() {
        let part = range.within(block);
        let (device, offset) = match map.get(block).slot {
            None => (DeviceIndex::PRIMARY, part.start.bytes()),
            Some(slot) => {
                let within = u64::from(part.start.within_block()) * SECTOR_SIZE;
                (DeviceIndex::SPARE, geometry.slot_offset(slot) + within)
            }
        };
        match runs.last_mut() {
            Some(last) if last.device == device && last.offset + last.range.bytes() == offset => {
                last.range.count += part.count;
            }
            _ => runs.push(Run { range: part, device, offset }),
        }
    }
    runs
}
