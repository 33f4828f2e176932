//! A volume that goes with its guest from one server to another.

use std::fs;
use std::os::unix::net::UnixStream;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tempfile::TempDir;

use crate::frontend::{FrontEnd, Setup};
use crate::migration::{log_file, request};
use crate::model::pattern;
use crate::server::{Server, Volume};

const SETUP: Setup = Setup { queues: 1, size: 16, without: 0 };
const IN: u32 = 0;
const OUT: u32 = 1;
const WRITEBACK: u32 = 32;

/// A server that awaits the guest of another one.
fn await_guest(volume: &Volume, options: &[&str]) -> (Server, TempDir) {
    volume.serve_elsewhere(&[&["--incoming"], options].concat()).join().unwrap()
}

fn is_away(server: &Server) -> bool {
    server.status().state == ["away"]
}

fn write(front_end: &mut FrontEnd, sector: u64, salt: u64) {
    let data = front_end.rings[0].area() + 0x1_0000;
    front_end.rings[0].write(data, &pattern(sector, 8, salt));
    assert_eq!(request(front_end, OUT, sector, data, 4096), 0);
}

fn check(front_end: &mut FrontEnd, sector: u64, salt: u64) {
    let data = front_end.rings[0].area() + 0x1_0000;
    assert_eq!(request(front_end, IN, sector, data, 4096), 0);
    assert!(front_end.rings[0].read(data, 4096) == pattern(sector, 8, salt), "sector {sector}");
}

fn check_zeros(front_end: &mut FrontEnd) {
    let data = front_end.rings[0].area() + 0x1_0000;
    assert_eq!(request(front_end, IN, 0, data, 4096), 0);
    assert!(front_end.rings[0].read(data, 4096) == [0; 4096]);
}

/// What a front-end does when its guest has left.
fn leave(front_end: &mut FrontEnd) {
    front_end.log_to(&log_file(), 0);
    front_end.stop(0);
}

#[test]
fn a_volume_goes_with_its_guest_and_comes_back() {
    let volume = Volume::create(32, 64);
    let source = volume.serve(&[]);
    let (target, _dir) = await_guest(&volume, &[]);
    assert!(target.announcement.contains("a guest is awaited, remaps at most 64"), "{}", target.announcement);
    source.fault(&["--ops", "write", "--sectors", "80-87"]);
    let mut here = FrontEnd::connect(&source.socket, SETUP);
    write(&mut here, 80, 1);
    write(&mut here, 800, 1);

    // While the other has it: the disk is shown, and nothing is known of it.
    assert!(is_away(&target));
    let status = target.status();
    assert_eq!((status.capacity_sectors, status.blocks.remaps_max), (32 << 11, 64));
    assert_eq!(status.volume, source.status().volume);
    for words in [&["list"][..], &["remap", "8"], &["save"], &["clear"]] {
        let why = target.refused(words);
        assert!(why.contains("disk.img: is not open here: it is opened when a guest starts to use it"), "{why}");
    }

    leave(&mut here);
    assert!(is_away(&source));
    assert_eq!(source.await_event("handed-over").cause, "the guest has stopped to leave");
    let mut there = FrontEnd::connect(&target.socket, SETUP);
    assert_eq!(target.await_event("taken-over").cause, "the guest is served here");
    assert_eq!((target.status().state, target.blocks("remapped")), (vec!["ok".to_owned()], vec![80]));
    check(&mut there, 80, 1);
    check(&mut there, 800, 1);
    write(&mut there, 80, 2);

    // The guest comes back, to a front-end that never went.
    leave(&mut there);
    assert!(is_away(&target));
    here.log_no_more();
    here.start(0, 0);
    assert_eq!(source.status().state, ["ok"]);
    check(&mut here, 80, 2);
    write(&mut here, 800, 2);
    drop((here, there));
    source.stop();
    target.stop();
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    assert_eq!((guest.read(80, 8), guest.read(800, 8)), (Ok(pattern(80, 8, 2)), Ok(pattern(800, 8, 2))));
}

