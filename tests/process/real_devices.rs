//! Devices that lose their end, fill up or vanish under a running server, as the kernel tells of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vhost_remap::volume::layout::{Layout, Place};

use crate::disks::{Exported, Fault, FuseDisk, Loop, Thin, Which, skip};
use crate::faults::failing;
use crate::guest::{ANSWER_LIMIT, Failed, Guest, Io};
use crate::model::{Model, pattern};
use crate::server::{Server, Starting, Volume, done, refusal, vhost_remap};

const ENGINES: [&str; 2] = ["io_uring", "threads"];

const NO_SPACE: &str = "No space left on device (os error 28)";
const IO_ERROR: &str = "Input/output error (os error 5)";
const NO_DEVICE: &str = "No such device or address (os error 6)";
const NOT_CONNECTED: &str = "Transport endpoint is not connected (os error 107)";
const ABORTED: &str = "Software caused connection abort (os error 103)";

/// Bytes of a primary and of a spare that are loop devices.
const PRIMARY_LEN: u64 = 32 << 20;
const SPARE_LEN: u64 = 8 << 20;

/// A loop device, and the file beneath it, whose end can be taken away and put back.
struct Cut {
    disk: Loop,
    file: File,
    len: u64,
    /// What was cut off.
    end: Vec<u8>,
}

impl Cut {
    fn attach(volume: &Volume, name: &str, len: u64) -> Result<Cut, String> {
        let path = volume.dir.path().join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        Ok(Cut { disk: Loop::attach(&path, &["--direct-io=on"])?, file, len, end: Vec::new() })
    }

    /// Cut the file off at this sector. The loop device keeps its size.
    fn cut(&mut self, sector: u64) {
        self.end = vec![0; usize::try_from(self.len - sector * 512).unwrap()];
        self.file.read_exact_at(&mut self.end, sector * 512).unwrap();
        self.file.set_len(sector * 512).unwrap();
    }

    /// As it was before [`Cut::cut`].
    fn restore(&self) {
        self.file.set_len(self.len).unwrap();
        self.file.write_all_at(&self.end, self.len - self.end.len() as u64).unwrap();
    }
}

/// A volume whose primary is an adopted block device, without a label that is written at its end.
fn adopted(mut volume: Volume, primary: &Loop) -> Volume {
    volume.primary = primary.path.clone();
    let [primary, spare] = [&volume.primary, &volume.spare].map(|path| path.to_str().unwrap());
    done(&vhost_remap(&["adopt", "--primary", primary, "--spare", spare, "--max-remaps", "64"]));
    volume
}

/// A volume whose spare is a block device.
fn created_on(mut volume: Volume, spare: &Loop) -> Volume {
    volume.spare = spare.path.clone();
    let [primary, spare] = [&volume.primary, &volume.spare].map(|path| path.to_str().unwrap());
    let words = ["create", "--primary", primary, "--spare", spare, "--size", "32M", "--max-remaps", "64"];
    done(&vhost_remap(&words));
    volume
}

fn begin(volume: &Volume, options: &[&str]) -> (Server, Guest, Model) {
    let server = volume.serve(options);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    guest.flush().unwrap();
    (server, guest, model)
}

/// After a crash everything is there, mapping and data.
fn check_restarted(volume: &Volume, server: Server, guest: Guest, model: &Model) {
    let list = server.order(&["list", "--json"]);
    server.kill();
    drop(guest);
    let server = volume.serve(&[]);
    assert_eq!((server.order(&["list", "--json"]), &server.status().state[0][..]), (list, "ok"));
    model.check_all(server.guest(1).queue());
    server.stop();
}

