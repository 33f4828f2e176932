//! Whether a crash tears pages of the table, and not only leaves them old or new.

use std::collections::BTreeMap;
use std::ops::Range;

use vhost_remap::volume::layout::{Layout, PAGE, PAGE_SIZE, Place};

use super::store::{Content, Volatile};
use super::{Disk, NEVER};
use crate::guest::SECTOR;

/// Where a spare's pages of the table are: sectors.
pub(crate) fn tables(layout: &Layout) -> Vec<Range<usize>> {
    let sectors = |place| {
        let first = layout.counters(place) + PAGE_SIZE;
        let end = first + 2 * u64::from(layout.table_pages) * PAGE_SIZE;
        [first, end].map(|offset| usize::try_from(offset).expect("small disks") / SECTOR)
    };
    Place::ALL.map(sectors).map(|[first, end]| first..end).to_vec()
}

impl Disk {
    fn is_in_table(&self, sector: usize) -> bool {
        self.tables.iter().any(|table| table.contains(&sector))
    }

    /// The last write did not bring this to the sector.
    pub(super) fn note_missed(&mut self, sector: usize, content: Content) {
        if self.is_in_table(sector) && !self.store.are_alike(content, self.current[sector]) {
            self.missed.push((sector, self.completed));
        }
    }

    /// The process is gone, and what it had under way is done as far as it ever will be.
    pub(crate) fn killed(&mut self) {
        let left: Vec<Volatile> =
            self.cache.iter().filter(|volatile| self.is_in_table(volatile.sector)).cloned().collect();
        self.count_torn(&left);
    }

    /// Count the pages of the table that a crash has torn between their entries: of the sectors that the last write
    /// to the page was to change, one is changed and one is not. Only one of the two can hold the header.
    pub(super) fn count_torn(&mut self, volatile: &[Volatile]) {
        let page = |sector| sector / (PAGE / SECTOR);
        let mut sectors: BTreeMap<(usize, u64), [bool; 2]> = BTreeMap::new();
        for Volatile { sector, durable, later } in volatile.iter().filter(|volatile| self.is_in_table(volatile.sector))
        {
            let Some(((number, newest), earlier)) = later.split_last() else { continue };
            let before = earlier.last().map_or(*durable, |(_, content)| *content);
            if *number != NEVER && !self.store.are_alike(*newest, before) {
                let kept = self.current[*sector] == *newest;
                sectors.entry((page(*sector), *number)).or_default()[usize::from(kept)] = true;
            }
        }
        for (sector, number) in std::mem::take(&mut self.missed) {
            sectors.entry((page(sector), number)).or_default()[0] = true;
        }
        self.torn_tables += sectors.values().filter(|[lost, kept]| *lost && *kept).count();
    }
}
