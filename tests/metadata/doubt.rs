//! A flush fails at any moment while a block moves: what the commit leaves in doubt harms nobody (W8), and the
//! failure costs no more than it must (F3).

use vhost_remap::device::OpKind;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::{Status, Token};
use vhost_remap::engine::scan::{Found, ScanOrder, ScanScope};

use crate::commits::{BLOCK_A, BLOCK_B, MOVED, SMALL, assert_old_or_new, begun, new, old, reopened};
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, pattern, range_of};

/// So many steps may pass before a write that was begun is answered.
const STEPS_MAX: u64 = 200;

fn begin(rig: &mut Rig, engine: &mut Engine, block: u64) -> Token {
    engine.begin_write(rig, block * BLOCK, &new(block))
}

/// Begin to move a block, and show `check` each moment of that until it is over.
fn at_every_moment(mut check: impl FnMut(&mut Rig, Engine)) {
    for steps in 0..STEPS_MAX {
        let mut rig = begun(SMALL);
        let mut engine = rig.open().unwrap();
        rig.performed.clear();
        let token = begin(&mut rig, &mut engine, BLOCK_A);
        for _ in 0..steps {
            engine.step(&mut rig).unwrap();
        }
        let over = engine.answer(token).is_some();
        check(&mut rig, engine);
        if over {
            return;
        }
    }
    panic!("a write is not answered within {STEPS_MAX} steps");
}

