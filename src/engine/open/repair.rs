//! Copies of metadata that are to be written anew, and the writing of them.

use super::superblocks;
use crate::device::{DeviceIndex, Errno};
use crate::engine::io::Io;
use crate::volume::layout::{Home, LabelLayout, Layout, PAGE, Place};
use crate::volume::sidecar::{Poison, SavedCounters};
use crate::volume::superblock::{Seat, Superblock};
use crate::volume::table::{PageSeat, Table};

/// Where a seat lies.
pub(super) fn device_of(seat: Seat) -> DeviceIndex {
    match seat {
        Seat::Spare(_) => DeviceIndex::SPARE,
        Seat::Label => DeviceIndex::PRIMARY,
    }
}

/// A copy of something.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Superblock(Seat, u8),
    /// A home of a table page.
    Page(Place, Home, u32),
    Poison(Seat),
    Counters(Place),
}

impl What {
    fn seat(self) -> Seat {
        match self {
            What::Superblock(seat, _) | What::Poison(seat) => seat,
            What::Page(place, ..) | What::Counters(place) => Seat::Spare(place),
        }
    }

    /// The place that is retired when it does not take this; without poison or counters it does as well.
    pub(super) fn needed_by(self) -> Option<Place> {
        match self {
            What::Superblock(Seat::Spare(place), _) | What::Page(place, ..) => Some(place),
            What::Superblock(Seat::Label, _) | What::Poison(_) | What::Counters(_) => None,
        }
    }

    pub(super) fn device(self) -> DeviceIndex {
        device_of(self.seat())
    }

    fn name(self) -> String {
        let at = match self.seat() {
            Seat::Spare(place) => format!("at the {}", place.name()),
            Seat::Label => "of the label".to_owned(),
        };
        match self {
            What::Superblock(seat, copy) => superblocks::name(seat, copy),
            What::Page(_, home, number) => format!("table page {number} {at}, home {home:?}"),
            What::Poison(_) => format!("poison page {at}"),
            What::Counters(_) => format!("counters {at}"),
        }
    }
}

/// A copy that is damaged, or older than another.
pub(super) struct Repair {
    pub(super) what: What,
    /// Which copy it is, and what is wrong with it.
    pub(super) cause: String,
}

impl Repair {
    pub(super) fn new(what: What, why: String) -> Repair {
        Repair { what, cause: format!("{}: {why}", what.name()) }
    }
}

/// The newest of everything, as found.
#[derive(Clone, Copy)]
pub(super) struct Newest<'a> {
    pub(super) layout: &'a Layout,
    pub(super) label: Option<LabelLayout>,
    pub(super) superblock: &'a Superblock,
    pub(super) table: &'a Table,
    pub(super) poison: &'a Poison,
    pub(super) counters: &'a SavedCounters,
}

impl Newest<'_> {
    fn offset(&self, what: What) -> u64 {
        let label = || self.label.expect("nothing of a label is repaired where there is none");
        match what {
            What::Superblock(Seat::Spare(place), copy) => self.layout.superblock(place, copy),
            What::Superblock(Seat::Label, copy) => label().superblock(copy),
            What::Page(place, home, number) => self.layout.table(place, home, number),
            What::Poison(Seat::Spare(place)) => self.layout.poison(place),
            What::Poison(Seat::Label) => label().poison(),
            What::Counters(place) => self.layout.counters(place),
        }
    }

    fn bytes(&self, what: What) -> [u8; PAGE] {
        let set = self.superblock.set;
        match what {
            What::Superblock(seat, copy) => self.superblock.encode(seat, copy),
            What::Page(place, home, number) => {
                let page = self.table.page_with(number, self.table.page(number).sequence, &[]);
                page.encode(set, number, PageSeat::Spare(place, home))
            }
            What::Poison(seat) => self.poison.encode(set, seat),
            What::Counters(place) => self.counters.encode(set, Seat::Spare(place)),
        }
    }

    /// Write a copy of the newest.
    pub(super) async fn write(&self, io: &Io, what: What) -> Result<(), Errno> {
        io.write(what.device(), self.offset(what), &self.bytes(what)).await
    }
}
