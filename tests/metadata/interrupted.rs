//! Making, opening and closing a volume, cut off after each operation: what is left is refused or whole, and
//! never half of something (E4, O1).

use std::collections::BTreeSet;

use uuid::Uuid;
use vhost_remap::device::OpKind;
use vhost_remap::device::memory::{Keep, Pending};
use vhost_remap::engine::healer::{Order, Reply};
use vhost_remap::engine::open::OpenError;
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::Place;

use crate::commits::{SMALL, bad_block, begun, check_copies, reopened};
use crate::crash::{at_every_operation, fates};
use crate::damage::{Damage, copies, inflict};
use crate::expect::{Opens, expect};
use crate::rig::{BLOCK, Bad, PRIMARY, Random, Reads, Rig, SPARE, Shape, pattern, range_of};
use crate::seat::{At, Entry, Kind, Seat, age, is_whole, seal, seats};
use crate::story::Story;

/// A block moves to the spare and reads back: everything a volume has to be able to do.
fn check_usable(rig: &mut Rig, block: u64) {
    let mut engine = rig.open().unwrap();
    rig.bad = vec![bad_block(block)];
    let data = pattern(block * BLOCK, BLOCK, 7);
    assert_eq!(engine.write(rig, block * BLOCK, &data), Ok(Status::Ok));
    assert_eq!(engine.flush(rig), Ok(Status::Ok));
    assert_eq!(engine.close(rig), Ok(Ok(())));
    drop(engine);
    rig.kill();
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(rig, block * BLOCK, BLOCK), Some(data));
    rig.kill();
}

/// A new volume without anything in it, with every copy of everything in its place.
fn check_empty(rig: &mut Rig) {
    let engine = rig.open().expect("opened before");
    assert_eq!(engine.map(), []);
    assert!(!engine.is_poisoned());
    drop(engine);
    for seat in seats(&rig.shape) {
        assert!(is_whole(&seat, &seat.read(rig)), "{seat:?}");
    }
    rig.kill();
    drop(reopened(rig));
    rig.kill();
    check_usable(rig, 3);
}

#[test]
fn an_interrupted_creation_leaves_nothing_or_a_complete_empty_volume() {
    for labelled in [true, false] {
        let blank = Rig::new(Shape { labelled, ..SMALL });
        let (mut refused, mut opened) = (0, 0);
        let create = |rig: &mut Rig, done: &mut bool| {
            rig.create()?.expect("healthy disks take a volume");
            *done = true;
            Ok(())
        };
        at_every_operation(&blank, create, |mut after, done| match after.open() {
            Ok(engine) => {
                opened += 1;
                drop(engine);
                after.kill();
                check_empty(&mut after);
            }
            Err(error) => {
                refused += 1;
                assert!(!done, "a volume that was made is there: {error}");
                assert!(matches!(error, OpenError::NotAVolume | OpenError::NoSuperblock(_)), "{error}");
                assert!(!after.was_written());
                // Another attempt is not disturbed by what the first has left.
                after.kill();
                after.create().unwrap().unwrap();
                check_empty(&mut after);
            }
        });
        println!("labelled {labelled}: {refused} refused, {opened} opened");
        assert!(refused > 0 && opened > 0);
    }
}

