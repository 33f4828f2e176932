//! Commits that fail, follow each other, or are torn (W2, W3, W8, O1).

use std::collections::BTreeSet;

use vhost_remap::device::OpKind;
use vhost_remap::device::memory::Keep;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::{Home, Place};

use crate::crash::{at_every_operation, crashed, fates, subset, unflushed};
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, pattern, range_of};
use crate::seat::{At, Entry, Kind, Seat, age, content, is_whole, live_entries, seats};

pub(crate) const SMALL: Shape = Shape { capacity: 2048, max_remaps: 16, labelled: true };
/// Takes no writes.
pub(crate) const BLOCK_A: u64 = 10;
/// Takes no writes either.
pub(crate) const BLOCK_B: u64 = 30;
/// Remapped already.
pub(crate) const MOVED: u64 = 20;

pub(crate) fn bad_block(block: u64) -> Bad {
    Bad { device: PRIMARY, from: block * 4096, to: (block + 1) * 4096, reads: Reads::Good, writes: true }
}

fn unwritable(from: u64, bytes: u64) -> Bad {
    Bad { device: SPARE, from, to: from + bytes, reads: Reads::Good, writes: true }
}

pub(crate) fn old(block: u64) -> Vec<u8> {
    pattern(block * BLOCK, BLOCK, 1)
}

pub(crate) fn new(block: u64) -> Vec<u8> {
    pattern(block * BLOCK, BLOCK, 2)
}

/// A small volume with some data, a remapped block, and two that take no writes any more. Open volumes end
/// here as by a kill.
pub(crate) fn begun(shape: Shape) -> Rig {
    let mut rig = Rig::new(shape);
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    for block in [BLOCK_A, BLOCK_B, MOVED] {
        assert_eq!(engine.write(&mut rig, block * BLOCK, &old(block)), Ok(Status::Ok));
    }
    engine.done(&mut rig, Order::Remap(range_of(MOVED * BLOCK, 4096)));
    assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
    drop(engine);
    rig.kill();
    rig.bad = vec![bad_block(BLOCK_A), bad_block(BLOCK_B)];
    rig
}

/// Every copy of every page of the spare is whole and, but for the superblocks, the same in all places.
pub(crate) fn check_copies(rig: &Rig) {
    let mut first: Vec<(Kind, Vec<u8>)> = Vec::new();
    for seat in seats(&rig.shape).iter().filter(|seat| seat.at != At::Label) {
        let bytes = seat.read(rig);
        assert!(is_whole(seat, &bytes), "{seat:?}");
        let page = match seat.kind {
            Kind::Table(_, number) => Kind::Table(0, number),
            kind => kind,
        };
        let content = content(seat.kind, &bytes);
        match first.iter().find(|(kind, _)| *kind == page) {
            Some((_, known)) => assert!(*known == content, "{seat:?} differs"),
            None => first.push((page, content)),
        }
    }
}

/// Open again and again: each time the same map, with all copies whole; gives the engine of the last time.
pub(crate) fn reopened(rig: &mut Rig) -> Engine {
    rig.bad.clear();
    let engine = rig.open().expect("what a crash leaves opens");
    let map = engine.map();
    check_copies(rig);
    drop(engine);
    rig.kill();
    let engine = rig.open().expect("what was repaired opens");
    assert_eq!(engine.map(), map, "the second start");
    assert_eq!(engine.causes("metadata-repaired"), [] as [&str; 0], "the second start");
    engine
}

/// Sector by sector, a block is old or new.
pub(crate) fn assert_old_or_new(found: &[u8], block: u64) {
    for (index, sector) in found.chunks(512).enumerate() {
        let at = index * 512..(index + 1) * 512;
        assert!(sector == &old(block)[at.clone()] || sector == &new(block)[at], "sector {index} of block {block}");
    }
}