/// R1, R2: beyond the end of the file beneath there is EIO, and never zeros.
#[test]
fn a_primary_whose_file_was_cut_fails_exactly_what_is_missing() {
    let name = "a_primary_whose_file_was_cut_fails_exactly_what_is_missing";
    for engine in ENGINES {
        let volume = Volume::absent();
        let mut cut = match Cut::attach(&volume, "beneath", PRIMARY_LEN) {
            Ok(cut) => cut,
            Err(reason) => return skip(name, reason),
        };
        let volume = adopted(volume, &cut.disk);
        let (server, mut guest, mut model) = begin(&volume, &["--io-engine", engine]);
        cut.cut(1000);
        assert_eq!(failing(&mut guest, 990..1020), (1000..1020).collect::<Vec<_>>());
        assert_eq!(guest.read(992, 16), Err(Failed::IoErr));
        model.check(guest.queue(), 960, 40);
        assert_eq!(server.blocks("pending"), [1000, 1008, 1016]);
        let errors = server.causes("guest-error");
        assert!(errors.iter().all(|cause| cause.contains(IO_ERROR)), "{errors:?}");
        // A write makes the file longer, and what was written is there.
        let write = model.write(1000, pattern(1000, 8, 2));
        guest.queue().one(write).unwrap();
        guest.flush().unwrap();
        assert_eq!(failing(&mut guest, 990..1020), (1008..1020).collect::<Vec<_>>());
        // Only its beginning was written since it was cut.
        cut.end[..8 * 512].copy_from_slice(model.sectors(1000, 8));
        cut.restore();
        model.check_all(guest.queue());
        let status = server.status();
        assert_eq!((status.blocks.remapped, status.blocks.pending, &status.state[0][..]), (0, 0, "ok"));
        check_restarted(&volume, server, guest, &model);
    }
}

/// As a spare: what lives beyond the end fails, and is there again with the file's end.
#[test]
fn a_spare_whose_file_was_cut_fails_exactly_what_lived_there() {
    let name = "a_spare_whose_file_was_cut_fails_exactly_what_lived_there";
    let volume = Volume::absent();
    let mut cut = match Cut::attach(&volume, "beneath", SPARE_LEN) {
        Ok(cut) => cut,
        Err(reason) => return skip(name, reason),
    };
    let volume = created_on(volume, &cut.disk);
    let (server, mut guest, model) = begin(&volume, &[]);
    server.order(&["remap", "1000-1015"]);
    let layout = Layout::new(SPARE_LEN, 64).unwrap();
    // In the middle of the second slot.
    cut.cut(layout.slots_start / 512 + 12);
    assert_eq!(failing(&mut guest, 990..1030), [1012, 1013, 1014, 1015]);
    model.check(guest.queue(), 960, 52);
    model.check(guest.queue(), 1016, 200);
    assert_eq!((server.blocks("pending"), &server.status().state[0][..]), (vec![1008], "ok"));
    cut.restore();
    model.check_all(guest.queue());
    assert_eq!(server.status().blocks.pending, 0);
    check_restarted(&volume, server, guest, &model);
}

/// E1, Gone: a block device that has become smaller is not the one that was opened.
#[test]
fn a_device_that_really_shrank_is_gone_until_it_has_its_size_again() {
    let name = "a_device_that_really_shrank_is_gone_until_it_has_its_size_again";
    for engine in ENGINES {
        let volume = Volume::absent();
        let mut cut = match Cut::attach(&volume, "beneath", PRIMARY_LEN) {
            Ok(cut) => cut,
            Err(reason) => return skip(name, reason),
        };
        let volume = adopted(volume, &cut.disk);
        let (server, mut guest, mut model) = begin(&volume, &["--io-engine", engine, "--on-device-loss", "hold"]);
        cut.cut(1000);
        cut.disk.update_size();
        // No probe has passed within the last second, which would speak for the device once more.
        let queue = guest.queue();
        let beyond = queue.submit(&Io::Read { sector: 1000, count: 8 });
        server.await_event("device-gone");
        assert_eq!(server.causes("device-gone"), [NO_DEVICE]);
        let below = queue.submit(&model.write(968, pattern(968, 8, 2)));
        assert_eq!(queue.wait_for(Duration::from_millis(300)), []);
        assert_eq!(server.status().state, ["primary-gone"]);
        cut.restore();
        cut.disk.update_size();
        let mut ended = Vec::new();
        while ended.len() < 2 {
            ended.extend(guest.queue().wait());
        }
        ended.sort_by_key(|(token, _)| *token);
        assert_eq!(ended, [(beyond, Ok(model.sectors(1000, 8).to_vec())), (below, Ok(Vec::new()))]);
        guest.flush().unwrap();
        model.check_all(guest.queue());
        let status = server.status();
        assert_eq!((status.blocks.remapped, status.blocks.pending, status.counters.guest_errors), (0, 0, 0));
        check_restarted(&volume, server, guest, &model);
    }
}

