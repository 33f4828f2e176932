//! What a seed chooses: the shape of the volume, and which faults the run knows (swarm testing: few kinds
//! a run, so that each gets its turn to be frequent).

use vhost_remap::engine::healer::{HealerParams, OnLoss, Policy};
use vhost_remap::engine::scan::ScanParams;
use vhost_remap::volume::layout::{Layout, label_size, spare_size};

use crate::rng::Rng;

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// Reads of a guest sector fail a few times.
    PrimaryReadOnce,
    /// ... until it is written.
    PrimaryReadUntilWritten,
    /// ... for ever.
    PrimaryReadForEver,
    /// Writes of a guest sector fail a few times.
    PrimaryWriteTimes,
    /// ... for ever.
    PrimaryWriteForEver,
    /// As above for sectors of slots.
    SlotRead,
    SlotWrite,
    /// Writes to a sector of metadata fail.
    MetadataWrite,
    /// Reads of a sector of metadata fail, in one place.
    MetadataRead,
    /// Sectors of metadata, in one place, change while nobody looks.
    MetadataDamage,
    /// A write of metadata, in one place, succeeds and is not done.
    MetadataLost,
    /// ... or is done elsewhere in that place.
    MetadataMisdirected,
    /// A few operations fail with an error that is our own fault.
    Ours,
    /// A few operations of any kind fail on the medium.
    Burst,
    /// No space.
    Full,
    /// A device is gone for a while.
    PrimaryGone,
    SpareGone,
    /// A flush fails.
    PrimaryFlush,
    SpareFlush,
    /// An operation takes seconds.
    Latency,
}

pub(crate) const FAULTS: [Fault; 20] = [
    Fault::PrimaryReadOnce,
    Fault::PrimaryReadUntilWritten,
    Fault::PrimaryReadForEver,
    Fault::PrimaryWriteTimes,
    Fault::PrimaryWriteForEver,
    Fault::SlotRead,
    Fault::SlotWrite,
    Fault::MetadataWrite,
    Fault::MetadataRead,
    Fault::MetadataDamage,
    Fault::MetadataLost,
    Fault::MetadataMisdirected,
    Fault::Ours,
    Fault::Burst,
    Fault::Full,
    Fault::PrimaryGone,
    Fault::SpareGone,
    Fault::PrimaryFlush,
    Fault::SpareFlush,
    Fault::Latency,
];

/// These leave one place, the tail, with metadata that the next opening cannot use. With one of them nothing
/// else may happen to the head: metadata survives what happens to one place.
const TAIL_ONLY: [Fault; 4] =
    [Fault::MetadataRead, Fault::MetadataDamage, Fault::MetadataLost, Fault::MetadataMisdirected];

/// These may cost the volume the head: of shortages of ours, several in a row do.
const EITHER_PLACE: [Fault; 4] = [Fault::Burst, Fault::Full, Fault::SpareGone, Fault::Ours];

/// What a volume is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Sectors.
    pub(crate) capacity: u64,
    pub(crate) logical: [u64; 2],
    pub(crate) max_remaps: u32,
    pub(crate) labelled: bool,
    /// Blocks in slots from the start, and so slots in use.
    pub(crate) used: u64,
}

/// Volumes with many slots in use. With fewer than 60, header and entries of a table page share a sector, and no
/// power cut tears one from the other; the further sectors of a page begin with slots 60, 124, 188, ...
pub(crate) const SHAPES: [Shape; 9] = [
    Shape { capacity: 76 * 8, logical: [512, 512], max_remaps: 80, labelled: false, used: 62 },
    Shape { capacity: 80 * 8 - 3, logical: [512, 512], max_remaps: 128, labelled: true, used: 66 },
    Shape { capacity: 84 * 8, logical: [512, 512], max_remaps: 96, labelled: true, used: 74 },
    Shape { capacity: 78 * 8, logical: [512, 512], max_remaps: 74, labelled: false, used: 72 },
    Shape { capacity: 72 * 8, logical: [512, 512], max_remaps: 520, labelled: true, used: 64 },
    Shape { capacity: 80 * 8, logical: [512, 4096], max_remaps: 90, labelled: true, used: 72 },
    Shape { capacity: 76 * 8, logical: [4096, 512], max_remaps: 100, labelled: false, used: 64 },
    Shape { capacity: 132 * 8, logical: [512, 512], max_remaps: 140, labelled: true, used: 123 },
    Shape { capacity: 1030 * 8, logical: [512, 512], max_remaps: 1040, labelled: true, used: 1020 },
];
/// The one of them whose slots in use fill more than two pages of the table.
const LARGE: usize = SHAPES.len() - 1;

impl Shape {
    fn of(rng: &mut Rng) -> Shape {
        let logical = if rng.percent(20) { [rng.pick(&[512, 4096]), rng.pick(&[512, 4096])] } else { [512, 512] };
        let blocks = if rng.percent(1) { 200 + rng.below(100) } else { 16 + rng.below(40) };
        let short = if logical == [512, 512] && rng.percent(30) { rng.below(8) } else { 0 };
        let max_remaps = match rng.below(20) {
            0 => 512 + 8,
            1..10 => 16,
            _ => 24 + u32::try_from(rng.below(40)).expect("small"),
        };
        Shape { capacity: blocks * 8 - short, logical, max_remaps, labelled: rng.percent(60), used: 0 }
    }
}