/// Any one operation of the spare fails while a block is moved, once or with all that follow; then the power
/// goes. What was answered as done is there; what failed is old or new, and stays what it is.
#[test]
fn a_commit_that_failed_half_way_is_old_or_new_after_a_restart() {
    let base = begun(SMALL);
    let mut outcomes = [0; 2];
    for first in 0.. {
        let mut performed = 0;
        for count in [1, u64::MAX] {
            let mut rig = base.fork();
            let mut engine = rig.open().unwrap();
            rig.bad.clone_from(&base.bad);
            let before = rig.performed.iter().filter(|op| op.device == SPARE).count() as u64;
            rig.fails = Some((before + first, count));
            let status = engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)).unwrap();
            outcomes[usize::from(status == Status::IoErr)] += 1;
            performed = rig.performed.iter().filter(|op| op.device == SPARE).count() as u64 - before;
            drop(engine);
            fates(&rig, first, |mut after| {
                let mut engine = reopened(&mut after);
                let found = engine.read(&mut after, BLOCK_A * BLOCK, BLOCK);
                // A failed flush may have poisoned the volume; it is read all the same.
                match (found, status) {
                    (Some(found), Status::Ok) => assert!(found == new(BLOCK_A), "what was answered is there"),
                    (Some(found), Status::IoErr) => assert_old_or_new(&found, BLOCK_A),
                    (None, _) => panic!("the block does not read"),
                }
                assert_eq!(engine.read(&mut after, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
                assert_eq!(engine.read(&mut after, BLOCK_B * BLOCK, BLOCK), Some(old(BLOCK_B)));
            });
        }
        if first > performed {
            break;
        }
    }
    assert!(outcomes[0] > 0 && outcomes[1] > 0, "{outcomes:?}");
}

/// Puts a commit in doubt: the head takes it, the tail does not, and that the tail is retired cannot be
/// written down.
fn doubtful(rig: &mut Rig) -> Engine {
    let mut engine = rig.open().unwrap();
    let layout = rig.shape.layout();
    rig.bad = vec![
        bad_block(BLOCK_A),
        bad_block(BLOCK_B),
        unwritable(layout.place_start(Place::Tail), layout.place_len()),
        unwritable(layout.superblock(Place::Head, 0), 8192),
    ];
    assert_eq!(engine.write(rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::IoErr));
    assert_eq!(engine.causes("in-doubt").len(), 1);
    engine
}

/// The sequence of the only table page in a home.
fn sequence(rig: &Rig, place: Place, home: Home) -> u64 {
    let offset = rig.shape.layout().table(place, home, 0);
    age(Kind::Table(0, 0), &rig.peek(SPARE, offset, 4096))
}

fn sequences(rig: &Rig) -> Vec<u64> {
    Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| sequence(rig, place, home))).collect()
}

/// W8 as long as the volume is open.
#[test]
fn a_commit_in_doubt_fails_its_block_until_the_spare_is_back() {
    let mut rig = begun(SMALL);
    let mut engine = doubtful(&mut rig);
    let doubted = *sequences(&rig).iter().max().unwrap();
    assert_eq!(engine.status(&mut rig).in_doubt, 1);
    assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, 1), None);
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::IoErr));
    assert_eq!(engine.read(&mut rig, BLOCK_B * BLOCK, BLOCK), Some(old(BLOCK_B)));
    rig.bad.truncate(2);
    engine.pass(&mut rig, 2).unwrap();
    assert_eq!(engine.causes("spare-back").len(), 1);
    // A higher sequence than the doubtful one is everywhere, with what was true before it.
    assert_eq!(sequences(&rig), [doubted + 1; 4]);
    assert_eq!(engine.map().iter().map(|entry| entry.0).collect::<Vec<_>>(), [MOVED]);
    assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, BLOCK), Some(old(BLOCK_A)));
    drop(engine);
    rig.crash(|_, _| Keep::Drop);
    let mut engine = reopened(&mut rig);
    assert_eq!(engine.map().iter().map(|entry| entry.0).collect::<Vec<_>>(), [MOVED]);
    assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, BLOCK), Some(old(BLOCK_A)));
    // Its slot serves again.
    rig.bad = vec![bad_block(BLOCK_A), bad_block(BLOCK_B)];
    for block in [BLOCK_A, BLOCK_B] {
        assert_eq!(engine.write(&mut rig, block * BLOCK, &new(block)), Ok(Status::Ok));
    }
    assert_eq!(engine.map().iter().map(|entry| entry.1).max(), Some(2));
}

/// W8 when the process ends before: whichever way the doubt goes, it goes once.
#[test]
fn a_commit_in_doubt_is_decided_once_by_a_restart() {
    let base = begun(SMALL);
    let mut rig = base.fork();
    let engine = doubtful(&mut rig);
    drop(engine);
    let mut kinds = BTreeSet::new();
    fates(&rig, 1, |mut after| {
        let mut engine = reopened(&mut after);
        let found = engine.read(&mut after, BLOCK_A * BLOCK, BLOCK).expect("decided");
        assert!(found == old(BLOCK_A) || found == new(BLOCK_A));
        assert_eq!(engine.map().len(), if found == new(BLOCK_A) { 2 } else { 1 });
        kinds.insert(found == new(BLOCK_A));
        assert_eq!(engine.write(&mut after, BLOCK_A * BLOCK, &pattern(0, BLOCK, 9)), Ok(Status::Ok));
    });
    assert_eq!(kinds.len(), 2, "both ways were seen");
}

