//! Superblocks at open: where they lie, which one counts, and what the primary's label says to it.

use super::repair::{Lack, Repair, What, device_of};
use super::{DeviceFacts, OpenError};
use crate::device::DeviceIndex;
use crate::engine::io::Io;
use crate::volume::layout::{LabelLayout, Layout, PAGE_SIZE, Place, REGION_ALIGN, REMAPS_MAX, place_len};
use crate::volume::superblock::{INCOMPAT_KNOWN, RO_COMPAT_KNOWN, Seat, Superblock, SuperblockError};

/// A superblock's seat, and what lies there.
pub(super) struct Found {
    seat: Seat,
    copy: u8,
    offset: u64,
    result: Result<Superblock, Flaw>,
}

/// Why nothing that lies there can be used.
struct Flaw {
    cause: String,
    /// Whether it may have been a superblock of such a device.
    ours: bool,
}

impl Flaw {
    fn elsewhere() -> Flaw {
        Flaw { cause: SuperblockError::Misplaced.to_string(), ours: true }
    }
}

/// Both copies of a seat, of which the first begins at `start`.
pub(super) async fn read_pair(io: &Io, seat: Seat, start: u64) -> Result<Vec<Found>, OpenError> {
    let device = device_of(seat);
    let mut found = Vec::new();
    for copy in 0..2 {
        let offset = start + u64::from(copy) * PAGE_SIZE;
        let result = match io.read_page(device, offset).await {
            Err(errno) => Err(Flaw { cause: errno.to_string(), ours: true }),
            Ok(page) => match Superblock::decode(&page, seat, copy) {
                Ok(superblock) => Ok(superblock),
                Err(SuperblockError::Version(found)) => return Err(OpenError::Version { device, found }),
                Err(error) => {
                    let ours = !matches!(error, SuperblockError::NotOurs | SuperblockError::Role);
                    Err(Flaw { cause: error.to_string(), ours })
                }
            },
        };
        found.push(Found { seat, copy, offset, result });
    }
    Ok(found)
}

fn valid(found: &[Found]) -> impl Iterator<Item = &Superblock> {
    found.iter().filter_map(|found| found.result.as_ref().ok())
}

/// Of one generation a label may have two, of which one was not yet written again when the power went: as long
/// as one gives its list a date, the list is whole.
pub(super) fn newest(found: &[Found]) -> Option<&Superblock> {
    valid(found).max_by_key(|superblock| (superblock.generation, superblock.stamped))
}

/// What is wrong with a superblock of ours among them.
pub(super) fn damage(found: &[Found]) -> Option<String> {
    let flaws = found.iter().filter_map(|found| found.result.as_ref().err());
    flaws.filter(|flaw| flaw.ours).map(|flaw| flaw.cause.clone()).next()
}

/// Every byte at which the tail of a spare of that size may start, nearest to its end first.
pub(in crate::engine) fn tail_starts(spare_size: u64) -> impl Iterator<Item = u64> {
    let end = spare_size / REGION_ALIGN;
    (1..=(place_len(REMAPS_MAX) / REGION_ALIGN).min(end)).map(move |regions| (end - regions) * REGION_ALIGN)
}

/// All superblocks of the spare. Where the head has none, the tail is looked for at every start its size
/// allows, from the spare's end: slots, whose content the guest chooses, lie before the true one.
pub(super) async fn find(io: &Io, spare_size: u64) -> Result<Vec<Found>, OpenError> {
    let mut found = read_pair(io, Seat::Spare(Place::Head), 0).await?;
    let tail = Seat::Spare(Place::Tail);
    if let Some(known) = newest(&found) {
        let start = Layout::new(known.spare_size, known.max_remaps)?.place_start(Place::Tail);
        found.extend(read_pair(io, tail, start).await?);
        return Ok(found);
    }
    let mut damaged = Vec::new();
    for start in tail_starts(spare_size) {
        let mut pair = read_pair(io, tail, start).await?;
        for found in &mut pair {
            found.result = std::mem::replace(&mut found.result, Err(Flaw::elsewhere())).and_then(|superblock| {
                let layout = Layout::new(superblock.spare_size, superblock.max_remaps);
                let belongs = layout.is_ok_and(|layout| layout.place_start(Place::Tail) == start);
                if belongs { Ok(superblock) } else { Err(Flaw::elsewhere()) }
            });
        }
        if newest(&pair).is_some() {
            found.extend(pair);
            return Ok(found);
        }
        if damaged.is_empty() && pair.iter().any(|found| found.result.as_ref().is_err_and(|flaw| flaw.ours)) {
            damaged = pair;
        }
    }
    // For the reason of the refusal.
    found.extend(damaged);
    Ok(found)
}