/// One run's choices.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) shards: usize,
    /// Sectors of the volume.
    pub(crate) capacity: u64,
    pub(crate) logical: [u64; 2],
    pub(crate) max_remaps: u32,
    pub(crate) labelled: bool,
    pub(crate) policy: Policy,
    /// The operator begins with so many blocks in slots.
    pub(crate) remapped: u64,
    /// The volume is not created but a copy of one with many slots in use, by its number in [`SHAPES`].
    pub(crate) prepared: Option<usize>,
    /// Requests go mostly to so many blocks.
    pub(crate) hot: u64,
    /// The blocks that most faults and many requests hit, so that troubles meet.
    pub(crate) weak: [u64; 3],
    /// Requests at a time.
    pub(crate) depth: usize,
    pub(crate) faults: Vec<Fault>,
    /// Faults to a thousand requests.
    pub(crate) fault_rate: u64,
    /// Orders to a thousand requests.
    pub(crate) order_rate: u64,
    /// Queue resets to a thousand requests.
    pub(crate) reset_rate: u64,
    pub(crate) write_through: bool,
    pub(crate) discards: bool,
    pub(crate) no_zeroes: bool,
    pub(crate) no_discard: bool,
    pub(crate) scan: ScanParams,
}

impl Config {
    /// So many entries share a sector with the header of their page. In a prepared volume, blocks that have moved
    /// begin in the slot of their number.
    pub(crate) const NEAR_HEADER: u64 = 60;

    pub(crate) fn of(rng: &mut Rng) -> Config {
        let prepared = match rng.below(1000) {
            0..4 => Some(LARGE),
            4..230 => Some(rng.index(LARGE)),
            _ => None,
        };
        let Shape { capacity, logical, max_remaps, labelled, .. } =
            prepared.map_or_else(|| Shape::of(rng), |shape| SHAPES[shape]);
        let blocks = capacity.div_ceil(8);
        let on_loss = |rng: &mut Rng| if rng.percent(60) { OnLoss::Fail } else { OnLoss::Hold(1 + rng.below(6)) };
        let policy = Policy { primary_gone: on_loss(rng), spare_full: on_loss(rng), passthrough: false };
        let share = rng.pick(&[4, 8, 15, 30, 50]);
        let mut faults: Vec<Fault> = FAULTS.into_iter().filter(|_| rng.percent(share)).collect();
        if faults.iter().any(|fault| TAIL_ONLY.contains(fault)) {
            faults.retain(|fault| !EITHER_PLACE.contains(fault));
        }
        if faults.is_empty() {
            faults.push(rng.pick(&FAULTS));
        }
        let few = prepared.is_none() && rng.percent(15);
        Config {
            shards: 1 + rng.index(3),
            capacity,
            logical,
            max_remaps,
            labelled,
            policy,
            remapped: if few { u64::from(max_remaps).min(blocks) - rng.below(4) } else { 0 },
            prepared,
            hot: if rng.percent(50) { 2 + rng.below(8) } else { 2 + rng.below(blocks - 2) },
            weak: std::array::from_fn(|_| match prepared {
                None => rng.below(blocks),
                Some(_) => blocks - 1 - rng.below((blocks - Config::NEAR_HEADER).min(24)),
            }),
            depth: 1 + rng.index(12),
            faults,
            fault_rate: rng.pick(&[20, 75, 250]),
            order_rate: rng.pick(&[0, 25, 100]),
            reset_rate: rng.pick(&[0, 0, 25]),
            write_through: rng.percent(30),
            discards: rng.percent(40),
            no_zeroes: rng.percent(20),
            no_discard: rng.percent(20),
            scan: ScanParams::default(),
        }
    }

    /// A volume on which nothing goes wrong by itself.
    pub(crate) fn without_faults(shards: usize, capacity: u64, max_remaps: u32, labelled: bool) -> Config {
        Config {
            shards,
            capacity,
            logical: [512, 512],
            max_remaps,
            labelled,
            policy: Policy { primary_gone: OnLoss::Fail, spare_full: OnLoss::Fail, passthrough: false },
            prepared: None,
            faults: Vec::new(),
            write_through: false,
            no_zeroes: false,
            no_discard: false,
            ..Config::of(&mut Rng::new(7))
        }
    }

    pub(crate) fn healer_params(&self) -> HealerParams {
        HealerParams { shards: self.shards, policy: self.policy, epoch: 1_000_000, scan: self.scan.clone() }
    }

    pub(crate) fn primary_bytes(&self) -> u64 {
        let data = (self.capacity * 512).next_multiple_of(4096);
        data + if self.labelled { label_size(self.max_remaps) } else { 0 }
    }

    pub(crate) fn spare_bytes(&self) -> u64 {
        spare_size(self.max_remaps)
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout::new(self.spare_bytes(), self.max_remaps).expect("the configuration is possible")
    }

    /// Sectors of a place, as far as the format writes them.
    pub(crate) fn place_sectors(&self) -> u64 {
        (4 + 2 * u64::from(self.layout().table_pages)) * 8
    }

    /// Sectors of the larger logical block of the two devices.
    pub(crate) fn unit(&self) -> u64 {
        self.logical.into_iter().max().unwrap_or(512) / 512
    }

    /// Slots in use from the start.
    pub(crate) fn used(&self) -> u64 {
        self.prepared.map_or(0, |shape| SHAPES[shape].used)
    }

    /// Whether the head is to stay whole.
    pub(crate) fn spares_the_head(&self) -> bool {
        self.has(&TAIL_ONLY)
    }

    pub(crate) fn has(&self, faults: &[Fault]) -> bool {
        self.faults.iter().any(|fault| faults.contains(fault))
    }
}
