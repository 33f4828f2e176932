//! Where copies of metadata lie, and what their bytes say, read by nothing but the documented format.

use std::fmt;

use vhost_remap::device::DeviceIndex;
use vhost_remap::volume::layout::{Home, PAGE, Place};

use super::rig::{PRIMARY, Rig, SPARE, Shape};

/// Entries of a table page.
pub(crate) const ENTRIES: usize = 508;

/// Where a copy lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum At {
    Head,
    Tail,
    Label,
}

impl At {
    /// The two places of the spare.
    pub(crate) const PLACES: [At; 2] = [At::Head, At::Tail];

    pub(crate) fn place(self) -> Option<Place> {
        match self {
            At::Head => Some(Place::Head),
            At::Tail => Some(Place::Tail),
            At::Label => None,
        }
    }

    /// Its bit among the retired places.
    pub(crate) fn bit(self) -> u32 {
        match self {
            At::Head => 1,
            At::Tail => 2,
            At::Label => 0,
        }
    }
}

/// A copy of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Superblock(u8),
    Poison,
    Counters,
    /// A home (0: A, 1: B) of a page; 0 in the label.
    Table(u8, u32),
}

/// One copy of a page of metadata.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Seat {
    pub(crate) at: At,
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl Seat {
    /// As events call it.
    pub(crate) fn name(&self) -> String {
        let at = match self.at {
            At::Head => "at the head",
            At::Tail => "at the tail",
            At::Label => "of the label",
        };
        match self.kind {
            Kind::Superblock(copy) => format!("superblock {copy} {at}"),
            Kind::Poison => format!("poison page {at}"),
            Kind::Counters => format!("counters {at}"),
            Kind::Table(_, number) if self.at == At::Label => format!("table page {number} {at}"),
            Kind::Table(home, number) => format!("table page {number} {at}, home {}", ["A", "B"][usize::from(home)]),
        }
    }

    pub(crate) fn device(&self) -> DeviceIndex {
        if self.at == At::Label { PRIMARY } else { SPARE }
    }

    pub(crate) fn read(&self, rig: &Rig) -> Vec<u8> {
        rig.peek(self.device(), self.offset, PAGE)
    }

    pub(crate) fn write(&self, rig: &Rig, bytes: &[u8]) {
        assert_eq!(bytes.len(), PAGE);
        rig.disks.poke(self.device(), self.offset, bytes);
    }
}

/// Every copy of every page of a volume, in the order of devices and places.
pub(crate) fn seats(shape: &Shape) -> Vec<Seat> {
    let layout = shape.layout();
    let mut seats = Vec::new();
    for at in At::PLACES {
        let place = at.place().expect("a place");
        let mut add = |kind, offset| seats.push(Seat { at, kind, offset });
        add(Kind::Superblock(0), layout.superblock(place, 0));
        add(Kind::Superblock(1), layout.superblock(place, 1));
        add(Kind::Poison, layout.poison(place));
        add(Kind::Counters, layout.counters(place));
        for (home, name) in [(0, Home::A), (1, Home::B)] {
            for number in 0..layout.table_pages {
                add(Kind::Table(home, number), layout.table(place, name, number));
            }
        }
    }
    if let Some(label) = shape.label() {
        let mut add = |kind, offset| seats.push(Seat { at: At::Label, kind, offset });
        add(Kind::Superblock(0), label.superblock(0));
        add(Kind::Superblock(1), label.superblock(1));
        add(Kind::Poison, label.poison());
        for number in 0..label.table_pages {
            add(Kind::Table(0, number), label.table(number));
        }
    }
    seats
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Where a page of that kind has its checksum.
pub(crate) fn checksum_at(kind: Kind) -> usize {
    match kind {
        Kind::Superblock(_) | Kind::Table(..) => 12,
        Kind::Poison | Kind::Counters => 8,
    }
}

/// The checksum a page should have.
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let mut page = bytes.to_vec();
    page[at..at + 4].fill(0);
    crc32c::crc32c(&page)
}

/// Put a page's checksum right after a change.
pub(crate) fn seal(bytes: &mut [u8], kind: Kind) {
    let at = checksum_at(kind);
    let crc = checksum(bytes, at);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Whether the bytes are a whole page of the seat's kind that belongs there.
pub(crate) fn is_whole(seat: &Seat, bytes: &[u8]) -> bool {
    let at = checksum_at(seat.kind);
    let place = match seat.at {
        At::Head => 0,
        At::Tail => 1,
        At::Label => 2,
    };
    u32_at(bytes, at) == checksum(bytes, at)
        && match seat.kind {
            Kind::Superblock(copy) => bytes.starts_with(b"VHREMAP1") && bytes[73..75] == [place, copy],
            Kind::Poison => bytes.starts_with(b"VHREPOIS") && bytes[12] == place,
            Kind::Counters => bytes.starts_with(b"VHRECNTR") && bytes[12] == place,
            Kind::Table(home, number) => {
                bytes.starts_with(b"VRTP") && u32_at(bytes, 8) == number && bytes[24..26] == [place, home]
            }
        }
}

/// What decides which of two whole copies is the newer: a generation, or a sequence.
pub(crate) fn age(kind: Kind, bytes: &[u8]) -> u64 {
    match kind {
        Kind::Superblock(_) => u64_at(bytes, 80),
        Kind::Poison | Kind::Counters => u64_at(bytes, 32),
        Kind::Table(..) => u64_at(bytes, 16),
    }
}

/// The places a superblock retires.
pub(crate) fn retired(superblock: &[u8]) -> u32 {
    u32_at(superblock, 76)
}

/// Whether a superblock closed the volume.
pub(crate) fn clean(superblock: &[u8]) -> bool {
    superblock[75] & 1 != 0
}

/// Whether a poison page says that the volume is poisoned.
pub(crate) fn poisoned(page: &[u8]) -> bool {
    page[40] != 0
}

/// The bytes of a page that are the same in all of its copies.
pub(crate) fn content(kind: Kind, bytes: &[u8]) -> Vec<u8> {
    let mut content = bytes.to_vec();
    let crc = checksum_at(kind);
    content[crc..crc + 4].fill(0);
    match kind {
        // Role, place and copy; the label also says when it was stamped.
        Kind::Superblock(_) => {
            content[72..75].fill(0);
            content[1152..1160].fill(0);
        }
        Kind::Poison | Kind::Counters => content[12] = 0,
        Kind::Table(..) => content[24..26].fill(0),
    }
    content
}

/// A remapped block: block, slot, lost sectors (bit mask), and whether the primary is stale.
pub(crate) type Entry = (u64, u32, u8, bool);

/// The live entries of a table page.
pub(crate) fn live_entries(number: u32, page: &[u8]) -> Vec<Entry> {
    let first = number * u32::try_from(ENTRIES).expect("small");
    let entries = (first..).zip(page[32..].chunks_exact(8)).filter_map(|(slot, raw)| {
        let raw = u64_at(raw, 0);
        let lost = u8::try_from(raw >> 40 & 0xff).expect("masked");
        (raw >> 54 & 7 == 1).then_some((raw & 0xff_ffff_ffff, slot, lost, raw >> 57 & 1 == 1))
    });
    entries.collect()
}
