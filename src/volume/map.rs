//! The map: an immutable snapshot of every block that is not simply on the primary.
//!
//! A radix tree with shared leaves. A block that lives on the primary with nothing to say of it costs
//! one pointer test where its 4 GiB or its 4 MiB hold nothing special, and one bit test elsewhere.
//! Changing a block copies its leaf and the two nodes above, so that publishing a snapshot costs what
//! changed and not the size of the table.

use std::sync::Arc;

use crate::units::{Block, BlockRange, Slot};

/// Blocks in a leaf (4 MiB).
const LEAF_BLOCKS: u64 = 1024;
/// Leaves under an inner node (4 GiB).
const NODE_LEAVES: u64 = 1024;
const WORDS: usize = (LEAF_BLOCKS / 64) as usize;

/// What is special about a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockState {
    /// Where it lives, if not on the primary.
    pub slot: Option<Slot>,
    /// Sectors (bit mask) whose content no device holds; only with a slot.
    pub lost: u8,
    /// The primary no longer holds the last content of the lost sectors: never look there.
    pub primary_stale: bool,
    /// Its last read failed on the medium, or it lies in a region of which too many did.
    pub pending: bool,
    /// A commit for it is in doubt: writes fail until that is resolved.
    pub in_doubt: bool,
    /// Sectors (bit mask) the write in doubt covered: their reads fail too.
    pub doubt: u8,
}

impl BlockState {
    /// Whether there is nothing to remember.
    pub fn is_plain(&self) -> bool {
        *self == BlockState::default()
    }
}

#[derive(Clone, Debug)]
struct Leaf {
    /// Bit per block: whether it has an entry.
    present: [u64; WORDS],
    /// Entries before each word of `present`.
    rank: [u16; WORDS],
    /// In block order.
    entries: Vec<BlockState>,
}

#[derive(Clone, Debug)]
struct Node {
    /// As many as the volume has under this node.
    leaves: Vec<Option<Arc<Leaf>>>,
}

/// A snapshot. Cloning is cheap; changing one leaves its clones as they were.
#[derive(Clone, Debug)]
pub struct Map {
    root: Arc<Vec<Option<Arc<Node>>>>,
    blocks: u64,
    len: usize,
}

impl Leaf {
    fn new() -> Leaf {
        Leaf { present: [0; WORDS], rank: [0; WORDS], entries: Vec::new() }
    }

    fn index(&self, at: usize) -> Result<usize, usize> {
        let (word, bit) = (at / 64, at % 64);
        let before = usize::from(self.rank[word]) + (self.present[word] & ((1 << bit) - 1)).count_ones() as usize;
        if self.present[word] >> bit & 1 == 1 { Ok(before) } else { Err(before) }
    }

    fn shift_rank(&mut self, from_word: usize, up: bool) {
        for rank in &mut self.rank[from_word + 1..] {
            *rank = if up { *rank + 1 } else { *rank - 1 };
        }
    }

    fn set(&mut self, at: usize, state: BlockState) -> i8 {
        let (word, bit) = (at / 64, at % 64);
        match (self.index(at), state.is_plain()) {
            (Ok(i), false) => {
                self.entries[i] = state;
                0
            }
            (Ok(i), true) => {
                self.entries.remove(i);
                self.present[word] &= !(1 << bit);
                self.shift_rank(word, false);
                -1
            }
            (Err(i), false) => {
                self.entries.insert(i, state);
                self.present[word] |= 1 << bit;
                self.shift_rank(word, true);
                1
            }
            (Err(_), true) => 0,
        }
    }

    /// The entries from `at` on.
    fn iter_from(&self, at: usize) -> impl Iterator<Item = (u64, BlockState)> + '_ {
        let first = at / 64;
        let words = self.present.iter().zip(0..).skip(first);
        let places = words.flat_map(move |(present, word)| {
            let hidden = if word == first as u64 { !0 << (at % 64) } else { !0 };
            bits_of(present & hidden).map(move |bit| word * 64 + u64::from(bit))
        });
        let before = self.index(at).unwrap_or_else(|before| before);
        places.zip(self.entries[before..].iter().copied())
    }

    fn any(&self, from: usize, to: usize) -> bool {
        let (first, last) = (from / 64, (to - 1) / 64);
        (first..=last).any(|word| {
            let mut bits = self.present[word];
            if word == first {
                bits &= !0 << (from % 64);
            }
            if word == last && !to.is_multiple_of(64) {
                bits &= (1 << (to % 64)) - 1;
            }
            bits != 0
        })
    }
}

