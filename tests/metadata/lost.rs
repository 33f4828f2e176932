//! Lost sectors: when they come back, and from where (R1, R3).

use vhost_remap::engine::create::CreateParams;
use vhost_remap::engine::open::OpenParams;
use vhost_remap::engine::request::Status;

use crate::commits::{MOVED, SMALL, begun, new, old};
use crate::crash::at_every_operation;
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, pattern};

/// Its first half is lost, its second was written since.
const HALF: u64 = 5;

fn written() -> Vec<u8> {
    pattern(HALF * BLOCK + 4, 4, 3)
}

/// The block as it is once its first half is found again.
fn whole() -> Vec<u8> {
    [&pattern(HALF * BLOCK, BLOCK, 1)[..4 * 512], &written()].concat()
}

/// A volume of devices with blocks of 4096 bytes. One block did not read when half of it was written; now it does.
fn half_lost() -> Rig {
    let mut rig = Rig::new(SMALL);
    let mut params: CreateParams = SMALL.create_params();
    (params.primary.logical_block, params.spare.logical_block) = (4096, 4096);
    rig.create_as(params).unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, HALF * BLOCK, &pattern(HALF * BLOCK, BLOCK, 1)), Ok(Status::Ok));
    assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
    let (from, to) = (HALF * 4096, (HALF + 1) * 4096);
    rig.bad = vec![Bad { device: PRIMARY, from, to, reads: Reads::Never, writes: true }];
    assert_eq!(engine.write(&mut rig, HALF * BLOCK + 4, &written()), Ok(Status::Ok));
    assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
    assert_eq!(engine.status(&mut rig).lost_sectors, 4);
    assert_eq!(engine.read(&mut rig, HALF * BLOCK, BLOCK), None);
    drop(engine);
    rig.kill();
    rig.bad.clear();
    rig
}

/// The sectors beside the lost ones are newer than the primary's; and the power may go at any moment of it.
#[test]
fn lost_sectors_that_read_again_are_kept_in_the_slot_beside_newer_ones() {
    let read = |rig: &mut Rig, _: &mut ()| {
        let mut engine = rig.try_open(rig.open_params())?.expect("opens");
        engine.begin_read(rig, HALF * BLOCK, BLOCK);
        engine.settle(rig)
    };
    at_every_operation(&half_lost(), read, |mut after, ()| {
        let mut engine = after.open().unwrap();
        assert_eq!(engine.read(&mut after, HALF * BLOCK, BLOCK), Some(whole()));
        assert_eq!(engine.status(&mut after).lost_sectors, 0);
        assert_eq!(engine.read(&mut after, HALF * BLOCK, BLOCK), Some(whole()));
    });
}

#[test]
fn a_read_only_volume_reads_a_lost_sector_and_heals_nothing() {
    let mut rig = half_lost();
    let params = OpenParams { read_only: true, ..rig.open_params() };
    let mut engine = rig.try_open(params).unwrap().unwrap();
    engine.start(&mut rig);
    assert_eq!(engine.read(&mut rig, HALF * BLOCK, BLOCK), Some(whole()));
    assert!(!rig.was_written());
}

/// R3: what was lost from a slot is older on the primary, also after the block has moved once more.
#[test]
fn a_sector_lost_from_a_slot_is_not_looked_for_on_the_primary() {
    let mut rig = begun(SMALL);
    let slots = rig.shape.layout().slots_start;
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, MOVED * BLOCK, &new(MOVED)), Ok(Status::Ok));
    let (from, to) = (slots, slots + 512);
    rig.bad = vec![Bad { device: SPARE, from, to, reads: Reads::Never, writes: true }];
    let mut expected = new(MOVED);
    for (slot, sector) in [(0, 4), (1, 6)] {
        let (from, to) = (slots + slot * 4096, slots + (slot + 1) * 4096);
        rig.bad.push(Bad { device: SPARE, from, to, reads: Reads::Good, writes: true });
        let data = pattern(MOVED * BLOCK + sector, 1, 9);
        assert_eq!(engine.write(&mut rig, MOVED * BLOCK + sector, &data), Ok(Status::Ok));
        let at = usize::try_from(sector).unwrap() * 512;
        expected[at..at + 512].copy_from_slice(&data);
        assert_eq!(engine.map(), [(MOVED, u32::try_from(slot).unwrap() + 1, 1, true)]);
        assert_ne!(old(MOVED), new(MOVED));
        assert_eq!(engine.read(&mut rig, MOVED * BLOCK, 1), None, "the primary has what was there before");
        assert_eq!(engine.read(&mut rig, MOVED * BLOCK + 1, 7).as_deref(), Some(&expected[512..]));
    }
}

/// W5: what is found of lost sectors does not replace what the guest writes to them meanwhile.
#[test]
fn a_write_to_lost_sectors_that_are_being_found_again_stays() {
    for steps in 0.. {
        let mut rig = half_lost();
        let mut engine = rig.open().unwrap();
        let read = engine.begin_read(&mut rig, HALF * BLOCK, BLOCK);
        for _ in 0..steps {
            engine.step(&mut rig).unwrap();
        }
        let is_over = engine.answer(read).is_some();
        let data = pattern(HALF * BLOCK, BLOCK, 9);
        let write = engine.begin_write(&mut rig, HALF * BLOCK, &data);
        engine.settle(&mut rig).unwrap();
        assert_eq!((engine.answer(read), engine.answer(write)), (Some(Status::Ok), Some(Status::Ok)), "{steps}");
        let found = engine.read(&mut rig, HALF * BLOCK, BLOCK);
        assert!(found == Some(data), "after {steps} steps, what was found again has replaced what was written");
        if is_over {
            break;
        }
    }
}
