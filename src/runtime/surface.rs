//! A map of the disk: equal ranges of sectors, and how much trouble lies in each.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::report::{ListEntry, SCHEMA_VERSION};
use crate::engine::scan::Scanned;
use crate::units::{Block, SECTORS_PER_BLOCK, Sector, SectorRange};

/// The most cells a map has.
pub const CELLS_MAX: u64 = 65_536;

/// The map. Cells without trouble are not named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SurfaceReport {
    /// [`SCHEMA_VERSION`].
    pub schema: u32,
    /// Size of the disk, in 512-byte sectors.
    pub capacity_sectors: u64,
    /// Sectors in a cell; the last one may have fewer.
    pub sectors_per_cell: u64,
    /// Cells there are, at most as many as were asked for.
    pub cells: u64,
    /// Cells with trouble, by address.
    pub marked: Vec<SurfaceCell>,
    /// Cells of which the scanner has not read all yet: first cell and number of cells of each stretch.
    #[serde(default)]
    pub not_scanned: Vec<(u64, u64)>,
}

/// A cell with trouble.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SurfaceCell {
    /// Its number, from 0.
    pub cell: u64,
    /// First sector of the first block in trouble.
    pub first: u64,
    /// Last sector of the last block in trouble.
    pub last: u64,
    /// Pending blocks.
    pub pending: u64,
    /// Remapped blocks.
    pub remapped: u64,
    /// Lost sectors.
    pub lost: u64,
    /// Blocks far slower than their neighbours.
    #[serde(default)]
    pub slow: u64,
}

/// A disk of `capacity` sectors in at most `cells` cells.
pub fn empty(capacity: u64, cells: u64) -> SurfaceReport {
    let blocks = capacity.div_ceil(SECTORS_PER_BLOCK);
    let blocks_per_cell = blocks.div_ceil(cells.clamp(1, CELLS_MAX)).max(1);
    SurfaceReport {
        schema: SCHEMA_VERSION,
        capacity_sectors: capacity,
        sectors_per_cell: blocks_per_cell * SECTORS_PER_BLOCK,
        cells: blocks.div_ceil(blocks_per_cell),
        marked: Vec::new(),
        not_scanned: Vec::new(),
    }
}

impl SurfaceReport {
    /// Put down what the scanner knows.
    pub fn add_scan(&mut self, slow: &BTreeSet<Block>, scanned: &Scanned) {
        for block in slow {
            let (first, cell) = (block.start().0, block.start().0 / self.sectors_per_cell);
            let last = (first + SECTORS_PER_BLOCK).min(self.capacity_sectors) - 1;
            let at = self.marked.partition_point(|marked| marked.cell < cell);
            if self.marked.get(at).is_none_or(|marked| marked.cell != cell) {
                self.marked.insert(at, SurfaceCell { cell, first, last, ..SurfaceCell::default() });
            }
            let found = &mut self.marked[at];
            (found.first, found.last, found.slow) = (found.first.min(first), found.last.max(last), found.slow + 1);
        }
        for cell in 0..self.cells {
            let start = cell * self.sectors_per_cell;
            let count = self.sectors_per_cell.min(self.capacity_sectors - start);
            if scanned.has(SectorRange { start: Sector(start), count }) {
                continue;
            }
            match self.not_scanned.last_mut() {
                Some((first, cells)) if *first + *cells == cell => *cells += 1,
                _ => self.not_scanned.push((cell, 1)),
            }
        }
    }

