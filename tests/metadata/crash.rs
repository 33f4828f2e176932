//! The power goes after each operation in turn, and every unflushed sector meets every fate.

use std::collections::BTreeSet;

use vhost_remap::device::DeviceIndex;
use vhost_remap::device::memory::Keep;
use vhost_remap::units::Sector;

use crate::rig::{Cut, Random, Rig};

/// Sectors that make a difference, at most, of which all subsets are tried.
const ENUMERATED: usize = 7;
/// Subsets that chance picks where there are more.
const CHANCES: u64 = 40;

pub(crate) type Place = (DeviceIndex, u64);

/// Unflushed sectors whose loss or survival can be seen.
pub(crate) fn unflushed(rig: &Rig) -> Vec<Place> {
    let mut offered = BTreeSet::new();
    let (kept, lost) = (rig.fork(), rig.fork());
    kept.disks.crash(|_, _| Keep::Keep);
    lost.disks.crash(|device, sector| {
        offered.insert((device, sector.0));
        Keep::Drop
    });
    let differs =
        |(device, sector): &Place| kept.peek(*device, sector * 512, 512) != lost.peek(*device, sector * 512, 512);
    offered.into_iter().filter(differs).collect()
}

/// The power goes; of the unflushed sectors exactly those in `kept` have landed.
pub(crate) fn crashed(rig: &Rig, kept: &BTreeSet<Place>) -> Rig {
    crashed_as(rig, |device, sector| kept.contains(&(device, sector.0)))
}

fn crashed_as(rig: &Rig, mut lands: impl FnMut(DeviceIndex, Sector) -> bool) -> Rig {
    let mut after = rig.fork();
    after.crash(|device, sector| if lands(device, sector) { Keep::Keep } else { Keep::Drop });
    after
}

/// The `index`-th subset.
pub(crate) fn subset(of: &[Place], index: u64) -> BTreeSet<Place> {
    of.iter().enumerate().filter(|(bit, _)| index >> bit & 1 == 1).map(|(_, place)| *place).collect()
}

/// Every way in which a power cut can leave the disks, or a good choice where there are too many. Where a
/// sector was written twice, chance also picks the version between.
pub(crate) fn fates(rig: &Rig, seed: u64, mut check: impl FnMut(Rig)) -> usize {
    let sectors = unflushed(rig);
    let mut random = Random::new(seed);
    let mut count = 0;
    let mut tell = |after: Rig| {
        count += 1;
        check(after);
    };
    if sectors.len() <= ENUMERATED {
        (0..1 << sectors.len()).for_each(|index| tell(crashed(rig, &subset(&sectors, index))));
    } else {
        let all: BTreeSet<Place> = sectors.iter().copied().collect();
        tell(crashed(rig, &BTreeSet::new()));
        tell(crashed(rig, &all));
        for sector in &sectors {
            tell(crashed(rig, &BTreeSet::from([*sector])));
            let mut others = all.clone();
            others.remove(sector);
            tell(crashed(rig, &others));
        }
        for _ in 0..CHANCES {
            let index = random.next();
            tell(crashed(rig, &subset(&sectors, index)));
        }
    }
    for percent in [25, 75] {
        tell(crashed_as(rig, |_, _| random.percent(percent)));
    }
    count
}

/// Run `scenario` on copies of `base` with the power cut after each of its operations, and show `check` how
/// far it had come and what every fate of the unflushed sectors left. The last run is not cut.
pub(crate) fn at_every_operation<P: Default>(
    base: &Rig,
    scenario: impl Fn(&mut Rig, &mut P) -> Result<(), Cut>,
    mut check: impl FnMut(Rig, &P),
) -> usize {
    let mut count = 0;
    for operations in 0.. {
        let mut rig = base.fork();
        rig.bad.clone_from(&base.bad);
        rig.left = Some(operations);
        let mut progress = P::default();
        let ended = scenario(&mut rig, &mut progress);
        count += fates(&rig, operations, |after| check(after, &progress));
        if ended == Ok(()) {
            break;
        }
    }
    count
}