/// `--force` makes a volume where another one was.
#[test]
fn a_creation_over_an_old_volume_never_leaves_half_of_the_old_one() {
    for labelled in [true, false] {
        let shape = Shape { labelled, ..SMALL };
        let mut base = begun(shape);
        base.bad.clear();
        let mut engine = base.open().unwrap();
        engine.done(&mut base, Order::Remap(range_of(0, 16 * 4096 - 4096)));
        let map = engine.map();
        let data: Vec<_> = map.iter().map(|entry| engine.read(&mut base, entry.0 * BLOCK, BLOCK)).collect();
        drop(engine);
        base.kill();
        let again = |rig: &mut Rig, done: &mut bool| {
            let mut params = shape.create_params();
            params.set = Uuid::from_u128(2);
            rig.create_as(params)?.expect("healthy disks take a volume");
            *done = true;
            Ok(())
        };
        let mut ends = [0; 3];
        at_every_operation(&base, again, |mut after, done| match after.open() {
            Ok(mut engine) if engine.map().is_empty() => {
                ends[0] += 1;
                drop(engine.status(&mut after));
                after.kill();
                check_empty(&mut after);
            }
            Ok(mut engine) => {
                ends[1] += 1;
                assert!(!done && engine.map() == map);
                for (entry, data) in map.iter().zip(&data) {
                    assert!(engine.read(&mut after, entry.0 * BLOCK, BLOCK) == *data, "block {} is lost", entry.0);
                }
            }
            Err(error) => {
                ends[2] += 1;
                assert!(!done, "{error}");
                // The label of the old volume is the last to go.
                let known = matches!(error, OpenError::NotAVolume | OpenError::NoSuperblock(_));
                assert!(known || (labelled && matches!(error, OpenError::WrongPrimary { .. })), "{error}");
                assert!(!after.was_written());
            }
        });
        println!("labelled {labelled}: new {}, old {}, refused {}", ends[0], ends[1], ends[2]);
        assert!(ends.iter().all(|count| *count > 0), "{ends:?}");
    }
}

/// Where, and how.
type Damaged = (At, Kind, Damage);

/// Volumes with damage of several kinds, each with what it is to come to.
fn damaged() -> Vec<(String, Rig, Opens)> {
    let cases: [(bool, &str, &[Damaged]); 6] = [
        (true, "half", &[]),
        (true, "alone", &[]),
        (false, "alone", &[(At::Head, Kind::Table(0, 0), Damage::Zero)]),
        (
            true,
            "half",
            &[
                (At::Head, Kind::Superblock(1), Damage::Random(1)),
                (At::Tail, Kind::Table(0, 1), Damage::Flip(40)),
                (At::Head, Kind::Table(1, 2), Damage::Older),
                (At::Tail, Kind::Poison, Damage::Zero),
                (At::Label, Kind::Superblock(0), Damage::Zero),
            ],
        ),
        // The generation that only the label still has.
        (
            true,
            "half",
            &[(At::Head, Kind::Superblock(1), Damage::Zero), (At::Tail, Kind::Superblock(1), Damage::Random(2))],
        ),
        (
            false,
            "closed",
            &[
                (At::Head, Kind::Table(0, 1), Damage::Older),
                (At::Head, Kind::Table(1, 1), Damage::Older),
                (At::Tail, Kind::Table(0, 1), Damage::Older),
                (At::Head, Kind::Superblock(0), Damage::Zero),
                (At::Head, Kind::Superblock(1), Damage::Zero),
            ],
        ),
    ];
    let cases = cases.into_iter().map(|(labelled, moment, damages)| {
        let story = Story::of(labelled);
        let at = story.moment(moment);
        let mut rig = Rig::on(story.shape, story.disks(at));
        let seats: Vec<Seat> = story.moments[at].bytes.keys().copied().collect();
        let seat = |at, kind| *seats.iter().find(|seat| (seat.at, seat.kind) == (at, kind)).expect("a seat");
        let damages: Vec<_> = damages.iter().map(|(at, kind, damage)| (seat(*at, *kind), *damage)).collect();
        damages.iter().for_each(|(seat, damage)| inflict(&mut rig, story, at, seat, *damage));
        let opens = expect(&copies(story, at, &damages), story.shape.layout().table_pages).expect("opens");
        (format!("{moment}, labelled {labelled}, {damages:?}"), rig, opens)
    });
    cases.collect()
}

/// Opens with what the damage left, all copies whole and equal, for good.
fn check_recovered(mut rig: Rig, opens: &Opens) {
    let engine = reopened(&mut rig);
    assert!(engine.map() == opens.map);
    assert_eq!(engine.is_poisoned(), opens.poisoned);
}

