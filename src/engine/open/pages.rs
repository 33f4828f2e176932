//! Table, poison and counters at open: the newest valid copy of each, and the copies that lack it.

use std::collections::BTreeMap;
use std::fmt;

use uuid::Uuid;

use super::OpenError;
use super::repair::{Lack, Repair, What, device_of};
use crate::device::{DeviceIndex, Errno};
use crate::engine::io::Io;
use crate::volume::layout::{Home, LabelLayout, Layout, PAGE, PAGE_SIZE, Place};
use crate::volume::sidecar::{Poison, SavedCounters};
use crate::volume::superblock::{Seat, Superblock};
use crate::volume::table::{Page, PageSeat, Table};

/// Why a page cannot be used.
#[derive(Clone, Copy)]
enum Flaw {
    Unreadable(Errno),
    Damaged,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Flaw::Unreadable(errno) => errno.fmt(f),
            Flaw::Damaged => f.write_str("damaged, or a page that belongs elsewhere"),
        }
    }
}

/// Why a copy that was read needs to be written anew, if it does.
fn lacking(found: Result<u64, Flaw>, newest: u64) -> Option<Lack> {
    match found {
        Err(flaw) => Some(Lack::Hidden(flaw.to_string())),
        Ok(sequence) if sequence != newest => {
            Some(Lack::Older(format!("sequence {sequence}, and the newest is {newest}")))
        }
        Ok(_) => None,
    }
}

/// One home of every table page in one place, as read.
async fn read_homes(io: &Io, layout: &Layout, set: Uuid, place: Place, home: Home) -> Vec<Result<Page, Flaw>> {
    const PAGES_AT_ONCE: u32 = 256;
    let mut pages = Vec::new();
    let mut first = 0;
    while first < layout.table_pages {
        let count = PAGES_AT_ONCE.min(layout.table_pages - first);
        let len = usize::try_from(u64::from(count) * PAGE_SIZE).expect("1 MiB");
        let (bulk, _) = io.read(DeviceIndex::SPARE, layout.table(place, home, first), len).await;
        for number in first..first + count {
            let verify =
                |bytes: &[u8]| Page::decode(bytes, set, number, PageSeat::Spare(place, home)).ok_or(Flaw::Damaged);
            let page = match &bulk {
                Ok(bulk) => {
                    let at = usize::try_from(u64::from(number - first) * PAGE_SIZE).expect("within 1 MiB");
                    verify(&bulk[at..at + PAGE])
                }
                Err(_) => {
                    let page = io.read_page(DeviceIndex::SPARE, layout.table(place, home, number)).await;
                    page.map_err(Flaw::Unreadable).and_then(|page| verify(&page))
                }
            };
            pages.push(page);
        }
        first += count;
    }
    pages
}

/// The table from the newest valid homes, and the homes that lack their page's newest.
pub(super) async fn load_table(
    io: &Io,
    layout: &Layout,
    superblock: &Superblock,
) -> Result<(Table, Vec<Repair>), OpenError> {
    let places: Vec<Place> = Place::ALL.into_iter().filter(|place| !superblock.is_retired(*place)).collect();
    let mut homes = BTreeMap::new();
    for (place, home) in places.iter().flat_map(|place| Home::ALL.map(|home| (*place, home))) {
        let pages = read_homes(io, layout, superblock.set, place, home).await;
        homes.insert((place, home.number()), (home, pages));
    }
    let mut table = Table::new(superblock.max_remaps);
    let mut repairs = Vec::new();
    for number in 0..layout.table_pages {
        let index = number as usize;
        let newest = homes
            .values()
            .filter_map(|(home, pages)| Some((*home, pages[index].as_ref().ok()?)))
            .max_by_key(|(_, page)| page.sequence);
        let (anchor, page) = newest.ok_or(OpenError::TablePage(number))?;
        for ((place, _), (home, pages)) in &homes {
            let found = pages[index].as_ref().map(|page| page.sequence).map_err(|flaw| *flaw);
            if let Some(lack) = lacking(found, page.sequence) {
                repairs.push(Repair::new(What::Page(*place, *home, number), lack));
            }
        }
        table.load_page(number, page, anchor);
    }
    Ok((table, repairs))
}

/// What to go by where the copies of the poison page do not say whether a flush had failed: nobody knows that all
/// is well, so nobody says so.
pub(super) fn unknown_poison() -> Poison {
    Poison { sequence: 1, poisoned: true, device: DeviceIndex::SPARE.0, errno: libc::EUCLEAN, ..Poison::default() }
}

