//! What is done to a block that fails, and what is not: a device that goes fails everything, and a slot that
//! failed is not given out again.

use vhost_remap::device::OpKind;
use vhost_remap::engine::healer::{Order, Reply};
use vhost_remap::engine::request::Status;

use crate::commits::{BLOCK_A, BLOCK_B, MOVED, SMALL, bad_block, begun, new, old};
use crate::crash::at_every_operation;
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, pattern, range_of};
use crate::seat::{Kind, is_whole, seats};

const GONE: Bad = Bad { device: PRIMARY, from: 0, to: u64::MAX, reads: Reads::Never, writes: true };

fn bad_slot(rig: &Rig, slot: u64) -> Bad {
    let from = rig.shape.layout().slots_start + slot * 4096;
    Bad { device: SPARE, from, to: from + 4096, reads: Reads::Good, writes: true }
}

/// A block whose reads fail until it is written.
fn unreadable(block: u64) -> Bad {
    Bad { reads: Reads::UntilWritten, writes: false, ..bad_block(block) }
}

fn pass_seconds(rig: &mut Rig, engine: &mut Engine, seconds: u64) {
    (0..seconds).for_each(|_| engine.pass(rig, 1).unwrap());
}

/// E1: whatever it answers, nothing is pending for a device that goes in the middle of a read, a moment after
/// it was seen to be there.
#[test]
fn nothing_is_pending_for_a_device_that_goes_during_a_read() {
    for steps in 0.. {
        let mut rig = begun(SMALL);
        rig.bad = vec![unreadable(5)];
        let mut engine = rig.open().unwrap();
        // A probe passes for this one.
        assert_eq!(engine.read(&mut rig, 5 * BLOCK, BLOCK), None);
        rig.bad.push(unreadable(7));
        let token = engine.begin_read(&mut rig, 7 * BLOCK, BLOCK);
        for _ in 0..steps {
            engine.step(&mut rig).unwrap();
        }
        let known = engine.causes("read-error").len();
        let over = engine.answer(token).is_some();
        rig.bad.push(GONE);
        engine.settle(&mut rig).unwrap();
        assert_eq!(engine.causes("read-error").len(), known, "after {steps} steps");
        if over {
            break;
        }
    }
}

/// E1: nor does a block move because the device went; unless that was decided already.
#[test]
fn no_block_moves_for_a_device_that_goes_during_a_write() {
    for steps in 0.. {
        let mut rig = begun(SMALL);
        let mut engine = rig.open().unwrap();
        rig.performed.clear();
        let token = engine.begin_write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A));
        for _ in 0..steps {
            engine.step(&mut rig).unwrap();
        }
        let over = engine.answer(token).is_some();
        let moving = rig.has_slot_writes();
        rig.bad.push(GONE);
        engine.settle(&mut rig).unwrap();
        let moved = engine.map().iter().any(|entry| entry.0 == BLOCK_A);
        assert!(!moved || moving, "after {steps} steps");
        let status = engine.status(&mut rig);
        assert!(status.retired == 0 && status.mode.spare_up, "after {steps} steps");
        if over {
            break;
        }
    }
}

/// E1: a spare that goes fails writes to slots. None of them is retired for that.
#[test]
fn no_slot_is_retired_for_a_spare_that_goes() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    let all = Bad { device: SPARE, ..GONE };
    rig.bad.push(all);
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::IoErr));
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &new(MOVED)), Ok(Status::IoErr));
    assert!(!engine.status(&mut rig).mode.spare_up);
    let attempts = rig.performed.len();
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &new(MOVED)), Ok(Status::IoErr));
    assert_eq!(rig.performed.len(), attempts, "nothing is asked of a spare that is down");
    rig.bad.retain(|bad| *bad != all);
    pass_seconds(&mut rig, &mut engine, 3);
    assert_eq!(engine.status(&mut rig).retired, 0);
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &new(MOVED)), Ok(Status::Ok));
}

/// E1: writes that fail all over the disk without one success are the device's, whatever the probe says.
#[test]
fn a_storm_of_failed_writes_trips_the_breaker() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    rig.bad = vec![Bad { reads: Reads::Good, ..GONE }];
    let blocks = (0..40).map(|n| n * 67 % 256);
    for block in blocks {
        let _ = engine.write(&mut rig, block * BLOCK, &pattern(block * BLOCK, BLOCK, 5)).unwrap();
    }
    assert_eq!(engine.causes("device-gone").len(), 1);
}

