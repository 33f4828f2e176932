//! What is found at a start is not all there is: a home that gave nothing may read again, and what reads may not be
//! there any more when the power goes (O1).

use vhost_remap::device::OpKind;
use vhost_remap::device::memory::Keep;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::Status;
use vhost_remap::units::Sector;
use vhost_remap::volume::layout::{Home, PAGE_SIZE, Place};

use crate::commits::{BLOCK_A, BLOCK_B, MOVED, SMALL, bad_block, begun, reopened, three_pages};
use crate::crash::at_every_operation;
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, Reads, Rig, SPARE, Shape, pattern, range_of};

/// The first of some blocks that have not moved.
const FIRST: u64 = 1100;

/// A volume whose next remaps are all in one page, and in another sector of it than its header.
fn third_page() -> (Rig, Engine) {
    let (mut rig, _) = three_pages();
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of((FIRST - 70) * BLOCK, 70 * 4096)));
    (rig, engine)
}

/// Writes the block, which moves, up to the write of a table page at that place; where that page is.
fn write_until_committed(rig: &mut Rig, engine: &mut Engine, block: u64, place: Place) -> u64 {
    let layout = rig.shape.layout();
    let pages = Home::ALL.into_iter().flat_map(|home| (0..layout.table_pages).map(move |page| (home, page)));
    let pages: Vec<u64> = pages.map(|(home, page)| layout.table(place, home, page)).collect();
    let token = engine.begin_write(rig, block * BLOCK, &pattern(block * BLOCK, BLOCK, 2));
    rig.performed.clear();
    loop {
        let written = rig.performed.iter().filter(|op| op.device == SPARE && op.kind == OpKind::Write);
        if let Some(page) = written.map(|op| op.offset).find(|offset| pages.contains(offset)) {
            return page;
        }
        assert!(engine.answer(token).is_none());
        engine.step(rig).unwrap();
    }
}

/// The power goes when one place alone has a commit, and that home does not read at the next start. What is written
/// there is lost; when it reads again, it has a commit that nobody goes by.
#[test]
fn a_home_that_gave_nothing_is_older_than_what_the_volume_went_on_with() {
    for (place, commits) in Place::ALL.into_iter().flat_map(|place| (0..3).map(move |commits| (place, commits))) {
        // Either of the homes.
        for before in 0..2 {
            check_hidden_home(place, before, commits);
        }
    }
}

/// After so many commits before, and with so many while the home does not read.
fn check_hidden_home(place: Place, before: u64, commits: u64) {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    let remap = |rig: &mut Rig, engine: &mut Engine, blocks: std::ops::Range<u64>| {
        blocks.for_each(|block| engine.done(rig, Order::Remap(range_of(block * BLOCK, 4096))));
    };
    remap(&mut rig, &mut engine, 0..before);
    let map = engine.map();
    let page = write_until_committed(&mut rig, &mut engine, BLOCK_A, place);
    drop(engine);
    rig.crash(|device, sector: Sector| {
        let is_of_page = device == SPARE && (page..page + PAGE_SIZE).contains(&(sector.0 * 512));
        if is_of_page { Keep::Keep } else { Keep::Drop }
    });
    assert_eq!(rig.fork().open().unwrap().map().len(), map.len() + 1, "the commit is found where its home reads");
    rig.bad = vec![Bad { device: SPARE, from: page, to: page + PAGE_SIZE, reads: Reads::Never, writes: false }];
    rig.lost = Some((SPARE, page..page + PAGE_SIZE));
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.map(), map);
    remap(&mut rig, &mut engine, before..before + commits);
    let map = engine.map();
    drop(engine);
    rig.kill();
    rig.lost = None;
    rig.bad.clear();
    assert_eq!(rig.open().unwrap().map(), map, "{place:?}, {before} commits before and {commits} after");
}

/// A superblock that retires the head is in the tail alone when the power goes, and gives nothing at the next start.
/// That goes on with the head, and retires the tail. When both read, the one that came later counts.
#[test]
fn a_superblock_that_gave_nothing_is_older_than_the_one_the_volume_went_on_with() {
    let mut rig = begun(SMALL);
    let layout = rig.shape.layout();
    let bad = |from: u64, reads: Reads, writes: bool| Bad { device: SPARE, from, to: from + PAGE_SIZE, reads, writes };
    let unwritable = |place: Place| Home::ALL.map(|home| bad(layout.table(place, home, 0), Reads::Good, true));
    let mut engine = rig.open().unwrap();
    rig.bad.extend(unwritable(Place::Head));
    let superblocks = [0, 1].map(|copy| layout.superblock(Place::Tail, copy));
    engine.begin_write(&mut rig, BLOCK_A * BLOCK, &pattern(BLOCK_A * BLOCK, BLOCK, 2));
    rig.performed.clear();
    let superblock = loop {
        engine.step(&mut rig).unwrap();
        let written = rig.performed.iter().filter(|op| op.device == SPARE && op.kind == OpKind::Write);
        if let Some(superblock) = written.map(|op| op.offset).find(|offset| superblocks.contains(offset)) {
            break superblock;
        }
    };
    drop(engine);
    rig.crash(|_, _| Keep::Keep);
    rig.bad = vec![bad(superblock, Reads::Never, false)];
    rig.bad.extend(unwritable(Place::Tail));
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.causes("place-retired").len(), 1);
    engine.done(&mut rig, Order::Remap(range_of(BLOCK_B * BLOCK, 4096)));
    let map = engine.map();
    drop(engine);
    rig.kill();
    rig.bad.clear();
    assert_eq!(rig.open().unwrap().map(), map);
}

