//! What goes wrong.

use vhost_remap::device::DeviceIndex;
use vhost_remap::volume::layout::Place;

use crate::config::{Config, Fault};
use crate::disk::{Astray, Bad, Until};
use crate::guest::SECTOR;
use crate::rng::Rng;
use crate::world::{World, trace};

/// Bad sectors of a device at a time, at most: more would keep a run from doing anything else.
const BAD_MAX: usize = 12;
/// Slots that go bad: those used first, and those first used in the run.
const BAD_SLOTS: u64 = 10;

/// A fault that strikes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trouble {
    /// Sectors go bad for reads or for writes.
    Bad { device: DeviceIndex, sector: u64, count: u64, read: bool, bad: Bad },
    /// So many operations fail with that error, wherever they go.
    Burst { device: DeviceIndex, count: u32, errno: i32 },
    /// So many writes find no space.
    Full { device: DeviceIndex, count: u32 },
    /// The device goes, or comes back.
    ComeAndGo(DeviceIndex),
    /// A flush fails.
    Flush(DeviceIndex),
    /// Metadata in one place changes.
    Damage { sector: u64 },
    /// The next writes of metadata in one place succeed and are not done, or so many sectors away.
    Astray { count: u32, by: Option<u64> },
    /// Chance decides for each operation.
    Elsewhere,
}

impl Trouble {
    pub(crate) fn of(fault: Fault, config: &Config, rng: &mut Rng) -> Trouble {
        let errno = rng.pick(&[libc::EIO, libc::EIO, libc::ENODATA, libc::EILSEQ]);
        // Less often than a ladder has rungs, as another trouble may have been what it began with.
        let times = Until::Times(1 + few(rng, 2));
        let more = Until::Times(1 + few(rng, 8));
        let (primary, spare) = (DeviceIndex::PRIMARY, DeviceIndex::SPARE);
        let bad = |until| Bad { errno, until, fault: Some(fault) };
        match fault {
            Fault::PrimaryReadOnce => bad_guest_sector(config, rng, bad(times), true),
            Fault::PrimaryReadUntilWritten => bad_guest_sector(config, rng, bad(Until::Written), true),
            Fault::PrimaryReadForEver => bad_guest_sector(config, rng, bad(Until::Healed), true),
            Fault::PrimaryWriteTimes => bad_guest_sector(config, rng, bad(more), false),
            Fault::PrimaryWriteForEver => bad_guest_sector(config, rng, bad(Until::Healed), false),
            Fault::SlotRead | Fault::SlotWrite => {
                let bad = bad(rng.pick(&[more, Until::Written, Until::Healed]));
                let first = if rng.percent(50) { config.used() } else { 0 };
                let slot = (first + rng.below(BAD_SLOTS)).min(u64::from(config.max_remaps) - 1);
                let sector = config.layout().slots_start / 512 + slot * 8 + rng.below(8);
                Trouble::Bad { device: spare, sector, count: 1, read: fault == Fault::SlotRead, bad }
            }
            Fault::MetadataWrite | Fault::MetadataRead => {
                let read = fault == Fault::MetadataRead;
                let place = if config.spares_the_head() || rng.percent(50) { Place::Tail } else { Place::Head };
                let bad = bad(rng.pick(&[more, Until::Written, Until::Healed]));
                let pages = config.place_sectors() / 8;
                let sector = config.layout().place_start(place) / 512 + rng.below(pages) * 8;
                Trouble::Bad { device: spare, sector, count: 8, read, bad }
            }
            Fault::Ours | Fault::Burst => {
                let device = rng.pick(&[primary, spare]);
                let errno = match fault {
                    Fault::Ours => rng.pick(&[libc::EAGAIN, libc::ENOMEM]),
                    _ => rng.pick(&[libc::EIO, libc::EREMOTEIO, libc::ENODATA]),
                };
                Trouble::Burst { device, count: 1 + few(rng, 3), errno }
            }
            Fault::Full => Trouble::Full { device: rng.pick(&[primary, primary, spare]), count: 1 + few(rng, 3) },
            Fault::PrimaryGone => Trouble::ComeAndGo(primary),
            Fault::SpareGone => Trouble::ComeAndGo(spare),
            Fault::PrimaryFlush => Trouble::Flush(primary),
            Fault::SpareFlush => Trouble::Flush(spare),
            Fault::MetadataDamage => Trouble::Damage { sector: rng.below(config.place_sectors()) },
            Fault::MetadataLost => Trouble::Astray { count: 1 + few(rng, 2), by: None },
            Fault::MetadataMisdirected => {
                let pages = config.place_sectors() / 8;
                Trouble::Astray { count: 1 + few(rng, 2), by: Some((1 + rng.below(pages - 1)) * 8) }
            }
            Fault::Latency => Trouble::Elsewhere,
        }
    }

