//! A resize that does not come to its end, since a device does not take it, or the volume is closed: what is there
//! opens, and nothing is lost.

use vhost_remap::device::OpKind;
use vhost_remap::device::memory::{Keep, Pending};
use vhost_remap::engine::healer::{Order, Reply};
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::Place;
use vhost_remap::volume::superblock::CloseStamp;

use crate::commits::{MOVED, SMALL, old};
use crate::crash::at_every_operation;
use crate::resize::{GROWN, Progress, base, check_old_data, check_resized, extend, resize, shapes};
use crate::rig::{BLOCK, Bad, MTIME, PRIMARY, Reads, Rig, SPARE, Shape, pattern};

/// Any one operation of the spare fails, once or with all that follow.
#[test]
fn a_resize_that_the_spare_does_not_take_leaves_a_disk_that_opens() {
    for shapes in shapes() {
        let [before, after] = shapes;
        let base = base(before);
        let mut outcomes = [0; 3];
        for first in 0.. {
            let mut performed = 0;
            for (count, torn) in [(1, None), (u64::MAX, None), (u64::MAX, Some(1))] {
                let mut rig = base.fork();
                let mut engine = rig.open().unwrap();
                extend(&mut rig, after);
                let so_far = rig.performed.iter().filter(|op| op.device == SPARE).count() as u64;
                (rig.fails, rig.torn) = (Some((so_far + first, count)), torn);
                let answer = resize(&mut engine, &mut rig, &after).unwrap();
                performed = rig.performed.iter().filter(|op| op.device == SPARE).count() as u64 - so_far;
                let progress = Progress { extended: true, answered: answer.is_ok(), written: false };
                rig.fails = None;
                engine.pass(&mut rig, 2).unwrap();
                match &answer {
                    Ok(_) => outcomes[0] += 1,
                    Err(failed) => {
                        outcomes[1 + usize::from(failed.is_as_before)] += 1;
                        assert_eq!(engine.status(&mut rig).capacity, before.capacity);
                        assert_eq!(engine.read(&mut rig, before.capacity, 1), None);
                        check_old_data(&mut engine, &mut rig, &before);
                        if failed.is_as_before {
                            let mut shorter = rig.fork();
                            shorter.kill();
                            shorter.shape = before;
                            let mut engine = shorter.open().expect("as it was before");
                            check_old_data(&mut engine, &mut shorter, &before);
                        }
                    }
                }
                drop(engine);
                // What is not flushed of it may still land.
                for fate in [Keep::Keep, Keep::Drop] {
                    let mut after = rig.fork();
                    after.crash(|_, _| fate);
                    check_resized(after, &shapes, progress, &mut [0; 3]);
                }
            }
            if first > performed {
                break;
            }
        }
        println!("labelled {}: {outcomes:?} grown, not grown, not grown and as before", before.labelled);
        assert!(outcomes[0] > 0 && outcomes[1] > 0);
    }
}

/// F2, O1: the spare has said that its superblock did not land, and it did. The next attempt takes back what it says
/// before it clears the place of its label.
#[test]
fn an_attempt_that_may_count_is_overtaken_before_its_label_goes() {
    let base = base(SMALL);
    let mut checked = 0;
    let attempts = |rig: &mut Rig, has_failed: &mut bool| {
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        engine.pass(rig, 0)?;
        extend(rig, GROWN);
        let so_far = rig.performed.iter().filter(|op| op.device == SPARE).count() as u64;
        (rig.fails, rig.torn) = (Some((so_far, u64::MAX)), Some(1));
        let failed = resize(&mut engine, rig, &GROWN)?.expect_err("the spare takes nothing");
        assert!(!failed.is_as_before);
        (rig.fails, rig.torn) = (None, None);
        *has_failed = true;
        match engine.order(rig, Order::PrepareResize(GROWN.sizes()[0]))? {
            Reply::Done(Ok(_)) => Ok(()),
            reply => panic!("{reply:?}"),
        }
    };
    at_every_operation(&base, attempts, |mut after, has_failed| {
        if !has_failed {
            return;
        }
        checked += 1;
        after.shape = GROWN;
        check_resized(after, &[SMALL, GROWN], Progress { extended: true, ..Progress::default() }, &mut [0; 3]);
    });
    assert!(checked > 10);
}