/// Second commits, before and after the second home of the first was brought up.
#[test]
fn a_second_commit_to_a_page_never_endangers_the_first() {
    let base = begun(SMALL);
    let two_writes = |rig: &mut Rig, answered: &mut Vec<u64>| {
        let bad = std::mem::take(&mut rig.bad);
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        rig.bad = bad;
        // The answer to the first comes before its second home is written.
        for block in [BLOCK_A, BLOCK_B] {
            let token = engine.begin_write(rig, block * BLOCK, &new(block));
            assert_eq!(engine.await_answer(rig, token)?, Status::Ok);
            answered.push(block);
        }
        engine.settle(rig)
    };
    let count = at_every_operation(&base, two_writes, |mut after, answered: &Vec<u64>| {
        let mut engine = reopened(&mut after);
        for block in [BLOCK_A, BLOCK_B] {
            let found = engine.read(&mut after, block * BLOCK, BLOCK).expect("no sector is lost");
            if answered.contains(&block) {
                assert!(found == new(block), "block {block} was answered");
            } else {
                assert_old_or_new(&found, block);
            }
        }
        assert_eq!(engine.read(&mut after, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
    });
    println!("{count} crashes");
}

/// While its second homes are not up, the newest copy of a page is not overwritten.
#[test]
fn a_second_commit_waits_for_the_second_home_of_the_first() {
    let mut rig = begun(SMALL);
    let bad = std::mem::take(&mut rig.bad);
    let mut engine = rig.open().unwrap();
    rig.bad = bad;
    rig.performed.clear();
    let tokens = [BLOCK_A, BLOCK_B].map(|block| engine.begin_write(&mut rig, block * BLOCK, &new(block)));
    for token in tokens {
        assert_eq!(engine.await_answer(&mut rig, token), Ok(Status::Ok));
    }
    engine.settle(&mut rig).unwrap();
    let layout = rig.shape.layout();
    let home_of = |offset: u64| {
        let homes = Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| (place, home)));
        homes.into_iter().find(|(place, home)| layout.table(*place, *home, 0) == offset).map(|(_, home)| home)
    };
    let written: Vec<Home> = rig
        .performed
        .iter()
        .filter(|op| op.kind == OpKind::Write && op.device == SPARE)
        .filter_map(|op| home_of(op.offset))
        .collect();
    // Two commits in two places: first home, second home, and then the other way round.
    let [first, second] = [written[0], written[0].other()];
    assert_eq!(written, [first, first, second, second, second, second, first, first]);
}

/// A volume with a free slot in the first page, one in the second, and those of the third.
pub(crate) fn three_pages() -> (Rig, Vec<Entry>) {
    let mut rig = Rig::new(Shape { capacity: 16 * 2048, max_remaps: 1100, labelled: false });
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(0, 1020 * 4096)));
    for block in [100, 700] {
        engine.done(&mut rig, Order::Release(range_of(block * BLOCK, 4096)));
    }
    let map = engine.map();
    drop(engine);
    rig.kill();
    // The table is what matters; four megabytes of slots would have to be copied for each case.
    let bare = Rig::new(rig.shape);
    seats(&rig.shape).iter().for_each(|seat| seat.write(&bare, &seat.read(&rig)));
    (bare, map)
}

/// Unflushed sectors of table pages.
fn torn_sectors(rig: &Rig) -> Vec<(Seat, u64)> {
    let is_page = |seat: &Seat| matches!(seat.kind, Kind::Table(..)) && seat.at != At::Label;
    let pages: Vec<Seat> = seats(&rig.shape).into_iter().filter(is_page).collect();
    let page = |sector: u64| pages.iter().find(|seat| (seat.offset..seat.offset + 4096).contains(&(sector * 512)));
    let sectors = unflushed(rig).into_iter().filter(|(device, _)| *device == SPARE);
    sectors.filter_map(|(_, sector)| Some((*page(sector)?, sector))).collect()
}