/// The newest superblock of the spare.
pub(super) fn choose(found: &[Found]) -> Result<Superblock, OpenError> {
    let Some(newest) = newest(found) else {
        let flaws = || found.iter().filter_map(|found| Some((found, found.result.as_ref().err()?)));
        if flaws().all(|(_, flaw)| !flaw.ours) {
            return Err(OpenError::NotAVolume);
        }
        let causes: Vec<String> = flaws()
            .map(|(found, flaw)| format!("{} (byte {}): {}", name(found.seat, found.copy), found.offset, flaw.cause))
            .collect();
        return Err(OpenError::NoSuperblock(causes.join("; ")));
    };
    match valid(found).find(|superblock| superblock.set != newest.set) {
        Some(other) => Err(OpenError::Mixed(newest.set, other.set)),
        None => Ok(newest.clone()),
    }
}

/// The label of the primary, as read.
pub(super) struct Label {
    pub(super) layout: LabelLayout,
    found: Vec<Found>,
}

/// Read the label, where the volume has one.
pub(super) async fn read_label(io: &Io, superblock: &Superblock) -> Result<Option<Label>, OpenError> {
    let layout = LabelLayout::new(superblock.primary_size, superblock.max_remaps).filter(|_| superblock.labelled);
    let Some(layout) = layout else { return Ok(None) };
    Ok(Some(Label { layout, found: read_pair(io, Seat::Label, layout.superblock(0)).await? }))
}

/// Whether the superblock knows the primary by inode, WWN or serial.
pub(super) fn same_device(superblock: &Superblock, primary: &DeviceFacts) -> bool {
    (superblock.primary_inode, superblock.primary_wwn.as_str()) == (primary.inode, primary.wwn.as_str())
}

impl Label {
    pub(super) fn newest(&self) -> Option<&Superblock> {
        newest(&self.found)
    }

    /// Compare label and spare; the superblock that counts.
    ///
    /// The label never has a generation that was not durable on the spare before. Where it has a later one
    /// than the spare, an older copy of the spare was put back, unless the spare shows what became of the
    /// later one: every seat it was written to is damaged. Then the label's copy of it counts.
    pub(super) fn compare(
        &self,
        found: &[Found],
        superblock: Superblock,
        primary: &DeviceFacts,
    ) -> Result<Superblock, OpenError> {
        let Some(label) = self.newest() else {
            // A creation that ended before its last step, or a label on bad sectors.
            let known = same_device(&superblock, primary);
            return if known { Ok(superblock) } else { Err(OpenError::NoLabel(superblock.set)) };
        };
        if label.set != superblock.set {
            return Err(OpenError::WrongPrimary { found: label.set, expected: superblock.set });
        }
        if label.generation <= superblock.generation {
            return Ok(superblock);
        }
        let copy = Superblock::copy_for(label.generation);
        let written = |seat| matches!(seat, Seat::Spare(place) if !label.is_retired(place));
        let mut seats = found.iter().filter(|found| found.copy == copy && written(found.seat)).peekable();
        if seats.peek().is_some() && seats.all(|found| found.result.is_err()) {
            return Ok(label.clone());
        }
        Err(OpenError::OldSpare { spare: superblock.generation, primary: label.generation })
    }

    /// Copies that are to be written anew.
    pub(super) fn repairs(&self) -> Vec<Repair> {
        let damaged = self.found.iter().filter_map(|found| Some((found, found.result.as_ref().err()?)));
        damaged
            .map(|(found, flaw)| {
                Repair::new(What::Superblock(Seat::Label, found.copy), Lack::Hidden(flaw.cause.clone()))
            })
            .collect()
    }
}

/// Copies in places that count which are damaged, or lack the newest generation where it belongs.
pub(super) fn repairs(found: &[Found], superblock: &Superblock) -> Vec<Repair> {
    let current = Superblock::copy_for(superblock.generation);
    let mut repairs = Vec::new();
    for Found { seat, copy, result, .. } in found {
        let Seat::Spare(place) = *seat else { continue };
        if superblock.is_retired(place) {
            continue;
        }
        let lack = match result {
            Err(flaw) => Lack::Hidden(flaw.cause.clone()),
            Ok(old) if *copy == current && old.generation != superblock.generation => {
                Lack::Older(format!("generation {}, and the newest is {}", old.generation, superblock.generation))
            }
            Ok(_) => continue,
        };
        repairs.push(Repair::new(What::Superblock(*seat, *copy), lack));
    }
    repairs
}

/// Refuse what a later program made incompatible; the read-only compatible features that are not known here.
pub(super) fn check_features(superblock: &Superblock, device: DeviceIndex) -> Result<u64, OpenError> {
    let unknown = superblock.features[2] & !INCOMPAT_KNOWN;
    if unknown != 0 {
        return Err(OpenError::Features { device, unknown });
    }
    Ok(superblock.features[1] & !RO_COMPAT_KNOWN)
}

/// For messages.
pub(super) fn name(seat: Seat, copy: u8) -> String {
    match seat {
        Seat::Spare(place) => format!("superblock {copy} at the {}", place.name()),
        Seat::Label => format!("superblock {copy} of the label"),
    }
}
