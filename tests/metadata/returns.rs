//! The spare comes back after a commit that a failed flush left torn, and the power goes meanwhile: a whole copy
//! of each page is there at any moment (O1, W8).

use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::Status;

use crate::commits::bad_block;
use crate::crash::at_every_operation;
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, Cut, Reads, Rig, SPARE, Shape, pattern, range_of};
use crate::seat::{At, Kind, Seat, age, is_whole, retired, seats};

/// Entries of the last slots lie in another sector of their page than its header.
const SHAPE: Shape = Shape { capacity: 80 * BLOCK, max_remaps: 72, labelled: false };
const REMAPPED: u64 = 62;

fn crowded() -> Rig {
    let mut rig = Rig::new(SHAPE);
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(0, 62 * 4096)));
    drop(engine);
    rig.kill();
    rig
}

/// Move a block; the flush of its commit fails, and drops every other sector.
fn fail_commit(rig: &mut Rig) -> Result<Engine, Cut> {
    let mut engine = rig.try_open(rig.open_params())?.expect("opens");
    rig.performed.clear();
    (rig.torn, rig.bad) = (Some(2), vec![bad_block(REMAPPED)]);
    let token = engine.begin_write(rig, REMAPPED * BLOCK, &pattern(REMAPPED * BLOCK, BLOCK, 1));
    while !rig.has_page_writes() {
        engine.step(rig)?;
    }
    rig.bad_flushes = [0, 1];
    engine.settle(rig)?;
    assert_eq!(engine.answer(token), Some(Status::IoErr));
    Ok(engine)
}

fn check(mut after: Rig) {
    let map = after.open().unwrap_or_else(|error| panic!("{error}")).map();
    assert!(map.len() >= 62 && map.iter().filter(|entry| entry.0 < REMAPPED).count() == 62, "{map:?}");
}

#[test]
fn the_power_may_go_while_a_torn_commit_is_made_good() {
    let come_back = |rig: &mut Rig, _: &mut ()| {
        let mut engine = fail_commit(rig)?;
        engine.pass(rig, 1)?;
        engine.pass(rig, 1)
    };
    at_every_operation(&crowded(), come_back, |after, ()| check(after));
}

/// Two superblocks of one generation say the same. An attempt to retire a place that a failed flush left half done
/// is one that was made.
#[test]
fn no_two_superblocks_of_one_generation_differ() {
    let come_back = |rig: &mut Rig, _: &mut ()| {
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        rig.performed.clear();
        (rig.torn, rig.bad) = (Some(2), vec![bad_block(REMAPPED)]);
        let head = seats(&SHAPE).into_iter().filter(|seat| seat.at == At::Head && matches!(seat.kind, Kind::Table(..)));
        let bad = head.map(|seat| (seat.offset, seat.offset + 4096));
        rig.bad.extend(bad.map(|(from, to)| Bad { device: SPARE, from, to, reads: Reads::Good, writes: true }));
        engine.begin_write(rig, REMAPPED * BLOCK, &pattern(REMAPPED * BLOCK, BLOCK, 1));
        while !rig.has_page_writes() {
            engine.step(rig)?;
        }
        rig.bad_flushes = [0, 1];
        engine.settle(rig)?;
        rig.bad.clear();
        engine.pass(rig, 1)?;
        engine.pass(rig, 1)
    };
    at_every_operation(&crowded(), come_back, |after, ()| {
        let superblocks = seats(&SHAPE).into_iter().filter(|seat| matches!(seat.kind, Kind::Superblock(_)));
        let whole = superblocks
            .map(|seat| (seat.kind, seat.read(&after), seat))
            .filter(|(_, bytes, seat)| is_whole(seat, bytes));
        let found: Vec<(u64, u32, Seat)> =
            whole.map(|(kind, bytes, seat)| (age(kind, &bytes), retired(&bytes), seat)).collect();
        for (generation, retired, seat) in &found {
            let same = found.iter().filter(|other| other.0 == *generation);
            same.for_each(|other| assert_eq!(other.1, *retired, "{seat:?} and {:?} of {generation}", other.2));
        }
    });
}