    pub(crate) fn strike(self, world: &mut World) {
        trace!(world, "fault {self:?}");
        match self {
            Trouble::Bad { device, sector, count, read, bad } => mark(world, device, sector, count, bad, read),
            Trouble::Burst { device, count, errno } => world.disk(device).burst = (count, errno),
            Trouble::Full { device, count } => world.disk(device).full = count,
            Trouble::ComeAndGo(device) => {
                let disk = world.disk(device);
                disk.gone = !disk.gone;
            }
            Trouble::Flush(device) => world.disk(device).bad_flushes = 1,
            Trouble::Damage { sector } => damage(world, sector),
            Trouble::Astray { count, by } => {
                let layout = world.config.layout();
                let first = usize::try_from(layout.place_start(Place::Tail)).expect("small") / SECTOR;
                let sectors = usize::try_from(world.config.place_sectors()).expect("small");
                let by = by.map(|by| usize::try_from(by).expect("small"));
                world.disk(DeviceIndex::SPARE).astray = Some(Astray { count, by, first, sectors });
            }
            Trouble::Elsewhere => {}
        }
    }
}

/// A sector of the tail's metadata changes.
pub(crate) fn damage(world: &mut World, sector: u64) {
    let first = world.config.layout().place_start(Place::Tail) / SECTOR as u64;
    let sector = usize::try_from(first + sector).expect("small");
    trace!(world, "damage at spare sector {sector}");
    world.disks[1].damage(sector, &mut world.rng);
    world.count_strike(Some(Fault::MetadataDamage));
}

fn few(rng: &mut Rng, end: u64) -> u32 {
    u32::try_from(rng.below(end)).expect("small")
}

fn bad_guest_sector(config: &Config, rng: &mut Rng, bad: Bad, read: bool) -> Trouble {
    let capacity = config.capacity;
    let sector = match rng.below(10) {
        0..6 => rng.pick(&config.weak) * 8 + rng.below(8),
        6..9 => rng.below((config.hot * 8).min(capacity)),
        _ => rng.below(capacity),
    };
    let sector = sector.min(capacity - 1);
    Trouble::Bad { device: DeviceIndex::PRIMARY, sector, count: 1 + rng.below(2), read, bad }
}

fn mark(world: &mut World, device: DeviceIndex, sector: u64, count: u64, bad: Bad, read: bool) {
    let disk = world.disk(device);
    let end = sector.saturating_add(count).min(disk.bytes() / SECTOR as u64);
    // A sector on a disk of large ones fails together with its neighbours.
    let unit = disk.logical / SECTOR as u64;
    let (first, last) = (sector / unit * unit, end.next_multiple_of(unit));
    let marks = if read { &mut disk.bad_reads } else { &mut disk.bad_writes };
    for sector in first..last {
        let sector = usize::try_from(sector).expect("small");
        // One trouble at a time: the next must not begin where a ladder has just climbed the last.
        let recent = disk.passed.get(&sector).is_some_and(|when| when + 400 > disk.step);
        if marks.len() < BAD_MAX && !recent && !marks.contains_key(&sector) {
            marks.insert(sector, bad);
        }
    }
}

/// Whether the bad sectors of the spare leave one place alone, so that it speaks for the volume.
pub(crate) fn one_place_is_whole(world: &World) -> bool {
    let layout = world.config.layout();
    let spare = &world.disks[1];
    if spare.bad_reads.is_empty() && spare.bad_writes.is_empty() {
        return true;
    }
    Place::ALL.into_iter().any(|place| {
        let first = usize::try_from(layout.place_start(place)).expect("small") / SECTOR;
        let last = first + usize::try_from(layout.place_len()).expect("small") / SECTOR;
        spare.bad_reads.range(first..last).next().is_none() && spare.bad_writes.range(first..last).next().is_none()
    })
}
