//! A volume that grows: whatever stops it, it opens as large as it was or as large as it is to become, with all that
//! was in it, a label to go by, and zeros where there was nothing.

use vhost_remap::device::OpKind;
use vhost_remap::device::memory::Keep;
use vhost_remap::engine::healer::{NotResized, Order, Reply};
use vhost_remap::engine::open::OpenError;
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::Place;

use crate::commits::{BLOCK_A, MOVED, SMALL, begun, check_copies, old};
use crate::crash::at_every_operation;
use crate::engine::Engine;
use crate::rig::{BLOCK, Cut, PRIMARY, Rig, SPARE, Shape, pattern, range_of};
use crate::seat::{At, Kind, seats};

/// By more than a label.
pub(crate) const GROWN: Shape = Shape { capacity: SMALL.capacity + 6144, ..SMALL };
/// Where the old label was, and where nothing was.
const NEW_BLOCKS: [u64; 3] = [SMALL.capacity / BLOCK, SMALL.capacity / BLOCK + 3, GROWN.capacity / BLOCK - 1];

/// One of those by which a closed primary is known again, as long as the volume has its old size.
const SAMPLED: u64 = 16;

/// Sizes before and after: with a label, and without one and a short last block.
pub(crate) fn shapes() -> [[Shape; 2]; 2] {
    let adopted = Shape { labelled: false, capacity: SMALL.capacity - 3, ..SMALL };
    [[SMALL, GROWN], [adopted, Shape { labelled: false, ..GROWN }]]
}

pub(crate) fn resize(engine: &mut Engine, rig: &mut Rig, shape: &Shape) -> Result<Result<String, NotResized>, Cut> {
    let order = Order::Resize { capacity: shape.capacity, primary_size: shape.sizes()[0] };
    match engine.order(rig, order)? {
        Reply::Resized(result) => Ok(result),
        reply => panic!("{reply:?}"),
    }
}

/// How far a resize has come.
#[derive(Clone, Copy, Default)]
pub(crate) struct Progress {
    pub(crate) extended: bool,
    pub(crate) answered: bool,
    pub(crate) written: bool,
}

/// A volume with a block that lives in a slot, and its last one too.
pub(crate) fn base(shape: Shape) -> Rig {
    let mut rig = begun(shape);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    let last = last_block(&shape);
    let range = vhost_remap::units::SectorRange {
        start: vhost_remap::units::Sector(last * BLOCK),
        count: shape.capacity - last * BLOCK,
    };
    assert_eq!(engine.write(&mut rig, last * BLOCK, &old(last)[..range.bytes() as usize]), Ok(Status::Ok));
    assert_eq!(engine.write(&mut rig, SAMPLED * BLOCK, &old(SAMPLED)), Ok(Status::Ok));
    engine.done(&mut rig, Order::Remap(range));
    assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
    drop(engine);
    rig.kill();
    rig
}

fn last_block(shape: &Shape) -> u64 {
    (shape.capacity - 1) / BLOCK
}

pub(crate) fn extend(rig: &mut Rig, to: Shape) {
    rig.disks.extend(PRIMARY, to.sizes()[0]);
    rig.shape = to;
}

fn grow(rig: &mut Rig, to: Shape, progress: &mut Progress) -> Result<(), Cut> {
    let mut engine = rig.try_open(rig.open_params())?.expect("opens");
    engine.pass(rig, 0)?;
    extend(rig, to);
    progress.extended = true;
    resize(&mut engine, rig, &to)?.expect("healthy disks take it");
    progress.answered = true;
    for block in NEW_BLOCKS {
        assert_eq!(engine.write(rig, block * BLOCK, &pattern(block * BLOCK, BLOCK, 5))?, Status::Ok);
    }
    assert_eq!(engine.flush(rig)?, Status::Ok);
    progress.written = true;
    // Whatever is written of the volume later.
    assert_eq!(engine.close(rig)?, Ok(()));
    Ok(())
}

pub(crate) fn check_old_data(engine: &mut Engine, rig: &mut Rig, before: &Shape) {
    for block in [BLOCK_A, MOVED, SAMPLED] {
        assert_eq!(engine.read(rig, block * BLOCK, BLOCK), Some(old(block)), "block {block}");
    }
    let last = last_block(before);
    let count = before.capacity - last * BLOCK;
    let expected = old(last)[..count as usize * 512].to_vec();
    assert_eq!(engine.read(rig, last * BLOCK, count), Some(expected), "the last block");
}