/// A page of the primary that takes no writes.
fn bad_primary(from: u64, to: u64) -> Bad {
    Bad { device: PRIMARY, from, to, reads: Reads::Good, writes: true }
}

#[test]
fn a_resize_that_the_primary_does_not_take_leaves_the_disk_as_it_was() {
    let (old_label, new_label) = (SMALL.label().unwrap(), GROWN.label().unwrap());
    let bad = [
        (bad_primary(new_label.poison(), new_label.poison() + 512), true),
        (bad_primary(new_label.table(0), new_label.table(0) + 512), true),
        (bad_primary(new_label.start, new_label.superblock(1) + 512), true),
        (bad_primary(old_label.start, old_label.end()), false),
    ];
    let shapes = [SMALL, GROWN];
    let base = base(SMALL);
    for (bad, is_as_before) in bad {
        let mut rig = base.fork();
        let mut engine = rig.open().unwrap();
        extend(&mut rig, GROWN);
        rig.bad = vec![bad];
        let failed = resize(&mut engine, &mut rig, &GROWN).unwrap().unwrap_err();
        assert_eq!(failed.is_as_before, is_as_before, "{failed:?}");
        assert!(failed.why.contains("primary"), "{failed:?}");
        assert_eq!(engine.status(&mut rig).capacity, SMALL.capacity);
        check_old_data(&mut engine, &mut rig, &SMALL);
        assert_eq!(engine.write(&mut rig, 0, &pattern(0, 8, 3)), Ok(Status::Ok));
        assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
        // Closed or not, with the bad place still there: it opens, and grows once the place is good again.
        let mut closed = rig.fork();
        closed.bad.clone_from(&rig.bad);
        assert_eq!(engine.close(&mut rig), Ok(Ok(())));
        drop(engine);
        for mut rig in [rig, closed] {
            rig.kill();
            let mut engine = rig.open().unwrap();
            assert_eq!(engine.status(&mut rig).capacity, SMALL.capacity);
            // Neither an old label nor what was to be a new one becomes zeros there.
            assert_eq!(engine.causes("old-label").len(), 1);
            drop(engine);
            rig.kill();
            rig.bad.clear();
            let progress = Progress { extended: true, ..Progress::default() };
            check_resized(rig, &shapes, progress, &mut [0; 3]);
        }
    }
}

/// F2: which label counts at the next start is not known while the spare has not taken its superblock for good.
#[test]
fn a_note_goes_to_every_label_that_may_count() {
    let mut rig = base(SMALL);
    let mut engine = rig.open().unwrap();
    extend(&mut rig, GROWN);
    let spare_ops = |rig: &Rig| rig.performed.iter().filter(|op| op.device == SPARE).count() as u64;
    // The superblock that says where the label is lands, and nobody is told.
    (rig.fails, rig.torn) = (Some((spare_ops(&rig), u64::MAX)), Some(1));
    let order = Order::Resize { capacity: GROWN.capacity, primary_size: GROWN.sizes()[0] };
    let id = engine.begin_order(&mut rig, order);
    while !engine.is_answered(id) {
        assert!(engine.step(&mut rig).unwrap());
    }
    let Some(Reply::Resized(Err(failed))) = engine.reply(id) else { panic!("it has failed") };
    assert!(!failed.is_as_before);
    // It becomes durable with a slot of the guest's.
    (rig.fails, rig.torn) = (None, None);
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &old(MOVED)), Ok(Status::Ok));
    assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
    // Then a flush fails, of which the spare takes no note.
    rig.bad_flushes = [1, 0];
    let poison = Place::ALL.map(|place| rig.shape.layout().poison(place));
    rig.bad = poison.map(|from| Bad { device: SPARE, from, to: from + 4096, reads: Reads::Good, writes: true }).into();
    assert_eq!(engine.write(&mut rig, 0, &pattern(0, 8, 3)), Ok(Status::Ok));
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    drop(engine);
    rig.crash(|_, _| Keep::Drop);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.status(&mut rig).primary_size, GROWN.sizes()[0], "the label that counts is the new one");
    assert!(engine.is_poisoned());
}

