//! Volumes of later programs (E4): a later format and incompatible features are refused, read-only compatible
//! ones are only read, compatible ones are kept.

use vhost_remap::device::DeviceIndex;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::open::OpenError;
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::{Home, Place};

use crate::commits::{SMALL, bad_block, begun};
use crate::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, pattern, range_of};
use crate::seat::{At, Kind, Seat, age, seal, seats, u32_at, u64_at};

/// Where a superblock has its version, and its masks of features.
const VERSION: usize = 8;
const COMPAT: usize = 16;
const RO_COMPAT: usize = 24;
const INCOMPAT: usize = 32;

fn superblocks(rig: &Rig, is: impl Fn(&Seat) -> bool) -> Vec<Seat> {
    let wanted = |seat: &Seat| matches!(seat.kind, Kind::Superblock(_)) && is(seat);
    seats(&rig.shape).into_iter().filter(wanted).collect()
}

/// Set a bit of a superblock, and its checksum right.
fn set_bit(rig: &Rig, seat: &Seat, mask: usize, bit: usize) {
    let mut bytes = seat.read(rig);
    bytes[mask + bit / 8] |= 1 << (bit % 8);
    seal(&mut bytes, seat.kind);
    seat.write(rig, &bytes);
}

fn set_version(rig: &Rig, seat: &Seat, version: u8) {
    let mut bytes = seat.read(rig);
    bytes[VERSION] = version;
    seal(&mut bytes, seat.kind);
    seat.write(rig, &bytes);
}

fn device_of(at: At) -> DeviceIndex {
    if at == At::Label { PRIMARY } else { SPARE }
}

/// A volume with a remapped block, not open.
fn volume(shape: Shape) -> Rig {
    let mut rig = begun(shape);
    rig.bad.clear();
    rig
}

/// Refused with this error, whichever way it is opened, and nothing is written.
#[track_caller]
fn check_refused(rig: &mut Rig, expected: &OpenError) {
    for read_only in [false, true] {
        let mut params = rig.open_params();
        params.read_only = read_only;
        let error = rig.try_open(params).unwrap().map(drop).expect_err("this must be refused");
        assert_eq!(error, *expected);
        assert!(!rig.was_written());
        rig.kill();
    }
}

#[test]
fn a_later_format_version_is_refused() {
    let base = volume(SMALL);
    for at in [At::Head, At::Tail, At::Label] {
        let all = superblocks(&base, |seat| seat.at == at);
        // In one of the copies, and in all of them.
        for seats in [&all[..1], &all[1..], &all[..]] {
            let mut rig = base.fork();
            seats.iter().for_each(|seat| set_version(&rig, seat, 2));
            check_refused(&mut rig, &OpenError::Version { device: device_of(at), found: 2 });
        }
    }
    // A later version in the place that is looked for when the head is gone.
    let mut rig = base.fork();
    for seat in superblocks(&base, |seat| seat.at != At::Label) {
        match seat.at {
            At::Head => seat.write(&rig, &[0; 4096]),
            _ => set_version(&rig, &seat, 7),
        }
    }
    check_refused(&mut rig, &OpenError::Version { device: SPARE, found: 7 });
}

#[test]
fn an_unknown_incompatible_feature_is_refused() {
    let base = volume(SMALL);
    for bit in 0..64 {
        for devices in [&[At::Head, At::Tail, At::Label][..], &[At::Head, At::Tail], &[At::Label]] {
            let mut rig = base.fork();
            for seat in superblocks(&base, |seat| devices.contains(&seat.at)) {
                set_bit(&rig, &seat, INCOMPAT, bit);
            }
            check_refused(&mut rig, &OpenError::Features { device: device_of(devices[0]), unknown: 1 << bit });
        }
    }
}

