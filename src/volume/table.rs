//! The table: for each slot, the block that lives in it. Slot-indexed, so that no two blocks can share
//! a slot; 8 bytes an entry, 508 entries a page.
//!
//! A page begins with a header of 32 bytes: magic `VRTP` (4), set tag (4), page number (4), CRC32C (4),
//! sequence (8), place (1: 0 head, 1 tail, 2 label), home (1: 0 A, 1 B), zeros (6). An entry holds, from
//! bit 0: block 40, lost mask 8, incarnation 4, copy index 2, state 3, primary stale 1, zeros 6.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::layout::{ENTRIES_PER_PAGE, Home, PAGE, Place};
use super::superblock::{Fields, FieldsMut, NUMBER_END, page_crc};
use crate::units::{Block, Slot};

const MAGIC: [u8; 4] = *b"VRTP";
const HEADER: usize = 32;

/// What a slot is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Nothing.
    Free,
    /// A block lives in it.
    Live,
    /// It failed and is never used again.
    Retired,
}

/// One slot's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The block, where live.
    pub block: Block,
    /// Sectors whose content no device holds.
    pub lost: u8,
    /// Modulo 16; of two live entries for a block the later one counts.
    pub incarnation: u8,
    /// Which copy of the block this is; 0 while slots have one copy.
    pub copy: u8,
    /// The slot's use.
    pub state: SlotState,
    /// The primary no longer holds the last content of the lost sectors.
    pub primary_stale: bool,
}

impl Entry {
    /// An unused slot.
    pub const FREE: Entry =
        Entry { block: Block(0), lost: 0, incarnation: 0, copy: 0, state: SlotState::Free, primary_stale: false };
    /// A slot that failed.
    pub const RETIRED: Entry = Entry { state: SlotState::Retired, ..Entry::FREE };

    fn encode(self) -> u64 {
        assert!(self.block.0 < 1 << 40, "block numbers are 40 bits wide");
        let state = match self.state {
            SlotState::Free => 0,
            SlotState::Live => 1,
            SlotState::Retired => 2_u64,
        };
        self.block.0
            | u64::from(self.lost) << 40
            | u64::from(self.incarnation & 15) << 48
            | u64::from(self.copy & 3) << 52
            | state << 54
            | u64::from(self.primary_stale) << 57
    }

    fn decode(raw: u64) -> Option<Entry> {
        let byte = |shift: u32, mask: u64| u8::try_from(raw >> shift & mask).expect("masked to a byte");
        let state = match raw >> 54 & 7 {
            // Nothing else is said of it.
            0 => return (raw >> 58 == 0).then_some(Entry::FREE),
            1 => SlotState::Live,
            2 => SlotState::Retired,
            _ => return None,
        };
        (raw >> 58 == 0).then_some(Entry {
            block: Block(raw & ((1 << 40) - 1)),
            lost: byte(40, 0xff),
            incarnation: byte(48, 15),
            copy: byte(52, 3),
            state,
            primary_stale: raw >> 57 & 1 == 1,
        })
    }
}

/// Whether incarnation `a` came after `b`, in arithmetic modulo 16: a block has at most two live entries
/// at any time, and the later is the earlier plus one.
pub fn incarnation_after(a: u8, b: u8) -> bool {
    matches!(a.wrapping_sub(b) & 15, 1..=7)
}

/// Where a table page was read from, or is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSeat {
    /// A home in a place on the spare.
    Spare(Place, Home),
    /// The stamped copy in the primary's label.
    Label,
}

impl PageSeat {
    fn bytes(self) -> [u8; 2] {
        match self {
            PageSeat::Spare(place, home) => [place.number(), home.number()],
            PageSeat::Label => [2, 0],
        }
    }
}

/// The bits of the set UUID that mark its pages.
pub fn set_tag(set: Uuid) -> u32 {
    let bytes = set.as_bytes();
    u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]])
}

/// A verified page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Raised by one with each commit.
    pub sequence: u64,
    /// [`ENTRIES_PER_PAGE`] entries.
    pub entries: Vec<Entry>,
}

