//! What a pass of the scanner reads, finds and does.

use std::collections::BTreeSet;

use vhost_remap::device::{DeviceIndex, OpKind};
use vhost_remap::engine::healer::{Order, Reply};
use vhost_remap::engine::request::Status;
use vhost_remap::engine::scan::{Found, ScanOrder, ScanParams, ScanScope, ScanState};
use vhost_remap::units::{Sector, SectorRange};

use crate::commits::{BLOCK_A, MOVED, SMALL, bad_block, begun, new, old};
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, pattern, range_of};
use crate::seat::seats;

/// Large enough for neighbourhoods: 64 MiB.
const LARGE: Shape = Shape { capacity: 131_072, max_remaps: 64, labelled: true };
const MIB: u64 = 1 << 20;

pub(crate) fn unreadable(device: DeviceIndex, from: u64, bytes: u64, reads: Reads) -> Bad {
    Bad { device, from, to: from + bytes, reads, writes: false }
}

/// A volume of that shape without faults.
pub(crate) fn made(shape: Shape) -> Rig {
    let mut rig = Rig::new(shape);
    rig.create().unwrap().unwrap();
    rig
}

/// Blocks of 4096 bytes that were read from a device since the last start, of which reads began so.
fn read_of(rig: &Rig, device: DeviceIndex) -> BTreeSet<u64> {
    let reads = rig.performed.iter().filter(|op| op.device == device && op.kind == OpKind::Read);
    reads.flat_map(|op| op.offset / 4096..(op.offset + op.len).div_ceil(4096)).collect()
}

fn slot_offset(rig: &Rig, slot: u64) -> u64 {
    rig.shape.layout().slots_start + slot * 4096
}

#[test]
fn a_pass_reads_every_block_and_slot_and_all_metadata_and_writes_nothing() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    engine.pass(&mut rig, 1).unwrap();
    rig.performed.clear();
    let last = engine.scan(&mut rig);
    assert!(last.complete && last.found == Found::default(), "{last:?}");
    let primary: BTreeSet<u64> = (0..SMALL.capacity / 8).collect();
    assert!(primary.is_subset(&read_of(&rig, PRIMARY)));
    assert!(read_of(&rig, SPARE).contains(&(slot_offset(&rig, 0) / 4096)));
    for seat in seats(&rig.shape) {
        assert!(read_of(&rig, seat.device()).contains(&(seat.offset / 4096)), "{seat:?} was not read");
    }
    let layout = rig.shape.layout();
    let places = [
        layout.counters(vhost_remap::volume::layout::Place::Head),
        layout.counters(vhost_remap::volume::layout::Place::Tail),
    ];
    let written = rig.performed.iter().filter(|op| op.kind == OpKind::Write);
    written.for_each(|op| assert!(op.device == SPARE && places.contains(&op.offset), "{op:?}"));
    let status = engine.status(&mut rig);
    assert_eq!((status.tally.health_scans, status.scan.last_complete, status.scan.pass), (1, Some(last.ended), 1));
    assert_eq!(engine.causes("metadata-damaged"), [] as [&str; 0]);
}

