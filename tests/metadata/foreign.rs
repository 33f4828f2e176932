//! Devices that do not belong together, or that somebody else has changed, are refused (E4).

use uuid::Uuid;
use vhost_remap::engine::create::CreateParams;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::open::{OpenError, OpenParams};

use crate::commits::SMALL;
use crate::rig::{MTIME, PRIMARY, Rig, Shape, range_of};
use crate::seat::{At, Kind, seats};

/// A volume with a remapped block, closed cleanly.
fn closed(shape: Shape) -> Rig {
    let mut rig = Rig::new(shape);
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    engine.done(&mut rig, Order::Remap(range_of(8, 4096)));
    assert_eq!(engine.close(&mut rig), Ok(Ok(())));
    drop(engine);
    rig.kill();
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
