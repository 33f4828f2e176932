//! What happens beside a failed flush of the primary: who is told when, and what is written no more (F2).

use vhost_remap::device::OpKind;
use vhost_remap::engine::healer::{Order, Reply};
use vhost_remap::engine::request::Status;

use crate::commits::{MOVED, SMALL, bad_block, begun, new};
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, pattern, range_of};

/// Its read has failed, and its next write is verified.
const PENDING: u64 = 5;
/// Nothing ever happened to it.
const PLAIN: u64 = 7;

fn with_pending_block() -> (Rig, Engine) {
    let mut rig = begun(SMALL);
    rig.bad = vec![Bad { reads: Reads::UntilWritten, writes: false, ..bad_block(PENDING) }];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, PENDING * BLOCK, BLOCK), None);
    rig.performed.clear();
    (rig, engine)
}

fn poison(rig: &mut Rig, engine: &mut Engine) {
    rig.bad_flushes = [1, 0];
    engine.begin_flush(rig);
    engine.settle_but_for_held(rig).unwrap();
    assert!(engine.is_poisoned());
}

fn writes_of(rig: &Rig, block: u64) -> usize {
    let there = rig.performed.iter().filter(|op| op.device == PRIMARY && op.kind == OpKind::Write);
    there.filter(|op| (op.offset..op.offset + op.len).contains(&(block * 4096))).count()
}

/// The flush of one device fails while the note of the other one's failure is being written: who waited for it is
/// told when the note is there, as everybody is.
#[test]
fn nobody_is_told_of_a_failed_flush_before_the_note_of_it_is_written() {
    let (mut rig, mut engine) = with_pending_block();
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &new(MOVED)), Ok(Status::Ok));
    rig.held_flush = Some(PRIMARY);
    let write = engine.begin_write(&mut rig, PENDING * BLOCK, &new(PENDING));
    engine.settle_but_for_held(&mut rig).unwrap();
    rig.bad_flushes = [1, 1];
    let flush = engine.begin_flush(&mut rig);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!((engine.is_poisoned(), engine.causes("poisoned").len()), (true, 0), "the label's note waits");
    assert_eq!([write, flush].map(|token| engine.answer(token)), [None; 2]);
    rig.held_flush = None;
    assert_eq!(engine.await_answer(&mut rig, write), Ok(Status::IoErr));
    assert_eq!(engine.causes("poisoned").len(), 1);
    assert_eq!(engine.await_answer(&mut rig, flush), Ok(Status::IoErr));
}

/// A flush of the spare that fails drops what it finds. The note of another failure is not there to be found.
#[test]
fn the_note_of_a_failed_flush_is_written_when_no_flush_of_its_device_is_under_way() {
    let (mut rig, mut engine) = with_pending_block();
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &new(MOVED)), Ok(Status::Ok));
    rig.performed.clear();
    rig.held_flush = Some(SPARE);
    rig.bad_flushes = [1, 1];
    let flush = engine.begin_flush(&mut rig);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert!(engine.is_poisoned());
    assert!(rig.performed.iter().all(|op| op.device == PRIMARY), "{:?}", rig.performed);
    rig.held_flush = None;
    assert_eq!(engine.await_answer(&mut rig, flush), Ok(Status::IoErr));
    assert_eq!(engine.causes("poisoned").len(), 1);
}

/// Of what is written after the note, its list of regions says nothing.
#[test]
fn a_write_that_waited_at_the_healer_when_the_volume_was_poisoned_is_not_begun() {
    let (mut rig, mut engine) = with_pending_block();
    rig.held = Some((PRIMARY, PENDING * 4096));
    // The second one is behind the first one's fence.
    let tokens = [1, 2].map(|_| engine.begin_write(&mut rig, PENDING * BLOCK, &new(PENDING)));
    engine.settle_but_for_held(&mut rig).unwrap();
    poison(&mut rig, &mut engine);
    rig.held = None;
    engine.settle(&mut rig).unwrap();
    assert_eq!(tokens.map(|token| engine.answer(token)), [Some(Status::IoErr); 2]);
    assert_eq!(writes_of(&rig, PENDING), 1, "that of the first, which was under way");
}

#[test]
fn a_write_that_was_parked_at_a_fence_when_the_volume_was_poisoned_is_not_begun() {
    let (mut rig, mut engine) = with_pending_block();
    let slot = rig.shape.layout().slots_start + 4096;
    rig.held = Some((SPARE, slot));
    let order = engine.begin_order(&mut rig, Order::Remap(range_of(PLAIN * BLOCK, 4096)));
    engine.settle_but_for_held(&mut rig).unwrap();
    let token = engine.begin_write(&mut rig, PLAIN * BLOCK, &new(PLAIN));
    engine.settle_but_for_held(&mut rig).unwrap();
    poison(&mut rig, &mut engine);
    assert!(!engine.is_answered(order) && engine.answer(token).is_none());
    rig.held = None;
    engine.settle(&mut rig).unwrap();
    assert_eq!((engine.answer(token), writes_of(&rig, PLAIN)), (Some(Status::IoErr), 0));
}

/// F2: a volume that grows beyond 16 GiB has larger regions; those written before are among them.
/// Each of two orders was given by somebody who had seen the same note. A flush for the second one could fail, and drop
/// what was written after the first, without anybody to be told.
#[test]
fn a_clearing_is_for_the_note_that_was_seen() {
    let (mut rig, mut engine) = with_pending_block();
    poison(&mut rig, &mut engine);
    rig.performed.clear();
    let orders = [0; 2].map(|_| engine.begin_order(&mut rig, Order::Clear));
    engine.settle(&mut rig).unwrap();
    let answers = orders.map(|order| matches!(engine.reply(order), Some(Reply::Done(Ok(_)))));
    assert_eq!((answers, engine.is_poisoned()), ([true, false], false));
    let flushes = rig.performed.iter().filter(|op| op.kind == OpKind::Flush);
    assert_eq!(flushes.count(), 4, "before and after the note, on both devices");
    let Some(Reply::Done(Err(refusal))) = engine.reply(orders[1]) else { panic!("the second is answered") };
    assert!(refusal.starts_with("what is to be cleared has changed"), "{refusal}");
}

#[test]
fn what_was_written_is_known_while_a_volume_grows() {
    let shape = Shape { capacity: (1 << 25) - 8, max_remaps: 16, labelled: false };
    let mut rig = Rig::new(shape);
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    let written = [2048 * 5, 2048 * 16_383];
    for sector in written {
        assert_eq!(engine.write(&mut rig, sector, &pattern(sector, 8, 1)), Ok(Status::Ok));
    }
    let grown = Shape { capacity: 1 << 26, ..shape };
    rig.disks.extend(PRIMARY, grown.sizes()[0]);
    let order = Order::Resize { capacity: grown.capacity, primary_size: grown.sizes()[0] };
    assert!(matches!(engine.order(&mut rig, order).unwrap(), Reply::Resized(Ok(_))));
    let last = grown.capacity - 8;
    assert_eq!(engine.write(&mut rig, last, &pattern(last, 8, 1)), Ok(Status::Ok));
    rig.bad_flushes = [1, 0];
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    let ranges = engine.status(&mut rig).poison.expect("poisoned").ranges;
    let region = |sector: u64| (sector >> 13 << 13, 1 << 13);
    assert_eq!(ranges, [region(written[0]), region(written[1]), region(last)]);
}