#[test]
fn a_place_that_nobody_lives_in_may_fail_or_be_given_back() {
    let mut rig = begun(SMALL);
    rig.bad = vec![unreadable(PRIMARY, MOVED * 4096, 512, Reads::Never)];
    let mut engine = rig.open().unwrap();
    let score = engine.status(&mut rig).health.score;
    rig.performed.clear();
    let last = engine.scan(&mut rig);
    assert!(last.complete && last.found == Found::default(), "{last:?}");
    let tries = rig.performed.iter().filter(|op| op.device == PRIMARY && op.offset / 4096 == MOVED);
    assert_eq!(tries.count(), 1, "it is tried once");
    let status = engine.status(&mut rig);
    assert_eq!((status.pending, status.scan.releasable, status.health.score), (0, 0, score));
    rig.bad.clear();
    engine.scan(&mut rig);
    assert_eq!(engine.status(&mut rig).scan.releasable, 1);
    engine.done(&mut rig, Order::Release(range_of(MOVED * BLOCK, 4096)));
    assert_eq!(engine.status(&mut rig).scan.releasable, 0);
    assert_eq!(engine.read(&mut rig, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
}

#[test]
fn a_pass_over_a_slot_ends_although_its_block_went_back_to_a_weak_place() {
    let mut rig = begun(LARGE);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    // The block goes back, and the pass, which could not read its slot, waits for that.
    rig.held = Some((PRIMARY, MOVED * 4096));
    let release = engine.begin_order(&mut rig, Order::Release(range_of(MOVED * BLOCK, 4096)));
    engine.settle_but_for_held(&mut rig).unwrap();
    rig.bad = vec![unreadable(SPARE, slot_offset(&rig, 0), 512, Reads::Never)];
    engine.begin_order(&mut rig, Order::Scan(ScanOrder::Start(ScanScope::default())));
    rig.performed.clear();
    let slot = slot_offset(&rig, 0);
    for _ in 0..100 {
        engine.tick(&mut rig, 1);
        engine.settle_but_for_held(&mut rig).unwrap();
    }
    assert!(rig.performed.iter().any(|op| (op.device, op.offset, op.kind) == (SPARE, slot, OpKind::Read)));
    assert_eq!(engine.status_now(&mut rig).scan.state, ScanState::Running);
    rig.held = None;
    while !engine.is_answered(release) {
        assert!(engine.step(&mut rig).unwrap());
    }
    rig.bad = vec![unreadable(PRIMARY, MOVED * 4096, 512, Reads::Times(2))];
    let last = engine.end_scan(&mut rig);
    assert_eq!(last.found, Found { recovered: 1, ..Found::default() });
    assert!(engine.status(&mut rig).live == 0 && rig.bad[0].reads == Reads::Times(0), "it was seen to where it lives");
}

/// Scenario 28: there is nothing suspicious about zeros.
#[test]
fn a_disk_full_of_zeros_has_no_suspects() {
    let mut rig = made(LARGE);
    let mut engine = rig.open().unwrap();
    let last = engine.scan(&mut rig);
    assert!(last.complete && last.found == Found::default(), "{last:?}");
    assert_eq!(engine.status(&mut rig).health.score, 100);
}

#[test]
fn a_pass_finds_what_does_not_read_and_reads_around_it_at_once() {
    let mut rig = made(LARGE);
    // In units 1 and 40, of which the first has two.
    rig.bad = [MIB + 512, MIB + 8192, 40 * MIB].map(|at| unreadable(PRIMARY, at, 512, Reads::Never)).to_vec();
    let mut engine = rig.open().unwrap();
    engine.pass(&mut rig, 1).unwrap();
    rig.performed.clear();
    let last = engine.scan(&mut rig);
    assert_eq!(last.found, Found { bad: 3, ..Found::default() });
    assert!(last.complete, "what does not read was looked at");
    let status = engine.status(&mut rig);
    assert_eq!((status.pending, status.lost_sectors, status.live), (3, 0, 0), "R4: it takes no slot");
    // The order of units: after the one with the second hit come those around it that were not read.
    let large = rig.performed.iter().filter(|op| op.device == PRIMARY && op.len == MIB);
    let mut units: Vec<u64> = large.map(|op| op.offset / MIB).collect();
    units.dedup();
    let behind = |unit| units.iter().position(|other| *other == unit).expect("read in large pieces");
    assert!(behind(40) < behind(50) && behind(50) < behind(51), "{units:?}");
    let once: BTreeSet<u64> = units.iter().copied().collect();
    assert_eq!(once.len(), units.len(), "no unit is read twice: {units:?}");
    // Down to the sector.
    let sector = rig.performed.iter().any(|op| op.device == PRIMARY && (op.offset, op.len) == (40 * MIB, 512));
    assert!(sector, "its sectors were tried one by one");
}

#[test]
fn a_pass_reads_pending_blocks_again() {
    let mut rig = made(SMALL);
    rig.bad = vec![unreadable(PRIMARY, 0, 512, Reads::Times(10))];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, 0, 1), None);
    assert_eq!(engine.status(&mut rig).pending, 1);
    rig.bad.clear();
    assert_eq!(engine.scan(&mut rig).found, Found::default());
    assert_eq!(engine.status(&mut rig).pending, 0);
}

/// W1.
#[test]
fn a_rewritten_block_counts_as_healed_once_a_pass_has_read_it() {
    let mut rig = made(SMALL);
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 512, Reads::UntilWritten)];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, 1), None);
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    let tally = engine.status(&mut rig).tally;
    assert_eq!((tally.rewritten, tally.healed), (1, 0));
    assert_eq!(engine.scan(&mut rig).found, Found { healed: 1, ..Found::default() });
    assert_eq!(engine.scan(&mut rig).found, Found::default(), "it is healed once");
    assert_eq!(engine.status(&mut rig).tally.healed, 1);
}

