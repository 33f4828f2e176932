//! What comes before what: flushes, notes and second looks that no crash of a healthy disk misses.

use vhost_remap::device::memory::{Keep, Pending};
use vhost_remap::device::{DeviceIndex, Errno, OpKind};
use vhost_remap::engine::healer::{Order, Reply};
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::{Home, Place};

use crate::commits::{BLOCK_A, MOVED, SMALL, bad_block, begun, new, old, three_pages};
use crate::crash::fates;
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, pattern, range_of};
use crate::seat::{At, Kind, Seat, age, retired, seats};

/// What was done to a device, in order.
fn kinds(performed: &[Pending], device: DeviceIndex) -> Vec<OpKind> {
    performed.iter().filter(|op| op.device == device).map(|op| op.kind).collect()
}

fn poison_of(rig: &Rig, device: DeviceIndex) -> Vec<Seat> {
    seats(&rig.shape).into_iter().filter(|seat| seat.kind == Kind::Poison && seat.device() == device).collect()
}

/// F2: whoever opens next goes by what is left of the note: that on the spare, that in the label, or what the
/// label did not take.
#[test]
fn the_note_of_a_flush_that_failed_at_opening_is_durable_wherever_it_is_taken() {
    for (lost, refusing) in [(Some(PRIMARY), false), (Some(SPARE), false), (None, true)] {
        let mut rig = begun(SMALL);
        rig.bad.clear();
        if refusing {
            let label = poison_of(&rig, PRIMARY)[0].offset;
            rig.bad.push(Bad { device: PRIMARY, from: label, to: label + 4096, reads: Reads::Good, writes: true });
        }
        rig.bad_flushes = [0, 1];
        rig.open().map(drop).expect_err("the flush failed");
        rig.crash(|_, _| Keep::Drop);
        let damaged = lost.into_iter().flat_map(|device| poison_of(&rig, device)).collect::<Vec<_>>();
        damaged.iter().for_each(|seat| seat.write(&rig, &[0xa5; 4096]));
        let mut engine = rig.open().unwrap();
        assert!(engine.is_poisoned(), "without {damaged:?}");
        let report = engine.status(&mut rig).poison.expect("poisoned");
        assert_eq!((report.device, report.errno), (SPARE, Errno(libc::EIO)), "without {damaged:?}");
    }
}

/// F2: it is not tried again, whatever the reason, and counts for more than the note before it.
#[test]
fn a_flush_that_fails_for_want_of_something_of_ours_is_not_tried_again() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    rig.performed.clear();
    (rig.bad_flushes, rig.flush_errno) = ([1, 0], Errno(libc::EAGAIN));
    assert_eq!(engine.write(&mut rig, 8, &pattern(8, 8, 9)), Ok(Status::Ok));
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    assert!(engine.is_poisoned());
    // The second one is the note's.
    let flushes = kinds(&rig.performed, PRIMARY).into_iter().filter(|kind| *kind == OpKind::Flush).count();
    assert_eq!(flushes, 2);
}

/// W1: what was rewritten in place is flushed before it is read back, or the read would show the cache.
#[test]
fn a_block_rewritten_in_place_is_flushed_and_then_read_back() {
    let mut rig = begun(SMALL);
    rig.bad = vec![Bad { device: PRIMARY, from: 8 * 512, to: 16 * 512, reads: Reads::UntilWritten, writes: false }];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, 8, 8), None);
    rig.performed.clear();
    let data = pattern(8, 8, 9);
    assert_eq!(engine.write(&mut rig, 8, &data), Ok(Status::Ok));
    assert_eq!(kinds(&rig.performed, PRIMARY), [OpKind::Write, OpKind::Flush, OpKind::Read]);
    assert_eq!(engine.read(&mut rig, 8, 8), Some(data));
}

/// W1, W6: what reads back differently was not written. A block whose rewriting was lost moves; one whose
/// release was lost stays in its slot.
#[test]
fn what_reads_back_differently_was_not_written() {
    let mut rig = begun(SMALL);
    rig.bad = vec![Bad { device: PRIMARY, from: 8 * 512, to: 16 * 512, reads: Reads::UntilWritten, writes: false }];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, 8, 8), None);
    rig.bad.clear();
    let moved = |block: u64| range_of(block * BLOCK, 4096).bytes();
    rig.lost = Some((PRIMARY, BLOCK * 512..BLOCK * 512 + moved(1)));
    let data = pattern(8, 8, 9);
    assert_eq!(engine.write(&mut rig, 8, &data), Ok(Status::Ok));
    assert!(engine.map().iter().any(|(block, ..)| *block == 1), "{:?}", engine.map());
    assert_eq!(engine.read(&mut rig, 8, 8), Some(data.clone()));
    match engine.order(&mut rig, Order::Release(range_of(8, 4096))).unwrap() {
        Reply::Done(Err(why)) => assert!(why.contains("reads back differently"), "{why}"),
        reply => panic!("{reply:?}"),
    }
    assert_eq!(engine.read(&mut rig, 8, 8), Some(data));
}

