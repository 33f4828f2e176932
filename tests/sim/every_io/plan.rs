//! What happens at which device operation of a run that leaves nothing to chance.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use vhost_remap::device::{DeviceIndex, Errno, OpKind};
use vhost_remap::engine::event::EventKind;
use vhost_remap::units::SectorRange;

use crate::config::Config;
use crate::disk::{Disk, Effect};
use crate::guest::Value;
use crate::model::{Crash, Model, Tick};
use crate::rng::Rng;
use crate::world::{Growth, Owner, World, sectors, trace};

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    /// Operation `at`, once, and does so much all the same.
    Once { at: u64, effect: Effect },
    /// Every operation from `at` on, on the devices of the mask (1 the primary, 2 the spare).
    From { at: u64, devices: u8, errno: i32 },
}

/// What an operation was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Struck {
    pub(crate) by_script: bool,
    pub(crate) device: DeviceIndex,
    pub(crate) kind: OpKind,
}

/// See [`World::plan`].
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) strike: Option<Strike>,
    /// Operations since counting began.
    pub(crate) count: u64,
    pub(crate) counting: bool,
    /// What was counted.
    pub(crate) kinds: Vec<OpKind>,
    pub(crate) struck: Vec<Struck>,
    /// What a crash must not forget: a poisoning from before; unless the operator clears it just now.
    pub(crate) poisoned: bool,
    pub(crate) clearing: bool,
    /// Crash points from this operation on are kept.
    pub(crate) record_from: Option<u64>,
    pub(crate) snapshots: Vec<Snapshot>,
}

impl World {
    /// Before the operation of flight `index` is performed: whether it fails, and a look at the disks in case
    /// that is where the power goes.
    pub(crate) fn planned(&mut self, index: usize) -> Option<Errno> {
        let plan = self.plan.as_ref().filter(|plan| plan.counting)?;
        let (device, kind) = (self.flights[index].op.device, self.flights[index].op.kind);
        let at = plan.count;
        let changes = !matches!(kind, OpKind::Read | OpKind::Identify);
        if changes && plan.record_from.is_some_and(|from| at >= from) {
            self.record();
        }
        let by_script = self.flights[index].owner == Owner::Script;
        let plan = self.plan.as_mut().expect("looked at above");
        plan.count += 1;
        plan.kinds.push(kind);
        let (errno, effect) = match plan.strike? {
            Strike::Once { at: when, effect } if when == at => (libc::EIO, effect),
            Strike::From { at: when, devices, errno } if at >= when && devices >> device.0 & 1 == 1 => {
                (errno, Effect::Nothing)
            }
            Strike::Once { .. } | Strike::From { .. } => return None,
        };
        plan.struck.push(Struck { by_script, device, kind });
        self.disk(device).effect = Some(effect);
        trace!(self, "operation {at} is struck: {effect:?}");
        Some(Errno(errno))
    }

    /// Whether a failed flush has been written down, and is not being cleared.
    fn poison_is_noted(&self) -> bool {
        let plan = self.plan.as_ref();
        let told = self.events.iter().rfind(|event| matches!(event.kind, EventKind::Poisoned | EventKind::Cleared));
        let noted = match told {
            Some(event) => event.kind == EventKind::Poisoned && !event.action.contains("not persistent"),
            None => plan.is_some_and(|plan| plan.poisoned),
        };
        noted && plan.is_none_or(|plan| !plan.clearing)
    }

    /// W2, W3: what was answered after its block moved is as durable as its mapping. `events` is how many
    /// there were when the write was submitted.
    pub(crate) fn pin_moved(&mut self, ranges: &[SectorRange], events: usize, start: Tick) {
        if self.plan.is_none() {
            return;
        }
        for event in self.events[events..].iter().filter(|event| event.kind == EventKind::Remapped) {
            let block = event.range.start.0..event.range.end().0;
            self.model.pinned(sectors(ranges).filter(|sector| block.contains(sector)), start);
        }
    }

    /// Keep the state of this moment as one a crash may meet.
    pub(crate) fn record(&mut self) {
        let snapshot = Snapshot::of(self);
        self.plan.as_mut().expect("only plans record").snapshots.push(snapshot);
    }
}

/// All that outlives a crash, as of some moment, and what was under way then.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// Operations performed before it.
    pub(crate) at: u64,
    disks: [Disk; 2],
    model: Model,
    next_value: Value,
    capacity: u64,
    growth: Growth,
    /// A place was retired.
    pub(crate) retired: bool,
    /// A failed flush was noted durably.
    pub(crate) poisoned: bool,
    /// The writes under way: device and number.
    under_way: BTreeSet<(usize, u64)>,
}

/// A sector of a write: device, number of the write, sector.
type Piece = (usize, u64, usize);

/// How a crash ends, with the pieces of unflushed writes that survive it.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    crash: Crash,
    kept: BTreeSet<Piece>,
}

/// How many of the images a crash can leave are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detail {
    /// All that was unflushed, or under way, survives, or none of it, or the first half of each write.
    Few,
    /// Every subset of the writes where they are few, else each of them alone, and all but each.
    Writes,
    /// Every subset of the sectors where they are few, else every subset of the writes, and each write torn.
    Torn,
}

/// Sectors of which all subsets are looked at.
const SECTORS_MAX: usize = 10;
/// Writes of which all subsets are looked at: without, and with, tearing.
const WRITES_MAX: [usize; 2] = [4, 7];

