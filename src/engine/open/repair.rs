//! Copies of metadata that are to be written anew, and the writing of them.

use std::ops::Range;

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

/// What is wrong with a copy that was read.
pub(super) enum Lack {
    /// Nothing can be made of it. It may hold a later version than any other copy, and be read the next time.
    Hidden(String),
    /// It is older than another.
    Older(String),
}

/// A copy that is damaged, or older than another.
pub(super) struct Repair {
    pub(super) what: What,
    /// Which copy it is, and what is wrong with it.
    pub(super) cause: String,
    /// See [`Lack::Hidden`].
    pub(super) is_hidden: bool,
}

impl Repair {
    pub(super) fn new(what: What, lack: Lack) -> Repair {
        let is_hidden = matches!(lack, Lack::Hidden(_));
        let (Lack::Hidden(why) | Lack::Older(why)) = lack;
        Repair { what, cause: format!("{}: {why}", what.name()), is_hidden }
    }

    /// The table page of which it is a home.
    pub(super) fn page(&self) -> Option<u32> {
        match self.what {
            What::Page(_, _, number) => Some(number),
            What::Superblock(..) | What::Poison(_) | What::Counters(_) => None,
        }
    }
}

/// The newest of everything, as found.
#[derive(Clone, Copy)]
pub(super) struct Newest<'a> {
    pub(super) layout: &'a Layout,
    pub(super) label: Option<LabelLayout>,
    pub(super) superblock: &'a Superblock,
    /// Of the label's table, as [`Superblock::stamped`].
    pub(super) stamped: u64,
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
            What::Page(place, home, number) => self.page(place, home, number, self.table.page(number).sequence),
            What::Poison(seat) => self.poison.encode(set, seat),
            What::Counters(place) => self.counters.encode(set, Seat::Spare(place)),
        }
    }

    /// A home of a table page, as a commit of that sequence writes it.
    fn page(&self, place: Place, home: Home, number: u32, sequence: u64) -> [u8; PAGE] {
        let page = self.table.page_with(number, sequence, &[]);
        page.encode(self.superblock.set, number, PageSeat::Spare(place, home))
    }

    /// Write a home of a table page under another sequence.
    pub(super) async fn write_page(
        &self,
        io: &Io,
        place: Place,
        home: Home,
        number: u32,
        sequence: u64,
    ) -> Result<(), Errno> {
        let offset = self.layout.table(place, home, number);
        io.write(DeviceIndex::SPARE, offset, &self.page(place, home, number, sequence)).await
    }

    /// Write the same home of consecutive table pages.
    pub(super) async fn write_pages(
        &self,
        io: &Io,
        place: Place,
        home: Home,
        numbers: Range<u32>,
    ) -> Result<(), Errno> {
        let offset = self.layout.table(place, home, numbers.start);
        let bytes: Vec<u8> = numbers.flat_map(|number| self.bytes(What::Page(place, home, number))).collect();
        io.write(DeviceIndex::SPARE, offset, &bytes).await
    }

    /// Write a copy of the newest.
    pub(super) async fn write(&self, io: &Io, what: What) -> Result<(), Errno> {
        io.write(what.device(), self.offset(what), &self.bytes(what)).await
    }
}
