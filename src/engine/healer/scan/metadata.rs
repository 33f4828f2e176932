//! A pass over metadata: each page is read and checked, and a damaged copy is written anew from what is known.

use std::rc::Rc;

use super::{PAGES_A_STEP, Step, Stopped, Turn};
use crate::device::DeviceIndex;
use crate::engine::healer::{Core, EventKind, Severity};
use crate::engine::task::join_all;
use crate::units::{SectorRange, Time};
use crate::volume::layout::{Home, LabelLayout, PAGE, Place};
use crate::volume::sidecar::{Poison, SavedCounters};
use crate::volume::superblock::{Seat, Superblock};
use crate::volume::table::{Page, PageSeat};

const PAGE_BYTES: u64 = PAGE as u64;

/// Times a page of the table is read that may be being written, and nanoseconds between them (100 ms).
const TRIES: usize = 4;
const BUSY_NS: u64 = 100_000_000;

/// What a look at a copy came to.
enum Look {
    Well,
    Damaged(String),
    /// The same, and commits were under way each time, one of which may have been writing it.
    Busy(String),
}

/// One copy of a page.
#[derive(Clone, Copy, Debug)]
enum Copy {
    Superblock(Place, u8),
    Poison(Place),
    Counters(Place),
    Table(Place, Home, u32),
    LabelSuperblock(LabelLayout, u8),
    LabelPoison(LabelLayout),
    LabelTable(LabelLayout, u32),
}

impl Copy {
    fn name(self) -> String {
        match self {
            Copy::Superblock(place, copy) => format!("superblock {copy} at the {}", place.name()),
            Copy::Poison(place) => format!("the poison page at the {}", place.name()),
            Copy::Counters(place) => format!("the counters at the {}", place.name()),
            Copy::Table(place, home, page) => format!("table page {page}, home {home:?}, at the {}", place.name()),
            Copy::LabelSuperblock(_, copy) => format!("superblock {copy} of the label"),
            Copy::LabelPoison(_) => "the poison page of the label".into(),
            Copy::LabelTable(_, page) => format!("table page {page} of the label"),
        }
    }
}

impl Core {
    /// All copies of all pages, in the order in which a pass goes over them.
    fn copies(&self) -> Vec<Copy> {
        let table = 0..self.table.borrow().pages();
        let mut copies = Vec::new();
        for place in self.live_places() {
            copies.extend([Copy::Superblock(place, 0), Copy::Superblock(place, 1)]);
            copies.extend([Copy::Poison(place), Copy::Counters(place)]);
            for home in Home::ALL {
                copies.extend(table.clone().map(|page| Copy::Table(place, home, page)));
            }
        }
        if let Some(label) = self.label.get() {
            copies.extend([Copy::LabelSuperblock(label, 0), Copy::LabelSuperblock(label, 1)]);
            copies.push(Copy::LabelPoison(label));
            copies.extend((0..label.table_pages).map(|page| Copy::LabelTable(label, page)));
        }
        copies
    }

    /// Number of all copies.
    pub(super) fn metadata_pages(&self) -> u64 {
        let table = u64::from(self.table.borrow().pages());
        let places = self.live_places().len() as u64 * (4 + 2 * table);
        places + self.label.get().map_or(0, |label| 3 + u64::from(label.table_pages))
    }

    /// Bytes of all copies.
    pub(super) fn metadata_bytes(&self) -> u64 {
        self.metadata_pages() * PAGE_BYTES
    }

    fn seat_of(&self, copy: Copy) -> (DeviceIndex, u64) {
        let offset = match copy {
            Copy::Superblock(place, copy) => self.layout.superblock(place, copy),
            Copy::Poison(place) => self.layout.poison(place),
            Copy::Counters(place) => self.layout.counters(place),
            Copy::Table(place, home, page) => self.layout.table(place, home, page),
            Copy::LabelSuperblock(label, copy) => return (DeviceIndex::PRIMARY, label.superblock(copy)),
            Copy::LabelPoison(label) => return (DeviceIndex::PRIMARY, label.poison()),
            Copy::LabelTable(label, page) => return (DeviceIndex::PRIMARY, label.table(page)),
        };
        (DeviceIndex::SPARE, offset)
    }

    /// Read and check some copies from a position on.
    pub(super) async fn read_metadata(self: &Rc<Self>, turn: Turn, position: u64) -> Result<Step, Stopped> {
        let copies = self.copies();
        let is_new = self.of_pass(turn, |pass| std::mem::replace(&mut pass.pages, copies.len()) != copies.len())?;
        if is_new && position > 0 {
            // Other ones than those that were counted, as a place has gone or come, or the server was started again.
            self.of_pass(turn, |pass| pass.cursor.position = 0)?;
            return Ok(Step::Again);
        }
        let from = usize::try_from(position).unwrap_or(usize::MAX).min(copies.len());
        let some = &copies[from..(from + PAGES_A_STEP).min(copies.len())];
        self.await_pace(turn, some.len() as u64 * PAGE_BYTES).await?;
        let label = self.label.get();
        let looks = join_all(some.iter().map(|copy| self.look_at(*copy))).await;
        let (mut damaged, mut busy) = (Vec::new(), Vec::new());
        for (copy, look) in some.iter().zip(looks) {
            match look {
                Look::Well => {}
                Look::Damaged(trouble) => damaged.push((*copy, trouble)),
                Look::Busy(trouble) => busy.push((*copy, trouble)),
            }
        }
        if self.label.get() != label {
            // Zeros are written where it was.
            return Ok(Step::Again);
        }
        // Before anything is said: a step that is taken again says it all again.
        if damaged.iter().any(|(copy, _)| self.refuse_gone(self.seat_of(*copy).0).is_err()) {
            return Ok(Step::Again);
        }
        for (copy, trouble) in busy {
            let (device, offset) = self.seat_of(copy);
            let why = format!("{} may be being written: {trouble}", copy.name());
            if self.skip(turn, device, offset, PAGE_BYTES, why)? == Step::Again {
                return Ok(Step::Again);
            }
        }
        for (copy, trouble) in &damaged {
            let (device, offset) = self.seat_of(*copy);
            let action = self.repair_copy(turn, *copy).await;
            let cause = format!("{}, byte {offset}: {trouble}", copy.name());
            let none = SectorRange::default();
            self.event(Severity::Warn, EventKind::MetadataDamaged, Some(device), none, cause, action);
        }
        let now = self.io.now();
        self.of_pass(turn, |pass| {
            pass.found.metadata += damaged.len() as u64;
            pass.cover(now, some.len() as u64 * PAGE_BYTES);
        })?;
        Ok(Step::Done)
    }