/// Why nobody knows whether a flush had failed, if so, and the device whose copies are missed.
///
/// The note is written wherever that is possible, which may be one device only: the other one had gone, as a
/// spare does whose flush fails. A device without a valid copy may have held it. A volume that was closed cleanly
/// had no note.
fn silence(poisons: &[(Seat, Result<Poison, Flaw>)], clean: bool) -> Option<(Option<DeviceIndex>, &'static str)> {
    let valid = || poisons.iter().filter_map(|(seat, found)| Some((device_of(*seat), found.as_ref().ok()?)));
    if valid().next().is_none() {
        return Some((None, "no copy of the poison page can be read"));
    }
    if clean || valid().any(|(_, poison)| poison.poisoned) {
        return None;
    }
    let causes = [
        (DeviceIndex::PRIMARY, "not closed, and the label's copy of the poison page cannot be read"),
        (DeviceIndex::SPARE, "not closed, and no copy of the poison page on the spare can be read"),
    ];
    let has_seat = |device| poisons.iter().any(|(seat, _)| device_of(*seat) == device);
    let is_silent = |device| has_seat(device) && !valid().any(|(of, _)| of == device);
    causes.into_iter().find(|(device, _)| is_silent(*device)).map(|(device, cause)| (Some(device), cause))
}

/// Poison and counters, as found.
pub(super) struct Sidecars {
    pub(super) poison: Poison,
    /// Why nobody knows whether a flush had failed, if so.
    pub(super) poison_unknown: Option<&'static str>,
    pub(super) counters: SavedCounters,
    pub(super) repairs: Vec<Repair>,
}

/// Poison and counters. Of a volume that may be written, a device that does not say whether it had a note is asked
/// to take one: where it takes none, it may well have had none, and there would be no end to the poison.
pub(super) async fn load_sidecars(
    io: &Io,
    layout: &Layout,
    superblock: &Superblock,
    label: Option<LabelLayout>,
    read_only: bool,
) -> Sidecars {
    let set = superblock.set;
    let (mut poisons, mut counters) = (Vec::new(), Vec::new());
    // Retired places too: a poison may have found no other that took it.
    let mut seats: Vec<(Seat, u64)> = Place::ALL.map(|place| (Seat::Spare(place), layout.poison(place))).into();
    seats.extend(label.map(|label| (Seat::Label, label.poison())));
    for (seat, offset) in &seats {
        let page = io.read_page(device_of(*seat), *offset).await;
        let verify = |page: &[u8]| Poison::decode(page, set, *seat).ok_or(Flaw::Damaged);
        poisons.push((*seat, page.map_err(Flaw::Unreadable).and_then(|page| verify(&page))));
    }
    for place in Place::ALL.into_iter().filter(|place| !superblock.is_retired(*place)) {
        let (page, _) = io.read(DeviceIndex::SPARE, layout.counters(place), PAGE).await;
        let verify = |page: &[u8]| SavedCounters::decode(page, set, Seat::Spare(place)).ok_or(Flaw::Damaged);
        counters.push((place, page.map_err(Flaw::Unreadable).and_then(|page| verify(&page))));
    }
    let noted = poisons.iter().filter_map(|(_, found)| found.as_ref().ok()).max_by_key(|poison| poison.sequence);
    // Newer than every copy there is, so that all of them get it.
    let unknown = Poison { sequence: noted.map_or(0, |noted| noted.sequence) + 1, ..unknown_poison() };
    let mut poison_unknown = silence(&poisons, superblock.clean);
    if let Some((Some(device), _)) = poison_unknown
        && !read_only
    {
        let mut taken = false;
        for (seat, offset) in seats.iter().filter(|(seat, _)| device_of(*seat) == device) {
            taken |= io.write(device, *offset, &unknown.encode(set, *seat)).await.is_ok();
        }
        poison_unknown = poison_unknown.filter(|_| taken);
    }
    let poison = noted.filter(|_| poison_unknown.is_none()).cloned().unwrap_or(unknown);
    let saved = counters.iter().filter_map(|(_, found)| found.as_ref().ok()).max_by_key(|saved| saved.sequence);
    let saved = saved.cloned().unwrap_or_default();
    let sequence = |found: &Result<Poison, Flaw>| found.as_ref().map(|poison| poison.sequence).map_err(|flaw| *flaw);
    let bad_poisons = poisons
        .iter()
        .filter_map(|(seat, found)| Some(Repair::new(What::Poison(*seat), lacking(sequence(found), poison.sequence)?)));
    let sequence =
        |found: &Result<SavedCounters, Flaw>| found.as_ref().map(|saved| saved.sequence).map_err(|flaw| *flaw);
    let bad_counters = counters.iter().filter_map(|(place, found)| {
        Some(Repair::new(What::Counters(*place), lacking(sequence(found), saved.sequence)?))
    });
    let repairs = bad_poisons.chain(bad_counters).collect();
    Sidecars { poison_unknown: poison_unknown.map(|(_, cause)| cause), repairs, counters: saved, poison }
}