/// At no time do two servers have it.
#[test]
fn a_guest_that_comes_too_early_is_turned_away() {
    let volume = Volume::create(32, 64);
    let source = volume.serve(&[]);
    let (target, _dir) = await_guest(&volume, &["--lock-wait", "5"]);
    let mut here = FrontEnd::connect(&source.socket, SETUP);
    write(&mut here, 0, 1);
    let early = UnixStream::connect(&target.socket).unwrap();
    let early = std::panic::catch_unwind(|| FrontEnd::over(early, SETUP));
    assert!(early.is_err(), "served while another server has the volume");
    let log = target.log_text();
    assert!(log.contains("disk.img: still in use by another process"), "{log}");
    assert!(is_away(&target));
    write(&mut here, 0, 2);
    leave(&mut here);
    let mut there = FrontEnd::connect(&target.socket, SETUP);
    check(&mut there, 0, 2);
}

/// A host that is out of descriptors for a while, wherever in the opening that shows.
#[test]
fn a_guest_whose_workers_cannot_be_started_may_come_again() {
    let volume = Volume::create(32, 64);
    let (target, _dir) = await_guest(&volume, &[]);
    let pid = Pid::from_raw(i32::try_from(target.pid()).unwrap());
    let open = fs::read_dir(format!("/proc/{}/fd", target.pid())).unwrap().count() as u64;
    let limit = |current| {
        let maximum = Some(1024);
        prlimit(pid, Resource::Nofile, Rlimit { current: Some(current), maximum }).unwrap();
    };
    let mut turned_away = 0;
    for more in 8..32 {
        limit(open + more);
        let served = std::panic::catch_unwind(|| leave(&mut FrontEnd::connect(&target.socket, SETUP)));
        turned_away += u32::from(served.is_err());
    }
    assert!(turned_away > 0);
    assert!(target.log_text().contains("a worker cannot be started"), "{}", target.log_text());
    limit(1024);
    check_zeros(&mut FrontEnd::connect(&target.socket, SETUP));
}

/// A guest that is not migrated may stop and start its queues as often as it likes.
#[test]
fn a_guest_that_stays_keeps_its_volume() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut front_end = FrontEnd::connect(&server.socket, SETUP);
    front_end.stop(0);
    assert_eq!(server.status().state, ["ok"]);
    front_end.start(0, 0);
    write(&mut front_end, 0, 1);
    assert!(server.events().iter().all(|event| event.kind != "handed-over"));
}

/// The front-end carries the device's state, and with it what disk its guest has used.
#[test]
fn a_target_with_another_map_refuses_the_guest() {
    let volume = Volume::create(32, 64);
    let copy = Volume::absent();
    let copy_files = || {
        fs::copy(&volume.primary, &copy.primary).unwrap();
        fs::copy(&volume.spare, &copy.spare).unwrap();
    };
    copy_files();
    // As often opened and closed as the first will be: told from it by its name alone.
    let other = Volume::create(32, 64);
    other.serve(&[]).stop();
    let source = volume.serve(&[]);
    let mut here = FrontEnd::connect(&source.socket, SETUP);
    write(&mut here, 80, 1);
    assert_eq!(here.save_state(), None, "a queue is started");
    here.stop(0);
    let state = here.save_state().expect("a state");
    assert!(is_away(&source));
    let nothing = Setup { queues: 0, ..SETUP };
    for (volume, why) in [(&copy, "or a copy of it that is older or newer"), (&other, "another volume")] {
        let (target, _dir) = await_guest(volume, &["--accept-external"]);
        let mut there = FrontEnd::connect(&target.socket, nothing);
        assert!(!there.load_state(&state));
        assert!(target.log_text().contains(why), "{}", target.log_text());
        assert!(is_away(&target));
    }
    let (target, _dir) = await_guest(&volume, &[]);
    for nonsense in [&b""[..], b"{}", b"\xff", &[b'['; 1 << 17], &state[..state.len() - 1]] {
        let mut there = FrontEnd::connect(&target.socket, nothing);
        assert!(!there.load_state(nonsense), "{nonsense:?}");
    }
    let mut there = FrontEnd::connect(&target.socket, nothing);
    assert!(there.load_state(&state), "{}", target.log_text());
    drop(there);
    let mut there = FrontEnd::connect(&target.socket, SETUP);
    check(&mut there, 80, 1);
}