#[test]
fn an_interrupted_opening_is_taken_up_by_the_next_one() {
    for (name, base, opens) in damaged() {
        let open = |rig: &mut Rig, _: &mut ()| {
            let mut engine = rig.try_open(rig.open_params())?.expect("opens");
            engine.pass(rig, 0)
        };
        let count = at_every_operation(&base, open, |after, ()| check_recovered(after, &opens));
        println!("{name}: {count} crashes");
    }
}

#[test]
fn openings_that_are_interrupted_again_and_again_come_to_an_end() {
    for (name, base, opens) in damaged() {
        for seed in 0..60 {
            let mut random = Random::new(seed);
            let mut rig = base.fork();
            for _ in 0..6 {
                rig.left = Some(random.below(60));
                let opened = rig.try_open(rig.open_params());
                assert!(!matches!(opened, Ok(Err(_))), "{name}, seed {seed}: refused");
                drop(opened);
                let percent = [0, 50, 100][usize::try_from(random.below(3)).unwrap()];
                rig.crash(|_, _| if random.percent(percent) { Keep::Keep } else { Keep::Drop });
            }
            check_recovered(rig, &opens);
        }
    }
}

#[test]
fn an_interrupted_close_loses_nothing() {
    for labelled in [true, false] {
        let mut base = begun(Shape { labelled, ..SMALL });
        base.bad.clear();
        #[derive(Default)]
        struct Progress {
            map: Vec<Entry>,
            closed: bool,
        }
        let data = |block: u64| pattern(block * BLOCK, BLOCK, 8);
        let close = |rig: &mut Rig, progress: &mut Progress| {
            let mut engine = rig.try_open(rig.open_params())?.expect("opens");
            // On the primary and in the slot, and not yet flushed.
            for block in [20, 40] {
                assert_eq!(engine.write(rig, block * BLOCK, &data(block))?, Status::Ok);
            }
            progress.map = engine.map();
            assert_eq!(engine.close(rig)?, Ok(()));
            progress.closed = true;
            Ok(())
        };
        let mut clean = BTreeSet::new();
        at_every_operation(&base, close, |mut after, progress| {
            let mut engine = reopened(&mut after);
            if progress.closed {
                assert!(engine.map() == progress.map);
                for block in [20, 40] {
                    assert!(engine.read(&mut after, block * BLOCK, BLOCK) == Some(data(block)));
                }
            }
            assert_eq!(engine.map().len(), 1);
            clean.insert(progress.closed);
        });
        assert_eq!(clean.len(), 2);
    }
}

/// What a close has stamped counts only with the last write of it.
#[test]
fn a_volume_is_clean_only_when_its_close_was_complete() {
    let mut base = begun(SMALL);
    base.bad.clear();
    let close = |rig: &mut Rig, done: &mut bool| {
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        assert_eq!(engine.close(rig)?, Ok(()));
        *done = true;
        Ok(())
    };
    let mut seen = [0; 2];
    at_every_operation(&base, close, |mut after, done| {
        // Somebody else writes to the first sampled block.
        after.disks.poke(PRIMARY, 0, b"mounted without us");
        let refused = matches!(after.open(), Err(OpenError::External(..)));
        assert!(refused || !done, "a foreign write after a clean close is found out");
        seen[usize::from(refused)] += 1;
    });
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

/// E4: the label never runs ahead of the spare, unless that was put back or lost what it had.
#[test]
fn a_label_tells_an_older_spare_from_a_damaged_one() {
    let mut rig = begun(SMALL);
    let old = rig.peek(SPARE, 0, usize::try_from(rig.shape.sizes()[1]).unwrap());
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(50 * BLOCK, 4096)));
    let map = engine.map();
    drop(engine);
    rig.kill();
    // Newest superblocks: the generation of this session, in both places.
    let newest = |rig: &Rig| {
        let of = |seat: &&Seat| seat.at != At::Label && matches!(seat.kind, Kind::Superblock(_));
        let all: Vec<Seat> = seats(&rig.shape).iter().filter(of).copied().collect();
        let age = |seat: &Seat| age(seat.kind, &seat.read(rig));
        let last = all.iter().map(age).max();
        all.into_iter().filter(|seat| Some(age(seat)) == last).collect::<Vec<_>>()
    };
    let mut damaged = rig.fork();
    for seat in newest(&rig) {
        seat.write(&damaged, &[0xa5; 4096]);
    }
    let engine = damaged.open().expect("the label has what the spare has lost");
    assert_eq!(engine.map(), map);
    assert_eq!(engine.causes("metadata-repaired").len(), 2);
    check_copies(&damaged);
    rig.disks.poke(SPARE, 0, &old);
    let error = rig.open().map(drop).expect_err("an older spare");
    assert!(matches!(error, OpenError::OldSpare { .. }), "{error}");
    assert!(!rig.was_written());
}