impl Page {
    /// The bytes of page `number` for `seat`.
    pub fn encode(&self, set: Uuid, number: u32, seat: PageSeat) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        let mut f = FieldsMut(&mut page);
        f.bytes(0, &MAGIC);
        f.u32(4, set_tag(set));
        f.u32(8, number);
        f.u64(16, self.sequence);
        f.bytes(24, &seat.bytes());
        for (raw, entry) in page[HEADER..].chunks_exact_mut(8).zip(&self.entries) {
            // Most are free as a rule, and zeros.
            if entry.state != SlotState::Free {
                raw.copy_from_slice(&entry.encode().to_le_bytes());
            }
        }
        let crc = page_crc(&page, 12);
        FieldsMut(&mut page).u32(12, crc);
        page
    }

    /// Verify bytes read from `seat`: `None` unless they are page `number` of this set, whole, in the
    /// place it was written for.
    pub fn decode(bytes: &[u8], set: Uuid, number: u32, seat: PageSeat) -> Option<Page> {
        let f = Fields(bytes);
        let ours = f.array(0) == MAGIC
            && f.u32(4) == set_tag(set)
            && f.u32(8) == number
            && f.array(24) == seat.bytes()
            && f.u64(16) < NUMBER_END
            && f.u32(12) == page_crc(bytes, 12);
        if !ours {
            return None;
        }
        let mut entries = vec![Entry::FREE; ENTRIES_PER_PAGE as usize];
        for (entry, raw) in entries.iter_mut().zip(bytes[HEADER..].chunks_exact(8)) {
            let raw = u64::from_le_bytes(raw.try_into().expect("eight bytes"));
            // Most are free as a rule, and zeros.
            if raw != 0 {
                *entry = Entry::decode(raw)?;
            }
        }
        Some(Page { sequence: f.u64(16), entries })
    }
}

/// What is known of a page beside its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    /// Of its last durable commit, or of the last one tried where that is in doubt.
    pub sequence: u64,
    /// The home of its last flushed commit, the same in all places: never the one written next.
    pub anchor: Home,
}

/// The table in memory: durable entries, and which free slots are spoken for.
#[derive(Clone, Debug)]
pub struct Table {
    entries: Vec<Entry>,
    pages: Vec<PageState>,
    /// Free in the table but not to be given out: reserved by a job, or its freeing commit is not done.
    reserved: Vec<bool>,
    lowest_free: usize,
    live: usize,
    retired: usize,
    available: usize,
}

/// One entry to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The slot.
    pub slot: Slot,
    /// Its new entry.
    pub entry: Entry,
}

fn at(slot: Slot) -> usize {
    usize::try_from(slot.0).expect("32 bits fit")
}

/// The page that holds a slot's entry.
pub fn page_of(slot: Slot) -> u32 {
    slot.0 / ENTRIES_PER_PAGE
}

impl Table {
    /// A table of `max_remaps` free slots.
    pub fn new(max_remaps: u32) -> Table {
        let count = at(Slot(max_remaps));
        let pages = count.div_ceil(ENTRIES_PER_PAGE as usize);
        Table {
            entries: vec![Entry::FREE; count],
            pages: vec![PageState { sequence: 1, anchor: Home::A }; pages],
            reserved: vec![false; count],
            lowest_free: 0,
            live: 0,
            retired: 0,
            available: count,
        }
    }

    /// Take over a verified page, at open.
    pub fn load_page(&mut self, number: u32, page: &Page, anchor: Home) {
        self.pages[number as usize] = PageState { sequence: page.sequence, anchor };
        let first = number * ENTRIES_PER_PAGE;
        for (slot, entry) in (first..self.max_remaps()).zip(&page.entries) {
            self.set(Change { slot: Slot(slot), entry: *entry });
        }
    }

    /// Number of slots.
    pub fn max_remaps(&self) -> u32 {
        u32::try_from(self.entries.len()).expect("made from 32 bits")
    }

    /// Slots in use.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Slots that failed.
    pub fn retired(&self) -> usize {
        self.retired
    }