/// O1: of the homes that lack a page's newest, those of its own name in other places come first and are flushed
/// before others are overwritten: what one place alone holds is in two soon, and never in one while the rest
/// of its copies are torn.
#[test]
fn the_newest_of_a_page_is_in_two_places_before_its_other_homes_are_rewritten() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    rig.bad = vec![bad_block(BLOCK_A)];
    // The power goes when one place has the commit, before its flush.
    let token = engine.begin_write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A));
    rig.performed.clear();
    let table = |rig: &Rig| -> Vec<Seat> {
        let of_place = |seat: &Seat| matches!(seat.kind, Kind::Table(..)) && seat.at != At::Label;
        seats(&rig.shape).into_iter().filter(of_place).collect()
    };
    let written = |rig: &Rig| -> Vec<Option<Seat>> {
        let changes = rig.performed.iter().filter(|op| op.device == SPARE);
        let changes = changes.filter(|op| matches!(op.kind, OpKind::Write | OpKind::Flush));
        let seats = table(rig);
        let found = changes.map(|op| (op.kind, seats.iter().find(|seat| seat.offset == op.offset)));
        // Flushes, and writes of table pages.
        let wanted = found.filter(|(kind, seat)| *kind == OpKind::Flush || seat.is_some());
        wanted.map(|(kind, seat)| seat.copied().filter(|_| kind == OpKind::Write)).collect()
    };
    let homes = |rig: &Rig| written(rig).into_iter().flatten().collect::<Vec<Seat>>();
    while homes(&rig).is_empty() {
        assert!(engine.answer(token).is_none());
        engine.step(&mut rig).unwrap();
    }
    let Kind::Table(anchor, _) = homes(&rig)[0].kind else { unreachable!("a page") };
    rig.kill();
    rig.bad.clear();
    drop(rig.open().unwrap());
    let home = |seat: &Seat| matches!(seat.kind, Kind::Table(home, _) if home == anchor);
    let order: Vec<Option<bool>> = written(&rig).iter().map(|seat| seat.map(|seat| home(&seat))).collect();
    // What was found, once more and durable; the other place's home of that name; then both other homes.
    let expected = [Some(true), None, Some(true), None, Some(false), Some(false), None];
    assert_eq!(order[..7], expected, "{order:?}");
}

/// O2: a block moves from a slot of one page to one of another and is released at once, while another commit
/// keeps the retiring of its first slot waiting. Were both in one commit, a power cut could take the
/// retiring alone, and the block would be found in the slot it left first.
#[test]
fn a_release_waits_until_the_slot_that_its_block_left_is_retired() {
    const BLOCK_OTHER: u64 = 1100;
    let (base, map) = three_pages();
    let slot = map.iter().find(|(block, ..)| *block == MOVING).expect("remapped").1;
    let mut checked = 0;
    for operations in 0.. {
        let mut rig = base.fork();
        let mut engine = rig.open().unwrap();
        // The first page has one free slot.
        engine.done(&mut rig, Order::Remap(range_of(BLOCK_OTHER * BLOCK, 4096)));
        let ended = release_while_moving(&mut rig, &mut engine, slot, operations);
        drop(engine);
        checked += fates(&rig, operations, |mut after| {
            let map = after.open().unwrap().map();
            let at: Vec<u32> = map.iter().filter(|(block, ..)| *block == MOVING).map(|(_, slot, ..)| *slot).collect();
            assert!(at.len() <= 1 && !at.contains(&slot), "after {operations} operations: {at:?}, and {slot} was left");
        });
        if ended {
            break;
        }
    }
    println!("{checked} images");
}

const MOVING: u64 = 50;

