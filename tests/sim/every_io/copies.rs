//! Copies of metadata on the spare. Of two with one number both say the same, whenever the power goes: nobody
//! could tell at open which of them is true.

use std::fmt::Debug;

use uuid::Uuid;
use vhost_remap::volume::layout::{Home, Place};
use vhost_remap::volume::sidecar::{Poison, SavedCounters};
use vhost_remap::volume::superblock::{Seat, Superblock};
use vhost_remap::volume::table::{Page, PageSeat};

use crate::session::SET;
use crate::world::World;

/// Look at what lies on the spare now.
pub(crate) fn check_copies(world: &World) {
    let (set, layout) = (Uuid::from_u128(SET), world.config.layout());
    let page = |offset| world.disks[1].page(offset);
    let superblocks = Place::ALL.into_iter().flat_map(|place| (0..2).map(move |copy| (place, copy)));
    agree("superblocks", superblocks, |(place, copy)| {
        let found = Superblock::decode(&page(layout.superblock(place, copy)), Seat::Spare(place), copy).ok()?;
        // That field is the label's: here it says nothing.
        Some((found.generation, Superblock { stamped: 0, ..found }))
    });
    for number in 0..layout.table_pages {
        let homes = Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| (place, home)));
        agree("table pages", homes, |(place, home)| {
            let found = page(layout.table(place, home, number));
            let found = Page::decode(&found, set, number, PageSeat::Spare(place, home))?;
            Some((found.sequence, found))
        });
    }
    agree("poison pages", Place::ALL, |place| {
        let found = Poison::decode(&page(layout.poison(place)), set, Seat::Spare(place))?;
        Some((found.sequence, found))
    });
    agree("counters", Place::ALL, |place| {
        let found = SavedCounters::decode(&page(layout.counters(place)), set, Seat::Spare(place))?;
        Some((found.sequence, found))
    });
}

/// Those of the seats that are valid, with their numbers, do not contradict each other.
fn agree<S: Copy + Debug, T: PartialEq + Debug>(
    what: &str,
    seats: impl IntoIterator<Item = S>,
    read: impl Fn(S) -> Option<(u64, T)>,
) {
    let found: Vec<(S, (u64, T))> = seats.into_iter().filter_map(|seat| Some((seat, read(seat)?))).collect();
    for (i, (seat, (number, content))) in found.iter().enumerate() {
        for (other, (same, says)) in &found[..i] {
            let contradict = number == same && content != says;
            assert!(
                !contradict,
                "O1: {what} {seat:?} and {other:?} of number {number} contradict: {content:?}, {says:?}"
            );
        }
    }
}