/// A volume with a block of which a sector is lost.
fn with_lost() -> (Rig, Engine) {
    let mut rig = begun(SMALL);
    rig.bad.push(unreadable(PRIMARY, BLOCK_A * 4096, 512, Reads::Never));
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK + 1, &pattern(BLOCK_A * BLOCK + 1, 2, 3)), Ok(Status::Ok));
    assert_eq!(engine.status(&mut rig).lost_sectors, 1);
    (rig, engine)
}

#[test]
fn a_pass_counts_lost_sectors_and_heals_those_that_read_again() {
    let (mut rig, mut engine) = with_lost();
    assert_eq!(engine.scan(&mut rig).found, Found { lost: 1, ..Found::default() });
    rig.bad.clear();
    // Only looking heals nothing.
    engine.begin_scan(&mut rig, ScanScope { range: None, check_only: true });
    assert_eq!(engine.end_scan(&mut rig).found, Found { lost: 1, ..Found::default() });
    assert_eq!(engine.status(&mut rig).lost_sectors, 1);
    assert_eq!(engine.scan(&mut rig).found, Found { healed: 1, ..Found::default() });
    assert_eq!(engine.status(&mut rig).lost_sectors, 0);
    let first = engine.read(&mut rig, BLOCK_A * BLOCK, 1);
    assert_eq!(first.as_deref(), Some(&old(BLOCK_A)[..512]));
}

#[test]
fn a_block_whose_slot_needs_retries_moves_to_another_one() {
    let mut rig = begun(SMALL);
    rig.bad = vec![unreadable(SPARE, slot_offset(&rig, 0), 512, Reads::Times(6))];
    let mut engine = rig.open().unwrap();
    let last = engine.scan(&mut rig);
    assert_eq!(last.found, Found { recovered: 1, moved: 1, ..Found::default() });
    let status = engine.status(&mut rig);
    assert_eq!((status.live, status.retired, status.lost_sectors), (1, 1, 0), "E3: the slot is retired");
    assert_eq!(engine.read(&mut rig, MOVED * BLOCK, BLOCK), Some(old(MOVED)));
}

/// Its piece, its part, and itself alone.
#[test]
fn a_block_that_reads_only_when_it_is_examined_counts_as_recovered() {
    let mut rig = made(SMALL);
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 512, Reads::Times(3))];
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.scan(&mut rig).found, Found { recovered: 1, ..Found::default() });
    assert_eq!(rig.bad[0].reads, Reads::Times(0));
}

#[test]
fn blocks_stay_in_failing_slots_where_few_are_free() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(40 * BLOCK, 11 * 4096)));
    assert_eq!(engine.status(&mut rig).free, 4, "of 16");
    rig.bad = vec![unreadable(SPARE, slot_offset(&rig, 0), 512, Reads::Times(6))];
    assert_eq!(engine.scan(&mut rig).found, Found { recovered: 1, ..Found::default() });
    assert_eq!(engine.status(&mut rig).retired, 0);
}

#[test]
fn a_pass_ends_with_its_server() {
    let mut rig = made(LARGE);
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    engine.scan_until(&mut rig, 8 * MIB);
    engine.wind_down();
    let before = rig.performed.len();
    engine.pass(&mut rig, 5).unwrap();
    assert!(rig.performed.len() - before <= 4, "no more than what was under way: {:?}", &rig.performed[before..]);
}

#[test]
fn weak_blocks_move_while_they_can_be_read_if_that_is_wanted_and_no_more_than_a_share() {
    let scan = |move_weak| {
        let mut rig = made(SMALL);
        rig.scan = ScanParams { move_weak, ..ScanParams::default() };
        let mut engine = rig.open().unwrap();
        for block in 0..6 {
            assert_eq!(engine.write(&mut rig, block * BLOCK, &new(block)), Ok(Status::Ok));
            rig.bad.push(unreadable(PRIMARY, block * 4096, 512, Reads::Times(6)));
        }
        let last = engine.scan(&mut rig);
        (0..6).for_each(|block| assert_eq!(engine.read(&mut rig, block * BLOCK, BLOCK), Some(new(block))));
        (last.found, engine.status(&mut rig))
    };
    let (found, status) = scan(false);
    assert_eq!((found.recovered, found.moved, status.live), (6, 0, 0));
    // A quarter of 16 slots.
    let (found, status) = scan(true);
    assert_eq!((found.recovered, found.moved, status.live), (6, 4, 4));
    assert_eq!(status.tally.remaps, 4);
}