/// The slot of a commit in doubt is its block's after a restart, as far as anybody knows: no other block is
/// written there, not even by a job that was on its way to a slot when the doubt came up.
#[test]
fn the_slot_of_a_commit_in_doubt_is_left_alone() {
    let mut last = false;
    for steps in 0..STEPS_MAX {
        let mut rig = begun(SMALL);
        let mut engine = rig.open().unwrap();
        rig.held_page = Some(0);
        let first = begin(&mut rig, &mut engine, BLOCK_A);
        engine.settle_but_for_held(&mut rig).unwrap();
        let second = begin(&mut rig, &mut engine, BLOCK_B);
        for _ in 0..steps {
            last = !engine.is_busy_but_for_held(&rig);
            engine.step(&mut rig).unwrap();
        }
        assert_eq!([first, second].map(|token| engine.answer(token)), [None; 2], "both wait for the first commit");
        rig.held_page = None;
        rig.bad_flushes = [0, 1];
        engine.settle(&mut rig).unwrap();
        assert_eq!(engine.answer(first), Some(Status::IoErr));
        drop(engine);
        rig.kill();
        let mut engine = reopened(&mut rig);
        for block in [BLOCK_A, BLOCK_B] {
            assert_old_or_new(&engine.read(&mut rig, block * BLOCK, BLOCK).expect("no sector is lost"), block);
        }
        assert_eq!(engine.read(&mut rig, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
        if last {
            return;
        }
    }
    panic!("the second write does not come to its commit");
}

/// Whatever a failed flush of the spare left in doubt is decided once the operator has looked and the spare is
/// in use again, also where the spare was dirty and the flush poisoned the volume.
#[test]
fn a_doubt_ends_with_the_poison_that_came_with_it() {
    let mut poisoned = 0;
    at_every_moment(|rig, mut engine| {
        begin(rig, &mut engine, MOVED);
        rig.bad_flushes = [0, 1];
        engine.settle(rig).unwrap();
        // Nobody may have wanted one until now.
        engine.flush(rig).unwrap();
        if engine.is_poisoned() {
            poisoned += 1;
            engine.done(rig, Order::Clear);
        }
        (0..3).for_each(|_| engine.pass(rig, 1).unwrap());
        assert_eq!(engine.status(rig).in_doubt, 0);
        for block in [BLOCK_A, BLOCK_B, MOVED] {
            assert_eq!(engine.write(rig, block * BLOCK, &new(block)), Ok(Status::Ok), "block {block}");
        }
        assert_eq!(engine.flush(rig), Ok(Status::Ok));
    });
    assert!(poisoned > 0, "some of them poison");
}

/// Where a block lives that is in doubt nobody knows, so a pass leaves it alone, and says so.
#[test]
fn a_pass_skips_a_block_in_doubt() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    rig.held_page = Some(0);
    let first = begin(&mut rig, &mut engine, BLOCK_A);
    engine.settle_but_for_held(&mut rig).unwrap();
    rig.held_page = None;
    // The spare answers nothing any more, so that the doubt stays.
    let spare = Bad { device: SPARE, from: 0, to: u64::MAX, reads: Reads::Never, writes: true };
    let block =
        Bad { device: PRIMARY, from: BLOCK_A * 4096, to: BLOCK_A * 4096 + 512, reads: Reads::Never, writes: true };
    rig.bad = vec![spare, block];
    engine.settle(&mut rig).unwrap();
    assert_eq!((engine.answer(first), engine.status(&mut rig).in_doubt), (Some(Status::IoErr), 1));
    let range = Some(range_of(BLOCK_A * BLOCK, 4096));
    engine.done(&mut rig, Order::Scan(ScanOrder::Start(ScanScope { range, check_only: false })));
    engine.pass(&mut rig, 1).unwrap();
    let status = engine.status(&mut rig);
    assert_eq!((status.scan.skipped_bytes, status.scan.found, status.pending), (4096, Found::default(), 0));
    assert!(status.scan.skipped[0].why.contains("in doubt"), "{:?}", status.scan.skipped);
}

/// A failed flush of the primary poisons the volume. A commit that has not begun by then is refused, so that
/// nothing is in doubt, and the spare stays in use.
#[test]
fn a_poisoned_volume_begins_no_commit() {
    let mut refused = 0;
    at_every_moment(|rig, mut engine| {
        rig.bad_flushes = [1, 0];
        engine.begin_flush(rig);
        while !engine.is_poisoned() {
            assert!(engine.step(rig).unwrap(), "a failed flush poisons");
        }
        let begun = rig.has_page_writes();
        engine.settle(rig).unwrap();
        let status = engine.status(rig);
        if !begun {
            refused += 1;
            assert!(status.mode.spare_up && status.in_doubt == 0, "{:?}", engine.causes("spare-down"));
        }
    });
    assert!(refused > 0, "some of them come too late");
}

/// F3: a commit that comes to its turn when the spare is down is refused before it does anything. Its flush would
/// fail, and be taken for one of the guest's data.
#[test]
fn a_commit_that_waited_until_the_spare_was_down_is_refused() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    let first = begin(&mut rig, &mut engine, BLOCK_A);
    assert_eq!(engine.await_answer(&mut rig, first), Ok(Status::Ok));
    // Its second homes are not up, for which the next commit waits; meanwhile the spare is dirty.
    rig.held_page = Some(0);
    let second = begin(&mut rig, &mut engine, BLOCK_B);
    engine.settle_but_for_held(&mut rig).unwrap();
    let third = begin(&mut rig, &mut engine, MOVED);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!([second, third].map(|token| engine.answer(token)), [None, Some(Status::Ok)]);
    let gone = Bad { device: SPARE, from: 0, to: u64::MAX, reads: Reads::Never, writes: true };
    rig.bad.push(gone);
    engine.begin_read(&mut rig, MOVED * BLOCK, BLOCK);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!(engine.causes("spare-down").len(), 1);
    // It works again, and nobody has asked it yet.
    rig.bad.retain(|bad| *bad != gone);
    rig.held_page = None;
    engine.settle(&mut rig).unwrap();
    assert_eq!(engine.answer(second), Some(Status::IoErr));
    assert!(!engine.is_poisoned());
}

/// F3: a write that comes to its turn when the spare is down writes nothing to its slot. Its flush would fail, and
/// be taken for one of the guest's data.
#[test]
fn a_write_that_waited_until_the_spare_was_down_does_not_touch_its_slot() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    let slot = rig.shape.layout().slots_start;
    rig.bad = vec![Bad { device: SPARE, from: slot, to: slot + 512, reads: Reads::Good, writes: true }];
    // It fails, and the healer waits for the other one before it tries again.
    let first = engine.begin_write(&mut rig, MOVED * BLOCK, &pattern(MOVED * BLOCK, 1, 2));
    rig.held = Some((SPARE, slot + 7 * 512));
    let second = engine.begin_write(&mut rig, MOVED * BLOCK + 7, &pattern(MOVED * BLOCK + 7, 1, 2));
    engine.settle_but_for_held(&mut rig).unwrap();
    // What the first one may have written is flushed. A spare that is clean goes down when it fails to flush.
    let flush = engine.begin_flush(&mut rig);
    assert_eq!(engine.await_answer(&mut rig, flush), Ok(Status::Ok));
    rig.bad_flushes = [0, 1];
    engine.begin_order(&mut rig, Order::Save);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!(engine.causes("spare-down").len(), 1);
    assert_eq!([first, second].map(|token| engine.answer(token)), [None; 2]);
    (rig.held, rig.bad) = (None, Vec::new());
    rig.performed.clear();
    engine.settle(&mut rig).unwrap();
    assert_eq!([first, second].map(|token| engine.answer(token)), [Some(Status::IoErr); 2]);
    let slots = rig.performed.iter().filter(|op| op.kind == OpKind::Write && op.offset == slot);
    assert_eq!((slots.count(), engine.is_poisoned()), (0, false));
}