/// A snapshot that is resumed on a server which was started as ever.
#[test]
fn a_guest_may_come_to_a_server_that_has_opened_its_volume() {
    let volume = Volume::create(32, 64);
    let source = volume.serve(&[]);
    let mut here = FrontEnd::connect(&source.socket, SETUP);
    write(&mut here, 80, 1);
    here.stop(0);
    let state = here.save_state().expect("a state");
    drop(here);
    source.stop();
    let nothing = Setup { queues: 0, ..SETUP };
    let server = volume.serve(&[]);
    assert!(FrontEnd::connect(&server.socket, nothing).load_state(&state), "{}", server.log_text());
    let mut there = FrontEnd::connect(&server.socket, SETUP);
    check(&mut there, 80, 1);
    write(&mut there, 80, 2);
    drop(there);
    assert!(!FrontEnd::connect(&server.socket, nothing).load_state(&state));
    assert!(server.log_text().contains("has been written to since it was opened here"), "{}", server.log_text());
    server.stop();
    let server = volume.serve(&[]);
    assert!(!FrontEnd::connect(&server.socket, nothing).load_state(&state));
    assert!(server.log_text().contains("or a copy of it that is older or newer"), "{}", server.log_text());
}

/// The driver does not say so again: its writes must go on being durable when they are answered.
#[test]
fn write_through_goes_with_the_guest() {
    let volume = Volume::create(32, 64);
    let source = volume.serve(&[]);
    for wanted in [0, 1] {
        let (target, _dir) = await_guest(&volume, &[]);
        let mut here = FrontEnd::connect(&source.socket, SETUP);
        assert!(here.set_config(WRITEBACK, &[wanted]));
        leave(&mut here);
        let mut there = FrontEnd::connect(&target.socket, SETUP);
        assert_eq!(there.config(WRITEBACK, 1), [wanted]);
        leave(&mut there);
    }
    // Nobody knows what the driver of a server that was killed wanted.
    let mut here = FrontEnd::connect(&source.socket, SETUP);
    write(&mut here, 0, 1);
    source.kill();
    let (target, _dir) = await_guest(&volume, &[]);
    let mut there = FrontEnd::connect(&target.socket, SETUP);
    assert_eq!(there.config(WRITEBACK, 1), [0]);
}

/// It may grow where it is, and where it has gone to.
#[test]
fn a_disk_that_has_grown_is_shown_as_large_to_the_next_front_end() {
    let volume = Volume::create(32, 64);
    let source = volume.serve(&[]);
    let (target, _dir) = await_guest(&volume, &[]);
    let mut here = FrontEnd::connect(&source.socket, SETUP);
    source.order(&["resize", "--size", "40M"]);
    leave(&mut here);
    let capacity = |front_end: &mut FrontEnd| u64::from_le_bytes(front_end.config(0, 8).try_into().unwrap());
    let mut there = FrontEnd::connect(&target.socket, SETUP);
    assert_eq!((capacity(&mut there), target.status().capacity_sectors), (40 << 11, 40 << 11));
    write(&mut there, (40 << 11) - 8, 1);
    target.order(&["resize", "--size", "48M"]);
    assert_eq!(capacity(&mut there), 48 << 11);
    write(&mut there, (48 << 11) - 8, 2);
    leave(&mut there);
    here.log_no_more();
    here.start(0, 0);
    assert_eq!(capacity(&mut here), 48 << 11);
    check(&mut here, (48 << 11) - 8, 2);
}

/// Without metadata there is nothing to compare but the size.
#[test]
fn a_primary_without_metadata_goes_too() {
    let volume = Volume::create(32, 64);
    let source = volume.serve_with(&["--passthrough"]);
    let dir = tempfile::tempdir().unwrap();
    let mut command = volume.command_without_socket(&["--passthrough", "--incoming"]);
    command.arg("--socket-path").arg(dir.path().join("vm.sock"));
    let target = Server::start(command, dir.path()).unwrap();
    let mut here = FrontEnd::connect(&source.socket, SETUP);
    write(&mut here, 80, 1);
    leave(&mut here);
    check(&mut FrontEnd::connect(&target.socket, SETUP), 80, 1);
}

#[test]
fn what_is_not_there_cannot_be_awaited() {
    let volume = Volume::absent();
    let why = volume.serve_refused(&["--incoming"]);
    assert!(why.contains("disk.img: no such file or device"), "{why}");
    let volume = Volume::create(32, 64);
    fs::write(&volume.spare, vec![0; 1 << 20]).unwrap();
    let why = volume.serve_refused(&["--incoming"]);
    assert!(why.contains("the spare holds no vhost-remap volume"), "{why}");
    let why = volume.serve_refused(&["--incoming", "--transport", "framework"]);
    assert!(why.contains("leave --incoming out"), "{why}");
}
