//! What a pass does with disks that take their time to fail.

use vhost_remap::device::OpKind;
use vhost_remap::engine::event::EventKind;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::Status;
use vhost_remap::engine::scan::{Found, ScanOrder, ScanParams, ScanScope, ScanState};

use crate::commits::{BLOCK_A, SMALL, begun, new};
use crate::engine::Engine;
use crate::rig::{BLOCK, PRIMARY, Reads, Rig, SPARE, Shape, range_of};
use crate::scan::{made, unreadable};

/// Seven of them are more than a request of the guest may take (R2).
const SECONDS: u64 = 2;
/// Reads of a block that fails in all its sectors: in whole, in halves and quarters, and each sector to its last retry.
const LADDER: u64 = 1 + 2 + 4 + 8 * 4;

fn slow_to_fail(reads: Reads) -> (Rig, Engine) {
    let mut rig = made(SMALL);
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, reads)];
    rig.failing_seconds = SECONDS;
    let engine = rig.open().unwrap();
    (rig, engine)
}

fn reads_of_block(rig: &Rig) -> u64 {
    let bytes = BLOCK_A * 4096..(BLOCK_A + 1) * 4096;
    let reads = rig.performed.iter().filter(|op| op.device == PRIMARY && op.kind == OpKind::Read && op.len <= 4096);
    reads.filter(|op| bytes.contains(&op.offset)).count() as u64
}

#[test]
fn a_block_that_takes_long_to_fail_is_tried_to_the_last_and_pending() {
    let (mut rig, mut engine) = slow_to_fail(Reads::Never);
    rig.performed.clear();
    let last = engine.scan(&mut rig);
    assert_eq!(last.found, Found { bad: 1, ..Found::default() });
    assert!(last.complete, "{:?}", engine.status(&mut rig).scan.skipped);
    assert_eq!(engine.status(&mut rig).pending, 1);
    // Once to find it, and all of the ladder but its first read, which was that.
    let reads = reads_of_block(&rig);
    assert!((LADDER..=LADDER + 1).contains(&reads), "{reads}");
    // Nothing else is read while it is tried, and the disk rests between.
    let took = last.ended - last.started;
    assert!(took > reads * SECONDS * 3 / 2, "{took} s for {reads} reads that fail");
}

/// R2: one request of the guest tries only so long, and what it says of the rest is true.
#[test]
fn what_a_request_has_no_time_for_is_not_called_pending() {
    let (mut rig, mut engine) = slow_to_fail(Reads::Never);
    assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, BLOCK), None);
    assert_eq!(engine.status(&mut rig).pending, 0);
    let events = engine.events.iter().filter(|event| event.kind == EventKind::ReadError);
    let (pending, others): (Vec<_>, Vec<_>) = events.partition(|event| event.action.starts_with("pending"));
    assert_eq!(pending.len(), 0);
    assert!(others.iter().all(|event| event.action.starts_with("fails now")) && !others.is_empty(), "{others:?}");
}

#[test]
fn the_guest_has_its_turn_while_a_block_is_tried() {
    let (mut rig, mut engine) = slow_to_fail(Reads::UntilWritten);
    engine.begin_scan(&mut rig, ScanScope::default());
    while engine.causes("read-error").is_empty() {
        engine.pass(&mut rig, 1).unwrap();
    }
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    assert_eq!(engine.status(&mut rig).scan.state, ScanState::Running);
    let last = engine.end_scan(&mut rig);
    // What was proven bad is counted; then it is another content, which reads.
    let expected = Found { bad: 1, rewritten: 1, healed: 1, ..Found::default() };
    assert_eq!((last.found, last.complete), (expected, true));
    assert_eq!(engine.status(&mut rig).pending, 0);
    assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, BLOCK), Some(new(BLOCK_A)));
}

#[test]
fn a_block_that_reads_in_a_later_round_counts_as_recovered() {
    let (mut rig, mut engine) = slow_to_fail(Reads::Times(8));
    let last = engine.scan(&mut rig);
    assert_eq!(last.found, Found { recovered: 1, ..Found::default() });
    assert!(last.complete && engine.status(&mut rig).pending == 0);
}