/// Whether it came to its end, within so many operations from the moment on at which everything waits.
fn release_while_moving(rig: &mut Rig, engine: &mut Engine, slot: u32, operations: u64) -> bool {
    let start = rig.shape.layout().slots_start + u64::from(slot) * 4096;
    rig.bad = vec![Bad { device: SPARE, from: start, to: start + 4096, reads: Reads::Good, writes: true }];
    // The move's own commit waits until that of another remap waits for it.
    rig.held_page = Some(1);
    let write = engine.begin_write(rig, MOVING * BLOCK, &pattern(MOVING * BLOCK, BLOCK, 3));
    engine.settle_but_for_held(rig).unwrap();
    engine.begin_order(rig, Order::Remap(range_of(1101 * BLOCK, 4096)));
    engine.settle_but_for_held(rig).unwrap();
    assert_eq!(engine.answer(write), None);
    rig.held_page = Some(2);
    while engine.answer(write).is_none() {
        engine.step(rig).unwrap();
    }
    // Now that one keeps the retiring of the slot waiting.
    let release = engine.begin_order(rig, Order::Release(range_of(MOVING * BLOCK, 4096)));
    engine.settle_but_for_held(rig).unwrap();
    assert!(!engine.is_answered(release), "nothing is committed yet");
    rig.held_page = None;
    rig.left = Some(operations);
    let ended = engine.settle(rig).is_ok();
    assert!(!ended || engine.is_answered(release));
    ended
}

