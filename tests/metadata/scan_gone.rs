//! What a pass does with devices that go and come back: nothing is called bad for it, and nothing moves.

use vhost_remap::device::{Errno, OpKind};
use vhost_remap::engine::scan::{Found, ScanParams, ScanScope};

use crate::commits::{BLOCK_A, SMALL};
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig};
use crate::scan::{made, unreadable};

/// Nothing of the primary answers.
pub(crate) fn gone() -> Vec<Bad> {
    vec![Bad { device: PRIMARY, from: 0, to: u64::MAX, reads: Reads::Never, writes: true }]
}

/// Reads of single blocks of the primary.
fn singles(rig: &Rig) -> usize {
    rig.performed.iter().filter(|op| op.device == PRIMARY && op.kind == OpKind::Read && op.len == 4096).count()
}

fn goes(engine: &Engine) -> usize {
    engine.causes("device-gone").len()
}

/// The guest finds out about it, while the pass is looking for the blocks that fail.
#[test]
fn blocks_that_failed_while_the_device_was_gone_are_not_weak() {
    for errno in [libc::EIO, libc::ENODEV] {
        let mut rig = made(SMALL);
        rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
        let mut engine = rig.open().unwrap();
        (rig.bad, rig.bad_errno) = (gone(), Errno(errno));
        rig.performed.clear();
        engine.begin_scan(&mut rig, ScanScope::default());
        for _ in 0..100 {
            engine.tick(&mut rig, 1);
            while singles(&rig) < 3 && engine.step(&mut rig).unwrap() {}
        }
        engine.begin_read(&mut rig, 100 * BLOCK, BLOCK);
        engine.settle(&mut rig).unwrap();
        assert_eq!(goes(&engine), 1);
        rig.bad.clear();
        for _ in 0..30 {
            engine.pass(&mut rig, 1).unwrap();
        }
        let last = engine.end_scan(&mut rig);
        assert!(last.complete && last.found == Found::default(), "{last:?}");
        let status = engine.status(&mut rig);
        assert_eq!((status.live, status.tally.recovered_reads, goes(&engine)), (0, 0, 1));
    }
}

#[test]
fn a_block_that_takes_the_device_away_is_left_alone_after_some_times() {
    let mut rig = made(SMALL);
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Never)];
    rig.bad_errno = Errno(libc::ENXIO);
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    let last = (0..300).find_map(|_| {
        engine.pass(&mut rig, 1).unwrap();
        engine.status(&mut rig).scan.last
    });
    let scan = engine.status(&mut rig).scan;
    assert_eq!(engine.causes("device-gone").len(), 3);
    assert!(last.is_some_and(|last| !last.complete) && scan.covered == scan.total, "{scan:?}");
    let [left_out] = &scan.skipped[..] else { panic!("{scan:?}") };
    assert_eq!((left_out.offset, left_out.len), (BLOCK_A * 4096, 4096));
    assert!(left_out.why.contains("whenever"), "{left_out:?}");
}

/// A read that outlasts the device's absence, as the guest has found out about it. Where the block is known to fail,
/// the pass reads it for that; otherwise it comes upon it.
fn check_late_read(is_known: bool) {
    let mut rig = made(SMALL);
    rig.scan = ScanParams { move_weak: true, ..ScanParams::default() };
    let mut engine = rig.open().unwrap();
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Never)];
    if is_known {
        assert_eq!(engine.read(&mut rig, BLOCK_A * BLOCK, BLOCK), None);
        rig.bad.clear();
    }
    rig.held_read = Some((PRIMARY, BLOCK_A * 4096));
    engine.begin_scan(&mut rig, ScanScope::default());
    for _ in 0..30 {
        engine.tick(&mut rig, 1);
        engine.settle_but_for_held(&mut rig).unwrap();
    }
    rig.bad = gone();
    engine.begin_read(&mut rig, 100 * BLOCK, BLOCK);
    engine.settle_but_for_held(&mut rig).unwrap();
    assert_eq!(goes(&engine), 1);
    rig.bad.clear();
    for _ in 0..10 {
        engine.tick(&mut rig, 1);
        engine.settle_but_for_held(&mut rig).unwrap();
    }
    rig.bad = vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Times(1))];
    rig.held_read = None;
    let last = engine.end_scan(&mut rig);
    assert!(last.complete && last.found == Found::default(), "{last:?}");
    let status = engine.status(&mut rig);
    assert_eq!((status.live, status.tally.recovered_reads, status.pending), (0, 0, 0));
}

#[test]
fn a_block_whose_read_ends_when_the_device_is_back_is_not_weak() {
    check_late_read(false);
}

#[test]
fn a_known_block_whose_read_ends_when_the_device_is_back_is_not_weak() {
    check_late_read(true);
}

/// As when a disk resets itself for a sector, and is away for longer than it takes to read others.
#[test]
fn of_a_device_that_goes_for_a_block_only_that_block_is_left_out() {
    let bad = || vec![unreadable(PRIMARY, BLOCK_A * 4096, 4096, Reads::Never)];
    let mut rig = made(SMALL);
    rig.bad = bad();
    let mut engine = rig.open().unwrap();
    engine.begin_scan(&mut rig, ScanScope::default());
    let mut back = 0;
    let last = (0..2000).find_map(|second| {
        if second == back {
            rig.bad = bad();
        }
        engine.tick(&mut rig, 1);
        rig.performed.clear();
        while engine.step(&mut rig).unwrap() {
            let touches = |op: &vhost_remap::device::memory::Pending| {
                op.device == PRIMARY && op.offset <= BLOCK_A * 4096 && BLOCK_A * 4096 < op.offset + op.len
            };
            if rig.performed.last().is_some_and(touches) {
                (rig.bad, back) = (gone(), second + 12);
                rig.performed.clear();
            }
        }
        engine.status_now(&mut rig).scan.last
    });
    // With its piece, with its neighbours, and by itself.
    assert_eq!(goes(&engine), 1 + 1 + 3);
    let scan = engine.status(&mut rig).scan;
    assert!(last.is_some_and(|last| last.found == Found::default()) && scan.covered == scan.total, "{scan:?}");
    let [left_out] = &scan.skipped[..] else { panic!("{scan:?}") };
    assert_eq!((left_out.offset, left_out.len), (BLOCK_A * 4096, 4096));
}