/// Zeros, or what was written since.
fn check_new_sectors(engine: &mut Engine, rig: &mut Rig, [before, after]: &[Shape; 2], progress: Progress) {
    let found = engine.read(rig, before.capacity, after.capacity - before.capacity).expect("it reads");
    for (sector, found) in (before.capacity..).zip(found.chunks(512)) {
        let written = NEW_BLOCKS.contains(&(sector / BLOCK)) && progress.answered;
        let (zeros, new) = (found.iter().all(|byte| *byte == 0), written && found == pattern(sector, 1, 5));
        assert!(if progress.written && written { new } else { zeros || new }, "sector {sector}");
    }
}

pub(crate) fn check_resized(mut rig: Rig, shapes: &[Shape; 2], progress: Progress, counts: &mut [usize; 3]) {
    let [before, after] = *shapes;
    rig.shape = if progress.extended { after } else { before };
    if before.labelled {
        let mut degraded = rig.fork();
        if let Err(error) = degraded.open_degraded().map(drop) {
            counts[2] += 1;
            // Not while it is written once more for the close.
            assert!(!progress.answered || error == OpenError::LabelHalfWritten, "{error}");
        }
    }
    let mut engine = rig.open().expect("it opens at any moment");
    let status = engine.status(&mut rig);
    assert!(!engine.is_poisoned());
    check_old_data(&mut engine, &mut rig, &before);
    if status.capacity == before.capacity {
        counts[0] += 1;
        assert!(!progress.answered);
        assert_eq!(engine.read(&mut rig, before.capacity, 1), None);
        if let (true, Some(label)) = (status.primary_size == after.sizes()[0], before.label()) {
            let left = rig.peek(PRIMARY, label.start, (label.end() - label.start) as usize);
            assert!(left.iter().all(|byte| *byte == 0), "the old label is zeros when the volume is open");
        }
        if !progress.extended {
            extend(&mut rig, after);
        }
        let answer = resize(&mut engine, &mut rig, &after).unwrap();
        answer.expect("another attempt is not disturbed by what the first has left");
    } else {
        counts[1] += 1;
        assert_eq!(status.capacity, after.capacity);
    }
    check_old_data(&mut engine, &mut rig, &before);
    check_new_sectors(&mut engine, &mut rig, shapes, progress);
    let map = engine.map();
    drop(engine);
    rig.kill();
    if before.labelled {
        assert!(rig.find_label().unwrap().is_some(), "a label to find the volume by");
        assert_eq!(rig.open_degraded().expect("a label to go by").map(), map);
        rig.kill();
    }
    let mut engine = rig.open().unwrap();
    check_copies(&rig);
    assert_eq!(engine.map(), map);
    check_old_data(&mut engine, &mut rig, &before);
    check_new_sectors(&mut engine, &mut rig, shapes, progress);
    assert_eq!(engine.close(&mut rig), Ok(Ok(())));
    drop(engine);
    rig.kill();
    rig.open().expect("what was closed opens");
}

#[test]
fn a_volume_that_grows_is_old_or_new_after_a_crash_at_any_moment() {
    for shapes in shapes() {
        let base = base(shapes[0]);
        let mut counts = [0; 3];
        at_every_operation(
            &base,
            |rig, progress: &mut Progress| grow(rig, shapes[1], progress),
            |after, progress| check_resized(after, &shapes, *progress, &mut counts),
        );
        let [old, new, no_label] = counts;
        println!("labelled {}: {old} old, {new} new, {no_label} without a label to go by", shapes[0].labelled);
        assert!(old > 0 && new > 0);
    }
}

/// R1: a label that was written and never counted lies where a larger resize gives sectors to the guest.
#[test]
fn what_an_attempt_has_left_does_not_come_to_light_with_the_next_one() {
    let larger = Shape { capacity: GROWN.capacity + 8192, ..SMALL };
    let base = base(SMALL);
    let (mut left, mut found) = (0, 0);
    let attempt = |rig: &mut Rig, progress: &mut Progress| grow(rig, GROWN, progress);
    at_every_operation(&base, attempt, |mut rig, progress| {
        rig.shape = if progress.extended { GROWN } else { SMALL };
        let label = GROWN.label().unwrap();
        let mut engine = rig.open().unwrap();
        if engine.status(&mut rig).capacity == GROWN.capacity {
            return;
        }
        left += 1;
        let size = rig.shape.sizes()[0];
        engine.done(&mut rig, Order::PrepareResize(size));
        if progress.extended {
            found += usize::from(engine.status(&mut rig).primary_size == SMALL.sizes()[0]);
        }
        // Cut off before anything else becomes durable.
        drop(engine);
        rig.crash(|_, _| Keep::Drop);
        extend(&mut rig, larger);
        let mut engine = rig.open().unwrap();
        resize(&mut engine, &mut rig, &larger).unwrap().unwrap();
        let debris = engine.read(&mut rig, label.start / 512, 2048).unwrap();
        assert!(debris.iter().all(|byte| *byte == 0), "what was left of a label");
        check_new_sectors(&mut engine, &mut rig, &[SMALL, larger], Progress::default());
    });
    println!("{left} attempts came to nothing, {found} of them after the primary was extended");
    assert!(found > 0 && left > found);
}