/// A pass that is paused in the middle of a block has not seen to it.
#[test]
fn a_pass_that_is_paused_while_it_looks_for_lost_sectors_looks_again() {
    let mut rig = begun(SMALL);
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Never)];
    rig.bad[0].writes = true;
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)[..512]), Ok(Status::Ok));
    assert_eq!(engine.status(&mut rig).lost_sectors, 7);
    rig.failing_seconds = SECONDS;
    engine.begin_scan(&mut rig, ScanScope::default());
    let looked = |rig: &Rig| rig.performed.iter().filter(|op| op.offset == BLOCK_A * 4096 + 512).count();
    let before = looked(&rig);
    while looked(&rig) < before + 4 {
        engine.tick(&mut rig, 1);
        while looked(&rig) < before + 4 && engine.step(&mut rig).unwrap() {}
    }
    engine.done(&mut rig, Order::Scan(ScanOrder::Pause));
    engine.pass(&mut rig, 60).unwrap();
    rig.bad.clear();
    engine.done(&mut rig, Order::Scan(ScanOrder::Resume));
    let last = engine.end_scan(&mut rig);
    assert!(last.complete && last.found.healed == 7, "{last:?}");
    assert_eq!(engine.status(&mut rig).lost_sectors, 0);
}

/// A pass over a dead part of a disk ends.
#[test]
fn what_fails_has_a_day_of_a_pass_at_most() {
    let mut rig = made(SMALL);
    let mut engine = rig.open().unwrap();
    assert!(engine.scan(&mut rig).complete);
    rig.bad = (0..9).map(|block| unreadable(PRIMARY, block * 4096 * 30, 4096, Reads::Never)).collect();
    rig.failing_seconds = 2000;
    let last = engine.scan(&mut rig);
    let scan = engine.status(&mut rig).scan;
    assert!(!last.complete && scan.covered == scan.total, "{scan:?}");
    let given_up = scan.skipped.iter().filter(|part| part.why.contains("a day"));
    // Of the first block something is proven, and the rest of it and all others are left out.
    assert_eq!((given_up.count(), last.found), (9, Found { bad: 1, ..Found::default() }), "{scan:?}");
    assert!(last.ended - last.started < 3 * 86_400, "{last:?}");
    let is_scanned = |block: u64| scan.scanned.has(range_of(block * BLOCK, BLOCK as usize * 512));
    assert!(!is_scanned(30) && is_scanned(32), "{:?}", scan.scanned);
}

/// The guest waits for such a disk as for one that fails.
#[test]
fn after_a_read_that_took_long_the_disk_rests_also_if_it_succeeded() {
    let mut rig = made(SMALL);
    (rig.slow, rig.failing_seconds) = (Some((PRIMARY, BLOCK_A * 4096..(BLOCK_A + 1) * 4096)), 5);
    let mut engine = rig.open().unwrap();
    rig.performed.clear();
    let last = engine.scan(&mut rig);
    assert_eq!((last.found, last.complete), (Found { slow: 1, ..Found::default() }, true));
    let reads = reads_of_block(&rig);
    assert!(reads > 2 && last.ended - last.started > reads * 5 * 3 / 2, "{reads} reads: {last:?}");
}

/// A disk that is dead in large parts takes a pass so long at most, however many pieces fail.
#[test]
fn a_pass_ends_when_it_has_given_two_days_to_what_fails() {
    let mut rig = made(Shape { capacity: 64 * 2048, max_remaps: 16, labelled: true });
    // All but its last sectors, which tell that it is there.
    rig.bad = vec![unreadable(PRIMARY, 0, 63 << 20, Reads::Never)];
    rig.failing_seconds = 20_000;
    let mut engine = rig.open().unwrap();
    let last = engine.scan(&mut rig);
    let scan = engine.status(&mut rig).scan;
    assert!(!last.complete && last.ended - last.started < 4 * 86_400, "{last:?}");
    let [.., of_primary, of_spare] = &scan.skipped[..] else { panic!("{scan:?}") };
    assert!([of_primary, of_spare].iter().all(|rest| rest.why.contains("two days")), "{scan:?}");
    assert_eq!((of_primary.device, of_primary.offset + of_primary.len), (PRIMARY, 64 << 20), "to its end");
    assert_eq!(of_spare.device, SPARE);
    assert_eq!(scan.covered + of_primary.len + of_spare.len, scan.total, "{scan:?}");
    assert!(!scan.scanned.has(range_of(0, BLOCK as usize * 512)), "{:?}", scan.scanned);
}

