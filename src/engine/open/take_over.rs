//! Taking over a volume for writing: repairs first, then a new generation.

use std::collections::BTreeSet;

use super::repair::{Lack, Newest, Repair, What};
use super::{OpenError, event, io_error};
use crate::device::{DeviceIndex, Errno};
use crate::engine::event::{Event, EventKind, Severity};
use crate::engine::io::Io;
use crate::volume::layout::{Home, Place};
use crate::volume::sidecar::Poison;
use crate::volume::superblock::{Seat, Superblock};
use crate::volume::table::PageState;

/// How far a number is raised above the newest that was found, where a copy gave nothing: what it holds may have been
/// numbered higher, by a commit or an update that came to nothing else, and reads again some day. More than one
/// session can count, and even, which leaves a superblock the copy it goes to.
const BEYOND_HIDDEN: u64 = 1 << 32;
/// Table pages that are written at once.
const PAGES_AT_ONCE: u32 = 256;

/// A volume being taken over.
pub(super) struct TakeOver<'a> {
    io: &'a Io,
    newest: Newest<'a>,
    repairs: &'a [Repair],
    /// The superblock of the generation that begins.
    next: Superblock,
    events: &'a mut Vec<Event>,
    /// Copies written anew.
    repaired: u64,
}

/// What has become of a volume that was taken over.
pub(super) struct TakenOver {
    /// Of the generation that has begun.
    pub(super) superblock: Superblock,
    /// Copies written anew.
    pub(super) repaired: u64,
    /// Table pages with another sequence than was found.
    pub(super) renewed: Vec<(u32, PageState)>,
}