    /// Put down a block of `list`; they come by address.
    pub fn add(&mut self, entry: &ListEntry) {
        let is = |name: &str| u64::from(entry.state.iter().any(|state| state == name));
        let (pending, remapped) = (is("pending"), is("remapped"));
        if pending + remapped == 0 {
            return;
        }
        let cell = entry.sector / self.sectors_per_cell;
        if self.marked.last().is_none_or(|last| last.cell != cell) {
            self.marked.push(SurfaceCell { cell, first: entry.sector, ..SurfaceCell::default() });
        }
        let found = self.marked.last_mut().expect("just pushed where there was none");
        found.last = entry.sector.saturating_add(u64::from(entry.sectors)).saturating_sub(1);
        found.pending += pending;
        found.remapped += remapped;
        found.lost += entry.lost.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sector: u64, states: &[&str], lost: &[u64]) -> ListEntry {
        ListEntry {
            sector,
            sectors: 8,
            state: states.iter().map(|state| (*state).to_owned()).collect(),
            slot: None,
            lost: lost.to_vec(),
            pending: Vec::new(),
            primary_stale: false,
        }
    }

    #[test]
    fn every_sector_lies_in_one_cell() {
        for capacity in [1, 7, 8, 9, 4096, 20_971_520, 1 << 50] {
            for cells in [0, 1, 2, 3, 1000, 1024, CELLS_MAX, u64::MAX] {
                let surface = empty(capacity, cells);
                assert!(surface.cells <= cells.clamp(1, CELLS_MAX), "{capacity} {cells}");
                assert!((surface.cells - 1) * surface.sectors_per_cell < capacity, "{capacity} {cells}");
                assert!(surface.cells * surface.sectors_per_cell >= capacity, "{capacity} {cells}");
            }
        }
        assert_eq!(empty(0, 100).cells, 0);
    }

    #[test]
    fn a_cell_counts_what_lies_in_it() {
        let mut surface = empty(4096, 4);
        for entry in [
            entry(16, &["remapped"], &[17, 18]),
            entry(1016, &["remapped", "pending"], &[]),
            entry(1024, &["pending"], &[]),
            entry(2048, &["in-doubt"], &[]),
            entry(4088, &["remapped"], &[]),
        ] {
            surface.add(&entry);
        }
        let cell = |cell, first, last, pending, remapped, lost| SurfaceCell {
            cell,
            first,
            last,
            pending,
            remapped,
            lost,
            slow: 0,
        };
        let expected = [cell(0, 16, 1023, 1, 2, 2), cell(1, 1024, 1031, 1, 0, 0), cell(3, 4088, 4095, 0, 1, 0)];
        assert_eq!((surface.sectors_per_cell, surface.marked), (1024, expected.to_vec()));
    }

    #[test]
    fn a_cell_is_scanned_when_all_of_it_was_and_slow_blocks_are_put_where_they_lie() {
        // 300 units of 1 MiB, of which a pass has read the first of each region, and unit 1.
        let extent = SectorRange { start: Sector(0), count: 300 * 2048 };
        let scanned = Scanned { extent, position: 4, skipped: Vec::new() };
        let mut surface = empty(extent.count, 300);
        surface.add(&entry(3 * 2048 + 64, &["pending"], &[]));
        surface.add_scan(&BTreeSet::from([Block(3 * 256), Block(7 * 256 + 1)]), &scanned);
        assert_eq!(surface.not_scanned, [(2, 126), (129, 127), (257, 43)]);
        let marked: Vec<_> = surface.marked.iter().map(|cell| (cell.cell, cell.first, cell.last, cell.slow)).collect();
        assert_eq!(marked, [(3, 3 * 2048, 3 * 2048 + 71, 1), (7, 7 * 2048 + 8, 7 * 2048 + 15, 1)]);
        let mut coarse = empty(extent.count, 150);
        coarse.add_scan(&BTreeSet::new(), &scanned);
        assert_eq!(coarse.not_scanned, [(1, 149)], "a cell of which a half was read is not done");
        let mut all = empty(extent.count + 2048, 301);
        let skipped = vec![SectorRange { start: Sector(5 * 2048 + 8), count: 8 }];
        all.add_scan(&BTreeSet::new(), &Scanned { extent, position: u64::MAX, skipped });
        assert_eq!(all.not_scanned, [(5, 1), (300, 1)], "what was skipped, and by what the disk has grown since");
    }
}
