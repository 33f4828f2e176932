//! The label's list of remapped blocks, by which a primary is served whose spare is lost: as it was at one
//! moment, or not gone by.

use vhost_remap::device::memory::Keep;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::open::OpenError;
use vhost_remap::engine::request::Status;

use crate::crash::at_every_operation;
use crate::rig::{BLOCK, Bad, Reads, Rig, SPARE, Shape, pattern, range_of};

/// Slots of two pages.
const SHAPE: Shape = Shape { capacity: 512 * BLOCK, max_remaps: 520, labelled: true };
/// Moves from a slot of the first page to one of the second.
const MOVING: u64 = 50;

/// R1: a block that moved is in the list that was written before, and in the one after: of a list that is half
/// written, it could be on neither page.
#[test]
fn a_label_whose_list_is_half_written_is_not_gone_by() {
    let mut base = Rig::new(SHAPE);
    base.create().unwrap().unwrap();
    let mut engine = base.open().unwrap();
    engine.done(&mut base, Order::Remap(range_of(0, 508 * 4096)));
    engine.done(&mut base, Order::Save);
    let slot = engine.map().iter().find(|entry| entry.0 == MOVING).expect("remapped").1;
    let start = base.shape.layout().slots_start + u64::from(slot) * 4096;
    base.bad = vec![Bad { device: SPARE, from: start, to: start + 4096, reads: Reads::Good, writes: true }];
    let data = pattern(MOVING * BLOCK, BLOCK, 1);
    assert_eq!(engine.write(&mut base, MOVING * BLOCK, &data), Ok(Status::Ok));
    let moved = engine.map().iter().find(|entry| entry.0 == MOVING).expect("moved").1;
    assert!(slot < 508 && moved >= 508, "from slot {slot} to {moved}");
    drop(engine);
    base.kill();
    let (mut opened, mut refused) = (0, 0);
    // Opening writes the list.
    let open = |rig: &mut Rig, _: &mut ()| {
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        engine.pass(rig, 0)
    };
    at_every_operation(&base, open, |mut after, ()| match after.open_degraded() {
        Ok(engine) => {
            opened += 1;
            let found: Vec<u32> = engine.map().iter().filter(|entry| entry.0 == MOVING).map(|entry| entry.1).collect();
            assert!(found == [slot] || found == [moved], "block {MOVING} is in slots {found:?}");
        }
        Err(error) => {
            refused += 1;
            assert_eq!(error, OpenError::LabelHalfWritten);
        }
    });
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused");
}

/// Closed cleanly, the volume has a list that is whole and has its date, though the power goes at once.
#[test]
fn the_label_of_a_closed_volume_can_be_gone_by() {
    let mut rig = Rig::new(SHAPE);
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(8, 4096)));
    let map = engine.map();
    assert_eq!(engine.close(&mut rig), Ok(Ok(())));
    drop(engine);
    rig.crash(|_, _| Keep::Drop);
    assert_eq!(rig.open_degraded().unwrap().map(), map);
}