#[test]
fn a_volume_that_cannot_grow_says_why_and_stays_as_it_is() {
    let mut rig = base(SMALL);
    let mut engine = rig.open().unwrap();
    extend(&mut rig, GROWN);
    rig.performed.clear();
    let (size, small) = (GROWN.sizes()[0], SMALL.sizes()[0]);
    for (capacity, primary_size, why) in [
        (SMALL.capacity, size, "only grow"),
        (SMALL.capacity - 8, size, "only grow"),
        (1 << 43, size, "more than"),
        (GROWN.capacity + 8, size, "needs"),
        (SMALL.capacity + 8, small, "needs"),
        // The new label would lie over the old one.
        (SMALL.capacity + 8, small + 4096, "needs"),
    ] {
        let order = Order::Resize { capacity, primary_size };
        let Reply::Resized(Err(failed)) = engine.order(&mut rig, order).unwrap() else { panic!("{capacity}") };
        assert!(failed.why.contains(why) && failed.is_as_before, "{failed:?}");
    }
    assert!(!rig.was_written());
    // Nor is anything done to what is closed.
    assert_eq!(engine.close(&mut rig), Ok(Ok(())));
    rig.performed.clear();
    let failed = resize(&mut engine, &mut rig, &GROWN).unwrap().unwrap_err();
    assert!(failed.why.contains("closed"), "{failed:?}");
    assert!(!rig.was_written());
}

/// Begin a resize, go so many steps, and close, while one of the superblocks' copies takes its time. Whether the resize
/// was over by then, and how it ended.
fn close_after(base: &Rig, shapes: &[Shape; 2], steps: usize, held: Option<u8>) -> (bool, bool) {
    let after = shapes[1];
    let mut rig = base.fork();
    let mut engine = rig.open().unwrap();
    extend(&mut rig, after);
    let order = Order::Resize { capacity: after.capacity, primary_size: after.sizes()[0] };
    let order = engine.begin_order(&mut rig, order);
    let was_over = !(0..steps).all(|_| engine.step(&mut rig).unwrap());
    rig.held = held.map(|copy| (SPARE, rig.shape.layout().superblock(Place::Tail, copy)));
    let settle = engine.begin_order(&mut rig, Order::Settle);
    engine.settle_but_for_held(&mut rig).unwrap();
    rig.held = None;
    while !engine.is_answered(settle) {
        assert!(engine.step(&mut rig).unwrap(), "a close is never answered");
    }
    let Some(Reply::Settled(Ok(sample_crc))) = engine.reply(settle) else { panic!("{:?}", engine.reply(settle)) };
    let stamp = CloseStamp { size: after.sizes()[0], mtime_ns: MTIME, sample_crc: *sample_crc, write_through: false };
    rig.performed.clear();
    engine.done(&mut rig, Order::Seal(stamp));
    let written = |op: &Pending| op.device == PRIMARY && !matches!(op.kind, OpKind::Read | OpKind::Flush);
    assert!(!rig.performed.iter().any(written), "after the last look at the primary: {:?}", rig.performed);
    let Some(Reply::Resized(answer)) = engine.reply(order) else { panic!("no answer to the resize") };
    let is_grown = answer.is_ok();
    drop(engine);
    rig.crash(|_, _| Keep::Drop);
    let progress = Progress { extended: true, answered: is_grown, written: false };
    check_resized(rig, shapes, progress, &mut [0; 3]);
    (was_over, is_grown)
}

/// E4: the stamp of the primary is of its last moment, and of the capacity that the next opening goes by.
#[test]
fn a_close_in_the_midst_of_a_resize_looks_at_the_primary_last() {
    for shapes in shapes() {
        let base = base(shapes[0]);
        let (mut grown, mut refused) = (0, 0);
        for held in [None, Some(0), Some(1)] {
            for steps in 0.. {
                let (was_over, is_grown) = close_after(&base, &shapes, steps, held);
                *(if is_grown { &mut grown } else { &mut refused }) += 1;
                if was_over {
                    break;
                }
            }
        }
        println!("labelled {}: {grown} grown, {refused} refused", shapes[0].labelled);
        assert!(grown > 0 && refused > 0);
    }
}