/// R4.
#[test]
fn a_weak_block_that_reads_no_more_when_it_is_to_move_stays_and_loses_nothing() {
    let mut rig = made(SMALL);
    rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 512, Reads::Times(6))];
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    engine.tick(&mut rig, 1);
    while engine.status_now(&mut rig).scan.found.recovered == 0 {
        assert!(engine.step(&mut rig).unwrap());
    }
    rig.bad[0].reads = Reads::Never;
    assert_eq!(engine.end_scan(&mut rig).found, Found { recovered: 1, bad: 1, ..Found::default() });
    let status = engine.status(&mut rig);
    assert_eq!((status.live, status.lost_sectors, status.pending), (0, 0, 1));
}

#[test]
fn of_weak_blocks_64_move_on_a_day() {
    let mut rig = made(Shape { capacity: 131_072, max_remaps: 400, labelled: false });
    rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
    let mut engine = rig.open().unwrap();
    rig.bad = (0..90).map(|block| unreadable(PRIMARY, block * 4096 * 17, 512, Reads::Times(7))).collect();
    assert_eq!(engine.scan(&mut rig).found.moved, 64);
    rig.bad = (64..90).map(|block| unreadable(PRIMARY, block * 4096 * 17, 512, Reads::Times(7))).collect();
    assert_eq!(engine.scan(&mut rig).found.moved, 0);
    engine.pass(&mut rig, 86_400).unwrap();
    rig.bad = (64..90).map(|block| unreadable(PRIMARY, block * 4096 * 17, 512, Reads::Times(7))).collect();
    assert_eq!(engine.scan(&mut rig).found.moved, 26);
}

#[test]
fn a_paused_pass_keeps_its_place_over_a_restart() {
    let mut rig = made(LARGE);
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    engine.scan_until(&mut rig, 8 * MIB);
    engine.done(&mut rig, Order::Scan(ScanOrder::Pause));
    let paused = engine.status(&mut rig).scan;
    assert!(paused.state == ScanState::Paused && paused.covered < 32 * MIB, "{paused:?}");
    engine.pass(&mut rig, 5).unwrap();
    assert_eq!(engine.status(&mut rig).scan.covered, paused.covered);
    assert!(engine.refused(&mut rig, Order::Scan(ScanOrder::Pause)).contains("paused already"));
    engine.close(&mut rig).unwrap().unwrap();
    rig.performed.clear();
    let mut engine = rig.open().unwrap();
    engine.pass(&mut rig, 5).unwrap();
    let again = engine.status(&mut rig).scan;
    assert_eq!((again.state, again.covered, again.pass), (ScanState::Paused, paused.covered, 1));
    engine.done(&mut rig, Order::Scan(ScanOrder::Resume));
    let last = engine.end_scan(&mut rig);
    assert!(last.complete);
    let large = rig.performed.iter().filter(|op| op.device == PRIMARY && op.len >= 65_536);
    let read: u64 = large.map(|op| op.len).sum();
    assert_eq!(read, rig.shape.capacity * 512 - paused.covered, "what was read before is not read again");
}

#[test]
fn a_pass_that_a_kill_interrupts_goes_on_by_itself() {
    let mut rig = made(LARGE);
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    engine.scan_until(&mut rig, 8 * MIB);
    let begun = engine.begin_order(&mut rig, Order::Save);
    while !engine.is_answered(begun) {
        engine.step(&mut rig).unwrap();
    }
    drop(engine);
    rig.kill();
    let mut engine = rig.open().unwrap();
    let scan = engine.status(&mut rig).scan;
    assert!(scan.state == ScanState::Running && scan.covered >= 8 * MIB, "{scan:?}");
    assert!(engine.end_scan(&mut rig).complete);
}

/// The disk grows meanwhile.
#[test]
fn a_pass_that_skipped_something_does_not_count() {
    let shape = Shape { labelled: false, ..LARGE };
    let mut rig = made(shape);
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    engine.done(&mut rig, Order::Scan(ScanOrder::Pause));
    let grown = Shape { capacity: shape.capacity + 2048, ..shape };
    rig.disks.extend(PRIMARY, grown.sizes()[0]);
    let order = Order::Resize { capacity: grown.capacity, primary_size: grown.sizes()[0] };
    assert!(matches!(engine.order(&mut rig, order).unwrap(), Reply::Resized(Ok(_))));
    engine.done(&mut rig, Order::Scan(ScanOrder::Resume));
    let last = engine.end_scan(&mut rig);
    let status = engine.status(&mut rig);
    assert_eq!((last.complete, status.scan.skipped_bytes, status.scan.last_complete), (false, MIB, None));
    assert_eq!(status.tally.health_scans, 0);
    assert!(engine.scan(&mut rig).complete);
}

