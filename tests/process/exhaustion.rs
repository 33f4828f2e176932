//! A spare without a free slot, and requests that cannot be served on any disk.

use std::time::Duration;

use crate::guest::{Failed, Io};
use crate::model::{Model, pattern};
use crate::server::{Server, TRANSPORTS, Volume};

/// The fewest a volume can have.
pub(crate) const SLOTS: u64 = 16;

/// Fill the spare: blocks 1000, 1008, ... fail, and each is written once.
pub(crate) fn fill(server: &Server) -> (crate::guest::Guest, Model) {
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 512, 1);
    server.fault(&["--ops", "write", "--sectors", "1000-1199"]);
    for slot in 0..SLOTS {
        let sector = 1000 + 8 * slot;
        let write = model.write(sector, pattern(sector, 8, 2));
        guest.queue().one(write).unwrap();
    }
    (guest, model)
}

/// Scenario 10.
#[test]
fn a_full_spare_fails_only_writes_that_need_a_slot() {
    let volume = Volume::create(32, u32::try_from(SLOTS).unwrap());
    let server = volume.serve(&[]);
    let (mut guest, mut model) = fill(&server);
    let beyond = 1000 + 8 * SLOTS;
    assert_eq!(guest.write(beyond, pattern(beyond, 8, 3)), Err(Failed::IoErr));
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.blocks.slots_free), (SLOTS, 0));
    assert_eq!(status.state, ["spare-full"]);
    assert!(status.messages[0].contains("16"), "{:?}", status.messages);
    assert_eq!(server.events().iter().filter(|event| event.kind == "guest-error").count(), 1);
    // Remapped blocks and good ones go on, and so does the block that could not be written: it was not
    // changed, its last content is there.
    for sector in [1000, 960, 1000 + 8 * (SLOTS - 1), 1300] {
        let write = model.write(sector, pattern(sector, 8, 4));
        guest.queue().one(write).unwrap();
    }
    guest.flush().unwrap();
    model.check_all(guest.queue());
    server.no_faults();
    let write = model.write(beyond, pattern(beyond, 8, 5));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    // Scenario 12: with all slots written, the metadata on both sides of them is whole.
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    assert_eq!((server.list().len() as u64, server.status().counters.metadata_repairs), (SLOTS, 0));
    model.check_all(server.guest(1).queue());
}

/// E2: also where one request takes the slots of several shares at once.
#[test]
fn a_filling_spare_is_announced_however_fast_it_fills() {
    let volume = Volume::create(32, u32::try_from(SLOTS).unwrap());
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let announced = || {
        let events = server.events().into_iter().filter(|event| event.kind.starts_with("spare-f"));
        events.map(|event| (event.severity, event.kind, event.cause)).collect::<Vec<_>>()
    };
    let event = |severity: &str, kind: &str, used, percent| {
        (severity.to_owned(), kind.to_owned(), format!("{used} of {SLOTS} slots are used ({percent} %)"))
    };
    server.fault(&["--ops", "write", "--sectors", "1000-1199"]);
    guest.write(1000, pattern(1000, 12 * 8, 1)).unwrap();
    assert_eq!(announced(), []);
    guest.write(1096, pattern(1096, 2 * 8, 1)).unwrap();
    let filling = event("warn", "spare-filling", 14, 87);
    assert_eq!(announced(), std::slice::from_ref(&filling));
    guest.write(1112, pattern(1112, 2 * 8, 1)).unwrap();
    let full = event("error", "spare-full", 16, 100);
    assert_eq!(announced(), [filling.clone(), full.clone()]);
    // Full again.
    server.no_faults();
    server.order(&["release", "1000-1007"]);
    server.order(&["remap", "1000-1007"]);
    assert_eq!(announced(), [filling, full.clone(), full]);
}