/// F3: so is a spare.
#[test]
fn a_spare_that_really_shrank_is_down_until_it_has_its_size_again() {
    let name = "a_spare_that_really_shrank_is_down_until_it_has_its_size_again";
    let volume = Volume::absent();
    let mut cut = match Cut::attach(&volume, "beneath", SPARE_LEN) {
        Ok(cut) => cut,
        Err(reason) => return skip(name, reason),
    };
    let volume = created_on(volume, &cut.disk);
    let (server, mut guest, mut model) = begin(&volume, &[]);
    server.order(&["remap", "1000-1007"]);
    cut.cut(8);
    cut.disk.update_size();
    assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    assert_eq!(server.status().state, ["spare-down"]);
    assert_eq!(server.causes("spare-down"), [NO_DEVICE]);
    let write = model.write(1008, pattern(1008, 64, 2));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    cut.restore();
    cut.disk.update_size();
    server.await_event("spare-back");
    model.check_all(guest.queue());
    check_restarted(&volume, server, guest, &model);
}

/// E1, Space: a primary that is thinner than it says fails what it has no space for, and nothing else.
#[test]
fn a_full_file_system_under_the_primary_fails_only_first_writes() {
    let name = "a_full_file_system_under_the_primary_fails_only_first_writes";
    for engine in ENGINES {
        let volume = Volume::absent();
        let mut thin = match Thin::attach(volume.dir.path(), PRIMARY_LEN, PRIMARY_LEN / 2) {
            Ok(thin) => thin,
            Err(reason) => return skip(name, reason),
        };
        let volume = adopted(volume, &thin.disk);
        let (server, mut guest, mut model) = begin(&volume, &["--io-engine", engine]);
        thin.fill();
        for sector in [4096, 8192, 40_000] {
            assert_eq!(guest.write(sector, pattern(sector, 8, 2)), Err(Failed::IoErr));
            assert_eq!(guest.read(sector, 8), Ok(vec![0; 4096]));
        }
        let write = model.write(1000, pattern(1000, 100, 2));
        guest.queue().one(write).unwrap();
        guest.flush().unwrap();
        model.check_all(guest.queue());
        assert_eq!(server.causes("guest-error"), [NO_SPACE; 3]);
        let status = server.status();
        assert_eq!((&status.state[..], status.devices[0].write_errors), (&["ok".to_owned()][..], 3));
        assert_eq!((status.blocks.remapped, status.blocks.pending, status.counters.rewritten), (0, 0, 0));
        thin.free();
        guest.write(8192, pattern(8192, 8, 3)).unwrap();
        assert_eq!(guest.read(8192, 8), Ok(pattern(8192, 8, 3)));
        check_restarted(&volume, server, guest, &model);
    }
}

/// E1, Space, and W7: as a spare, it fails the write that needs the slot; no slot is retired for it.
#[test]
fn a_full_file_system_under_the_spare_fails_only_writes_into_its_holes() {
    let name = "a_full_file_system_under_the_spare_fails_only_writes_into_its_holes";
    let volume = Volume::absent();
    let mut thin = match Thin::attach(volume.dir.path(), SPARE_LEN, SPARE_LEN + (4 << 20)) {
        Ok(thin) => thin,
        Err(reason) => return skip(name, reason),
    };
    let volume = created_on(volume, &thin.disk);
    let (server, mut guest, mut model) = begin(&volume, &[]);
    server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
    let layout = Layout::new(SPARE_LEN, 64).unwrap();
    thin.punch(layout.slots_start, 4096);
    thin.fill();
    assert_eq!(guest.write(1000, pattern(1000, 8, 2)), Err(Failed::IoErr));
    assert!(server.causes("guest-error")[0].contains(NO_SPACE), "{:?}", server.events());
    let status = server.status();
    assert_eq!((&status.state[..], status.blocks.slots_free), (&["ok".to_owned()][..], 64));
    assert_eq!((status.blocks.slots_retired, status.blocks.remapped, status.devices[1].write_errors), (0, 0, 1));
    let write = model.write(1008, pattern(1008, 64, 2));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    model.check_all(guest.queue());
    thin.free();
    let write = model.write(1000, pattern(1000, 8, 3));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    // Metadata that finds no space in one place goes on in the other.
    thin.punch(layout.place_start(Place::Head), layout.place_len());
    thin.fill();
    server.order(&["remap", "1100"]);
    assert_eq!(server.status().state, ["place-retired"]);
    assert!(server.causes("place-retired")[0].contains(NO_SPACE), "{:?}", server.events());
    let write = model.write(1100, pattern(1100, 4, 4));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    model.check_all(guest.queue());
    thin.free();
    check_restarted(&volume, server, guest, &model);
}