/// Only the newest superblock speaks for the volume.
#[test]
fn a_feature_that_an_older_superblock_names_is_history() {
    let mut rig = volume(SMALL);
    let newest = superblocks(&rig, |_| true).iter().map(|seat| age(seat.kind, &seat.read(&rig))).max();
    let older = superblocks(&rig, |seat| Some(age(seat.kind, &seat.read(&rig))) != newest);
    assert_eq!(older.len(), 3);
    for seat in &older {
        set_bit(&rig, seat, INCOMPAT, 5);
        set_bit(&rig, seat, RO_COMPAT, 5);
    }
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, 0, &pattern(0, BLOCK, 3)), Ok(Status::Ok));
}

#[test]
fn an_unknown_read_only_compatible_feature_opens_read_only() {
    let base = volume(SMALL);
    for bit in 0..64 {
        for devices in [&[At::Head, At::Tail, At::Label][..], &[At::Head, At::Tail], &[At::Label]] {
            let mut rig = base.fork();
            for seat in superblocks(&base, |seat| devices.contains(&seat.at)) {
                set_bit(&rig, &seat, RO_COMPAT, bit);
            }
            // Even something to repair is left as it is.
            let layout = rig.shape.layout();
            rig.disks.poke(SPARE, layout.table(Place::Tail, Home::A, 0), &[0; 4096]);
            let mut engine = rig.open().unwrap();
            let why = engine.causes("read-only");
            assert_eq!(why.len(), 1);
            assert!(why[0].contains(&format!("{:#x}", 1_u64 << bit)), "{why:?}");
            assert_eq!(engine.causes("metadata-damaged").len(), 1);
            assert!(engine.status(&mut rig).mode.read_only);
            assert_eq!(engine.map(), [(20, 0, 0, false)]);
            assert_eq!(engine.read(&mut rig, 20 * BLOCK, BLOCK), Some(pattern(20 * BLOCK, BLOCK, 1)));
            assert_eq!(engine.write(&mut rig, 0, &pattern(0, BLOCK, 3)), Ok(Status::IoErr));
            assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
            assert!(engine.close(&mut rig).unwrap().is_err());
            engine.pass(&mut rig, 100).unwrap();
            assert!(!rig.was_written());
        }
    }
}

/// Whatever rewrites a superblock keeps what it does not know: opening, closing, a place that is retired, a
/// copy that is repaired.
#[test]
fn an_unknown_compatible_feature_is_ignored_and_kept() {
    for labelled in [true, false] {
        let mut rig = volume(Shape { labelled, ..SMALL });
        let mask = 0x8000_0000_0001_0002_u64;
        for seat in superblocks(&rig, |_| true) {
            (0..64).filter(|bit| mask >> bit & 1 == 1).for_each(|bit| set_bit(&rig, &seat, COMPAT, bit));
        }
        let check = |rig: &Rig| {
            for seat in superblocks(rig, |_| true) {
                let bytes = seat.read(rig);
                assert_eq!(u64_at(&bytes, COMPAT), mask, "{seat:?}");
                assert_eq!((u32_at(&bytes, VERSION), &bytes[RO_COMPAT..40]), (1, &[0; 16][..]), "{seat:?}");
            }
        };
        let last = superblocks(&rig, |seat| seat.at == At::Tail)[1];
        last.write(&rig, &[0; 4096]);
        let mut engine = rig.open().unwrap();
        check(&rig);
        engine.done(&mut rig, Order::Remap(range_of(100 * BLOCK, 4096)));
        engine.close(&mut rig).unwrap().unwrap();
        check(&rig);
        let mut engine = rig.open().unwrap();
        let layout = rig.shape.layout();
        let from = layout.table(Place::Head, Home::A, 0);
        let homes = Bad { device: SPARE, from, to: from + 8192, reads: Reads::Good, writes: true };
        rig.bad = vec![bad_block(50), homes];
        assert_eq!(engine.write(&mut rig, 50 * BLOCK, &pattern(0, BLOCK, 3)), Ok(Status::Ok));
        assert_eq!(engine.causes("place-retired").len(), 1);
        check(&rig);
    }
}
