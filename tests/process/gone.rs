//! A primary that is not there.

use std::time::{Duration, Instant};

use crate::guest::{Failed, Io};
use crate::model::{Model, pattern};
use crate::server::{Server, Volume};

fn take_away(server: &Server) {
    server.fault(&["--ops", "read,write,flush,discard,identify", "--errno", "ENODEV"]);
}

/// E1: nothing is remapped, and the volume is back when the device is.
#[test]
fn a_lost_primary_fails_requests_and_comes_back_by_itself() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "960-967"]);
    take_away(&server);
    for io in [
        Io::Write { sector: 1000, data: pattern(1000, 8, 2) },
        Io::Read { sector: 1000, count: 8 },
        Io::Read { sector: 960, count: 64 },
        Io::Flush,
    ] {
        assert_eq!(guest.queue().one(io.clone()), Err(Failed::IoErr), "{io:?}");
    }
    let status = server.status();
    assert_eq!((&status.state[..], &status.devices[0].state[..]), (&["primary-gone".to_owned()][..], "gone"));
    assert!(status.messages[0].contains("disk.img"), "{:?}", status.messages);
    assert_eq!((status.blocks.remapped, status.blocks.pending, status.blocks.lost_sectors), (1, 0, 0));
    let why = server.refused(&["clear"]);
    assert!(why.contains("primary does not answer"), "{why}");
    // What lives on the spare is still there.
    model.check(guest.queue(), 960, 8);
    assert_eq!(server.events().iter().filter(|event| event.kind == "device-gone").count(), 1);
    server.no_faults();
    server.await_event("device-back");
    model.check_all(guest.queue());
    let write = model.write(1000, pattern(1000, 8, 3));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    model.check_all(guest.queue());
    assert_eq!(server.status().state, ["ok"]);
    assert_eq!(server.blocks("remapped"), [960]);
}

/// E1 with `--on-device-loss hold`: the guest sees no error.
#[test]
fn held_requests_go_on_when_the_primary_is_back() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--on-device-loss", "hold"]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    take_away(&server);
    let queue = guest.queue();
    let ios = [
        Io::Read { sector: 960, count: 8 },
        model.write(1000, pattern(1000, 16, 2)),
        Io::WriteZeroes(vec![(1100, 8, 0)]),
    ];
    model.zero(1100, 8);
    let mut tokens: Vec<u64> = ios.iter().map(|io| queue.submit(io)).collect();
    server.await_event("device-gone");
    // Only now: a flush that the device itself had failed would poison the volume (F2).
    tokens.push(queue.submit(&Io::Flush));
    assert_eq!(queue.wait_for(Duration::from_millis(300)), []);
    assert_eq!(server.status().state[0], "primary-gone");
    server.no_faults();
    let mut ended = Vec::new();
    while ended.len() < tokens.len() {
        ended.extend(queue.wait());
    }
    assert!(ended.iter().all(|(_, reply)| reply.is_ok()), "{ended:?}");
    model.check_all(queue);
    let status = server.status();
    assert_eq!((status.counters.guest_errors, status.blocks.remapped), (0, 0));
}

#[test]
fn held_requests_fail_when_their_time_is_over() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--on-device-loss", "hold=1"]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    take_away(&server);
    let started = std::time::Instant::now();
    assert_eq!(guest.read(960, 8), Err(Failed::IoErr));
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
    server.no_faults();
    server.await_event("device-back");
    model.check_all(guest.queue());
}

/// E1: EIO everywhere with a failing probe is a lost device too, and never a disk full of bad blocks.
#[test]
fn a_primary_that_answers_eio_to_everything_is_gone() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    server.fault(&["--ops", "read,write,flush"]);
    assert_eq!(guest.write(1000, pattern(1000, 8, 2)), Err(Failed::IoErr));
    let status = server.status();
    assert_eq!((&status.state[0][..], status.blocks.remapped), ("primary-gone", 0));
    server.no_faults();
    server.await_event("device-back");
    model.check(guest.queue(), 960, 40);
    model.check(guest.queue(), 1008, 208);
}

/// E1: that the probe passed a moment ago says nothing of now.
#[test]
fn a_primary_that_goes_right_after_a_probe_is_gone_and_not_full_of_bad_sectors() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--on-device-loss", "hold"]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    server.fault(&["--ops", "read", "--sectors", "1003", "--count", "1"]);
    model.check(guest.queue(), 960, 256);
    let recovered = server.await_event("recovered-read");
    assert!(recovered.cause.contains("os error 5"), "{recovered:?}");
    server.fault(&["--ops", "read,write,flush"]);
    let queue = guest.queue();
    queue.submit(&Io::Read { sector: 1100, count: 8 });
    server.await_event("device-gone");
    assert_eq!(queue.wait_for(Duration::from_millis(100)), []);
    server.no_faults();
    assert_eq!(queue.wait()[0].1.as_deref(), Ok(model.sectors(1100, 8)));
    assert_eq!((server.status().counters.guest_errors, server.list().len()), (0, 0));
}