impl Snapshot {
    pub(crate) fn of(world: &World) -> Snapshot {
        let mut disks = world.disks.clone();
        let mut under_way = BTreeSet::new();
        for flight in &world.flights {
            let device = usize::from(flight.op.device.0);
            under_way.extend(disks[device].land(&flight.op).map(|number| (device, number)));
        }
        Snapshot {
            at: world.plan.as_ref().map_or(0, |plan| plan.count),
            disks,
            model: world.model.clone(),
            next_value: world.next_value,
            capacity: world.config.capacity,
            growth: world.growth.clone(),
            retired: world.retired,
            poisoned: world.poison_is_noted(),
            under_way,
        }
    }

    /// The images that a crash here can leave, as far as `detail` says.
    pub(crate) fn images(&self, detail: Detail) -> Vec<Image> {
        let mut writes: Vec<Vec<Piece>> = Vec::new();
        for (device, disk) in self.disks.iter().enumerate() {
            let unflushed = disk.unflushed().into_iter();
            writes.extend(unflushed.map(|(number, sectors)| {
                sectors.into_iter().map(|sector| (device, number, sector)).collect::<Vec<_>>()
            }));
        }
        let under_way = |write: &&Vec<Piece>| self.under_way.contains(&(write[0].0, write[0].1));
        let flying: Vec<Vec<Piece>> = writes.iter().filter(under_way).cloned().collect();
        let killed = subsets(&flying, detail).into_iter().map(|kept| Image { crash: Crash::Kill, kept });
        let cut = subsets(&writes, detail).into_iter().map(|kept| Image { crash: Crash::PowerCut, kept });
        killed.chain(cut).collect()
    }

    /// A world in which only the image is left, not opened.
    pub(crate) fn world(&self, image: Option<&Image>, config: &Config, verbose: bool) -> World {
        let config = Config { capacity: self.capacity, ..config.clone() };
        let mut world = World::on(self.disks.clone(), config, Rng::new(1), verbose);
        world.growth.clone_from(&self.growth);
        (world.model, world.next_value, world.retired) = (self.model.clone(), self.next_value, self.retired);
        world.plan = Some(Plan { poisoned: self.poisoned, ..Plan::default() });
        world.disks.iter_mut().for_each(|disk| disk.effect = Some(Effect::Half));
        let Some(Image { crash, kept }) = image else { return world };
        for (device, disk) in world.disks.iter_mut().enumerate() {
            match crash {
                Crash::PowerCut => disk.cut(|number, sector| kept.contains(&(device, number, sector))),
                Crash::Kill => disk.undo(|number, sector| {
                    self.under_way.contains(&(device, number)) && !kept.contains(&(device, number, sector))
                }),
            }
            disk.recover();
        }
        world.model.crash(*crash);
        world
    }
}

/// Equal for worlds that differ in nothing a reopening could see.
pub(crate) fn fingerprint(world: &World, poisoned: bool) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.disks.iter().for_each(|disk| disk.fingerprint(&mut hasher));
    world.model.fingerprint(&mut hasher);
    poisoned.hash(&mut hasher);
    hasher.finish()
}

fn every_subset<T>(parts: &[T], pieces: impl Fn(&T) -> Vec<Piece>) -> Vec<BTreeSet<Piece>> {
    let chosen = |mask: usize| parts.iter().enumerate().filter(move |(i, _)| mask >> i & 1 == 1);
    (0..1_usize << parts.len()).map(|mask| chosen(mask).flat_map(|(_, part)| pieces(part)).collect()).collect()
}

/// The subsets of the pieces of `writes` that `detail` asks for.
fn subsets(writes: &[Vec<Piece>], detail: Detail) -> Vec<BTreeSet<Piece>> {
    let all: BTreeSet<Piece> = writes.iter().flatten().copied().collect();
    if all.is_empty() {
        return vec![all];
    }
    if detail == Detail::Torn && all.len() <= SECTORS_MAX {
        let sectors: Vec<Piece> = all.into_iter().collect();
        return every_subset(&sectors, |sector| vec![*sector]);
    }
    let mut kept = match detail {
        Detail::Few => {
            let halves = writes.iter().flat_map(|write| &write[..write.len() / 2]).copied().collect();
            vec![BTreeSet::new(), halves, all]
        }
        Detail::Writes | Detail::Torn if writes.len() <= WRITES_MAX[usize::from(detail == Detail::Torn)] => {
            every_subset(writes, Clone::clone)
        }
        Detail::Writes | Detail::Torn => {
            let alone = writes.iter().map(|write| write.iter().copied().collect::<BTreeSet<Piece>>());
            let without: Vec<BTreeSet<Piece>> = alone.clone().map(|write| &all - &write).collect();
            alone.chain(without).chain([BTreeSet::new(), all]).collect()
        }
    };
    if detail == Detail::Torn {
        let all: BTreeSet<Piece> = writes.iter().flatten().copied().collect();
        for write in writes {
            let others = &all - &write.iter().copied().collect();
            for (begin, end) in (1..write.len()).map(|at| write.split_at(at)) {
                for part in [begin, end] {
                    let part: BTreeSet<Piece> = part.iter().copied().collect();
                    kept.push(&others | &part);
                    kept.push(part);
                }
            }
        }
    }
    kept
}