/// What GET_LIFETIME answers: how much of the reserve is used, from 1 (less than 80 %) to 3 (90 % and more).
#[track_caller]
fn check_lifetime(guest: &mut crate::guest::Guest, pre_eol_info: u8) {
    let get_lifetime = Io::Raw { kind: 10, sector: 0, readable: Vec::new(), writable: 6 };
    assert_eq!(guest.queue().one(get_lifetime), Ok(vec![pre_eol_info, 0, 0, 0, 0, 0]));
}

/// E2, as the guest sees it, by the shares at which the operator is warned.
#[test]
fn a_guest_is_told_how_far_the_spare_is_used() {
    for transport in TRANSPORTS {
        let volume = Volume::create(32, u32::try_from(SLOTS).unwrap());
        let server = volume.serve(&["--transport", transport]);
        let mut guest = server.guest(1);
        assert_ne!(guest.features & 1 << 15, 0, "VIRTIO_BLK_F_LIFETIME");
        check_lifetime(&mut guest, 1);
        server.fault(&["--ops", "write", "--sectors", "1000-1199"]);
        for (blocks, pre_eol_info) in [(12, 1), (1, 2), (1, 2), (1, 3), (1, 3)] {
            let sector = 1000 + 8 * server.status().blocks.remapped;
            guest.write(sector, pattern(sector, 8 * blocks, 1)).unwrap();
            check_lifetime(&mut guest, pre_eol_info);
        }
        // Without a slot that is free all the more.
        assert_eq!(guest.write(1128, pattern(1128, 8, 1)), Err(Failed::IoErr));
        check_lifetime(&mut guest, 3);
        server.no_faults();
        server.order(&["release", "1000-1015"]);
        check_lifetime(&mut guest, 2);
        drop(guest);
        server.stop();
        for options in [&[][..], &["--read-only"]] {
            check_lifetime(&mut volume.serve(&[options, &["--transport", transport]].concat()).guest(1), 2);
        }
    }
}

/// Scenario 10, where the operator prefers waiting guests.
#[test]
fn a_write_held_by_a_full_spare_goes_on_when_a_slot_is_free() {
    let volume = Volume::create(32, u32::try_from(SLOTS).unwrap());
    let server = volume.serve(&["--on-spare-full", "hold"]);
    let (mut guest, mut model) = fill(&server);
    let beyond = 1000 + 8 * SLOTS;
    let write = model.write(beyond, pattern(beyond, 8, 3));
    guest.queue().submit(&write);
    assert_eq!(guest.queue().wait_for(Duration::from_millis(300)), []);
    let status = server.status();
    assert!(status.state == ["spare-full"] && status.messages[0].contains("wait (1 do)"), "{status:?}");
    // A held write holds nobody else: neither flushes nor its own block.
    let free = model.write(1300, pattern(1300, 8, 4));
    for io in [Io::Flush, free, Io::Read { sector: beyond, count: 8 }] {
        guest.queue().submit(&io);
        assert!(guest.queue().wait()[0].1.is_ok());
    }
    server.no_faults();
    server.order(&["release", "1000"]);
    assert_eq!(guest.queue().wait()[0].1, Ok(Vec::new()));
    model.check_all(guest.queue());
}