#[test]
fn orders_that_make_no_sense_are_refused() {
    let mut rig = made(LARGE);
    let mut engine = rig.open().unwrap();
    for (order, why) in [
        (ScanOrder::Pause, "no pass is under way"),
        (ScanOrder::Resume, "no pass is paused"),
        (ScanOrder::Cancel, "no pass is under way"),
    ] {
        assert_eq!(engine.refused(&mut rig, Order::Scan(order)), why);
    }
    let range =
        |start, count| ScanScope { range: Some(SectorRange { start: Sector(start), count }), check_only: false };
    let why = engine.refused(&mut rig, Order::Scan(ScanOrder::Start(range(131_071, 2))));
    assert!(why.contains("last sector is 131071"), "{why}");
    engine.begin_scan(&mut rig, ScanScope::default());
    let why = engine.refused(&mut rig, Order::Scan(ScanOrder::Start(ScanScope::default())));
    assert_eq!(why, "pass 1 is under way");
    assert_eq!(engine.refused(&mut rig, Order::Scan(ScanOrder::Resume)), "pass 1 is not paused");
    engine.done(&mut rig, Order::Scan(ScanOrder::Cancel));
    let status = engine.status(&mut rig);
    assert_eq!((status.scan.state, status.tally.health_scans), (ScanState::Off, 0));
    assert!(!status.scan.last.unwrap().complete);
    // What was given up no longer reads.
    engine.pass(&mut rig, 1).unwrap();
    rig.performed.clear();
    engine.pass(&mut rig, 5).unwrap();
    assert_eq!(rig.performed.len(), 0);
    // Sectors are widened to their blocks.
    engine.begin_order(&mut rig, Order::Scan(ScanOrder::Start(range(9, 8))));
    let scan = engine.status_now(&mut rig).scan;
    assert_eq!((scan.scope.range, scan.total), (Some(range_of(8, 8192)), 8192));
    let last = engine.end_scan(&mut rig);
    assert_eq!((last.complete, last.pass), (false, 2), "a range is no pass over the volume");
}

#[test]
fn passes_begin_when_they_are_due_and_go_on_in_their_window() {
    let mut rig = made(SMALL);
    // The rig's clock begins on a Tuesday at 22:13:20 UTC.
    let window = "tue 22:30-23:00".parse().unwrap();
    rig.scan = ScanParams { interval: Some(86_400), window, ..ScanParams::default() };
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.status(&mut rig).scan.state, ScanState::Waiting);
    engine.pass(&mut rig, 599).unwrap();
    assert_eq!(engine.status(&mut rig).scan.pass, 0);
    engine.pass(&mut rig, 1).unwrap();
    let scan = engine.status(&mut rig).scan;
    assert_eq!((scan.pass, scan.state), (1, ScanState::OutsideWindow));
    assert!(scan.held.unwrap().contains("tue 22:30-23:00"));
    for _ in 0..16 {
        engine.pass(&mut rig, 60).unwrap();
    }
    let scan = engine.status(&mut rig).scan;
    assert!(scan.state == ScanState::Waiting && scan.last.unwrap().complete, "{scan:?}");
    // By order it does not wait for a window.
    engine.pass(&mut rig, 3600).unwrap();
    assert!(engine.scan(&mut rig).complete);
    let next = engine.status(&mut rig).scan.next.unwrap();
    assert_eq!(next, engine.status(&mut rig).scan.last.unwrap().ended + 86_400);
}

#[test]
fn a_pass_waits_for_a_device_that_is_gone() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    // The spare answers nothing any more.
    rig.bad = vec![Bad { device: SPARE, from: 0, to: u64::MAX, reads: Reads::Never, writes: true }];
    engine.begin_scan(&mut rig, ScanScope::default());
    for _ in 0..10 {
        engine.pass(&mut rig, 1).unwrap();
    }
    let scan = engine.status(&mut rig).scan;
    assert_eq!((scan.state, scan.held.as_deref()), (ScanState::Held, Some("the spare cannot be used")));
    rig.bad.clear();
    for _ in 0..10 {
        engine.pass(&mut rig, 1).unwrap();
    }
    assert!(engine.end_scan(&mut rig).complete);
}

/// What does not write does not move either.
#[test]
fn a_poisoned_volume_is_looked_at_and_not_touched() {
    let mut rig = begun(SMALL);
    rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, 0, &new(0)), Ok(Status::Ok));
    rig.bad_flushes = [1, 0];
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    rig.bad = vec![unreadable(PRIMARY, 4096, 512, Reads::Times(6)), bad_block(BLOCK_A)];
    rig.performed.clear();
    let last = engine.scan(&mut rig);
    assert_eq!(last.found, Found { recovered: 1, ..Found::default() });
    assert!(!rig.was_written(), "{:?}", rig.performed);
}
