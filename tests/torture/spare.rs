//! What a kill has left on the spare, read from the bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use uuid::Uuid;
use vhost_remap::units::{Block, Slot};
use vhost_remap::volume::layout::{ENTRIES_PER_PAGE, Home, Layout, PAGE, Place};
use vhost_remap::volume::table::{Page, PageSeat, SlotState, Table};

use crate::sector::{Run, SECTOR, Stamp};

const BLOCK: usize = 4096;
/// Slots are given out lowest first, so what is written before the table names it lies among these.
const FREE_SLOTS: usize = 256;

/// The spare of a volume whose server is dead.
pub(crate) struct Spare {
    file: File,
    layout: Layout,
    set: Uuid,
    run: Run,
}

/// What is there.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// Sum of the pages' sequences: grows by one with each page of each commit.
    pub(crate) sequence: u64,
    /// Whether a page differs between its homes.
    pub(crate) uneven: bool,
    /// A page's newest sequence is in one of the two places only: its commit had begun and was not flushed.
    pub(crate) half_written: bool,
    /// A page names a slot with data of a request that has no answer, and its other homes do not.
    pub(crate) unanswered: bool,
    /// Data of requests that have no answer, in slots that no page names.
    pub(crate) unnamed: BTreeSet<(Slot, Stamp)>,
    /// Which blocks live in which slots.
    pub(crate) live: Vec<(Block, Slot)>,
    pub(crate) retired: usize,
    /// The lowest slots that are free.
    pub(crate) free: Vec<Slot>,
}

impl Spare {
    pub(crate) fn open(path: &Path, max_remaps: u32, set: Uuid, run: Run) -> Spare {
        let file = File::open(path).expect("the spare");
        let layout = Layout::new(file.metadata().expect("the spare").len(), max_remaps).expect("as it was made");
        Spare { file, layout, set, run }
    }

    fn read(&self, offset: u64) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        self.file.read_exact_at(&mut page, offset).expect("the spare");
        page
    }

    /// The homes of a page that are whole.
    fn homes(&self, number: u32) -> BTreeMap<(u8, u8), Page> {
        let seats = Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| (place, home)));
        seats
            .filter_map(|(place, home)| {
                let bytes = self.read(self.layout.table(place, home, number));
                let page = Page::decode(&bytes, self.set, number, PageSeat::Spare(place, home))?;
                Some(((place.number(), home.number()), page))
            })
            .collect()
    }

    /// Stamps of these writes that a slot has.
    fn stamps_in(&self, slot: Slot, wanted: &BTreeSet<Stamp>) -> Vec<Stamp> {
        let bytes = self.read(self.layout.slots_start + u64::from(slot.0) * BLOCK as u64);
        let found = bytes.chunks(SECTOR).filter_map(|sector| self.run.identify(sector).ok());
        found.map(|(_, stamp)| stamp).filter(|stamp| wanted.contains(stamp)).collect()
    }

    /// Look at the table, and at slots for data of requests that have no answer.
    ///
    /// # Panics
    /// When the table is not one that a volume may be left with.
    pub(crate) fn look(&self, unanswered: &BTreeSet<Stamp>, blocks: u64) -> Look {
        let mut look = Look::default();
        let mut table = Table::new(self.layout.max_remaps);
        for number in 0..self.layout.table_pages {
            let homes = self.homes(number);
            // Only one home is written at a time, so a kill can spoil that one only; whole pages at that, as
            // nothing tears a write of a page here.
            assert_eq!(homes.len(), 4, "table page {number}: homes {:?} are whole", homes.keys());
            let newest = homes.values().max_by_key(|page| page.sequence).expect("four");
            let oldest = homes.values().min_by_key(|page| page.sequence).expect("four");
            assert!(
                newest.sequence - oldest.sequence <= 1,
                "table page {number}: {} after {}",
                newest.sequence,
                oldest.sequence
            );
            let same = |page: &&Page| page.sequence != newest.sequence || *page == newest;
            assert!(homes.values().all(|page| same(&page)), "table page {number}: two contents of one sequence");
            let at: BTreeSet<u8> =
                homes.iter().filter(|(_, page)| page.sequence == newest.sequence).map(|(seat, _)| seat.0).collect();
            look.sequence += newest.sequence;
            look.uneven |= newest.sequence != oldest.sequence;
            look.half_written |= at.len() == 1;
            for (slot, (new, old)) in
                (number * ENTRIES_PER_PAGE..).map(Slot).zip(newest.entries.iter().zip(&oldest.entries))
            {
                if new != old && new.state == SlotState::Live && !self.stamps_in(slot, unanswered).is_empty() {
                    look.unanswered = true;
                }
            }
            table.load_page(number, newest, Home::A);
        }
        let (live, superseded) = table.resolve(blocks);
        assert_eq!(live.len() + superseded.len(), table.live(), "blocks beyond the end of the volume");
        look.retired = table.retired();
        look.live = live.into_iter().map(|(block, (slot, _))| (block, slot)).collect();
        let free = (0..self.layout.max_remaps).map(Slot).filter(|slot| table.entry(*slot).state == SlotState::Free);
        look.free = free.take(FREE_SLOTS).collect();
        for slot in &look.free {
            look.unnamed.extend(self.stamps_in(*slot, unanswered).into_iter().map(|stamp| (*slot, stamp)));
        }
        look
    }
}