    /// Look at a copy: once as it is, as no request of the guest should wait for a disk that takes long to fail; and
    /// again when nobody writes it, if that was no whole page. No request waits for the label.
    async fn look_at(self: &Rc<Self>, copy: Copy) -> Look {
        let mut tries = 0;
        let mut is_alone = matches!(copy, Copy::Table(..) | Copy::LabelSuperblock(..) | Copy::LabelTable(..));
        loop {
            // All but pages of the table are written by one at a time; those are whole between commits.
            let permits = match copy {
                _ if !is_alone => None,
                Copy::Superblock(..) => Some(&self.places.turn),
                Copy::Poison(_) | Copy::LabelPoison(_) => Some(&self.flushes.note),
                Copy::Counters(_) => Some(&self.places.saving),
                Copy::LabelSuperblock(..) | Copy::LabelTable(..) => Some(&self.places.label),
                _ => None,
            };
            if let Some(permits) = permits {
                permits.acquire().await;
            }
            let (before, busy) = (self.tally.borrow().commits, self.commits_under_way());
            let (device, offset) = self.seat_of(copy);
            let departures = self.departures(device);
            let (read, _) = self.io.read(device, offset, PAGE).await;
            if let Some(permits) = permits {
                permits.release();
            }
            let trouble = match read.map(|page| self.check(copy, &page)) {
                Ok(Ok(())) => return Look::Well,
                Ok(Err(_)) if !is_alone => {
                    is_alone = true;
                    continue;
                }
                Ok(Err(trouble)) => trouble.to_owned(),
                Err(errno) => {
                    // Whether it is the device, which is then waited for.
                    let _ = self.diagnose(device, errno, true, SectorRange::default()).await;
                    if self.departures(device) != departures && self.refuse_gone(device).is_ok() {
                        // It was away meanwhile, and is back.
                        continue;
                    }
                    errno.to_string()
                }
            };
            let is_over = !busy && !self.commits_under_way() && before == self.tally.borrow().commits;
            if is_over || !matches!(copy, Copy::Table(..)) {
                return Look::Damaged(trouble);
            }
            tries += 1;
            if tries == TRIES {
                return Look::Busy(trouble);
            }
            self.io.sleep_until(Time(self.io.now().0 + BUSY_NS)).await;
        }
    }

    fn check(&self, copy: Copy, page: &[u8]) -> Result<(), &'static str> {
        let empty = page.iter().all(|byte| *byte == 0);
        let superblock =
            |seat, number| Superblock::decode(page, seat, number).is_ok_and(|superblock| superblock.set == self.set);
        let whole = match copy {
            Copy::Superblock(place, number) => superblock(Seat::Spare(place), number),
            Copy::LabelSuperblock(_, number) => superblock(Seat::Label, number),
            // Nothing is there until something is to be said.
            Copy::Poison(place) => empty || Poison::decode(page, self.set, Seat::Spare(place)).is_some(),
            Copy::LabelPoison(_) => empty || Poison::decode(page, self.set, Seat::Label).is_some(),
            Copy::Counters(place) => empty || SavedCounters::decode(page, self.set, Seat::Spare(place)).is_some(),
            Copy::Table(place, home, number) => {
                Page::decode(page, self.set, number, PageSeat::Spare(place, home)).is_some()
            }
            Copy::LabelTable(_, number) => Page::decode(page, self.set, number, PageSeat::Label).is_some(),
        };
        if whole { Ok(()) } else { Err("its checksum or what it says of itself is wrong") }
    }

    /// Write a damaged copy anew where that is somebody's to do while the volume is open; what was done.
    async fn repair_copy(self: &Rc<Self>, turn: Turn, copy: Copy) -> &'static str {
        if !self.acts(turn) {
            return "left as it is";
        }
        match copy {
            Copy::Table(_, home, number) => {
                if self.rewrite_page(number, home).await.is_err() {
                    return "it could not be written anew";
                }
            }
            Copy::Counters(_) => {
                if self.save_counters().await.is_err() {
                    return "it could not be written anew";
                }
            }
            Copy::LabelSuperblock(..) | Copy::LabelTable(..) => {
                self.label_is_old();
                self.stamp_label().await;
            }
            Copy::Superblock(..) | Copy::Poison(_) | Copy::LabelPoison(_) => {
                return "the other copies count; it is written anew when the volume is opened next";
            }
        }
        match self.look_at(copy).await {
            Look::Damaged(_) => "written anew, and damaged still",
            Look::Busy(_) => "written anew, and may be being written again",
            Look::Well => {
                // Who stamps the label has counted its superblocks.
                let is_counted = matches!(copy, Copy::LabelSuperblock(..));
                self.tally.borrow_mut().metadata_repairs += u64::from(!is_counted);
                "written anew"
            }
        }
    }
}
