//! The life of a small volume, and what lay on its disks at moments of it.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use vhost_remap::device::memory::MemoryDisks;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::Place;

use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, pattern, range_of};
use crate::seat::{At, Entry, Kind, Seat, age, is_whole, live_entries, seats};

/// Three pages of table; the primary takes no writes in its first 1,030 blocks, which fill two of them and
/// a little of the third.
pub(crate) const MAX_REMAPS: u32 = 1100;
const BAD_BLOCKS: u64 = 1030;
const CAPACITY: u64 = 16 * 2048;

/// What lay where at a moment.
pub(crate) struct Moment {
    pub(crate) name: &'static str,
    pub(crate) bytes: BTreeMap<Seat, Vec<u8>>,
    /// The map as the running engine had it last, for comparison with what the bytes say.
    map: Vec<Entry>,
}

/// A volume's moments, in order.
pub(crate) struct Story {
    pub(crate) shape: Shape,
    pub(crate) moments: Vec<Moment>,
}

fn bad(first: u64, count: u64) -> Bad {
    Bad { device: PRIMARY, from: first * 4096, to: (first + count) * 4096, reads: Reads::Good, writes: true }
}

impl Story {
    /// The story of a created or an adopted volume, told once.
    pub(crate) fn of(labelled: bool) -> &'static Story {
        static STORIES: [OnceLock<Story>; 2] = [OnceLock::new(), OnceLock::new()];
        STORIES[usize::from(labelled)].get_or_init(|| Story::tell(labelled))
    }

    /// Everything a table can come to: see the names of the moments.
    fn tell(labelled: bool) -> Story {
        let shape = Shape { capacity: CAPACITY, max_remaps: MAX_REMAPS, labelled };
        let mut story = Story { shape, moments: Vec::new() };
        let mut rig = Rig::new(shape);
        rig.create().unwrap().unwrap();
        let engine = rig.open().unwrap();
        story.note("new", &mut rig, engine);
        let engine = fill(&mut rig);
        story.note("filled", &mut rig, engine);
        let engine = use_more(&mut rig);
        story.note("used", &mut rig, engine);
        let engine = half_a_commit(&mut rig);
        story.note("half", &mut rig, engine);
        let mut engine = rig.open().unwrap();
        engine.close(&mut rig).unwrap().unwrap();
        story.note("closed", &mut rig, engine);
        let engine = lose_a_place(&mut rig);
        story.note("alone", &mut rig, engine);
        story
    }

    /// The process ends here; what the devices have not performed never lands.
    fn note(&mut self, name: &'static str, rig: &mut Rig, engine: Engine) {
        rig.bad.clear();
        rig.kill();
        let bytes: BTreeMap<Seat, Vec<u8>> =
            seats(&self.shape).into_iter().map(|seat| (seat, seat.read(rig))).collect();
        for (seat, bytes) in &bytes {
            assert!(is_whole(seat, bytes), "{name}: {seat:?}");
        }
        let moment = Moment { name, bytes, map: engine.map() };
        let newest = (0..rig.shape.layout().table_pages).flat_map(|number| {
            let homes = moment
                .bytes
                .iter()
                .filter(|(seat, _)| seat.at != At::Label && matches!(seat.kind, Kind::Table(_, of) if of == number));
            let (_, page) = homes.max_by_key(|(seat, bytes)| age(seat.kind, bytes)).expect("four homes");
            live_entries(number, page)
        });
        let mut newest: Vec<_> = newest.collect();
        newest.sort_unstable();
        assert_eq!(newest, moment.map, "{name}: what the disks say is what the engine knew");
        self.moments.push(moment);
    }

    pub(crate) fn moment(&self, name: &str) -> usize {
        self.moments.iter().position(|moment| moment.name == name).expect("a moment of the story")
    }

    /// Disks as they were then, without the content of slots and blocks.
    pub(crate) fn disks(&self, moment: usize) -> MemoryDisks {
        let rig = Rig::new(self.shape);
        for (seat, bytes) in &self.moments[moment].bytes {
            seat.write(&rig, bytes);
        }
        // Without the queues of this rig.
        rig.disks.fork()
    }

    /// What lay in a seat before it came to hold what it holds at a moment.
    pub(crate) fn older(&self, moment: usize, seat: &Seat) -> Option<&Vec<u8>> {
        let now = &self.moments[moment].bytes[seat];
        self.moments[..moment].iter().rev().map(|moment| &moment.bytes[seat]).find(|bytes| *bytes != now)
    }
}