/// The bits that are set, lowest first.
fn bits_of(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        (word != 0).then(|| {
            word &= word - 1;
            bit
        })
    })
}

fn split(block: Block) -> (usize, usize, usize) {
    let leaf = block.0 / LEAF_BLOCKS;
    let fits = |n: u64| usize::try_from(n).expect("block numbers are at most 40 bits wide");
    (fits(leaf / NODE_LEAVES), fits(leaf % NODE_LEAVES), fits(block.0 % LEAF_BLOCKS))
}

impl Map {
    /// A map of `blocks` blocks, all plain.
    pub fn new(blocks: u64) -> Map {
        let nodes = blocks.div_ceil(LEAF_BLOCKS * NODE_LEAVES);
        let root = vec![None; usize::try_from(nodes).expect("at most 2^20 nodes for 40-bit block numbers")];
        Map { root: Arc::new(root), blocks, len: 0 }
    }

    /// Speak of `blocks` blocks from now on, at least as many as before; those that are new are plain.
    pub fn grow(&mut self, blocks: u64) {
        let leaves_of = |node: u64| (blocks.div_ceil(LEAF_BLOCKS) - node * NODE_LEAVES).min(NODE_LEAVES);
        let root = Arc::make_mut(&mut self.root);
        // Only the last node may have had less than its share.
        if let Some((Some(node), number)) = root.iter_mut().zip(0_u64..).last() {
            let leaves = usize::try_from(leaves_of(number)).expect("a small number");
            Arc::make_mut(node).leaves.resize(leaves, None);
        }
        let nodes = blocks.div_ceil(LEAF_BLOCKS * NODE_LEAVES);
        root.resize(usize::try_from(nodes).expect("at most 2^20 nodes for 40-bit block numbers"), None);
        self.blocks = blocks;
    }

    /// Blocks the map speaks of, plain ones included.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks that are not plain.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether every block is plain.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is special about `block`; the default where nothing is.
    #[inline]
    pub fn get(&self, block: Block) -> BlockState {
        let (node, leaf, at) = split(block);
        let Some(Some(node)) = self.root.get(node) else { return BlockState::default() };
        let Some(Some(leaf)) = node.leaves.get(leaf) else { return BlockState::default() };
        leaf.index(at).map_or_else(|_| BlockState::default(), |i| leaf.entries[i])
    }

    /// Whether every block of the range is plain.
    #[inline]
    pub fn is_plain(&self, range: BlockRange) -> bool {
        let mut block = range.start.0;
        while block < range.end.0 {
            let (node, leaf, at) = split(Block(block));
            let Some(Some(node)) = self.root.get(node) else {
                block = (block / (LEAF_BLOCKS * NODE_LEAVES) + 1) * LEAF_BLOCKS * NODE_LEAVES;
                continue;
            };
            let end = ((block / LEAF_BLOCKS + 1) * LEAF_BLOCKS).min(range.end.0);
            if let Some(Some(leaf)) = node.leaves.get(leaf) {
                let count = usize::try_from(end - block).expect("at most a leaf");
                if leaf.any(at, at + count) {
                    return false;
                }
            }
            block = end;
        }
        true
    }

    /// Remember `state` for `block`; a plain state forgets it.
    pub fn set(&mut self, block: Block, state: BlockState) {
        assert!(block.0 < self.blocks, "block {block} lies beyond the map's {} blocks", self.blocks);
        let (node, leaf, at) = split(block);
        let root = Arc::make_mut(&mut self.root);
        if state.is_plain() && root[node].as_ref().is_none_or(|n| n.leaves[leaf].is_none()) {
            return;
        }
        let node_ref = root[node].get_or_insert_with(|| {
            let leaves = self.blocks.div_ceil(LEAF_BLOCKS) - node as u64 * NODE_LEAVES;
            Arc::new(Node { leaves: vec![None; usize::try_from(leaves.min(NODE_LEAVES)).expect("a small number")] })
        });
        let inner = Arc::make_mut(node_ref);
        let leaf_ref = inner.leaves[leaf].get_or_insert_with(|| Arc::new(Leaf::new()));
        let change = Arc::make_mut(leaf_ref).set(at, state);
        if leaf_ref.entries.is_empty() {
            inner.leaves[leaf] = None;
            if inner.leaves.iter().all(Option::is_none) {
                root[node] = None;
            }
        }
        self.len = self.len.checked_add_signed(isize::from(change)).expect("the count follows the entries");
    }