/// O1: a place that was retired is whole on the medium before the first superblock counts it: from then on the
/// other one may be lost.
#[test]
fn a_place_that_counts_again_is_whole_by_then() {
    let mut base = begun(SMALL);
    let tail = base.shape.layout().tail_start;
    let mut engine = base.open().unwrap();
    base.bad = vec![
        bad_block(BLOCK_A),
        Bad { device: SPARE, from: tail, to: base.shape.sizes()[1], reads: Reads::Good, writes: true },
    ];
    assert_eq!(engine.write(&mut base, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    let expected = engine.map();
    drop(engine);
    base.kill();
    let mut counted = 0;
    for operations in 0.. {
        let mut rig = base.fork();
        rig.left = Some(operations);
        let ended = rig.try_open(rig.open_params()).map(drop).is_ok();
        // All that can be lost of the tail is, and nothing of the head.
        rig.crash(|device, sector| if device == SPARE && sector.0 * 512 >= tail { Keep::Drop } else { Keep::Keep });
        let head = seats(&rig.shape).into_iter().filter(|seat| seat.at == At::Head);
        let (superblocks, tables): (Vec<Seat>, Vec<Seat>) = head
            .filter(|seat| matches!(seat.kind, Kind::Superblock(_) | Kind::Table(..)))
            .partition(|seat| matches!(seat.kind, Kind::Superblock(_)));
        let newest = superblocks.iter().max_by_key(|seat| age(seat.kind, &seat.read(&rig))).expect("two copies");
        if retired(&newest.read(&rig)) == 0 {
            counted += 1;
            tables.iter().for_each(|seat| seat.write(&rig, &[0xa5; 4096]));
            let engine = rig.open().unwrap_or_else(|error| panic!("after {operations} operations: {error}"));
            assert_eq!(engine.map(), expected, "after {operations} operations");
        }
        if ended {
            break;
        }
    }
    assert!(counted > 1, "it counts in the end");
}

/// O2: the slot that a block has left counts again when the entry of its later one is gone first. Its retiring is
/// refused while the volume is poisoned; a release that was on its way meanwhile is not begun.
#[test]
fn nothing_is_released_while_the_slot_that_its_block_left_is_not_recorded() {
    let (base, map) = three_pages();
    let mut rig = base.fork();
    let slot = map.iter().find(|(block, ..)| *block == MOVING).expect("remapped").1;
    let layout = rig.shape.layout();
    let mut engine = rig.open().unwrap();
    // The first page has one free slot. Its second homes wait, and with them the retiring of a slot of that page.
    let remap = engine.begin_order(&mut rig, Order::Remap(range_of(1101 * BLOCK, 4096)));
    while !engine.is_answered(remap) {
        engine.step(&mut rig).unwrap();
    }
    rig.held_page = Some(0);
    let start = layout.slots_start + u64::from(slot) * 4096;
    rig.bad = vec![Bad { device: SPARE, from: start, to: start + 4096, reads: Reads::Good, writes: true }];
    let write = engine.begin_write(&mut rig, MOVING * BLOCK, &pattern(MOVING * BLOCK, BLOCK, 3));
    assert_eq!(engine.await_answer(&mut rig, write), Ok(Status::Ok));
    // So do those of the page to which the block has moved.
    let second = rig.performed.iter().rev().find(|op| op.device == SPARE && op.offset > layout.tail_start);
    let written = second.expect("a place at the tail has the commit").offset;
    let homes = Home::ALL.map(|home| layout.table(Place::Tail, home, 1));
    rig.held = Some((SPARE, homes[usize::from(written == homes[0])]));
    let release = engine.begin_order(&mut rig, Order::Release(range_of(MOVING * BLOCK, 4096)));
    engine.settle_but_for_held(&mut rig).unwrap();
    rig.bad_flushes = [1, 0];
    engine.begin_flush(&mut rig);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert!(engine.is_poisoned() && !engine.is_answered(release));
    rig.held_page = None;
    engine.settle_but_for_held(&mut rig).unwrap();
    let clear = engine.begin_order(&mut rig, Order::Clear);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert!(engine.is_answered(clear) && !engine.is_poisoned());
    rig.held = None;
    while !engine.is_answered(release) {
        engine.step(&mut rig).unwrap();
    }
    drop(engine);
    rig.crash(|_, _| Keep::Drop);
    let map = rig.open().unwrap().map();
    let at = map.iter().find(|(block, ..)| *block == MOVING).map(|(_, slot, ..)| *slot);
    assert_ne!(at, Some(slot), "what it holds is old");
}

/// O1: one place does not take a commit, and the other not the second home of the one before. Were both retired at a
/// time, each by a superblock on the other, the one that lacks the commit would be left.
#[test]
fn two_places_that_fail_at_a_time_are_not_retired_each_by_the_other() {
    let (base, map) = three_pages();
    let mut rig = base.fork();
    let layout = rig.shape.layout();
    let mut engine = rig.open().unwrap();
    let remap = engine.begin_order(&mut rig, Order::Remap(range_of(1101 * BLOCK, 4096)));
    while !engine.is_answered(remap) {
        engine.step(&mut rig).unwrap();
    }
    rig.held_page = Some(0);
    let unwritable = |place: Place, page| {
        let bad = move |home| {
            let from = layout.table(place, home, page);
            Bad { device: SPARE, from, to: from + 4096, reads: Reads::Good, writes: true }
        };
        Home::ALL.map(bad)
    };
    rig.bad = [unwritable(Place::Head, 0), unwritable(Place::Tail, 1)].concat();
    let block = map.iter().find(|(_, slot, ..)| *slot == 600).expect("remapped").0;
    let release = engine.begin_order(&mut rig, Order::Release(range_of(block * BLOCK, 4096)));
    // Up to the superblock that retires the tail.
    let retiring = |rig: &Rig, copy: &u8| {
        let under_way = (0..rig.disks.pending_len()).map(|at| rig.disks.pending(at));
        let offset = layout.superblock(Place::Head, *copy);
        under_way.into_iter().any(|op| op.device == SPARE && op.offset == offset)
    };
    let copy = loop {
        match [0, 1].into_iter().find(|copy| retiring(&rig, copy)) {
            Some(copy) => break copy,
            None => assert!(engine.step(&mut rig).unwrap(), "the tail is retired"),
        }
    };
    rig.held_page = None;
    // One that retires the head would come last.
    rig.held = Some((SPARE, layout.superblock(Place::Tail, copy)));
    engine.settle_but_for_held(&mut rig).unwrap();
    rig.held = None;
    engine.settle(&mut rig).unwrap();
    rig.bad.clear();
    (0..3).for_each(|_| engine.pass(&mut rig, 1).unwrap());
    assert!(engine.is_answered(release));
    let data = pattern(block * BLOCK, BLOCK, 3);
    assert_eq!(engine.write(&mut rig, block * BLOCK, &data), Ok(Status::Ok));
    assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
    drop(engine);
    rig.crash(|_, _| Keep::Drop);
    assert_eq!(rig.open().unwrap().read(&mut rig, block * BLOCK, BLOCK), Some(data));
}

/// W5: as long as the healer reads a slot, its block stays there, and nothing else comes into it.
#[test]
fn a_slot_that_is_read_again_is_not_given_to_another_block_meanwhile() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    let at = (SPARE, rig.shape.layout().slots_start + 3 * 512);
    let bad = std::mem::take(&mut rig.bad);
    rig.bad = vec![Bad { device: SPARE, from: at.1, to: at.1 + 512, reads: Reads::Never, writes: false }];
    rig.performed.clear();
    let read = engine.begin_read(&mut rig, MOVED * BLOCK + 3, 1);
    while rig.performed.is_empty() {
        engine.step(&mut rig).unwrap();
    }
    // It failed once. What the healer tries then takes its time.
    (rig.bad, rig.held_read) = (bad, Some(at));
    engine.settle_but_for_held(&mut rig).unwrap();
    engine.begin_order(&mut rig, Order::Release(range_of(MOVED * BLOCK, 4096)));
    engine.settle_but_for_held(&mut rig).unwrap();
    let write = engine.begin_write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A));
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!((engine.answer(read), engine.answer(write)), (None, Some(Status::Ok)));
    rig.held_read = None;
    engine.settle(&mut rig).unwrap();
    assert_eq!(engine.content(read).as_deref(), Some(&old(MOVED)[3 * 512..4 * 512]));
}
