//! Damaged copies of metadata that a pass comes upon while the volume is open.

use vhost_remap::device::OpKind;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::scan::{Found, ScanOrder, ScanScope, ScanState};
use vhost_remap::volume::layout::{Home, Place};

use crate::commits::{MOVED, SMALL, begun, old};
use crate::crash::at_every_operation;
use crate::resize::{GROWN, extend};
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, range_of};
use crate::seat::{At, Kind, Seat, is_whole, seats};

/// Whether a pass writes it anew; the spare's superblocks and notes of a failed flush are left to the next opening.
fn is_repaired(seat: &Seat) -> bool {
    matches!((seat.kind, seat.at), (Kind::Table(..) | Kind::Counters, _) | (Kind::Superblock(_), At::Label))
}

fn damage(rig: &Rig, seat: &Seat) {
    let mut bytes = seat.read(rig);
    bytes[100] ^= 0x40;
    seat.write(rig, &bytes);
}

fn quiet(rig: &mut Rig) -> crate::engine::Engine {
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    // So that there are counters on the disk.
    engine.done(rig, Order::Save);
    engine.pass(rig, 1).unwrap();
    engine
}

#[test]
fn each_damaged_copy_is_found_and_all_but_the_spares_superblocks_and_notes_are_written_anew() {
    for seat in seats(&SMALL) {
        let mut rig = begun(SMALL);
        let mut engine = quiet(&mut rig);
        // Which saves the counters.
        engine.begin_scan(&mut rig, ScanScope::default());
        if seat.kind == Kind::Poison {
            // Nothing has been noted: there is nothing to be damaged but zeros.
            let mut bytes = seat.read(&rig);
            bytes[0] = 1;
            seat.write(&rig, &bytes);
        } else {
            damage(&rig, &seat);
        }
        let map = engine.map();
        let last = engine.end_scan(&mut rig);
        assert!(last.complete && last.found == Found { metadata: 1, ..Found::default() }, "{seat:?}: {last:?}");
        assert_eq!(engine.causes("metadata-damaged").len(), 1, "{seat:?}");
        let bytes = seat.read(&rig);
        assert_eq!(is_whole(&seat, &bytes), is_repaired(&seat), "{seat:?}");
        let repairs = engine.status(&mut rig).tally.metadata_repairs;
        assert_eq!(repairs, u64::from(is_repaired(&seat)), "{seat:?}");
        assert_eq!(engine.map(), map);
        drop(engine);
        rig.kill();
        let mut engine = rig.open().unwrap();
        assert_eq!(engine.map(), map, "{seat:?}");
        assert_eq!(engine.read(&mut rig, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
    }
}

#[test]
fn a_copy_that_does_not_read_is_written_anew() {
    let table = seats(&SMALL).into_iter().filter(|seat| matches!(seat.kind, Kind::Table(..)) && seat.at != At::Label);
    for seat in table {
        let mut rig = begun(SMALL);
        let mut engine = quiet(&mut rig);
        let (from, to) = (seat.offset, seat.offset + 4096);
        rig.bad = vec![Bad { device: seat.device(), from, to, reads: Reads::UntilWritten, writes: false }];
        let found = engine.scan(&mut rig).found;
        assert_eq!((found.metadata, rig.bad.len()), (1, 0), "{seat:?}");
    }
}

#[test]
fn only_looking_leaves_a_damaged_copy() {
    let mut rig = begun(SMALL);
    let mut engine = quiet(&mut rig);
    let seat = seats(&SMALL).into_iter().find(|seat| matches!(seat.kind, Kind::Table(0, 0))).unwrap();
    damage(&rig, &seat);
    engine.begin_scan(&mut rig, ScanScope { range: None, check_only: true });
    assert_eq!(engine.end_scan(&mut rig).found.metadata, 1);
    assert!(!is_whole(&seat, &seat.read(&rig)));
}

/// A copy that is read while it is written may be half of either.
#[test]
fn a_page_that_is_being_written_is_not_called_damaged() {
    for home in [0, 1] {
        let mut rig = begun(SMALL);
        let mut engine = quiet(&mut rig);
        let seat = seats(&SMALL).into_iter().find(|seat| seat.kind == Kind::Table(home, 0)).unwrap();
        rig.held_page = Some(0);
        engine.begin_order(&mut rig, Order::Remap(range_of(0, 4096)));
        engine.settle_but_for_held(&mut rig).unwrap();
        damage(&rig, &seat);
        engine.begin_order(&mut rig, Order::Scan(ScanOrder::Start(ScanScope::default())));
        for _ in 0..20 {
            engine.tick(&mut rig, 1);
            engine.settle_but_for_held(&mut rig).unwrap();
        }
        let scan = engine.status_now(&mut rig).scan;
        let last = scan.last.expect("the pass waits for no commit");
        assert_eq!(last.found, Found::default(), "home {home}");
        // What is in it is not known, and nobody says that it is whole.
        assert!(!last.complete && scan.skipped_bytes == 4096, "{:?}", scan.skipped);
    }
}

/// The page is written as any commit writes it: whatever moment the power goes at, what is in it counts.
#[test]
fn the_power_may_go_while_a_damaged_copy_is_written_anew() {
    for home in [0, 1] {
        let mut rig = begun(SMALL);
        rig.bad.clear();
        let engine = quiet(&mut rig);
        let map = engine.map();
        drop(engine);
        rig.kill();
        let seat = seats(&SMALL).into_iter().find(|seat| seat.kind == Kind::Table(home, 0)).unwrap();
        let act = |rig: &mut Rig, (): &mut ()| {
            let mut engine = rig.try_open(rig.open_params())?.expect("opens");
            damage(rig, &seat);
            engine.order(rig, Order::Scan(ScanOrder::Start(ScanScope::default())))?;
            // A block moves meanwhile.
            engine.begin_order(rig, Order::Remap(range_of(0, 4096)));
            engine.pass(rig, 1)
        };
        at_every_operation(&rig, act, |mut after, ()| {
            let mut engine = after.open().unwrap();
            let found = engine.map();
            assert!(map.iter().all(|entry| found.contains(entry)), "{found:?}");
            assert_eq!(engine.read(&mut after, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
        });
    }
}

/// As long as the home that counts is damaged, the other one is all there is: it has to be durable before the first is
/// written over.
#[test]
fn a_damaged_anchor_is_written_anew_once_the_other_home_is_durable() {
    for home in [0, 1] {
        let mut rig = begun(SMALL);
        rig.bad.clear();
        // In both places: else the other one's is enough.
        let both = |seat: &Seat| seat.kind == Kind::Table(home, 0) && seat.at != At::Label;
        let damaged: Vec<Seat> = seats(&SMALL).into_iter().filter(both).collect();
        assert_eq!(damaged.len(), 2);
        let act = |rig: &mut Rig, rewriting: &mut bool| {
            let mut engine = rig.try_open(rig.open_params())?.expect("opens");
            engine.order(rig, Order::Remap(range_of(0, 4096)))?;
            engine.settle(rig)?;
            damaged.iter().for_each(|seat| damage(rig, seat));
            let from = rig.performed.len();
            engine.begin_order(rig, Order::Scan(ScanOrder::Start(ScanScope::default())));
            for _ in 0..20 {
                engine.tick(rig, 1);
                while engine.step(rig)? {
                    let mut since = rig.performed[from..].iter();
                    let is_one = |offset| damaged.iter().any(|seat| seat.offset == offset);
                    *rewriting |= since.any(|op| op.kind == OpKind::Write && is_one(op.offset));
                }
            }
            Ok(())
        };
        let mut cuts = 0;
        at_every_operation(&rig, act, |mut after, rewriting| {
            if *rewriting {
                cuts += 1;
                let mut engine = after.open().unwrap();
                assert_eq!(engine.map().len(), 2);
                assert_eq!(engine.read(&mut after, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
            }
        });
        assert!(cuts > 0, "home {home} was written anew");
    }
}

/// What is left is counted anew, and none of it left out.
#[test]
fn a_place_that_goes_during_a_pass_does_not_end_it_early() {
    let shape = Shape { capacity: 131_072, max_remaps: 16_384, labelled: true };
    let mut rig = begun(shape);
    let mut engine = quiet(&mut rig);
    // In the second of several steps.
    let from = shape.layout().table(Place::Tail, Home::ALL[0], 10);
    rig.bad = vec![Bad { device: SPARE, from, to: from + 4096, reads: Reads::Never, writes: true }];
    rig.performed.clear();
    assert!(engine.scan(&mut rig).complete);
    assert_eq!(engine.status(&mut rig).retired_places.len(), 1);
    let label: Vec<Seat> = seats(&shape).into_iter().filter(|seat| seat.at == At::Label).collect();
    for seat in &label {
        let mut reads = rig.performed.iter().filter(|op| op.kind == OpKind::Read && op.device == seat.device());
        assert!(reads.any(|op| (op.offset, op.len) == (seat.offset, 4096)), "{seat:?} was not read");
    }
    assert!(label.len() > 3, "the label has a table");
}

/// Of a label that moves, pages are overwritten with zeros.
#[test]
fn a_label_that_moves_is_not_called_damaged() {
    let mut rig = begun(SMALL);
    let mut engine = quiet(&mut rig);
    engine.scan(&mut rig);
    let whole = engine.status(&mut rig).scan.scanned.extent;
    // A pass comes to the label while that moves, waits for it, and finds zeros where it was.
    extend(&mut rig, GROWN);
    rig.held = Some((PRIMARY, GROWN.label().unwrap().superblock(0)));
    let order = Order::Resize { capacity: GROWN.capacity, primary_size: GROWN.sizes()[0] };
    let resized = engine.begin_order(&mut rig, order);
    engine.settle_but_for_held(&mut rig).unwrap();
    engine.begin_order(&mut rig, Order::Scan(ScanOrder::Start(ScanScope::default())));
    for _ in 0..20 {
        engine.tick(&mut rig, 1);
        engine.settle_but_for_held(&mut rig).unwrap();
    }
    assert_eq!(engine.status_now(&mut rig).scan.state, ScanState::Running);
    rig.held = None;
    engine.settle(&mut rig).unwrap();
    assert!(engine.is_answered(resized));
    let last = engine.end_scan(&mut rig);
    assert_eq!((last.found, last.complete), (Found::default(), false), "the new part was not read");
    let scanned = engine.status(&mut rig).scan.scanned;
    assert_eq!(scanned.extent, whole);
    assert!(scanned.has(range_of(0, 4096)) && !scanned.has(range_of(SMALL.capacity, 4096)));
    drop(engine);
    rig.kill();
    let mut engine = quiet(&mut rig);
    assert_eq!(engine.status(&mut rig).scan.scanned.extent, whole, "it is remembered");
    assert!(engine.scan(&mut rig).complete);
    assert!(engine.status(&mut rig).scan.scanned.has(range_of(SMALL.capacity, 4096)));
}

/// A disk may take half a minute to read a page, and longer to fail.
#[test]
fn a_look_at_a_page_keeps_nobody_from_writing_it() {
    let mut rig = begun(SMALL);
    let mut engine = quiet(&mut rig);
    let seat = seats(&SMALL).into_iter().find(|seat| seat.kind == Kind::Counters).unwrap();
    rig.held_read = Some((SPARE, seat.offset));
    engine.begin_scan(&mut rig, ScanScope::default());
    for _ in 0..600 {
        if rig.disks.pending_len() > 0 {
            break;
        }
        engine.tick(&mut rig, 1);
        engine.settle_but_for_held(&mut rig).unwrap();
    }
    assert_eq!(rig.disks.pending_len(), 1);
    let save = engine.begin_order(&mut rig, Order::Save);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert!(engine.is_answered(save), "it waits for the look");
    rig.held_read = None;
    assert!(engine.end_scan(&mut rig).complete);
}