/// E1, Gone: the daemon that offers the primary is killed, with requests under way. What is open on it is dead
/// for good, so the volume comes back with the next server.
#[test]
fn a_primary_whose_daemon_was_killed_is_gone_and_nothing_is_lost() {
    let name = "a_primary_whose_daemon_was_killed_is_gone_and_nothing_is_lost";
    for engine in ENGINES {
        let Some(mut exported) = Exported::adopt(name) else { return };
        let server = exported.serve(engine, &["--on-device-loss", "hold=2"]);
        let mut guest = server.guest(1);
        let mut model = Model::written(&mut guest, 960, 256, 1);
        server.order(&["remap", "960-967"]);
        exported.primary().pause();
        let queue = guest.queue();
        queue.submit(&Io::Write { sector: 1000, data: pattern(1000, 8, 2) });
        server.await_status(|status| status.oldest_in_flight_ms > 0);
        exported.primary().kill();
        server.await_event("device-gone");
        let status = server.status();
        assert_eq!((&status.state[..], &status.devices[0].state[..]), (&["primary-gone".to_owned()][..], "gone"));
        // What lives on the spare is still there; all else waits for a while.
        model.check(guest.queue(), 960, 8);
        assert_eq!(guest.queue().wait()[0].1, Err(Failed::IoErr));
        assert_eq!(guest.read(968, 8), Err(Failed::IoErr));
        let gone = server.causes("device-gone");
        assert!(gone == [ABORTED] || gone == [NOT_CONNECTED], "{gone:?}");
        let status = server.status();
        assert_eq!((status.blocks.remapped, status.blocks.pending, status.counters.rewritten), (1, 0, 0));
        exported.export(Which::Primary).unwrap();
        let why = server.refused(&["clear"]);
        assert!(why.contains(NOT_CONNECTED), "{why}");
        server.kill();
        drop(guest);
        let server = exported.serve(engine, &[]);
        let mut guest = server.guest(1);
        model.settle(guest.queue(), 1000, &pattern(1000, 8, 2));
        model.check_all(guest.queue());
        let write = model.write(1000, pattern(1000, 8, 3));
        guest.queue().one(write).unwrap();
        guest.flush().unwrap();
        model.check_all(guest.queue());
        assert_eq!((server.status().state, server.blocks("remapped")), (vec!["ok".to_owned()], vec![960]));
        server.stop();
    }
}

