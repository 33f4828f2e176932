//! The label of the primary, which is all there is when the spare is lost: its list is whole or nobody goes by it,
//! it belongs to the volume, and a note of poison in it counts.

use uuid::Uuid;
use vhost_remap::device::OpKind;
use vhost_remap::device::memory::Keep;
use vhost_remap::engine::create::{CreateParams, Creation};
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::Status;
use vhost_remap::units::{Sector, SectorRange};
use vhost_remap::volume::layout::Place;

use crate::commits::{SMALL, begun};
use crate::crash::at_every_operation;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, pattern, range_of};
use crate::scan_gone::gone;

/// Also when the copy of the label's superblock that was written last cannot be read afterwards.
#[test]
fn an_interrupted_stamp_leaves_a_whole_list_or_none_to_go_by() {
    let mut rig = Rig::new(Shape { capacity: 8192, max_remaps: 600, labelled: true });
    rig.create().unwrap().unwrap();
    let blocks = |from: u64, count: u64| SectorRange { start: Sector(from * BLOCK), count: count * BLOCK };
    let mut engine = rig.open().unwrap();
    // More than one page of the table has entries for.
    engine.done(&mut rig, Order::Remap(blocks(0, 515)));
    engine.done(&mut rig, Order::Save);
    let before = engine.map();
    engine.done(&mut rig, Order::Remap(blocks(600, 1)));
    engine.done(&mut rig, Order::Release(blocks(3, 1)));
    let after = engine.map();
    drop(engine);
    rig.crash(|_, _| Keep::Keep);
    let stamp = |rig: &mut Rig, done: &mut bool| {
        let mut engine = rig.try_open(rig.open_params())?.expect("nothing is damaged");
        engine.pass(rig, 0)?;
        *done = true;
        Ok(())
    };
    let label = rig.shape.label().expect("labelled");
    let (mut old, mut new, mut refused) = (0, 0, 0);
    at_every_operation(&rig, stamp, |cut, done| {
        for lost in [None, Some(0), Some(1)] {
            let mut rig = cut.fork();
            if let Some(copy) = lost {
                rig.disks.poke(PRIMARY, label.superblock(copy) + 100, b"damage");
            }
            match rig.open_degraded().map(|engine| engine.map()) {
                Ok(map) if map == before => old += 1,
                Ok(map) if map == after => new += 1,
                Ok(_) => panic!("half a list was gone by"),
                Err(error) => {
                    refused += 1;
                    assert!(!done || lost.is_some(), "{error}");
                }
            }
            rig.kill();
        }
    });
    println!("{old} times the old list, {new} times the new one, {refused} times none");
    assert!(old > 0 && new > 0 && refused > 0);
}

/// Without its spare nobody could tell that the label is not the new volume's.
#[test]
fn an_interrupted_adoption_leaves_no_new_volume_beside_an_old_label() {
    let mut old = Rig::new(SMALL);
    old.create().unwrap().unwrap();
    let adopt = |rig: &mut Rig, done: &mut bool| {
        let label = rig.find_label()?.expect("made by us");
        assert_eq!((label.set, label.remapped), (SMALL.create_params().set, Some(0)));
        let params = SMALL.create_params();
        let capacity = params.primary.size / 512;
        let params = CreateParams { set: Uuid::from_u128(2), labelled: false, capacity, ..params };
        rig.make(Creation::replacing(params, label))?.expect("healthy disks take a volume");
        *done = true;
        Ok(())
    };
    let (mut untouched, mut neither, mut adopted) = (0, 0, 0);
    at_every_operation(&old, adopt, |mut after, done| {
        let labelled = after.find_label().unwrap().is_some();
        let opened = after.try_open(after.open_params()).unwrap().is_ok();
        after.kill();
        assert!(opened || !done);
        match (labelled, opened) {
            (false, true) => adopted += 1,
            (false, false) => neither += 1,
            (true, false) => untouched += 1,
            // The old volume, of which nothing is gone yet.
            (true, true) => {
                assert_eq!(
                    after.peek(SPARE, 40, 16),
                    SMALL.create_params().set.as_bytes(),
                    "a new volume beside an old label"
                );
                untouched += 1;
            }
        }
    });
    println!("{untouched} before, {neither} between, {adopted} after");
    assert!(untouched > 0 && neither > 0 && adopted > 0);
}