/// A flush of table pages fails and drops half of them, but they read. The next start's flush succeeds without them;
/// were the homes overwritten that hold the last durable commit, a power cut could leave a page without any.
#[test]
fn pages_that_a_failed_flush_dropped_are_durable_before_older_ones_are_overwritten() {
    let (mut rig, mut engine) = third_page();
    rig.bad = vec![bad_block(FIRST)];
    let before = engine.map();
    write_until_committed(&mut rig, &mut engine, FIRST, Place::Tail);
    (rig.bad_flushes, rig.torn) = ([0, 1], Some(BLOCK));
    engine.settle(&mut rig).unwrap();
    rig.torn = None;
    assert_eq!(engine.causes("in-doubt").len(), 1);
    drop(engine);
    rig.kill();
    rig.bad.clear();
    let after = rig.fork().open().unwrap().map();
    assert_eq!(after.len(), before.len() + 1, "what was dropped still reads");
    let reopen = |rig: &mut Rig, _: &mut ()| rig.try_open(rig.open_params()).map(|opened| drop(opened.expect("opens")));
    let fates = at_every_operation(&rig, reopen, |mut left, ()| {
        let map = reopened(&mut left).map();
        assert!(map == before || map == after, "neither old nor new");
    });
    println!("{fates} fates");
}

/// The second home of a page reads like the first, and neither says which of them is durable.
#[test]
fn a_second_home_that_a_failed_flush_dropped_is_not_taken_for_the_durable_one() {
    for commits in 1..=2 {
        let (mut rig, mut engine) = third_page();
        rig.bad = (FIRST..FIRST + commits).map(bad_block).collect();
        for block in FIRST..FIRST + commits {
            engine.begin_write(&mut rig, block * BLOCK, &pattern(block * BLOCK, BLOCK, 2));
            engine.settle(&mut rig).unwrap();
        }
        let map = engine.map();
        // Nothing of the guest's waits for this flush.
        rig.bad_flushes = [0, 1];
        engine.begin_order(&mut rig, Order::Save);
        engine.settle(&mut rig).unwrap();
        assert!(!engine.is_poisoned());
        drop(engine);
        rig.kill();
        let move_another = |rig: &mut Rig, _: &mut ()| {
            let mut engine = rig.try_open(rig.open_params())?.expect("opens");
            rig.bad = vec![bad_block(FIRST + commits)];
            let block = FIRST + commits;
            engine.begin_write(rig, block * BLOCK, &pattern(block * BLOCK, BLOCK, 3));
            engine.settle(rig)
        };
        at_every_operation(&rig, move_another, |mut left, ()| {
            let found = reopened(&mut left).map();
            assert!(map.iter().all(|entry| found.contains(entry)), "a commit that was durable is gone");
        });
    }
}

/// F2: a note of a failed flush that no flush made durable reads at the next start, and stays from then on.
#[test]
fn a_note_of_a_failed_flush_is_durable_once_it_was_read() {
    let mut rig = begun(Shape { labelled: false, ..SMALL });
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &pattern(MOVED * BLOCK, BLOCK, 2)), Ok(Status::Ok));
    rig.bad_flushes = [0, u32::MAX];
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    assert!(engine.is_poisoned());
    drop(engine);
    rig.kill();
    rig.bad_flushes = [0; 2];
    drop(rig.open().unwrap());
    rig.crash(|_, _| Keep::Drop);
    assert!(rig.open().unwrap().is_poisoned());
}

/// A flush of the last superblock fails and drops half of it, but it reads. It differs from the one before in more than
/// one sector: until it is durable, the one before is not overwritten.
#[test]
fn a_superblock_that_a_failed_flush_dropped_is_durable_before_the_older_one_is_overwritten() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut fates = 0;
    for first in 0.. {
        let mut after = rig.fork();
        let mut engine = after.open().unwrap();
        // The label gets another date.
        engine.tick(&mut after, 3600);
        engine.done(&mut after, Order::Remap(range_of(BLOCK_B * BLOCK, 4096)));
        engine.pass(&mut after, 3600).unwrap();
        drop(engine);
        after.kill();
        let mut engine = after.open().unwrap();
        (after.fails, after.torn) = (Some((first, 1)), Some(BLOCK));
        let closed = engine.close(&mut after).unwrap();
        let operations = after.performed.iter().filter(|op| op.device == SPARE).count() as u64;
        drop(engine);
        after.kill();
        (after.fails, after.torn) = (None, None);
        let reopen =
            |rig: &mut Rig, _: &mut ()| rig.try_open(rig.open_params()).map(|opened| drop(opened.expect("opens")));
        fates += at_every_operation(&after, reopen, |mut left, ()| drop(reopened(&mut left)));
        if closed == Ok(()) && first > operations {
            break;
        }
    }
    println!("{fates} fates");
}