/// R1: a superblock that spoke of an old label may come to count again when later ones are damaged; nothing is zeroed
/// that the guest has written.
#[test]
fn what_the_guest_wrote_where_the_label_was_outlives_the_last_superblock() {
    let base = base(SMALL);
    for (lost, label_too) in [(None, false), (Some(0), false), (Some(1), false), (Some(0), true), (Some(1), true)] {
        for closed in [false, true] {
            let mut rig = base.fork();
            let mut engine = rig.open().unwrap();
            extend(&mut rig, GROWN);
            resize(&mut engine, &mut rig, &GROWN).unwrap().unwrap();
            let block = NEW_BLOCKS[0];
            let data = pattern(block * BLOCK, BLOCK, 5);
            assert_eq!(engine.write(&mut rig, block * BLOCK, &data), Ok(Status::Ok));
            assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
            if closed {
                assert_eq!(engine.close(&mut rig), Ok(Ok(())));
            }
            drop(engine);
            rig.crash(|_, _| Keep::Drop);
            let superblocks = seats(&rig.shape).into_iter().filter(|seat| match seat.kind {
                Kind::Superblock(_) if seat.at == At::Label => label_too,
                Kind::Superblock(copy) => lost == Some(copy),
                _ => false,
            });
            superblocks.for_each(|seat| seat.write(&rig, &[0xa5; 4096]));
            for _ in 0..2 {
                let mut engine = rig.open().unwrap();
                assert_eq!(engine.status(&mut rig).capacity, GROWN.capacity);
                assert_eq!(engine.read(&mut rig, block * BLOCK, BLOCK), Some(data.clone()), "without copy {lost:?}");
                drop(engine);
                rig.kill();
            }
        }
    }
}

/// What happens to the devices, in order: each letter a write, a flush or a zeroing of what it stands for.
fn story(rig: &Rig) -> String {
    let (old, new) = (SMALL.label().expect("labelled"), GROWN.label().expect("labelled"));
    let superblocks =
        [Place::Head, Place::Tail].map(|place| [0, 1].map(|copy| rig.shape.layout().superblock(place, copy)));
    let mut story = String::new();
    for op in &rig.performed {
        let word = match (op.device, op.kind) {
            (PRIMARY, OpKind::Flush) => "F",
            (SPARE, OpKind::Flush) => "f",
            (PRIMARY, OpKind::WriteZeroes { .. }) if (old.start..old.end()).contains(&op.offset) => "0",
            (PRIMARY, OpKind::Write) if op.offset == new.poison() => "n",
            (PRIMARY, OpKind::Write) if (0..2).any(|copy| op.offset == new.superblock(copy)) => "L",
            (PRIMARY, OpKind::Write) if (new.start..new.end()).contains(&op.offset) => "T",
            (SPARE, OpKind::Write) if superblocks.as_flattened().contains(&op.offset) => "s",
            (_, OpKind::Read | OpKind::Identify) => "",
            (_, _) => "?",
        };
        story.push_str(word);
    }
    story
}

/// A note, an undated label, its list, its date; the spare; zeros; the spare twice; the label once more, of which what
/// is written last is first written again.
#[test]
fn a_volume_grows_in_the_order_that_loses_nothing() {
    let mut rig = base(SMALL);
    let mut engine = rig.open().unwrap();
    extend(&mut rig, GROWN);
    rig.performed.clear();
    resize(&mut engine, &mut rig, &GROWN).unwrap().unwrap();
    assert_eq!(story(&rig), "nFLFLFTFLFLF ssf 0F ssf ssf LFLFLFTFLFL".replace(' ', ""));
}

/// E4, and the label that moved says so.
#[test]
fn a_spare_from_before_the_volume_grew_is_refused() {
    let mut rig = base(SMALL);
    let spare = rig.peek(SPARE, 0, SMALL.sizes()[1] as usize);
    let mut engine = rig.open().unwrap();
    extend(&mut rig, GROWN);
    resize(&mut engine, &mut rig, &GROWN).unwrap().unwrap();
    drop(engine);
    rig.kill();
    rig.disks.poke(SPARE, 0, &spare);
    assert!(matches!(rig.open().map(drop), Err(OpenError::OldSpare { .. })));
    assert!(!rig.was_written());
    rig.kill();
    // Without that label, its absence from where it was does.
    let label = GROWN.label().unwrap();
    rig.disks.poke(PRIMARY, label.start, &[0xa5; 8192]);
    assert!(matches!(rig.open().map(drop), Err(OpenError::Grown { .. })));
    assert!(!rig.was_written());
}