    /// The special blocks from `from` on, in order.
    pub fn iter_from(&self, from: Block) -> impl Iterator<Item = (Block, BlockState)> + '_ {
        let (first_node, first_leaf, first_at) = split(from);
        self.root.iter().enumerate().skip(first_node).filter_map(|(n, node)| Some((n, node.as_ref()?))).flat_map(
            move |(n, node)| {
                let skip = if n == first_node { first_leaf } else { 0 };
                node.leaves.iter().enumerate().skip(skip).filter_map(|(l, leaf)| Some((l, leaf.as_ref()?))).flat_map(
                    move |(l, leaf)| {
                        let skip = if (n, l) == (first_node, first_leaf) { first_at } else { 0 };
                        let base = (n as u64 * NODE_LEAVES + l as u64) * LEAF_BLOCKS;
                        leaf.iter_from(skip).map(move |(at, state)| (Block(base + at), state))
                    },
                )
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn slot(n: u32) -> BlockState {
        BlockState { slot: Some(Slot(n)), ..BlockState::default() }
    }

    /// A map and a plain tree told the same things give the same answers.
    #[test]
    fn agrees_with_a_tree_under_random_changes() {
        let blocks = 3 * LEAF_BLOCKS * NODE_LEAVES + 77;
        let mut map = Map::new(blocks);
        let mut model = BTreeMap::new();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for step in 0..if cfg!(miri) { 20 } else { 20_000_u32 } {
            let base = [0, LEAF_BLOCKS - 8, LEAF_BLOCKS * NODE_LEAVES - 8, blocks - 16][next(4) as usize];
            let block = Block(base + next(16));
            if next(3) == 0 {
                map.set(block, BlockState::default());
                model.remove(&block);
            } else {
                map.set(block, slot(step));
                model.insert(block, slot(step));
            }
            let probe = Block(base + next(16));
            assert_eq!(map.get(probe), model.get(&probe).copied().unwrap_or_default());
            let range = BlockRange { start: block, end: Block((block.0 + next(40)).min(blocks)) };
            let plain = model.range(range.start..range.end).next().is_none();
            assert_eq!(map.is_plain(range), plain, "step {step}, {range:?}");
            assert_eq!(map.len(), model.len());
        }
        assert!(map.iter_from(Block(0)).eq(model.iter().map(|(b, s)| (*b, *s))));
        let half = Block(LEAF_BLOCKS);
        assert!(map.iter_from(half).eq(model.range(half..).map(|(b, s)| (*b, *s))));
    }

    #[test]
    fn a_map_that_has_grown_takes_new_blocks_and_keeps_the_old_ones() {
        let node = LEAF_BLOCKS * NODE_LEAVES;
        for before in [1, 8, LEAF_BLOCKS, node - 1, node, node + 1] {
            for after in [before, before + 1, before + LEAF_BLOCKS, before + node, before + 2 * node] {
                let mut map = Map::new(before);
                map.set(Block(before - 1), slot(1));
                let old = map.clone();
                map.grow(after);
                assert_eq!((map.blocks(), old.blocks()), (after, before));
                map.set(Block(after - 1), slot(2));
                let last = if after == before { 2 } else { 1 };
                assert_eq!((map.get(Block(before - 1)), map.get(Block(after - 1))), (slot(last), slot(2)));
                assert_eq!(old.iter_from(Block(0)).collect::<Vec<_>>(), [(Block(before - 1), slot(1))]);
            }
        }
    }

    #[test]
    fn a_clone_keeps_the_old_state() {
        let mut map = Map::new(100);
        map.set(Block(7), slot(1));
        let old = map.clone();
        map.set(Block(7), slot(2));
        assert_eq!(old.get(Block(7)), slot(1));
        assert_eq!(map.get(Block(7)), slot(2));
    }
}