/// E5: slots hold what the guest wants. With the head's superblocks gone, the tail's are looked for, and what
/// looks like one in a slot is none.
#[test]
fn what_a_guest_writes_is_not_taken_for_a_superblock() {
    // Slots of four megabytes lie before the tail.
    let shape = Shape { capacity: 16 * 2048, max_remaps: 1024, labelled: false };
    let mut rig = Rig::new(shape);
    rig.create().unwrap().unwrap();
    drop(rig.open().unwrap());
    rig.kill();
    let layout = shape.layout();
    let mut forged = rig.peek(SPARE, layout.superblock(Place::Tail, 0), 4096);
    forged[80..88].copy_from_slice(&99_u64.to_le_bytes());
    seal(&mut forged, Kind::Superblock(0));
    let starts = (layout.slots_start..layout.tail_start).step_by(1 << 20);
    starts.for_each(|start| rig.disks.poke(SPARE, start, &forged));
    for copy in 0..2 {
        rig.disks.poke(SPARE, layout.superblock(Place::Head, copy), &[0; 4096]);
    }
    let mut without_tail = rig.fork();
    let engine = rig.open().unwrap();
    assert_eq!(engine.causes("metadata-repaired").len(), 2);
    check_copies(&rig);
    for copy in 0..2 {
        without_tail.disks.poke(SPARE, layout.superblock(Place::Tail, copy), &[0; 4096]);
    }
    let error = without_tail.open().map(drop).expect_err("no superblock is left");
    assert!(matches!(error, OpenError::NoSuperblock(_)), "{error}");
}

/// F2: a flush that fails while a volume is opened after a crash is noted, with what was known before.
#[test]
fn a_flush_that_fails_at_opening_poisons_and_forgets_no_earlier_note() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    for poisoned_before in [false, true] {
        rig.bad_flushes = [0, 1];
        let error = rig.open().map(drop).expect_err("the flush failed");
        assert!(matches!(error, OpenError::Io { .. }), "{error}");
        rig.kill();
        let mut engine = rig.open().unwrap();
        assert!(engine.is_poisoned());
        let report = engine.status(&mut rig).poison.expect("poisoned");
        if poisoned_before {
            assert_eq!((report.device, report.ranges.len()), (PRIMARY, 1));
            break;
        }
        assert_eq!(report.device, SPARE);
        // Now one that says what was written.
        engine.done(&mut rig, Order::Clear);
        assert_eq!(engine.write(&mut rig, 8, &pattern(8, 8, 9)), Ok(Status::Ok));
        rig.bad_flushes = [1, 0];
        assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
        drop(engine);
        rig.kill();
    }
}