/// Every block that takes no write moves: two pages full, and some of the third.
fn fill(rig: &mut Rig) -> Engine {
    let mut engine = rig.open().unwrap();
    rig.bad = vec![bad(0, BAD_BLOCKS)];
    for first in (0..BAD_BLOCKS).step_by(256) {
        let count = 256.min(BAD_BLOCKS - first);
        let data = pattern(first * BLOCK, count * BLOCK, 1);
        assert_eq!(engine.write(rig, first * BLOCK, &data), Ok(Status::Ok));
    }
    assert_eq!(engine.map().len() as u64, BAD_BLOCKS);
    engine.close(rig).unwrap().unwrap();
    engine
}

/// Lost sectors, blocks that went back, a slot that went bad: more in one page than in another, so that their
/// sequences differ. Most blocks go back, because a full table takes longer to open.
fn use_more(rig: &mut Rig) -> Engine {
    let mut engine = rig.open().unwrap();
    let lost = 1100;
    rig.bad = vec![
        bad(lost, 1),
        Bad { reads: Reads::Never, from: lost * 4096 + 1024, to: lost * 4096 + 2048, ..bad(lost, 1) },
    ];
    assert_eq!(engine.write(rig, lost * BLOCK, &pattern(lost * BLOCK, 1, 2)), Ok(Status::Ok));
    assert_eq!(engine.map().last().map(|entry| (entry.0, entry.2)), Some((lost, 0b1100)));
    // Not those that a close samples: what goes back to them is not on the disks that damage strikes.
    for (first, count) in [(40, 216), (257, 220), (540, 228), (769, 200), (5, 1)] {
        engine.done(rig, Order::Release(range_of(first * BLOCK, count * 4096)));
    }
    let slot = engine.map()[0].1;
    let from = rig.shape.layout().slots_start + u64::from(slot) * 4096;
    rig.bad = vec![Bad { device: SPARE, from, to: from + 4096, reads: Reads::Good, writes: true }];
    assert_eq!(engine.write(rig, 0, &pattern(0, BLOCK, 3)), Ok(Status::Ok));
    assert_ne!(engine.map()[0].1, slot);
    engine.done(rig, Order::Save);
    engine.close(rig).unwrap().unwrap();
    engine
}

/// A commit that is durable and answered, and whose second homes were not brought up.
fn half_a_commit(rig: &mut Rig) -> Engine {
    let mut engine = rig.open().unwrap();
    rig.bad = vec![bad(1200, 1)];
    let token = engine.begin_write(rig, 1200 * BLOCK, &pattern(1200 * BLOCK, BLOCK, 4));
    assert_eq!(engine.await_answer(rig, token), Ok(Status::Ok));
    engine
}

/// The tail takes no writes any more, then a flush of the primary fails; then the process is killed.
fn lose_a_place(rig: &mut Rig) -> Engine {
    let mut engine = rig.open().unwrap();
    let tail = rig.shape.layout().place_start(Place::Tail);
    rig.bad = vec![
        bad(1300, 10),
        Bad { device: SPARE, from: tail, to: rig.shape.sizes()[1], reads: Reads::Good, writes: true },
    ];
    assert_eq!(engine.write(rig, 1300 * BLOCK, &pattern(1300 * BLOCK, BLOCK, 5)), Ok(Status::Ok));
    assert_eq!(engine.causes("place-retired").len(), 1);
    engine.done(rig, Order::Save);
    let token = engine.begin_write(rig, 1301 * BLOCK, &pattern(1301 * BLOCK, BLOCK, 6));
    assert_eq!(engine.await_answer(rig, token), Ok(Status::Ok));
    engine.settle(rig).unwrap();
    rig.bad_flushes = [1, 0];
    assert_eq!(engine.flush(rig), Ok(Status::IoErr));
    assert!(engine.is_poisoned());
    engine
}