/// Starts of areas further apart than a quarter of a 32 MiB volume.
const FAR_APART: [u64; 3] = [2048, 24_000, 48_000];

/// E1: only the guest's own writes count, not what the ladders try again.
#[test]
fn bad_areas_far_apart_that_are_hit_at_once_are_no_lost_device() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::zeros(0, 65_536);
    for start in FAR_APART {
        server.fault(&["--ops", "write", "--sectors", &format!("{start}-{}", start + 159)]);
    }
    // Thirty writes over two blocks each: the ladders fail four times as often.
    let writes: Vec<Io> = (0..30)
        .map(|i| FAR_APART[i % 3] + i as u64 / 3 * 16)
        .map(|sector| model.write(sector, pattern(sector, 16, 2)))
        .collect();
    for reply in guest.queue().run(&writes) {
        reply.unwrap();
    }
    let status = server.status();
    assert_eq!((&status.state[..], status.blocks.remapped), (&["ok".to_owned()][..], 60));
    model.check_all(guest.queue());
}

/// E1: a device that takes no write anywhere is lost, even if it reads; it takes an operator to say otherwise.
#[test]
fn a_storm_of_failed_writes_trips_the_breaker_until_the_operator_clears_it() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    server.fault(&["--ops", "write"]);
    let writes: Vec<Io> = (0..40)
        .map(|i| FAR_APART[i % 3] + i as u64 / 3 * 8)
        .map(|sector| Io::Write { sector, data: pattern(sector, 8, 2) })
        .collect();
    let failed = guest.queue().run(&writes).iter().filter(|reply| reply.is_err()).count();
    assert!(failed >= 9, "{failed}");
    let gone = server.await_event("device-gone");
    assert!(gone.action.contains("until `clear`"), "{}", gone.action);
    let status = server.status();
    assert_eq!(&status.state[0][..], "primary-gone");
    assert!(status.blocks.remapped <= 31, "{}", status.blocks.remapped);
    server.no_faults();
    assert_eq!(guest.read(960, 8), Err(Failed::IoErr));
    server.order(&["clear"]);
    assert_eq!(server.status().state, ["ok"]);
    model.check_all(guest.queue());
    guest.write(2048, pattern(2048, 8, 3)).unwrap();
}

/// E1, Space: the disk is full, which is nobody's bad sector.
#[test]
fn no_space_fails_only_that_write() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    server.fault(&["--ops", "write", "--errno", "ENOSPC", "--count", "1"]);
    assert_eq!(guest.write(1000, pattern(1000, 8, 2)), Err(Failed::IoErr));
    assert!(server.list().is_empty());
    assert_eq!(server.status().state, ["ok"]);
    model.check_all(guest.queue());
    guest.write(1000, pattern(1000, 8, 3)).unwrap();
}

/// E1: a probe ends with its first good read, and the next one has not to wait behind the bad ones of all before.
#[test]
fn probes_read_a_place_that_takes_its_time_once_at_a_time() {
    const SECONDS: u64 = 20;
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let began = Instant::now();
    server.fault(&["--ops", "read", "--sectors", "0", "--delay", &(SECONDS * 1000).to_string()]);
    server.fault(&["--ops", "write", "--sectors", "1000-1159"]);
    for sector in (1000..1160).step_by(8) {
        guest.write(sector, pattern(sector, 8, 2)).unwrap();
    }
    assert_eq!(server.status().blocks.remapped, 20);
    let rules = server.order(&["fault", "list", "--json"]);
    let hits = serde_json::from_str::<serde_json::Value>(&rules).unwrap();
    let hits = hits["rules"][0]["hits"].as_u64().unwrap();
    assert!(hits <= 1 + began.elapsed().as_secs() / SECONDS, "{hits} reads of sector 0: {rules}");
    server.kill();
}

/// E1: what fails after the device has gone was under way when it went. It is no storm, which takes an operator.
#[test]
fn a_device_that_went_before_its_writes_failed_comes_back_by_itself() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    server.fault(&["--ops", "write", "--errno", "ENODATA", "--delay", "2000"]);
    server.fault(&["--ops", "read", "--sectors", "1000", "--errno", "ENODEV"]);
    server.fault(&["--ops", "identify", "--errno", "ENODEV"]);
    let writes = (0..40).map(|i| FAR_APART[i % 3] + i as u64 / 3 * 8);
    let mut ios: Vec<Io> = writes.map(|sector| Io::Write { sector, data: pattern(sector, 8, 2) }).collect();
    ios.push(Io::Read { sector: 1000, count: 1 });
    assert!(guest.queue().run(&ios).iter().all(Result::is_err));
    let gone = server.await_event("device-gone");
    assert!(gone.action.contains("until it is back"), "{}", gone.action);
    server.no_faults();
    server.await_event("device-back");
    assert_eq!(server.status().state, ["ok"]);
    model.check_all(guest.queue());
}