    /// Slots that can be given out.
    pub fn available(&self) -> usize {
        self.available
    }

    /// The entry of a slot.
    pub fn entry(&self, slot: Slot) -> Entry {
        self.entries[at(slot)]
    }

    /// The state of a page.
    pub fn page(&self, number: u32) -> PageState {
        self.pages[number as usize]
    }

    /// Note a page's sequence and anchor after a commit.
    pub fn set_page(&mut self, number: u32, state: PageState) {
        self.pages[number as usize] = state;
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        u32::try_from(self.pages.len()).expect("fewer than slots")
    }

    /// Take the lowest free slot for a job. Lowest first keeps remaps of neighbours together.
    pub fn reserve(&mut self) -> Option<Slot> {
        let found = (self.lowest_free..self.entries.len())
            .find(|i| self.entries[*i].state == SlotState::Free && !self.reserved[*i])?;
        self.reserved[found] = true;
        self.lowest_free = found + 1;
        self.available -= 1;
        Some(Slot(u32::try_from(found).expect("slots are counted in 32 bits")))
    }

    /// End a slot's reservation: it can be given out again if its entry is free. Slots that were not
    /// reserved (their entries change in place) stay as they are.
    pub fn unreserve(&mut self, slot: Slot) {
        let reserved = std::mem::take(&mut self.reserved[at(slot)]);
        if reserved && self.entries[at(slot)].state == SlotState::Free {
            self.available += 1;
            self.lowest_free = self.lowest_free.min(at(slot));
        }
    }

    /// Keep a slot from being given out although its entry is (about to be) free.
    pub fn hold(&mut self, slot: Slot) {
        let reserved = std::mem::replace(&mut self.reserved[at(slot)], true);
        if !reserved && self.entries[at(slot)].state == SlotState::Free {
            self.available -= 1;
        }
    }

    /// [`Table::hold`] for several.
    pub fn hold_all(&mut self, slots: &[Slot]) {
        slots.iter().for_each(|slot| self.hold(*slot));
    }

    /// Change an entry: its commit is durable.
    pub fn set(&mut self, change: Change) {
        let index = at(change.slot);
        let old = std::mem::replace(&mut self.entries[index], change.entry);
        for (entry, up) in [(old, false), (change.entry, true)] {
            let counter = match entry.state {
                SlotState::Live => &mut self.live,
                SlotState::Retired => &mut self.retired,
                SlotState::Free if self.reserved[index] => continue,
                SlotState::Free => &mut self.available,
            };
            *counter = if up { *counter + 1 } else { *counter - 1 };
        }
        if change.entry.state == SlotState::Free && !self.reserved[index] {
            self.lowest_free = self.lowest_free.min(index);
        }
    }

    /// Page `number` as it would be with `changes`, at `sequence`.
    pub fn page_with(&self, number: u32, sequence: u64, changes: &[Change]) -> Page {
        let first = at(Slot(number * ENTRIES_PER_PAGE));
        let last = (first + ENTRIES_PER_PAGE as usize).min(self.entries.len());
        let mut entries = Vec::with_capacity(ENTRIES_PER_PAGE as usize);
        entries.extend_from_slice(&self.entries[first..last]);
        entries.resize(ENTRIES_PER_PAGE as usize, Entry::FREE);
        for change in changes.iter().filter(|change| page_of(change.slot) == number) {
            entries[at(change.slot) - first] = change.entry;
        }
        Page { sequence, entries }
    }