/// Tear the table pages that wait for a flush in every way; a page is as new as its newest whole home.
fn check_torn(torn: &Rig, before: &[Entry]) {
    let sectors = torn_sectors(torn);
    let written: BTreeSet<Seat> = sectors.iter().map(|(seat, _)| *seat).collect();
    assert_eq!(written.len(), 6, "three pages in two places: {written:?}");
    let all: Vec<_> = sectors.iter().map(|(_, sector)| (SPARE, *sector)).collect();
    // What each page says when it is new: known from the disk on which everything landed.
    let whole = crashed(torn, &all.iter().copied().collect());
    for index in 0..1 << all.len() {
        let kept = subset(&all, index);
        let lands = |seat: &&Seat| sectors.iter().all(|(of, sector)| of != *seat || kept.contains(&(SPARE, *sector)));
        let mut expected = before.to_vec();
        for number in 0..3 {
            let of_page = |seat: &&Seat| matches!(seat.kind, Kind::Table(_, of) if of == number);
            if let Some(seat) = written.iter().filter(of_page).find(lands) {
                let slots = number * 508..(number + 1) * 508;
                expected.retain(|entry| !slots.contains(&entry.1));
                expected.extend(live_entries(number, &seat.read(&whole)));
            }
        }
        expected.sort_unstable();
        let mut after = crashed(torn, &kept);
        let engine = after.open().unwrap();
        assert!(engine.map() == expected, "subset {index:#b} of {sectors:?}");
        check_copies(&after);
    }
    println!("{} subsets of {} sectors", 1 << all.len(), all.len());
}

/// The table pages of one commit, written in one flush epoch, torn in every way: each page for itself is old
/// or new, and when the commit was durable, it stays while second homes are torn.
#[test]
fn a_torn_group_commit_leaves_each_page_old_or_new() {
    const FIRST: u64 = 1100;
    let (rig, before) = three_pages();
    let bad = Bad { to: (FIRST + 3) * 4096, ..bad_block(FIRST) };
    // Three blocks in one request move in one commit.
    let write = |rig: &mut Rig| {
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        rig.bad = vec![bad];
        let token = engine.begin_write(rig, FIRST * BLOCK, &pattern(FIRST * BLOCK, 3 * BLOCK, 1));
        assert_eq!(engine.await_answer(rig, token)?, Status::Ok);
        engine.settle(rig).map(|()| engine.map())
    };
    let after = write(&mut rig.fork()).unwrap();
    assert_eq!(after.len(), before.len() + 3);
    let cut = |operations| {
        let mut torn = rig.fork();
        torn.left = Some(operations);
        (write(&mut torn).is_err(), torn)
    };
    let homes = |torn: &Rig| torn_sectors(torn).into_iter().map(|(seat, _)| seat).collect::<BTreeSet<_>>();
    let mut cuts = (0..).map(cut).take_while(|(was_cut, _)| *was_cut).map(|(_, torn)| torn);
    let torn = cuts.find(|torn| homes(torn).len() == 6).expect("all pages are written before the flush");
    check_torn(&torn, &before);
    let first = homes(&torn);
    let second = |torn: &Rig| homes(torn).len() == 6 && homes(torn).is_disjoint(&first);
    let torn = cuts.find(second).expect("all second homes are written");
    check_torn(&torn, &after);
}

/// A place that does not take the last superblock is retired like any other; counters are kept where they can be.
#[test]
fn a_bad_page_in_one_place_keeps_no_volume_from_closing_cleanly() {
    for place in Place::ALL {
        let begin = || {
            let mut rig = begun(SMALL);
            let engine = rig.open().unwrap();
            let layout = rig.shape.layout();
            (rig, engine, layout)
        };
        for copy in 0..2 {
            let (mut rig, mut engine, layout) = begin();
            engine.settle(&mut rig).unwrap();
            rig.bad = vec![unwritable(layout.superblock(place, copy), 4096)];
            assert_eq!(engine.close(&mut rig).unwrap(), Ok(()), "{place:?} {copy}");
            let retired = engine.causes("place-retired").len();
            let again = rig.open().unwrap();
            // The last superblock went to one of the copies only.
            assert!(retired <= 1 && again.causes("metadata-repaired").is_empty(), "{place:?} {copy}");
            assert_eq!(again.map().len(), 1);
        }
        let (mut rig, mut engine, layout) = begin();
        rig.bad = vec![unwritable(layout.counters(place), 4096)];
        assert_eq!(engine.close(&mut rig).unwrap(), Ok(()), "{place:?}");
        assert!(engine.causes("place-retired").is_empty());
    }
}
