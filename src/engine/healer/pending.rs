//! Pending blocks: those whose last read failed on the medium. Advisory, in memory, bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Core;
use crate::engine::view::View;
use crate::units::{Block, BlockRange, SectorRange};

/// Blocks kept exactly, at most; beyond, a region counts as a whole.
const EXACT_MAX: usize = 65_536;

/// Which sectors failed when they were last read.
#[derive(Debug, Default)]
pub(super) struct PendingSectors {
    exact: BTreeMap<Block, u8>,
    /// Those of them that live in slots.
    in_slots: BTreeSet<Block>,
    /// Regions in which more failed than are kept.
    regions: Arc<BTreeSet<u64>>,
}

impl PendingSectors {
    /// Blocks known exactly.
    pub(super) fn len(&self) -> usize {
        self.exact.len()
    }

    /// Those on the primary, and those in slots.
    pub(super) fn by_device(&self) -> [u64; 2] {
        let in_slots = self.in_slots.len() as u64;
        [self.exact.len() as u64 - in_slots, in_slots]
    }

    fn insert(&mut self, block: Block, mask: u8, in_slot: bool) {
        self.exact.insert(block, mask);
        if in_slot {
            self.in_slots.insert(block);
        }
    }

    /// The block reads again, or has moved: what was known of its old place does not matter.
    pub(super) fn forget(&mut self, block: Block) {
        self.exact.remove(&block);
        self.in_slots.remove(&block);
    }

    fn in_region(&self, block: Block) -> bool {
        self.regions.contains(&(block.0 / View::REGION_BLOCKS))
    }

    /// Regions with more pending blocks than are kept.
    pub(super) fn dense(&self) -> Arc<BTreeSet<u64>> {
        self.regions.clone()
    }

    /// Those of `blocks` that are known exactly.
    pub(super) fn in_range(&self, blocks: BlockRange) -> impl Iterator<Item = Block> {
        self.exact.range(blocks.start..blocks.end).map(|(block, _)| *block)
    }

    /// Sectors of a block (bit mask) that failed.
    pub(super) fn mask(&self, block: Block) -> u8 {
        self.exact.get(&block).copied().unwrap_or(0)
    }
}

impl Core {
    /// Sectors `mask` of `block` were proven bad by a read.
    pub(super) fn note_bad(&self, block: Block, mask: u8) {
        let mut pending = self.pending.borrow_mut();
        if let Some(known) = pending.exact.get_mut(&block) {
            *known |= mask;
            return;
        }
        if pending.exact.len() >= EXACT_MAX {
            Arc::make_mut(&mut pending.regions).insert(block.0 / View::REGION_BLOCKS);
            self.view_stale.set(true);
            return;
        }
        pending.insert(block, mask, self.map.borrow().get(block).slot.is_some());
        drop(pending);
        self.update_map(block, |state| state.pending = true);
    }

    /// The sectors of `range` were read or written well.
    pub(super) fn note_good(&self, range: SectorRange) {
        if self.pending.borrow().exact.is_empty() {
            return;
        }
        for block in range.blocks().iter() {
            let mut pending = self.pending.borrow_mut();
            let Some(known) = pending.exact.get_mut(&block) else { continue };
            *known &= !range.mask_in(block);
            if *known == 0 {
                pending.forget(block);
                drop(pending);
                self.update_map(block, |state| state.pending = false);
            }
        }
    }

    /// Whether a write to the block must be verified: its last read failed, or it lies in a region where
    /// too many did.
    pub(super) fn is_pending(&self, block: Block) -> bool {
        let pending = self.pending.borrow();
        pending.exact.contains_key(&block) || pending.in_region(block)
    }
}