/// F2: the label alone took the note, as when the spare has gone, and is damaged before anybody reads it.
#[test]
fn a_note_that_only_the_label_had_is_not_forgotten_with_it() {
    for lost in [false, true] {
        let mut rig = begun(SMALL);
        rig.bad.clear();
        let mut engine = rig.open().unwrap();
        engine.done(&mut rig, Order::Remap(range_of(50 * BLOCK, 4096)));
        assert_eq!(engine.write(&mut rig, 50 * BLOCK, &pattern(50 * BLOCK, BLOCK, 9)), Ok(Status::Ok));
        let layout = rig.shape.layout();
        rig.bad = Place::ALL.map(|place| bad_page(layout.poison(place))).into();
        rig.bad_flushes = [0, 1];
        assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
        drop(engine);
        rig.kill();
        rig.bad.clear();
        let label = rig.shape.label().expect("labelled").poison();
        if lost {
            rig.disks.poke(PRIMARY, label, b"damage");
        }
        let mut engine = rig.open().unwrap();
        assert!(engine.is_poisoned(), "the note is forgotten");
        assert_eq!(engine.causes("poisoned").len(), usize::from(lost));
        // Once the operator has looked and the volume was closed, that page may say what it wants.
        engine.done(&mut rig, Order::Clear);
        assert_eq!(engine.close(&mut rig), Ok(Ok(())));
        drop(engine);
        rig.kill();
        rig.disks.poke(PRIMARY, label, b"damage");
        assert!(!rig.open().unwrap().is_poisoned());
        rig.kill();
    }
}

/// A page of the spare that takes no writes.
fn bad_page(offset: u64) -> Bad {
    Bad { device: SPARE, from: offset, to: offset + 4096, reads: Reads::Good, writes: true }
}

/// Whose flush would fail, and poison the volume: with that a guest that only had to wait would get errors. The guest
/// finds out about it before a write of the label ends, which then succeeds, or nobody does.
#[test]
fn the_label_of_a_device_that_goes_is_left_alone() {
    for (is_known, operations) in [false, true].into_iter().flat_map(|known| (0..25).map(move |n| (known, n))) {
        let mut rig = begun(SMALL);
        rig.bad.clear();
        let mut engine = rig.open().unwrap();
        engine.done(&mut rig, Order::Remap(range_of(0, 4096)));
        rig.performed.clear();
        engine.tick(&mut rig, 60);
        while rig.performed.len() < operations && engine.step(&mut rig).unwrap() {}
        let Some(next) = rig.next_op().map(|at| rig.disks.pending(at)) else {
            assert!(operations > 12, "{operations}");
            continue;
        };
        // A flush that is under way then fails as any other does.
        if next.kind == OpKind::Flush || next.device != PRIMARY || (is_known && next.kind != OpKind::Write) {
            continue;
        }
        rig.bad = gone();
        rig.bad_flushes[0] = u32::MAX;
        if is_known {
            rig.held = Some((PRIMARY, next.offset));
            engine.begin_read(&mut rig, 100 * BLOCK, BLOCK);
            engine.settle_but_for_held(&mut rig).unwrap();
            assert_eq!(engine.causes("device-gone").len(), 1);
            (rig.held, rig.bad) = (None, Vec::new());
        }
        engine.settle(&mut rig).unwrap();
        assert!(!engine.is_poisoned(), "known {is_known}, after {operations} operations");
        (rig.bad_flushes[0], rig.bad) = (0, Vec::new());
        for _ in 0..3 {
            engine.pass(&mut rig, 60).unwrap();
        }
        assert_eq!((engine.is_poisoned(), engine.causes("label-failed").len()), (false, 0));
        let map = engine.map();
        drop(engine);
        rig.kill();
        assert_eq!(rig.open_degraded().unwrap().map(), map, "after {operations} operations");
    }
}

#[test]
fn a_label_that_takes_no_writes_is_told_of_once() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let label = rig.shape.label().expect("labelled");
    let mut engine = rig.open().unwrap();
    rig.bad = vec![Bad { device: PRIMARY, from: label.start, to: label.end(), reads: Reads::Good, writes: true }];
    for block in 0..3 {
        engine.done(&mut rig, Order::Remap(range_of(block * BLOCK, 4096)));
        engine.pass(&mut rig, 60).unwrap();
    }
    assert_eq!(engine.causes("label-failed").len(), 1);
    rig.bad.clear();
    engine.pass(&mut rig, 60).unwrap();
    let map = engine.map();
    drop(engine);
    rig.kill();
    assert_eq!(rig.open_degraded().unwrap().map(), map);
}

/// As when a disk resets itself for a sector of it.
#[test]
fn a_label_that_takes_its_device_away_is_left_alone_after_some_times() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let label = rig.shape.label().expect("labelled");
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(0, 4096)));
    for _ in 0..8 {
        engine.tick(&mut rig, 60);
        rig.performed.clear();
        let touches =
            |rig: &Rig| rig.performed.last().is_some_and(|op| op.device == PRIMARY && op.offset == label.superblock(0));
        while !touches(&rig) && engine.step(&mut rig).unwrap() {}
        if touches(&rig) {
            rig.bad = gone();
            engine.settle(&mut rig).unwrap();
            rig.bad.clear();
        }
        engine.settle(&mut rig).unwrap();
    }
    assert_eq!(engine.causes("device-gone").len(), 3);
    assert_eq!(engine.causes("label-failed").len(), 1, "{:?}", engine.events);
    assert!(!engine.is_poisoned());
}