/// F3: as a spare, it costs only what lived there.
#[test]
fn a_spare_whose_daemon_was_killed_is_down_and_nothing_is_lost() {
    let name = "a_spare_whose_daemon_was_killed_is_down_and_nothing_is_lost";
    let Some(mut exported) = Exported::create(name, Which::Spare) else { return };
    let server = exported.serve("threads", &[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000-1007"]);
    guest.flush().unwrap();
    exported.spare().kill();
    assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    assert_eq!(guest.write(1000, pattern(1000, 8, 2)), Err(Failed::IoErr));
    assert_eq!(server.status().state, ["spare-down"]);
    assert_eq!(server.causes("spare-down"), [NOT_CONNECTED]);
    let write = model.write(1008, pattern(1008, 64, 2));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    model.check(guest.queue(), 1008, 200);
    exported.export(Which::Spare).unwrap();
    server.kill();
    drop(guest);
    let server = exported.serve("threads", &[]);
    model.check_all(server.guest(1).queue());
    assert_eq!((server.status().state, server.blocks("remapped")), (vec!["ok".to_owned()], vec![1000]));
    server.stop();
}

/// A loop device that is detached while it is in use stays until its last user closes it.
#[test]
fn a_loop_device_detached_in_use_serves_until_the_server_lets_go_of_it() {
    let name = "a_loop_device_detached_in_use_serves_until_the_server_lets_go_of_it";
    let volume = Volume::absent();
    let cut = match Cut::attach(&volume, "beneath", PRIMARY_LEN) {
        Ok(cut) => cut,
        Err(reason) => return skip(name, reason),
    };
    let mut volume = adopted(volume, &cut.disk);
    let (server, mut guest, mut model) = begin(&volume, &[]);
    // The one other user; it is marked to go with the last.
    drop(cut);
    let write = model.write(1000, pattern(1000, 8, 2));
    guest.queue().one(write).unwrap();
    server.order(&["remap", "1000"]);
    guest.flush().unwrap();
    model.check_all(guest.queue());
    assert_eq!(server.status().state, ["ok"]);
    drop(guest);
    server.stop();
    // Now its number is anybody's, so that nothing may be opened by it any more.
    let beneath = volume.dir.path().join("beneath");
    let attribute = Path::new("/sys/block").join(volume.primary.file_name().unwrap()).join("loop/backing_file");
    let deadline = Instant::now() + ANSWER_LIMIT;
    while fs::read_to_string(&attribute).is_ok_and(|path| Path::new(path.trim()) == beneath) {
        assert!(Instant::now() < deadline, "{} is not detached", volume.primary.display());
        std::thread::yield_now();
    }
    let again = Loop::attach(&beneath, &["--direct-io=on"]).unwrap();
    volume.primary = again.path.clone();
    let server = volume.serve(&[]);
    model.check_all(server.guest(1).queue());
    assert_eq!(server.blocks("remapped"), [1000]);
    server.stop();
}

/// As a disk's driver says it: what a block device reports went through the kernel's block layer.
#[test]
fn medium_errors_of_a_block_device_move_blocks_and_a_dead_one_is_gone() {
    let name = "medium_errors_of_a_block_device_move_blocks_and_a_dead_one_is_gone";
    let volume = Volume::absent();
    let path = volume.dir.path().join("beneath");
    File::create(&path).unwrap().set_len(PRIMARY_LEN).unwrap();
    let mut beneath = match FuseDisk::export(&path) {
        Ok(beneath) => beneath,
        Err(reason) => return skip(name, reason),
    };
    let disk = match Loop::attach(&beneath.path, &["--direct-io=on"]) {
        Ok(disk) => disk,
        Err(reason) => return skip(name, reason),
    };
    let volume = adopted(volume, &disk);
    let (server, mut guest, mut model) = begin(&volume, &["--io-engine", "threads"]);
    let bad = [(1000, libc::ENODATA), (1008, libc::EILSEQ), (1016, libc::EIO), (1024, libc::EREMOTEIO)];
    let rules = bad.map(|(sector, errno)| Fault::of(&["write", "write-zeroes"], errno).at(sector..sector + 8));
    beneath.fail(&rules);
    for (sector, _) in bad {
        let write = model.write(sector + 1, pattern(sector + 1, 2, 2));
        guest.queue().one(write).unwrap();
        model.check_all(guest.queue());
    }
    guest.flush().unwrap();
    assert_eq!(server.blocks("remapped"), bad.map(|(sector, _)| sector));
    assert_eq!(server.status().counters.guest_errors, 0);
    // A probe that has passed no more than a second ago is believed where a read fails; a write asks anew.
    beneath.kill();
    assert_eq!(guest.write(1200, pattern(1200, 8, 3)), Err(Failed::IoErr));
    assert_eq!((server.status().state, server.status().blocks.remapped), (vec!["primary-gone".to_owned()], 4));
    assert_eq!(server.causes("device-gone"), [IO_ERROR]);
    model.check(guest.queue(), 1000, 32);
    server.kill();
}

/// O4: a killed server whose I/O hangs in the kernel keeps its socket too. A successor at the same path waits
/// for the volume's lock, as at any other path, and then serves what the dead one was told to write.
#[test]
fn a_successor_at_the_same_socket_waits_for_what_a_killed_server_left_in_the_kernel() {
    let name = "a_successor_at_the_same_socket_waits_for_what_a_killed_server_left_in_the_kernel";
    let Some(mut exported) = Exported::adopt(name) else { return };
    let mut server = exported.serve("threads", &[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 64, 1);
    let paused = exported.primary().pause_for_a_while();
    guest.queue().submit(&Io::Write { sector: 2000, data: pattern(2000, 8, 2) });
    server.await_status(|status| status.oldest_in_flight_ms > 0);
    server.kill_into_a_zombie();
    let spare = exported.volume.spare.to_str().expect("UTF-8").to_owned();
    let command = exported.volume.command(&["--spare", &spare, "--io-engine", "threads"]);
    let mut successor = Starting::spawn(command, exported.volume.dir.path());
    // It has looked at the socket, and the daemon that does nothing is asked for the primary.
    assert!(successor.server.comes_to_wait_for_fuse(), "{}", successor.server.log_text());
    drop(paused);
    let successor = successor.wait().unwrap_or_else(|output| panic!("{}", refusal(&output)));
    let mut guest = successor.guest(1);
    model.check_all(guest.queue());
    drop(guest);
    successor.stop();
}