impl<'a> TakeOver<'a> {
    pub(super) fn new(
        io: &'a Io,
        newest: Newest<'a>,
        repairs: &'a [Repair],
        events: &'a mut Vec<Event>,
    ) -> TakeOver<'a> {
        let mut next = newest.superblock.next_generation();
        if repairs.iter().any(|repair| repair.is_hidden && matches!(repair.what, What::Superblock(Seat::Spare(_), _))) {
            next.generation += BEYOND_HIDDEN;
        }
        (next.clean, next.stamped) = (false, newest.stamped);
        (next.stamp, next.sampled) = (None, 0);
        TakeOver { io, newest, repairs, next, events, repaired: 0 }
    }

    /// Bring every live place to the newest state, flush, and only then begin a new generation on the
    /// spare. A place that does not take a write is retired while there is another; one that was retired is
    /// written in full and counts again if it takes that.
    pub(super) async fn run(mut self) -> Result<TakenOver, OpenError> {
        // What a killed process left in the device's cache may be the newest there is: before anything is
        // overwritten for its sake it must be durable. The slots' last writes are waiting there too.
        self.write_newest_again().await?;
        self.flush().await?;
        // Before the repairs: who fails those may have to make room for a place that is back.
        self.restore_retired().await?;
        let renewed = self.repair_spare().await?;
        self.begin().await?;
        self.flush().await?;
        self.repair_label().await?;
        Ok(TakenOver { superblock: self.next, repaired: self.repaired, renewed })
    }

    /// Write what is the newest where it was found, byte for byte: had a flush failed after it was written, the
    /// next one would succeed without it. What a power cut leaves of that is what was there before, whole.
    async fn write_newest_again(&mut self) -> Result<(), OpenError> {
        let is_lacking = |what| self.repairs.iter().any(|repair| repair.what == what);
        let copy = Superblock::copy_for(self.newest.superblock.generation);
        for place in self.live_places() {
            let superblock = What::Superblock(Seat::Spare(place), copy);
            if !is_lacking(superblock)
                && let Err(errno) = self.newest.write(self.io, superblock).await
            {
                self.retire(place, errno, "writing the superblock again")?;
            }
        }
        if self.newest.poison.poisoned {
            for what in Place::ALL.map(|place| What::Poison(Seat::Spare(place))) {
                if !is_lacking(what) {
                    // One of them is enough, as when it was noted.
                    let _ = self.newest.write(self.io, what).await;
                }
            }
        }
        if !self.newest.superblock.clean {
            for place in self.live_places() {
                if let Err(errno) = self.write_anchors_again(place).await {
                    self.retire(place, errno, "writing the table again")?;
                }
            }
        }
        Ok(())
    }

    async fn write_anchors_again(&self, place: Place) -> Result<(), Errno> {
        let pages = self.newest.layout.table_pages;
        let is_lacking = |repair: &Repair| match repair.what {
            What::Page(of, home, number) => (of == place && home == self.anchor(number)).then_some(number),
            What::Superblock(..) | What::Poison(_) | What::Counters(_) => None,
        };
        let lacking: BTreeSet<u32> = self.repairs.iter().filter_map(is_lacking).collect();
        for home in Home::ALL {
            let is_wanted = |number: &u32| self.anchor(*number) == home && !lacking.contains(number);
            let mut number = 0;
            while let Some(first) = (number..pages).find(is_wanted) {
                let last = (first..pages.min(first + PAGES_AT_ONCE)).take_while(is_wanted).last();
                number = last.expect("the first is") + 1;
                self.newest.write_pages(self.io, place, home, first..number).await?;
            }
        }
        Ok(())
    }

    fn anchor(&self, number: u32) -> Home {
        self.newest.table.page(number).anchor
    }

    fn live_places(&self) -> Vec<Place> {
        Place::ALL.into_iter().filter(|place| !self.next.is_retired(*place)).collect()
    }

    /// Rewrite the copies that lack the newest. Of table pages, first the homes of the same name in other
    /// places, so that the only home that has it is never the only one whole for long. A page of which a home
    /// gave nothing is then committed anew, which has to come after whatever that home holds.
    async fn repair_spare(&mut self) -> Result<Vec<(u32, PageState)>, OpenError> {
        let new_copy = Superblock::copy_for(self.next.generation);
        let repairs = self.repairs;
        let hidden: BTreeSet<u32> = repairs.iter().filter(|repair| repair.is_hidden).filter_map(Repair::page).collect();
        for first in [true, false] {
            let mut written = false;
            for repair in repairs {
                let goes_first = match repair.what {
                    What::Page(_, home, number) => home == self.anchor(number),
                    // Written in the end, or later, or with the new generation.
                    What::Superblock(Seat::Label, _) | What::Poison(Seat::Label) => continue,
                    What::Superblock(_, copy) if copy == new_copy => continue,
                    What::Superblock(..) | What::Poison(_) | What::Counters(_) => true,
                };
                let is_renewed = !goes_first && repair.page().is_some_and(|number| hidden.contains(&number));
                let is_retired = repair.what.needed_by().is_some_and(|place| self.next.is_retired(place));
                if goes_first == first && !is_renewed && !is_retired {
                    written = true;
                    self.repair(repair).await?;
                }
            }
            if written {
                self.flush().await?;
            }
        }
        self.renew(&hidden).await
    }

    /// Commit table pages as they are, with a sequence above any that was tried: the home that is not the anchor
    /// first, and when that is durable the anchor. Their states then.
    async fn renew(&mut self, numbers: &BTreeSet<u32>) -> Result<Vec<(u32, PageState)>, OpenError> {
        let renewed = |number: u32| {
            let PageState { sequence, anchor } = self.newest.table.page(number);
            (number, PageState { sequence: sequence + BEYOND_HIDDEN, anchor: anchor.other() })
        };
        let renewed: Vec<(u32, PageState)> = numbers.iter().map(|number| renewed(*number)).collect();
        for is_second in [false, true] {
            for (number, PageState { sequence, anchor }) in &renewed {
                let home = if is_second { anchor.other() } else { *anchor };
                for place in self.live_places() {
                    match self.newest.write_page(self.io, place, home, *number, *sequence).await {
                        Err(errno) => self.retire(place, errno, "rewriting damaged metadata")?,
                        Ok(()) if is_second => {}
                        Ok(()) => {
                            let of = self.repairs.iter().find(|repair| repair.what == What::Page(place, home, *number));
                            of.into_iter().for_each(|repair| self.repaired(repair));
                        }
                    }
                }
            }
            if !renewed.is_empty() {
                self.flush().await?;
            }
        }
        Ok(renewed)
    }

    async fn repair(&mut self, repair: &Repair) -> Result<(), OpenError> {
        match (self.newest.write(self.io, repair.what).await, repair.what.needed_by()) {
            (Ok(()), _) => self.repaired(repair),
            (Err(errno), Some(place)) => self.retire(place, errno, "rewriting damaged metadata")?,
            (Err(errno), None) => self.not_repaired(repair, errno),
        }
        Ok(())
    }

    fn repaired(&mut self, repair: &Repair) {
        self.repaired += 1;
        let (cause, device) = (repair.cause.clone(), repair.what.device());
        event(
            self.events,
            Severity::Warn,
            EventKind::MetadataRepaired,
            device,
            cause,
            "rewritten from the newest copy",
        );
    }

    fn not_repaired(&mut self, repair: &Repair, errno: Errno) {
        let (cause, device) = (repair.cause.clone(), repair.what.device());
        let action = format!("another copy is used; it cannot be rewritten: {errno}");
        event(self.events, Severity::Warn, EventKind::MetadataDamaged, device, cause, &action);
    }

    /// Count `place` no longer, unless it is the last.
    fn retire(&mut self, place: Place, errno: Errno, what: &'static str) -> Result<(), OpenError> {
        let spare = DeviceIndex::SPARE;
        self.next.retired |= 1 << place.number();
        if Place::ALL.into_iter().all(|place| self.next.is_retired(place)) {
            return Err(io_error(spare, what)(errno));
        }
        let cause = format!("{what} at the spare's {}: {errno}", place.name());
        let action = "retired; the other place goes on alone";
        event(self.events, Severity::Error, EventKind::PlaceRetired, spare, cause, action);
        Ok(())
    }

    async fn restore_retired(&mut self) -> Result<(), OpenError> {
        for place in Place::ALL.into_iter().filter(|place| self.newest.superblock.is_retired(*place)) {
            if self.restore(place).await.is_err() {
                continue;
            }
            let counters = Repair::new(What::Counters(place), Lack::Older("retired until now".to_owned()));
            if let Err(errno) = self.newest.write(self.io, counters.what).await {
                self.not_repaired(&counters, errno);
            }
            self.flush().await?;
            self.next.retired &= !(1 << place.number());
            let cause = format!("the spare's {} takes writes again", place.name());
            let action = "written in full; it counts again";
            event(self.events, Severity::Info, EventKind::PlaceRestored, DeviceIndex::SPARE, cause, action);
        }
        Ok(())
    }

    /// Write everything a place has to take. Both superblocks too: a place without one of them would be
    /// retired again with the next generation or the one after.
    async fn restore(&self, place: Place) -> Result<(), Errno> {
        for copy in 0..2 {
            self.newest.write(self.io, What::Superblock(Seat::Spare(place), copy)).await?;
        }
        for home in Home::ALL {
            for number in 0..self.newest.layout.table_pages {
                self.newest.write(self.io, What::Page(place, home, number)).await?;
            }
        }
        Ok(())
    }

    /// Write the new generation's superblock to every live place.
    async fn begin(&mut self) -> Result<(), OpenError> {
        let copy = Superblock::copy_for(self.next.generation);
        'again: loop {
            for place in Place::ALL.into_iter().filter(|place| !self.next.is_retired(*place)) {
                let bytes = self.next.encode(Seat::Spare(place), copy);
                let offset = self.newest.layout.superblock(place, copy);
                if let Err(errno) = self.io.write(DeviceIndex::SPARE, offset, &bytes).await {
                    self.retire(place, errno, "writing the superblock")?;
                    // No two superblocks of one generation may differ; the older copy stays as it is.
                    self.next.generation += 2;
                    continue 'again;
                }
            }
            break;
        }
        for repair in self.repairs {
            let What::Superblock(Seat::Spare(place), of) = repair.what else { continue };
            if of == copy && !self.next.is_retired(place) {
                self.repaired(repair);
            }
        }
        Ok(())
    }

    /// Write the note of the label anew where it needs that. Its superblocks are the healer's: a power cut must not
    /// find both on their way, and what the last session wrote to one may not be durable.
    async fn repair_label(&mut self) -> Result<(), OpenError> {
        let repairs = self.repairs;
        for repair in repairs {
            match repair.what {
                What::Poison(Seat::Label) => self.repair(repair).await?,
                What::Superblock(Seat::Label, _) => {
                    let (cause, device) = (repair.cause.clone(), DeviceIndex::PRIMARY);
                    let action = "another copy is used; it is written anew with the label's list of remapped blocks";
                    event(self.events, Severity::Warn, EventKind::MetadataDamaged, device, cause, action);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Flush the spare. A failure is noted wherever that is possible: who opens next must not take the
    /// next flush's success for the last one's (F2).
    async fn flush(&self) -> Result<(), OpenError> {
        let Err(errno) = self.io.flush(DeviceIndex::SPARE).await else { return Ok(()) };
        let failed = io_error(DeviceIndex::SPARE, "flushing its metadata")(errno);
        let Newest { layout, label, superblock, poison, .. } = self.newest;
        if superblock.clean && !poison.poisoned {
            // Nothing of the guest's was waiting for it.
            return Err(failed);
        }
        let note = match poison.poisoned {
            // What it says of earlier writes stays true.
            true => Poison { sequence: poison.sequence + 1, ..poison.clone() },
            false => Poison {
                sequence: poison.sequence + 1,
                poisoned: true,
                device: DeviceIndex::SPARE.0,
                errno: errno.0,
                ..Poison::default()
            },
        };
        for place in Place::ALL {
            let bytes = note.encode(superblock.set, Seat::Spare(place));
            let _ = self.io.write(DeviceIndex::SPARE, layout.poison(place), &bytes).await;
        }
        let _ = self.io.flush(DeviceIndex::SPARE).await;
        if let Some(label) = label {
            let bytes = note.encode(superblock.set, Seat::Label);
            let _ = self.io.write(DeviceIndex::PRIMARY, label.poison(), &bytes).await;
            let _ = self.io.flush(DeviceIndex::PRIMARY).await;
        }
        Err(failed)
    }
}