/// W8: a spare that comes back while pages of it are still being written is compared when they have been.
#[test]
fn a_spare_that_is_back_is_not_used_before_its_pages_are_written() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    let token = begin(&mut rig, &mut engine, BLOCK_A);
    assert_eq!(engine.await_answer(&mut rig, token), Ok(Status::Ok));
    // The second homes of that commit.
    rig.held_page = Some(0);
    rig.bad_flushes = [0, 1];
    engine.begin_order(&mut rig, Order::Save);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!(engine.causes("spare-down").len(), 1);
    for _ in 0..3 {
        engine.tick(&mut rig, 1);
        engine.settle_but_for_held(&mut rig).unwrap();
    }
    assert_eq!(engine.causes("spare-back"), [] as [&str; 0]);
    rig.held_page = None;
    engine.settle(&mut rig).unwrap();
    (0..3).for_each(|_| engine.pass(&mut rig, 1).unwrap());
    assert_eq!(engine.causes("spare-back").len(), 1);
}

/// F2: a spare that comes back is written and flushed when the flush that was under way as it went has ended, which
/// drops what it finds if it fails: the next one would vouch for that.
#[test]
fn a_spare_that_is_back_waits_for_a_flush_that_is_under_way() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    rig.performed.clear();
    rig.held_flush = Some(SPARE);
    engine.begin_order(&mut rig, Order::Save);
    engine.settle_but_for_held(&mut rig).unwrap();
    engine.begin_order(&mut rig, Order::Release(range_of(MOVED * BLOCK, 4096)));
    while !rig.has_page_writes() {
        engine.step(&mut rig).unwrap();
    }
    rig.bad = vec![Bad { device: SPARE, from: 0, to: u64::MAX, reads: Reads::Never, writes: true }];
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!((engine.causes("spare-down").len(), engine.causes("in-doubt").len()), (1, 1));
    rig.bad.clear();
    rig.performed.clear();
    for _ in 0..3 {
        engine.tick(&mut rig, 1);
        engine.settle_but_for_held(&mut rig).unwrap();
    }
    assert!(!rig.has_page_writes() && engine.causes("spare-back").is_empty());
    rig.held_flush = None;
    engine.settle(&mut rig).unwrap();
    (0..3).for_each(|_| engine.pass(&mut rig, 1).unwrap());
    assert_eq!(engine.causes("spare-back").len(), 1);
}

/// F2: nobody vouches for a write that was under way when a flush failed: of the shard's own, or of the healer's,
/// which fills up a block of 4096 bytes.
#[test]
fn a_write_that_ends_after_a_failed_flush_is_not_answered_as_done() {
    for logical_block in [512, 4096] {
        let mut rig = Rig::new(SMALL);
        let mut params = SMALL.create_params();
        (params.primary.logical_block, params.spare.logical_block) = (logical_block, logical_block);
        rig.create_as(params).unwrap().unwrap();
        let mut engine = rig.open().unwrap();
        rig.held = Some((PRIMARY, 5 * 4096));
        let token = engine.begin_write(&mut rig, 5 * BLOCK, &pattern(5 * BLOCK, 4, 1));
        engine.settle_but_for_held(&mut rig).unwrap();
        rig.bad_flushes = [1, 0];
        engine.begin_flush(&mut rig);
        engine.settle_but_for_held(&mut rig).unwrap();
        assert_eq!((engine.is_poisoned(), engine.answer(token)), (true, None));
        rig.held = None;
        engine.settle(&mut rig).unwrap();
        assert_eq!(engine.answer(token), Some(Status::IoErr), "blocks of {logical_block}");
    }
}