/// E1: nothing but its probe is sent to a device that is gone.
#[test]
fn a_primary_that_is_gone_is_left_alone() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    rig.bad.push(GONE);
    assert_eq!(engine.write(&mut rig, 5 * BLOCK, &pattern(5 * BLOCK, BLOCK, 5)), Ok(Status::IoErr));
    assert_eq!(engine.causes("device-gone").len(), 1);
    rig.performed.clear();
    assert_eq!(engine.write(&mut rig, 5 * BLOCK, &pattern(5 * BLOCK, BLOCK, 6)), Ok(Status::IoErr));
    assert_eq!(engine.read(&mut rig, 6 * BLOCK, BLOCK), None);
    assert!(rig.performed.is_empty(), "{:?}", rig.performed);
}

/// W1: one rewrite in place, and no second one.
#[test]
fn a_block_that_fails_a_read_again_after_a_rewrite_moves() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    for (write, moves) in [(7, false), (8, true)] {
        rig.bad = vec![unreadable(5)];
        assert_eq!(engine.read(&mut rig, 5 * BLOCK, BLOCK), None);
        assert_eq!(engine.write(&mut rig, 5 * BLOCK, &pattern(5 * BLOCK, BLOCK, write)), Ok(Status::Ok));
        assert_eq!(engine.map().iter().any(|entry| entry.0 == 5), moves, "write {write}");
    }
    assert_eq!(engine.read(&mut rig, 5 * BLOCK, BLOCK), Some(pattern(5 * BLOCK, BLOCK, 8)));
}

/// W6: what a discard drops is not what is pending or remapped.
#[test]
fn a_discard_passes_over_blocks_that_are_not_plain() {
    let mut rig = begun(SMALL);
    rig.bad = vec![unreadable(5)];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, 5 * BLOCK, BLOCK), None);
    rig.performed.clear();
    engine.discard(&mut rig, 4 * BLOCK, 20 * BLOCK);
    let discarded: Vec<(u64, u64)> = rig
        .performed
        .iter()
        .filter(|op| op.kind == OpKind::Discard)
        .map(|op| (op.offset / 4096, (op.offset + op.len) / 4096))
        .collect();
    assert_eq!(discarded, [(4, 5), (6, MOVED), (MOVED + 1, 24)]);
}

/// R1, R4: a read error marks nothing lost, not even by order; and what is lost is not released.
#[test]
fn orders_lose_nothing_and_release_nothing_that_is_lost() {
    let mut rig = begun(SMALL);
    let sector = Bad { device: PRIMARY, from: 5 * 4096, to: 5 * 4096 + 512, reads: Reads::Never, writes: true };
    rig.bad = vec![sector];
    let mut engine = rig.open().unwrap();
    let refused = |engine: &mut Engine, rig: &mut Rig, order| match engine.order(rig, order).unwrap() {
        Reply::Done(Err(why)) => why,
        reply => panic!("{reply:?}"),
    };
    let why = refused(&mut engine, &mut rig, Order::Remap(range_of(5 * BLOCK, 4096)));
    assert!(why.contains("rewrite it first"), "{why}");
    assert_eq!(engine.map().len(), 1);
    // A part of the block is written, which fails in place, so that it moves without the bad sector.
    rig.bad.push(bad_block(5));
    assert_eq!(engine.write(&mut rig, 5 * BLOCK + 4, &pattern(5 * BLOCK + 4, 4, 3)), Ok(Status::Ok));
    assert_eq!(engine.status(&mut rig).lost_sectors, 1);
    rig.bad = vec![sector];
    let why = refused(&mut engine, &mut rig, Order::Release(range_of(5 * BLOCK, 4096)));
    assert!(why.contains("lost"), "{why}");
    // A poisoned volume takes no orders.
    rig.bad_flushes = [1, 0];
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    rig.performed.clear();
    for order in [Order::Remap(range_of(6 * BLOCK, 4096)), Order::Release(range_of(MOVED * BLOCK, 4096))] {
        let why = refused(&mut engine, &mut rig, order);
        assert!(why.contains("`clear` first"), "{why}");
    }
    assert!(rig.performed.is_empty());
}