#[test]
fn a_primary_that_was_extended_while_nobody_looked_opens_as_it_was_and_can_be_used() {
    for shapes in shapes() {
        let [before, after] = shapes;
        let mut rig = base(before);
        extend(&mut rig, after);
        let mut engine = rig.open().unwrap();
        assert_eq!(engine.status(&mut rig).capacity, before.capacity);
        assert_eq!(engine.causes("primary-grown").len(), 1);
        check_old_data(&mut engine, &mut rig, &before);
        drop(engine);
        rig.kill();
        let progress = Progress { extended: true, ..Progress::default() };
        check_resized(rig, &shapes, progress, &mut [0; 3]);
    }
}

/// As large as its primary has room for without that its label moves.
#[test]
fn a_volume_grows_into_room_that_it_has() {
    let mut rig = base(SMALL);
    let mut engine = rig.open().unwrap();
    extend(&mut rig, GROWN);
    let larger = Shape { capacity: SMALL.capacity + 8, ..SMALL };
    let order = |shape: Shape| Order::Resize { capacity: shape.capacity, primary_size: GROWN.sizes()[0] };
    for shape in [larger, GROWN] {
        rig.performed.clear();
        assert!(matches!(engine.order(&mut rig, order(shape)).unwrap(), Reply::Resized(Ok(_))));
        assert_eq!(engine.status(&mut rig).capacity, shape.capacity);
        assert_eq!(story(&rig).starts_with('n'), shape == larger, "the label moves once");
        assert_eq!(engine.read(&mut rig, shape.capacity, 1), None);
    }
    check_new_sectors(&mut engine, &mut rig, &[SMALL, GROWN], Progress::default());
}

/// A session that writes the label.
fn stamp(rig: &mut Rig) -> Result<Engine, Cut> {
    let mut engine = rig.try_open(rig.open_params())?.expect("nothing is damaged");
    engine.pass(rig, 0)?;
    Ok(engine)
}

/// And once more, as a block moves.
fn stamp_twice(rig: &mut Rig) -> Result<(), Cut> {
    let mut engine = stamp(rig)?;
    for order in [Order::Remap(range_of(40 * BLOCK, 4096)), Order::Save] {
        assert!(matches!(engine.order(rig, order)?, Reply::Done(Ok(_))));
    }
    Ok(())
}

/// How a session ends when it flushes the primary.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Killed,
    /// When that has failed and it could not say so. Of that many sectors the first has landed.
    FailedAndKilled(u64),
    /// Of each page the first sector has landed.
    PowerCut,
}

/// By which alone a primary that has grown is known; the power goes in the next session, too.
#[test]
fn two_ends_of_any_kind_leave_a_whole_superblock_in_the_label() {
    let mut grown = base(SMALL);
    drop(grown.open().unwrap());
    grown.crash(|_, _| Keep::Keep);
    extend(&mut grown, GROWN);
    let check = |mut rig: Rig| drop(rig.open().expect("the label tells that it is the primary"));
    let mut cut = at_every_operation(&grown, |rig, ()| stamp_twice(rig), |rig, ()| check(rig));
    let mut ended = 0;
    let ends = [End::Killed, End::FailedAndKilled(8), End::FailedAndKilled(u64::MAX), End::PowerCut];
    for operations in 0.. {
        let mut rigs = ends.map(|end| (end, grown.fork()));
        let mut is_over = false;
        for (end, rig) in &mut rigs {
            rig.left = Some(operations);
            is_over = stamp_twice(rig) == Ok(());
            let next = rig.next_op().map(|at| rig.disks.pending(at));
            if is_over || next.is_none_or(|op| (op.device, op.kind) != (PRIMARY, OpKind::Flush)) {
                continue;
            }
            rig.left = None;
            if let End::FailedAndKilled(torn) = end {
                (rig.bad_flushes[0], rig.torn) = (1, Some(*torn));
                rig.perform().expect("no end is set");
            }
            match end {
                End::PowerCut => {
                    rig.crash(|_, sector| if sector.0.is_multiple_of(8) { Keep::Keep } else { Keep::Drop })
                }
                _ => rig.kill(),
            }
            rig.torn = None;
            ended += 1;
            cut += at_every_operation(rig, |rig, ()| stamp(rig).map(drop), |rig, ()| check(rig));
        }
        if is_over {
            break;
        }
    }
    println!("{ended} ends, and {cut} ends of the power");
    assert!(ended > 20);
}