    /// The live entries, one a block: where a block has two (a move was interrupted between its two
    /// commits), the later incarnation counts and the slot of the other is in the second list.
    ///
    /// Entries of blocks beyond `blocks` are in neither list: the caller has checked the sizes.
    pub fn resolve(&self, blocks: u64) -> (BTreeMap<Block, (Slot, Entry)>, Vec<Slot>) {
        let mut live: BTreeMap<Block, (Slot, Entry)> = BTreeMap::new();
        let mut superseded = Vec::new();
        for (index, entry) in self.entries.iter().enumerate() {
            if entry.state != SlotState::Live || entry.block.0 >= blocks {
                continue;
            }
            let slot = Slot(u32::try_from(index).expect("slots are counted in 32 bits"));
            match live.get_mut(&entry.block) {
                None => _ = live.insert(entry.block, (slot, *entry)),
                Some(known) if incarnation_after(entry.incarnation, known.1.incarnation) => {
                    superseded.push(known.0);
                    *known = (slot, *entry);
                }
                Some(_) => superseded.push(slot),
            }
        }
        (live, superseded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(block: u64, incarnation: u8) -> Entry {
        Entry { block: Block(block), lost: 3, incarnation, copy: 1, state: SlotState::Live, primary_stale: true }
    }

    #[test]
    fn pages_survive_the_trip_and_nothing_else_passes_for_them() {
        let set = Uuid::from_u128(0x1234_5678);
        let mut table = Table::new(600);
        table.set(Change { slot: Slot(509), entry: live((1 << 40) - 1, 15) });
        let page = table.page_with(1, 9, &[Change { slot: Slot(510), entry: Entry::RETIRED }]);
        let seat = PageSeat::Spare(Place::Tail, Home::B);
        let bytes = page.encode(set, 1, seat);
        assert_eq!(Page::decode(&bytes, set, 1, seat), Some(page));
        assert_eq!(Page::decode(&bytes, set, 0, seat), None);
        assert_eq!(Page::decode(&bytes, Uuid::from_u128(1), 1, seat), None);
        for elsewhere in [PageSeat::Spare(Place::Tail, Home::A), PageSeat::Spare(Place::Head, Home::B), PageSeat::Label]
        {
            assert_eq!(Page::decode(&bytes, set, 1, elsewhere), None);
        }
        // An interpreter has no time for all.
        for byte in (0..PAGE).step_by(if cfg!(miri) { 1999 } else { 1 }) {
            let mut flipped = bytes;
            flipped[byte] ^= 1;
            assert_eq!(Page::decode(&flipped, set, 1, seat), None, "byte {byte}");
        }
    }

    #[test]
    fn a_sequence_that_leaves_no_room_for_the_next_is_not_believed() {
        let (set, seat) = (Uuid::from_u128(5), PageSeat::Label);
        let page = |sequence| Page { sequence, entries: vec![Entry::FREE; ENTRIES_PER_PAGE as usize] };
        let decode = |sequence| Page::decode(&page(sequence).encode(set, 3, seat), set, 3, seat);
        assert_eq!(decode(NUMBER_END - 1), Some(page(NUMBER_END - 1)));
        assert_eq!(decode(u64::MAX), None);
    }

    #[test]
    fn the_later_incarnation_wins_also_across_the_wrap() {
        let mut table = Table::new(16);
        table.set(Change { slot: Slot(2), entry: live(5, 15) });
        table.set(Change { slot: Slot(9), entry: live(5, 0) });
        let (map, superseded) = table.resolve(100);
        assert_eq!(map[&Block(5)].0, Slot(9));
        assert_eq!(superseded, [Slot(2)]);
    }

    #[test]
    fn every_slot_is_given_out_once_and_counts_agree() {
        let mut table = Table::new(40);
        table.set(Change { slot: Slot(3), entry: Entry::RETIRED });
        let given: Vec<Slot> = std::iter::from_fn(|| table.reserve()).collect();
        assert_eq!(given.len(), 39);
        assert!(!given.contains(&Slot(3)));
        assert_eq!(table.available(), 0);
        table.set(Change { slot: Slot(0), entry: live(1, 0) });
        table.unreserve(Slot(0));
        table.unreserve(Slot(7));
        assert_eq!((table.live(), table.retired(), table.available()), (1, 1, 1));
        table.hold(Slot(0));
        table.set(Change { slot: Slot(0), entry: Entry::FREE });
        assert_eq!(table.available(), 1);
        table.unreserve(Slot(0));
        assert_eq!(table.available(), 2);
        assert_eq!(table.reserve(), Some(Slot(0)));
    }
}