/// E3: a slot that failed is retired in the end, though the move it failed came to nothing and nothing could be
/// committed then: when the spare is back, or the poison that came with it is cleared.
#[test]
fn a_slot_that_failed_is_retired_when_the_trouble_is_over() {
    for dirty in [false, true] {
        let mut rig = begun(SMALL);
        let mut engine = rig.open().unwrap();
        if dirty {
            assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &new(MOVED)), Ok(Status::Ok));
        }
        rig.bad.push(bad_slot(&rig, 1));
        rig.bad_flushes = [0, 1];
        assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::IoErr));
        assert_eq!((engine.is_poisoned(), engine.status(&mut rig).retired), (dirty, 0));
        if dirty {
            engine.done(&mut rig, Order::Clear);
        }
        pass_seconds(&mut rig, &mut engine, 3);
        assert_eq!(engine.status(&mut rig).retired, 1, "dirty: {dirty}");
        assert_eq!(engine.write(&mut rig, BLOCK_B * BLOCK, &new(BLOCK_B)), Ok(Status::Ok));
    }
}

/// F3: a flush of the spare that fails while nothing on it is unflushed costs the spare, and nothing else.
#[test]
fn a_failed_flush_of_a_clean_spare_takes_it_down() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    rig.bad_flushes = [0, 1];
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::IoErr));
    let status = engine.status(&mut rig);
    assert!(!status.mode.spare_up && !status.mode.poisoned, "{:?}", status.mode);
    assert_eq!(engine.read(&mut rig, BLOCK_B * BLOCK, BLOCK), Some(old(BLOCK_B)));
    // Nor is such a volume closed cleanly: nothing is written there.
    rig.performed.clear();
    assert!(matches!(engine.close(&mut rig), Ok(Err(_))));
    assert!(rig.performed.iter().all(|op| op.device == PRIMARY), "a spare that is down is left alone");
}

/// F2: a clearing of which every flush fails may have landed all the same: a restart does not go by it. One
/// that a single copy did not take counts.
#[test]
fn a_clearing_counts_when_a_device_took_it_and_only_then() {
    for taken in [false, true] {
        let mut rig = begun(SMALL);
        rig.bad.clear();
        let mut engine = rig.open().unwrap();
        rig.bad_flushes = [1, 0];
        assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
        rig.performed.clear();
        let label = rig.shape.label().expect("labelled").poison();
        if taken {
            rig.bad.push(Bad { device: PRIMARY, from: label, to: label + 4096, reads: Reads::Good, writes: true });
        }
        let order = engine.begin_order(&mut rig, Order::Clear);
        let flushes = |rig: &Rig| rig.performed.iter().filter(|op| op.kind == OpKind::Flush).count();
        while !taken && flushes(&rig) < 2 {
            engine.step(&mut rig).unwrap();
        }
        rig.bad_flushes = if taken { [0, 0] } else { [1, 1] };
        engine.settle(&mut rig).unwrap();
        assert!(engine.is_answered(order));
        assert_eq!(engine.is_poisoned(), !taken);
        drop(engine);
        rig.kill();
        rig.bad.clear();
        assert_eq!(rig.open().unwrap().is_poisoned(), !taken, "after a restart");
    }
}

/// P1: while counters are saved, the power leaves those of one place whole.
#[test]
fn counters_are_whole_in_one_place_while_those_of_the_other_are_saved() {
    let mut base = begun(SMALL);
    base.bad.clear();
    let mut engine = base.open().unwrap();
    engine.done(&mut base, Order::Save);
    drop(engine);
    base.kill();
    let save = |rig: &mut Rig, _: &mut ()| {
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        engine.pass(rig, 0)?;
        engine.order(rig, Order::Save).map(drop)
    };
    at_every_operation(&base, save, |after, ()| {
        let counters = seats(&after.shape).into_iter().filter(|seat| seat.kind == Kind::Counters);
        assert!(counters.into_iter().any(|seat| is_whole(&seat, &seat.read(&after))));
    });
}
