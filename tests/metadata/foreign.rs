//! Devices that do not belong together, or that somebody else has changed, are refused (E4).

use uuid::Uuid;
use vhost_remap::device::memory::Keep;
use vhost_remap::engine::create::CreateParams;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::open::{OpenError, OpenParams};

use crate::commits::{SMALL, begun};
use crate::rig::{MTIME, PRIMARY, Rig, Shape, range_of};
use crate::seat::{At, Kind, Seat, seal, seats, u64_at};

/// A volume with a remapped block, closed cleanly.
fn closed(shape: Shape) -> Rig {
    let mut rig = Rig::new(shape);
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(8, 4096)));
    assert_eq!(engine.close(&mut rig), Ok(Ok(())));
    drop(engine);
    // A close that is over outlives the power.
    rig.crash(|_, _| Keep::Drop);
    rig
}

fn refusal(rig: &mut Rig, params: OpenParams) -> Option<OpenError> {
    let error = rig.try_open(params).expect("no end was set").map(drop).err();
    assert!(error.is_none() || !rig.was_written(), "what is refused is left alone");
    error
}

#[test]
fn superblocks_of_two_volumes_on_one_spare_are_refused() {
    let mut rig = closed(SMALL);
    let mut other = Rig::new(SMALL);
    let params = CreateParams { set: Uuid::from_u128(99), ..SMALL.create_params() };
    other.create_as(params).unwrap().unwrap();
    let tail = |kind| matches!(kind, Kind::Superblock(_));
    for seat in seats(&SMALL).into_iter().filter(|seat| seat.at == At::Tail && tail(seat.kind)) {
        seat.write(&rig, &seat.read(&other));
    }
    let params = rig.open_params();
    assert!(matches!(refusal(&mut rig, params), Some(OpenError::Mixed(..))));
}

/// By its time of change where it is the same file; another file is told by its samples.
#[test]
fn a_primary_that_somebody_else_changed_is_refused_unless_that_was_wanted() {
    for labelled in [true, false] {
        let mut rig = closed(Shape { labelled, ..SMALL });
        let mut changed = rig.open_params();
        changed.primary.mtime_ns = MTIME + 1;
        assert!(matches!(refusal(&mut rig, changed.clone()), Some(OpenError::External(..))), "labelled: {labelled}");
        changed.accept_external = true;
        assert_eq!(refusal(&mut rig, changed), None);
    }
}

#[test]
fn another_primary_than_the_adopted_one_is_refused_unless_its_samples_are_the_same() {
    let mut rig = closed(Shape { labelled: false, ..SMALL });
    let mut copy = rig.open_params();
    (copy.primary.wwn, copy.primary.inode, copy.primary.mtime_ns) = ("naa.another".to_owned(), 8, MTIME + 1);
    assert_eq!(refusal(&mut rig.fork(), copy.clone()), None, "a copy of it will do");
    rig.disks.poke(PRIMARY, 0, &[0x5a; 4096]);
    assert!(matches!(refusal(&mut rig, copy), Some(OpenError::NotAdopted(_))));
}

/// While the volume is open: a spare that comes back has to be the one that went, and no older copy of it.
#[test]
fn what_comes_back_in_place_of_the_spare_is_not_used() {
    let mut rig = begun(SMALL);
    rig.bad.clear();
    let mut engine = rig.open().unwrap();
    rig.bad_flushes = [0, 1];
    let _ = engine.order(&mut rig, Order::Save).unwrap();
    assert!(!engine.status(&mut rig).mode.spare_up);
    let superblocks = seats(&SMALL).into_iter().filter(|seat| matches!(seat.kind, Kind::Superblock(_)));
    let own: Vec<(Seat, Vec<u8>)> =
        superblocks.filter(|seat| seat.at != At::Label).map(|seat| (seat, seat.read(&rig))).collect();
    let older = |bytes: &mut [u8]| {
        let generation = u64_at(bytes, 80) - 2;
        bytes[80..88].copy_from_slice(&generation.to_le_bytes());
    };
    let another = |bytes: &mut [u8]| bytes[40] ^= 1;
    for change in [&older as &dyn Fn(&mut [u8]), &another] {
        for (seat, bytes) in &own {
            let mut bytes = bytes.clone();
            change(&mut bytes);
            seal(&mut bytes, seat.kind);
            seat.write(&rig, &bytes);
        }
        (0..3).for_each(|_| engine.pass(&mut rig, 1).unwrap());
        assert!(!engine.status(&mut rig).mode.spare_up);
    }
    own.iter().for_each(|(seat, bytes)| seat.write(&rig, bytes));
    (0..3).for_each(|_| engine.pass(&mut rig, 1).unwrap());
    assert!(engine.status(&mut rig).mode.spare_up);
}
