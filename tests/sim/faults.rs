//! What goes wrong, and when.

use vhost_remap::device::DeviceIndex;
use vhost_remap::volume::layout::{Layout, Place};

use crate::config::Fault;
use crate::disk::{Bad, Until};
use crate::guest::SECTOR;
use crate::world::{World, trace};

/// Bad sectors of a device at a time, at most: more would keep a run from doing anything else.
const BAD_MAX: usize = 12;
/// Slots that go bad: those used first.
const BAD_SLOTS: u64 = 10;

/// One of the faults this run knows strikes.
pub(crate) fn inject(world: &mut World) {
    if world.config.faults.is_empty() {
        return;
    }
    let kinds = world.config.faults.clone();
    let fault = world.rng.pick(&kinds);
    trace!(world, "fault {fault:?}");
    let errno = world.rng.pick(&[libc::EIO, libc::EIO, libc::ENODATA, libc::EILSEQ]);
    let times = Until::Times(1 + u32::try_from(world.rng.below(3)).expect("small"));
    let more = Until::Times(1 + u32::try_from(world.rng.below(8)).expect("small"));
    let (primary, spare) = (DeviceIndex::PRIMARY, DeviceIndex::SPARE);
    match fault {
        Fault::PrimaryReadOnce => bad_guest_sector(world, Bad { errno, until: times }, true),
        Fault::PrimaryReadUntilWritten => bad_guest_sector(world, Bad { errno, until: Until::Written }, true),
        Fault::PrimaryReadForEver => bad_guest_sector(world, Bad { errno, until: Until::Healed }, true),
        Fault::PrimaryWriteTimes => bad_guest_sector(world, Bad { errno, until: more }, false),
        Fault::PrimaryWriteForEver => bad_guest_sector(world, Bad { errno, until: Until::Healed }, false),
        Fault::SlotRead | Fault::SlotWrite => {
            let until = world.rng.pick(&[more, Until::Written, Until::Healed]);
            let slot = world.rng.below(BAD_SLOTS);
            let sector = layout(world).slots_start / 512 + slot * 8 + world.rng.below(8);
            mark(world, spare, sector, 1, Bad { errno, until }, fault == Fault::SlotRead);
        }
        Fault::MetadataWrite | Fault::MetadataRead => {
            // Reads fail in one place only, so that the other one can speak for the volume.
            let read = fault == Fault::MetadataRead;
            let place = if read || world.rng.percent(60) { Place::Tail } else { Place::Head };
            let until = world.rng.pick(&[more, Until::Written, Until::Healed]);
            let pages = 4 + 2 * u64::from(layout(world).table_pages);
            let sector = layout(world).place_start(place) / 512 + world.rng.below(pages) * 8;
            mark(world, spare, sector, 8, Bad { errno, until }, read);
        }
        Fault::Ours | Fault::Burst => {
            let device = world.rng.pick(&[primary, spare]);
            let errno = match fault {
                Fault::Ours => world.rng.pick(&[libc::EAGAIN, libc::ENOMEM]),
                _ => world.rng.pick(&[libc::EIO, libc::EREMOTEIO, libc::ENODATA]),
            };
            let count = 1 + u32::try_from(world.rng.below(3)).expect("small");
            world.disk(device).burst = (count, errno);
        }
        Fault::Full => {
            let device = world.rng.pick(&[primary, primary, spare]);
            world.disk(device).full = 1 + u32::try_from(world.rng.below(3)).expect("small");
        }
        Fault::PrimaryGone => come_and_go(world, primary),
        Fault::SpareGone => come_and_go(world, spare),
        Fault::PrimaryFlush => world.disk(primary).bad_flushes = 1,
        Fault::SpareFlush => world.disk(spare).bad_flushes = 1,
        // Chance decides for each operation at its submission, and between sessions.
        Fault::Latency | Fault::MetadataDamage => {}
    }
}

fn layout(world: &World) -> Layout {
    Layout::new(world.config.spare_bytes(), world.config.max_remaps).expect("the configuration is possible")
}

fn come_and_go(world: &mut World, device: DeviceIndex) {
    let disk = world.disk(device);
    disk.gone = !disk.gone;
}

fn bad_guest_sector(world: &mut World, bad: Bad, read: bool) {
    let capacity = world.config.capacity;
    let sector = match world.rng.below(10) {
        0..6 => world.rng.pick(&world.config.weak.clone()) * 8 + world.rng.below(8),
        6..9 => world.rng.below((world.config.hot * 8).min(capacity)),
        _ => world.rng.below(capacity),
    };
    let sector = sector.min(capacity - 1);
    mark(world, DeviceIndex::PRIMARY, sector, 1 + world.rng.clone().below(2), bad, read);
}

fn mark(world: &mut World, device: DeviceIndex, sector: u64, count: u64, bad: Bad, read: bool) {
    trace!(world, "{device} sector {sector}+{count}: {bad:?} read {read}");
    let disk = world.disk(device);
    let end = sector.saturating_add(count).min(disk.bytes() / SECTOR as u64);
    // A sector on a disk of large ones fails together with its neighbours.
    let unit = disk.logical / SECTOR as u64;
    let (first, last) = (sector / unit * unit, end.next_multiple_of(unit));
    let marks = if read { &mut disk.bad_reads } else { &mut disk.bad_writes };
    for sector in first..last {
        let sector_at = usize::try_from(sector).expect("small");
        // One trouble at a time: the next must not begin where a ladder has just climbed the last.
        let recent = disk.passed.get(&sector_at).is_some_and(|when| when + 400 > disk.step);
        if marks.len() < BAD_MAX && !recent && !marks.contains_key(&sector_at) {
            marks.insert(usize::try_from(sector).expect("small"), bad);
        }
    }
}

/// Whether the bad sectors of the spare leave one place alone, so that it speaks for the volume.
pub(crate) fn one_place_is_whole(world: &World) -> bool {
    let layout = layout(world);
    let spare = &world.disks[1];
    Place::ALL.into_iter().any(|place| {
        let first = usize::try_from(layout.place_start(place)).expect("small") / SECTOR;
        let last = first + usize::try_from(layout.place_len()).expect("small") / SECTOR;
        spare.bad_reads.range(first..last).next().is_none() && spare.bad_writes.range(first..last).next().is_none()
    })
}

/// What happens to the devices while nobody uses them.
pub(crate) fn between_sessions(world: &mut World) {
    if world.config.has(&[Fault::MetadataDamage]) && !world.retired && !world.config.has(&[Fault::MetadataWrite]) {
        let layout = layout(world);
        let first = layout.place_start(Place::Tail) / SECTOR as u64;
        let sectors = (4 + 2 * u64::from(layout.table_pages)) * 8;
        for _ in 0..world.rng.below(4) {
            let sector = usize::try_from(first + world.rng.below(sectors)).expect("small");
            trace!(world, "damage at spare sector {sector}");
            world.disks[1].damage(sector, &mut world.rng);
        }
    }
    for device in [DeviceIndex::PRIMARY, DeviceIndex::SPARE] {
        if world.rng.percent(50) {
            let disk = world.disk(device);
            (disk.gone, disk.burst, disk.full, disk.bad_flushes) = (false, (0, 0), 0, 0);
        }
    }
}