/// A place that comes back is whole before it counts, and is refused as long as it does not take everything.
#[test]
fn a_retired_place_counts_again_only_when_it_takes_everything() {
    let story = Story::of(true);
    let alone = story.moment("alone");
    for seat in story.moments[alone].bytes.keys().filter(|seat| seat.at == At::Tail) {
        let mut rig = Rig::on(story.shape, story.disks(alone));
        let needed = !matches!(seat.kind, Kind::Poison | Kind::Counters);
        let (from, to) = (seat.offset, seat.offset + 4096);
        rig.bad = vec![Bad { device: SPARE, from, to, reads: Reads::Good, writes: true }];
        let engine = rig.open().unwrap();
        assert_eq!(engine.causes("place-restored").len(), usize::from(!needed), "{seat:?}");
        drop(engine);
        fates(&rig, 1, |after| assert_eq!(reopened(&mut { after }).map(), rig_map(story, alone)));
    }
}

fn rig_map(story: &Story, moment: usize) -> Vec<Entry> {
    expect(&copies(story, moment, &[]), story.shape.layout().table_pages).expect("opens").map
}

/// An operator's order that runs when the volume is closed goes no further than the block it is at: what it wrote to
/// the primary after the close had looked at it would pass for somebody else's.
#[test]
fn an_order_under_way_goes_no_further_when_the_volume_is_closed() {
    const BLOCKS: u64 = 8;
    let range = range_of(0, BLOCKS as usize * 4096);
    let mut cut_short = 0;
    for steps in 0..40 {
        let mut rig = begun(SMALL);
        rig.bad.clear();
        let mut engine = rig.open().unwrap();
        engine.done(&mut rig, Order::Remap(range));
        let release = engine.begin_order(&mut rig, Order::Release(range));
        for _ in 0..steps {
            engine.step(&mut rig).unwrap();
        }
        rig.performed.clear();
        assert_eq!(engine.close(&mut rig).unwrap(), Ok(()));
        let of_guest = |offset: u64| offset < BLOCKS * 4096;
        let written = |op: &&Pending| op.kind == OpKind::Write && op.device == PRIMARY && of_guest(op.offset);
        assert!(rig.performed.iter().filter(written).count() <= 1, "{steps}");
        let Some(Reply::Done(released)) = engine.reply(release) else { panic!("{steps}: it is not answered") };
        cut_short += usize::from(released.as_ref().is_err_and(|why| why.contains("is being closed")));
        for order in [Order::Release(range), Order::Save] {
            let Reply::Done(Err(why)) = engine.order(&mut rig, order).unwrap() else { panic!("it is taken") };
            assert!(why.contains("is being closed"), "{why}");
        }
    }
    assert!(cut_short > 0, "no order was under way");
}

/// What a close notes of the primary would be wrong then, and the next start would refuse a volume that was closed
/// cleanly. The label is tried again each minute while a page of it takes no writes.
#[test]
fn nothing_is_written_to_the_primary_once_a_close_has_looked_at_it() {
    let range = range_of(0, 4 * 4096);
    for steps in 0.. {
        let mut rig = begun(SMALL);
        let page = rig.shape.label().expect("labelled").table(0);
        rig.bad = vec![Bad { device: PRIMARY, from: page, to: page + 4096, reads: Reads::Good, writes: true }];
        let mut engine = rig.open().unwrap();
        engine.done(&mut rig, Order::Remap(range));
        let release = engine.begin_order(&mut rig, Order::Release(range));
        for _ in 0..steps / 2 {
            engine.step(&mut rig).unwrap();
        }
        let settle = engine.begin_order(&mut rig, Order::Settle);
        for _ in 0..steps {
            engine.step(&mut rig).unwrap();
        }
        let was_over = engine.reply(settle).is_some();
        engine.tick(&mut rig, 61);
        while engine.reply(settle).is_none() {
            assert!(engine.step(&mut rig).unwrap(), "{steps}: the close hangs");
        }
        rig.performed.clear();
        engine.pass(&mut rig, 61).unwrap();
        let written = |op: &Pending| op.kind == OpKind::Write && op.device == PRIMARY;
        assert!(!rig.performed.iter().any(written), "{steps}: {:?}", rig.performed);
        assert!(engine.reply(release).is_some(), "{steps}: it is not answered");
        if was_over {
            assert!(steps > 20, "{steps}");
            break;
        }
    }
}
