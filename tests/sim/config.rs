//! What a seed chooses: the shape of the volume, and which faults the run knows (swarm testing: few kinds
//! a run, so that each gets its turn to be frequent).

use vhost_remap::engine::healer::{OnLoss, Policy};
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
}

impl Config {
    pub(crate) fn of(rng: &mut Rng) -> Config {
        let logical = if rng.percent(20) { [rng.pick(&[512, 4096]), rng.pick(&[512, 4096])] } else { [512, 512] };
        let blocks = if rng.percent(2) { 600 + rng.below(300) } else { 16 + rng.below(48) };
        let short = if logical == [512, 512] && rng.percent(30) { rng.below(8) } else { 0 };
        let max_remaps = match rng.below(20) {
            0 => 512 + 8,
            1..10 => 16,
            _ => 24 + u32::try_from(rng.below(40)).expect("small"),
        };
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
        Config {
            shards: 1 + rng.index(3),
            capacity: blocks * 8 - short,
            logical,
            max_remaps,
            labelled: rng.percent(60),
            policy,
            remapped: if rng.percent(15) { u64::from(max_remaps).min(blocks) - rng.below(4) } else { 0 },
            hot: if rng.percent(50) { 2 + rng.below(8) } else { 2 + rng.below(blocks - 2) },
            weak: std::array::from_fn(|_| rng.below(blocks)),
            depth: 1 + rng.index(12),
            faults,
            fault_rate: rng.pick(&[20, 75, 250]),
            order_rate: rng.pick(&[0, 25, 100]),
            reset_rate: rng.pick(&[0, 0, 25]),
            write_through: rng.percent(30),
            discards: rng.percent(40),
            no_zeroes: rng.percent(20),
            no_discard: rng.percent(20),
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
            faults: Vec::new(),
            write_through: false,
            no_zeroes: false,
            no_discard: false,
            ..Config::of(&mut Rng::new(7))
        }
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

    /// Whether the head is to stay whole.
    pub(crate) fn spares_the_head(&self) -> bool {
        self.has(&TAIL_ONLY)
    }

    pub(crate) fn has(&self, faults: &[Fault]) -> bool {
        self.faults.iter().any(|fault| faults.contains(fault))
    }
}
