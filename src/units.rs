//! The units every layer counts in: sectors, blocks, slots and time.
//!
//! A *sector* is 512 bytes, the unit of every virtio-blk address (virtio 1.3 §5.2.6); a *block* is
//! 4096 bytes, the unit that is remapped; a *slot* is a block-sized place on the spare. [`Time`] is
//! nanoseconds since an arbitrary start, handed in by whoever drives the code: nothing below the
//! runtime reads a clock.

use std::fmt;

/// Bytes in a sector.
pub const SECTOR_SIZE: u64 = 512;
/// Bytes in a block.
pub const BLOCK_SIZE: u64 = 4096;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE / SECTOR_SIZE;

/// A 512-byte logical block address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

/// A 4096-byte block number on the primary: block `n` covers sectors `8n` to `8n + 7`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

/// A block-sized place on the spare, counted from the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// Nanoseconds since the start of the driver's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Sector {
    /// The block this sector lies in.
    pub fn block(self) -> Block {
        Block(self.0 / SECTORS_PER_BLOCK)
    }

    /// The place of this sector within its block, 0 to 7.
    pub fn within_block(self) -> u32 {
        u32::try_from(self.0 % SECTORS_PER_BLOCK).expect("a remainder of 8 fits")
    }

    /// Byte offset of the sector's start.
    pub fn bytes(self) -> u64 {
        self.0.checked_mul(SECTOR_SIZE).expect("sector addresses were checked against the capacity")
    }
}

impl Block {
    /// First sector of the block.
    pub fn start(self) -> Sector {
        Sector(self.0.checked_mul(SECTORS_PER_BLOCK).expect("block numbers were checked against the capacity"))
    }

    /// Byte offset of the block's start.
    pub fn bytes(self) -> u64 {
        self.start().bytes()
    }
}

impl Time {
    /// One second later per unit of `seconds`.
    pub const fn plus_secs(self, seconds: u64) -> Time {
        self.plus_ns(seconds.saturating_mul(1_000_000_000))
    }

    /// `ns` nanoseconds later.
    pub const fn plus_ns(self, ns: u64) -> Time {
        Time(self.0.saturating_add(ns))
    }

    /// Nanoseconds from `earlier` to here; 0 if `earlier` is later.
    pub const fn since_ns(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A run of sectors: `count` sectors from `start`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SectorRange {
    /// First sector.
    pub start: Sector,
    /// Number of sectors.
    pub count: u64,
}

impl SectorRange {
    /// The sector after the last one, or `None` where the sum does not fit in 64 bits.
    pub fn checked_end(self) -> Option<Sector> {
        self.start.0.checked_add(self.count).map(Sector)
    }

    /// The sector after the last one.
    ///
    /// # Panics
    /// If the sum overflows: callers have compared the range with the capacity.
    pub fn end(self) -> Sector {
        self.checked_end().expect("the range was checked against the capacity")
    }

    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        self.count.checked_mul(SECTOR_SIZE).expect("the range was checked against the capacity")
    }

    /// Whether the range has no sector.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The blocks the range touches, also those it covers only in part.
    pub fn blocks(self) -> BlockRange {
        if self.is_empty() {
            return BlockRange { start: self.start.block(), end: self.start.block() };
        }
        let last = Sector(self.end().0 - 1);
        BlockRange { start: self.start.block(), end: Block(last.block().0 + 1) }
    }

    /// The part of this range that lies in `block`.
    pub fn within(self, block: Block) -> SectorRange {
        let start = self.start.max(block.start());
        let end = self.end().min(Sector(block.start().0 + SECTORS_PER_BLOCK));
        SectorRange { start, count: end.0.saturating_sub(start.0) }
    }

    /// Bit `i` is set where the range covers sector `i` of `block`.
    pub fn mask_in(self, block: Block) -> u8 {
        let part = self.within(block);
        sector_mask(part.start.within_block(), part.count)
    }
}

/// A mask of `count` sectors from sector `first` of a block.
pub fn sector_mask(first: u32, count: u64) -> u8 {
    if count == 0 {
        return 0;
    }
    let ones = if count >= SECTORS_PER_BLOCK { 0xff_u32 } else { (1 << count) - 1 };
    u8::try_from((ones << first) & 0xff).expect("masked to eight bits")
}

/// Blocks `start` up to but not including `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// First block.
    pub start: Block,
    /// The block after the last one.
    pub end: Block,
}

impl BlockRange {
    /// The range that holds just `block`.
    pub fn one(block: Block) -> BlockRange {
        BlockRange { start: block, end: Block(block.0 + 1) }
    }

    /// Whether the two ranges share a block.
    pub fn overlaps(self, other: BlockRange) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether `block` is in the range.
    pub fn contains(self, block: Block) -> bool {
        self.start <= block && block < self.end
    }

    /// Number of blocks.
    pub fn len(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether the range has no block.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Each block in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Block> {
        (self.start.0..self.end.0).map(Block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_blocks_of_a_range_that_straddles_blocks() {
        let range = SectorRange { start: Sector(6), count: 12 };
        assert_eq!(range.blocks(), BlockRange { start: Block(0), end: Block(3) });
        assert_eq!(range.mask_in(Block(0)), 0b1100_0000);
        assert_eq!(range.mask_in(Block(1)), 0xff);
        assert_eq!(range.mask_in(Block(2)), 0b0000_0011);
    }

    #[test]
    fn an_empty_range_touches_nothing() {
        let range = SectorRange { start: Sector(9), count: 0 };
        assert!(range.blocks().is_empty());
        assert_eq!(range.mask_in(Block(1)), 0);
    }
}