/// Scenario 26.
#[test]
fn requests_beyond_the_end_or_not_in_sectors_are_refused_and_change_nothing() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let end = 32 * 2048;
    let model = Model::written(&mut guest, end - 2048, 2048, 1);
    let queue = guest.queue();
    let write = |sector, count| Io::Write { sector, data: pattern(sector, count, 9) };
    let raw = |kind, sector, len, writable| Io::Raw { kind, sector, readable: vec![1; len], writable };
    for io in [
        Io::Read { sector: end, count: 1 },
        Io::Read { sector: end - 1, count: 2 },
        Io::Read { sector: u64::MAX, count: 1 },
        Io::Read { sector: u64::MAX / 512, count: 8 },
        write(end, 1),
        write(end - 8, 9),
        raw(1, end - 8, 513, 0),
        raw(1, end - 8, 100, 0),
        raw(0, end - 8, 0, 511),
        raw(0, end - 8, 0, 1025),
        Io::WriteZeroes(vec![(end - 8, 9, 0)]),
        Io::WriteZeroes(vec![(end - 8, 8, 0), (end, 1, 0)]),
        Io::Discard(vec![(u64::MAX, 8, 0)]),
        Io::Discard(vec![(end - 8, 9, 0)]),
        raw(11, 0, 20, 0),
    ] {
        assert_eq!(queue.one(io.clone()), Err(Failed::IoErr), "{io:?}");
    }
    // P1: one event for each, wherever it was refused.
    let events = server.events();
    let reported: Vec<_> = events.iter().filter(|event| event.kind == "guest-error").collect();
    assert!(reported.len() == 15 && reported.iter().all(|event| !event.cause.is_empty()), "{events:?}");
    for io in [
        raw(99, 0, 0, 0),
        Io::Discard(vec![(end - 8, 8, 1)]),
        Io::WriteZeroes(vec![(end - 8, 8, 2)]),
        raw(2, 0, 512, 0),
    ] {
        assert_eq!(queue.one(io.clone()), Err(Failed::Unsupp), "{io:?}");
    }
    model.check_all(queue);
    // The identity: 20 bytes, the same as the operator gave or the volume was born with.
    let serial = queue.one(raw(8, 0, 0, 20)).unwrap();
    assert_eq!(String::from_utf8(serial).unwrap(), server.status().volume.replace('-', "")[..20]);
    assert_eq!(server.status().state, ["ok"]);
}

/// Scenario 25.
#[test]
fn zeroing_several_ranges_over_remapped_blocks_leaves_zeros() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 8192, 4096, 1);
    server.order(&["remap", "8192", "8216-8231", "9000"]);
    // Whole and partial blocks, remapped, plain and, in the last two, failing.
    server.fault(&["--ops", "write", "--sectors", "10000-10007"]);
    for ranges in [
        vec![(8190 + 2, 4, 0), (8218, 30, 0), (8998, 5, 1)],
        vec![(9500, 1, 1), (9600, 400, 0)],
        vec![(10_001, 2, 0), (10_100, 8, 1)],
    ] {
        for (sector, count, _) in &ranges {
            model.zero(*sector, u64::from(*count));
        }
        assert_eq!(guest.queue().one(Io::WriteZeroes(ranges.clone())), Ok(Vec::new()), "{ranges:?}");
        model.check_all(guest.queue());
    }
    assert!(server.blocks("remapped").contains(&10_000));
    assert_eq!(guest.queue().one(Io::WriteZeroes(vec![(8192, 4096, 1)])), Ok(Vec::new()));
    model.zero(8192, 4096);
    model.check_all(guest.queue());
}

/// Scenario 25, W6: what is discarded may read as anything that was there, but remapped and pending blocks
/// are not touched.
#[test]
fn a_discard_skips_remapped_and_pending_blocks() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 8192, 4096, 1);
    server.order(&["remap", "8200", "9000-9015"]);
    server.fault(&["--ops", "read", "--sectors", "8305"]);
    assert_eq!(guest.read(8304, 8), Err(Failed::IoErr));
    let discard = Io::Discard(vec![(8192, 808, 0), (9000, 100, 0), (9500, 3, 0)]);
    assert_eq!(guest.queue().one(discard), Ok(Vec::new()));
    server.no_faults();
    for (sector, count) in [(8200, 8), (9000, 16), (8304, 8), (9100, 400), (9503, 2785)] {
        model.check(guest.queue(), sector, count);
    }
    let plain = guest.read(8400, 8).unwrap();
    assert!(plain == model.sectors(8400, 8) || plain.iter().all(|byte| *byte == 0));
    // A device without discard has taken the advice.
    server.fault(&["--ops", "discard", "--errno", "EOPNOTSUPP"]);
    assert_eq!(guest.queue().one(Io::Discard(vec![(8192, 8, 0)])), Ok(Vec::new()));
    assert_eq!(server.status().counters.guest_errors, 1);
}
