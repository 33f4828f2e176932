//! A flush of the spare fails and drops what was written into slots by work that is not done yet. The spare comes
//! back before that is, and the next flush succeeds: it does not vouch for what is gone (F3).

use vhost_remap::device::DeviceIndex;
use vhost_remap::device::memory::Keep;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::{Status, Token};

use crate::commits::{BLOCK_A, MOVED, SMALL, bad_block, begun, reopened};
use crate::engine::Engine;
use crate::rig::{BLOCK, PRIMARY, Rig, SPARE, pattern};

/// Everything of the write is done but that of one byte, when a flush of the spare fails; it is done when the spare
/// is back.
fn write_over_failed_flush(rig: &mut Rig, engine: &mut Engine, block: u64, held: (DeviceIndex, u64)) -> Token {
    rig.held = Some(held);
    let data = pattern(block * BLOCK, 3 * BLOCK, 2);
    let token = engine.begin_write(rig, block * BLOCK, &data);
    engine.settle_but_for_held(rig).unwrap();
    assert_eq!(engine.answer(token), None);
    rig.bad_flushes = [0, 1];
    engine.begin_order(rig, Order::Save);
    engine.settle_but_for_held(rig).unwrap();
    assert_eq!((engine.causes("spare-down").len(), engine.causes("poisoned").len()), (1, 0));
    for _ in 0..3 {
        engine.tick(rig, 1);
        engine.settle_but_for_held(rig).unwrap();
    }
    assert_eq!(engine.causes("spare-back").len(), 1);
    assert_eq!(engine.answer(token), None);
    rig.held = None;
    engine.settle(rig).unwrap();
    token
}

/// What was answered as done and flushed outlives the power.
fn check(mut rig: Rig, mut engine: Engine, block: u64, token: Token) {
    let answers = (engine.answer(token).expect("settled"), engine.flush(&mut rig));
    drop(engine);
    rig.crash(|_, _| Keep::Drop);
    let mut engine = reopened(&mut rig);
    let found = engine.read(&mut rig, block * BLOCK, 3 * BLOCK).expect("no sector is lost");
    let done = answers == (Status::Ok, Ok(Status::Ok));
    assert!(!done || found == pattern(block * BLOCK, 3 * BLOCK, 2), "a write that was answered as done is gone");
}

#[test]
fn blocks_on_their_way_to_slots_do_not_rely_on_a_flush_that_failed_meanwhile() {
    let mut rig = begun(SMALL);
    rig.bad = (BLOCK_A..BLOCK_A + 3).map(bad_block).collect();
    let mut engine = rig.open().unwrap();
    let third_slot = rig.shape.layout().slots_start + 3 * 4096;
    let token = write_over_failed_flush(&mut rig, &mut engine, BLOCK_A, (SPARE, third_slot));
    check(rig, engine, BLOCK_A, token);
}

/// Of a write over blocks of both devices the slot's part is done first.
#[test]
fn a_write_to_a_slot_does_not_rely_on_a_flush_that_failed_while_it_was_under_way() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    let token = write_over_failed_flush(&mut rig, &mut engine, MOVED, (PRIMARY, (MOVED + 1) * 4096));
    check(rig, engine, MOVED, token);
}