#[test]
fn a_rewrite_of_another_block_does_not_begin_a_block_anew() {
    let others: Vec<u64> = (0..4).map(|n| 64 + n * 8).collect();
    let mut rig = made(SMALL);
    let bad = |block: u64| unreadable(PRIMARY, block * 4096, 4096, Reads::UntilWritten);
    rig.bad = others.iter().copied().chain([BLOCK_A]).map(bad).collect();
    let mut engine = rig.open().unwrap();
    for block in others.iter().copied().chain([BLOCK_A]) {
        assert_eq!(engine.read(&mut rig, block * BLOCK, BLOCK), None);
    }
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    rig.bad.push(unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Never));
    rig.failing_seconds = SECONDS;
    rig.performed.clear();
    engine.begin_scan(&mut rig, ScanScope::default());
    for (n, block) in (1..).zip(others) {
        while reads_of_block(&rig) < 6 * n {
            engine.pass(&mut rig, 1).unwrap();
        }
        assert_eq!(engine.write(&mut rig, block * BLOCK, &new(block)), Ok(Status::Ok));
    }
    let last = engine.end_scan(&mut rig);
    assert_eq!((last.found.bad, last.complete), (1, true), "{last:?}");
    let reads = reads_of_block(&rig);
    assert!((LADDER..=LADDER + 1).contains(&reads), "{reads}");
}

/// Between the rounds anybody may move it.
#[test]
fn a_weak_block_that_has_moved_meanwhile_stays_there() {
    let mut rig = made(SMALL);
    rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Times(8))];
    rig.failing_seconds = SECONDS;
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    while engine.status(&mut rig).scan.found.recovered == 0 {
        engine.pass(&mut rig, 1).unwrap();
    }
    engine.done(&mut rig, Order::Remap(range_of(BLOCK_A * BLOCK, 4096)));
    let last = engine.end_scan(&mut rig);
    assert_eq!(last.found, Found { recovered: 1, ..Found::default() });
    let status = engine.status(&mut rig);
    assert_eq!((status.live, status.retired, status.tally.remaps), (1, 0, 1));
}

/// What weak blocks may take of the slots is there again once they were given back.
#[test]
fn slots_that_weak_blocks_had_count_no_more_once_they_are_released() {
    let mut rig = made(SMALL);
    rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
    let mut engine = rig.open().unwrap();
    for _ in 0..3 {
        rig.bad = (0..6).map(|block| unreadable(PRIMARY, block * 4096, 512, Reads::Times(6))).collect();
        // A quarter of 16 slots.
        assert_eq!(engine.scan(&mut rig).found.moved, 4);
        rig.bad.clear();
        engine.done(&mut rig, Order::Release(range_of(0, 6 * 4096)));
        assert_eq!(engine.status(&mut rig).live, 0);
    }
}

/// What slows down and then fails is what a pass is to find.
#[test]
fn a_slow_block_that_fails_when_it_is_read_again_is_bad() {
    let mut rig = made(SMALL);
    (rig.slow, rig.failing_seconds) = (Some((PRIMARY, BLOCK_A * 4096..(BLOCK_A + 1) * 4096)), 1);
    let mut engine = rig.open().unwrap();
    rig.performed.clear();
    engine.begin_scan(&mut rig, ScanScope::default());
    while reads_of_block(&rig) < 1 {
        engine.tick(&mut rig, 1);
        while reads_of_block(&rig) < 1 && engine.step(&mut rig).unwrap() {}
    }
    (rig.slow, rig.failing_seconds) = (None, 0);
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Never)];
    assert_eq!(engine.end_scan(&mut rig).found, Found { bad: 1, ..Found::default() });
    assert_eq!(engine.status(&mut rig).pending, 1);
}

/// P2: what reads only when it is tried again has proven nothing.
#[test]
fn a_rewritten_block_that_reads_after_retries_is_not_healed() {
    let mut rig = made(SMALL);
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::UntilWritten)];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, BLOCK), None);
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Times(4))];
    assert_eq!(engine.scan(&mut rig).found, Found { recovered: 1, ..Found::default() });
    assert_eq!(engine.scan(&mut rig).found, Found { healed: 1, ..Found::default() });
}

/// E2: a write that needs a slot comes before a block that can still be read.
#[test]
fn weak_blocks_leave_a_quarter_of_the_slots_free() {
    let mut rig = made(SMALL);
    rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
    let mut engine = rig.open().unwrap();
    // Of 16 slots.
    engine.done(&mut rig, Order::Remap(range_of(100 * BLOCK, 10 * 4096)));
    rig.bad = (0..6).map(|block| unreadable(PRIMARY, block * 4096, 512, Reads::Times(6))).collect();
    assert_eq!(engine.scan(&mut rig).found.moved, 2);
}
