//! Growing a disk under the guest that uses it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_remap::volume::layout::label_size;

use crate::disks::{Loop, skip};
use crate::framework::{SETUP, chain, status};
use crate::frontend::{FrontEnd, Ring};
use crate::guest::{Failed, Io};
use crate::model::{Model, pattern};
use crate::server::{Server, TRANSPORTS, Volume, done, vhost_remap};

const LIMIT: Duration = Duration::from_secs(30);
const SLOTS: u32 = 64;
/// Sectors in a MiB.
const MIB: u64 = 2048;

/// Wait for the message that the configuration has changed.
#[track_caller]
fn await_change(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).expect("the front-end is told");
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, without payload, and no answer is waited for.
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

fn capacity(front_end: &mut FrontEnd) -> u64 {
    u64::from_le_bytes(front_end.config(0, 8).try_into().expect("eight bytes"))
}

/// Read or write a sector, and whether that works.
fn one(ring: &mut Ring, kind: u32, sector: u64) -> bool {
    chain(ring, 0, kind, sector);
    ring.offer(0);
    ring.take(LIMIT).expect("it is served");
    status(ring, 0) == 0
}

/// Zeros where nobody has written, at the end and where the label was, and nothing beyond.
#[track_caller]
fn check_new_sectors(server: &Server, first: u64, end: u64) {
    let mut guest = server.guest(1);
    assert_eq!(guest.config.capacity.to_native(), end);
    let label = label_size(SLOTS) / 512;
    for (sector, count) in [(first, label), (end - 8, 8)] {
        for start in (sector..sector + count).step_by(128) {
            let found = guest.read(start, 128.min(count)).unwrap();
            assert!(found.iter().all(|byte| *byte == 0), "sectors from {start} on");
        }
    }
    assert_eq!(guest.read(end, 1), Err(Failed::IoErr));
    guest.write(end - 8, pattern(end - 8, 8, 7)).unwrap();
    guest.write(first, pattern(first, 8, 7)).unwrap();
    guest.flush().unwrap();
}

#[track_caller]
fn check_written_sectors(server: &Server, first: u64, end: u64) {
    let mut guest = server.guest(1);
    assert_eq!(guest.config.capacity.to_native(), end);
    for sector in [first, end - 8] {
        assert!(guest.read(sector, 8).unwrap() == pattern(sector, 8, 7), "sector {sector}");
    }
}

#[test]
fn a_disk_grows_under_its_guest_which_is_told() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000"]);
    let write = model.write(1000, pattern(1000, 8, 2));
    guest.queue().one(write).unwrap();
    drop(guest);
    let mut front_end = FrontEnd::connect(&server.socket, SETUP);
    let mut channel = front_end.listen();
    // A server that has just come may serve another disk than the one before it.
    await_change(&mut channel);
    assert_eq!(capacity(&mut front_end), 32 * MIB);
    assert!(!one(&mut front_end.rings[0], 0, 32 * MIB));
    let answer = server.order(&["resize", "--size", "64M"]);
    assert_eq!(answer, "the disk has 131072 sectors now (67108864 bytes)\n");
    await_change(&mut channel);
    assert_eq!(capacity(&mut front_end), 64 * MIB);
    // At once, and under the same session.
    for sector in [32 * MIB, 64 * MIB - 1] {
        assert!(one(&mut front_end.rings[0], 0, sector));
    }
    assert!(!one(&mut front_end.rings[0], 0, 64 * MIB));
    assert_eq!(server.status().capacity_sectors, 64 * MIB);
    assert!(server.order(&["status"]).contains("64 MiB (131072 sectors)"));
    let event = server.await_event("resized");
    assert_eq!((event.sector, event.sectors), (Some(32 * MIB), 32 * MIB));
    drop(front_end);
    model.check_all(server.guest(1).queue());
    check_new_sectors(&server, 32 * MIB, 64 * MIB);
    // Once more, by less than a label.
    let json = server.order(&["resize", "--size", "65M", "--json"]);
    assert!(json.starts_with("{\"message\":\"the disk has 133120 sectors"), "{json}");
    server.kill();
    let server = volume.serve(&[]);
    model.check_all(server.guest(1).queue());
    let mut guest = server.guest(1);
    assert_eq!(guest.config.capacity.to_native(), 65 * MIB);
    assert!(guest.read(32 * MIB, 8).unwrap() == pattern(32 * MIB, 8, 7));
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    model.check_all(server.guest(1).queue());
    server.stop();
    // The label has moved with the end, and knows what has.
    fs::remove_file(&volume.spare).unwrap();
    let server = volume.serve_with(&["--degraded"]);
    let mut guest = server.guest(1);
    assert_eq!(guest.config.capacity.to_native(), 65 * MIB);
    assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    assert!(guest.read(64 * MIB - 8, 8).unwrap() == pattern(64 * MIB - 8, 8, 7));
    let why = server.refused(&["resize", "--size", "1G"]);
    assert!(why.contains("without its spare"), "{why}");
}

/// A front-end that has given no channel, or none yet, asks; so do those of the framework.
#[test]
fn a_front_end_without_a_channel_sees_the_new_size_when_it_asks() {
    for transport in TRANSPORTS {
        let volume = Volume::create(32, SLOTS);
        let server = volume.serve(&["--transport", transport]);
        let mut front_end = FrontEnd::connect(&server.socket, SETUP);
        assert_eq!(capacity(&mut front_end), 32 * MIB);
        server.order(&["resize", "--size", "34M"]);
        assert_eq!(capacity(&mut front_end), 34 * MIB);
        assert!(one(&mut front_end.rings[0], 1, 34 * MIB - 1));
    }
}

/// While no queue is started nothing is said: QEMU 7.2 ends when it is told then.
#[test]
fn a_front_end_is_told_when_its_queues_are_started_again() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let mut front_end = FrontEnd::connect(&server.socket, SETUP);
    let mut channel = front_end.listen();
    await_change(&mut channel);
    for queue in 0..SETUP.queues {
        front_end.stop(queue);
    }
    server.order(&["resize", "--size", "33M"]);
    channel.set_nonblocking(true).unwrap();
    assert_eq!(capacity(&mut front_end), 33 * MIB);
    assert_eq!(channel.read(&mut [0; 12]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    channel.set_nonblocking(false).unwrap();
    front_end.start(0, 0);
    await_change(&mut channel);
}

/// With requests under way all the time, on several workers: none fails, and none is lost.
#[test]
fn a_disk_grows_again_and_again_while_it_is_used() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&["--workers", "2"]);
    let mut guest = server.guest(2);
    std::thread::scope(|scope| {
        let growing = scope.spawn(|| {
            for mib in 33..48 {
                server.order(&["resize", "--size", &format!("{mib}M")]);
            }
        });
        let mut stamp = 1;
        while !growing.is_finished() || stamp < 20 {
            stamp += 1;
            for queue in 0..2 {
                let sector = 64 * queue as u64;
                let write = Io::Write { sector, data: pattern(sector, 8, stamp) };
                guest.queues[queue].one(write).unwrap();
                guest.queues[queue].one(Io::Flush).unwrap();
                let read = guest.queues[queue].one(Io::Read { sector, count: 8 }).unwrap();
                assert!(read == pattern(sector, 8, stamp), "sector {sector}");
            }
        }
    });
    drop(guest);
    assert_eq!(server.status().capacity_sectors, 47 * MIB);
    check_new_sectors(&server, 32 * MIB, 47 * MIB);
    server.kill();
    let server = volume.serve(&[]);
    check_written_sectors(&server, 32 * MIB, 47 * MIB);
}

#[test]
fn an_adopted_disk_and_one_without_metadata_grow_too() {
    for passthrough in [false, true] {
        let volume = Volume::absent();
        File::create(&volume.primary).unwrap().set_len((32 << 20) + 512 * 5).unwrap();
        let (primary, serve) = (volume.primary.to_str().unwrap(), ["--passthrough"]);
        let options = if passthrough { &serve[..] } else { &[] };
        if !passthrough {
            done(&vhost_remap(&["adopt", "--primary", primary]));
        }
        let server = volume.serve_with(options);
        let mut guest = server.guest(1);
        guest.write(0, pattern(0, 8, 1)).unwrap();
        drop(guest);
        server.order(&["resize", "--size", "48M"]);
        assert_eq!(fs::metadata(&volume.primary).unwrap().len(), 48 << 20);
        check_new_sectors(&server, 32 * MIB + 5, 48 * MIB);
        // What others have extended is taken as it is.
        File::options().write(true).open(&volume.primary).unwrap().set_len(50 << 20).unwrap();
        assert!(server.order(&["resize"]).contains("102400 sectors"));
        let why = server.refused(&["resize"]);
        assert!(why.contains("has 52428800 bytes and no room"), "{why}");
        server.stop();
        let server = volume.serve_with(options);
        let mut guest = server.guest(1);
        assert_eq!(guest.config.capacity.to_native(), 50 * MIB);
        assert!(guest.read(0, 8).unwrap() == pattern(0, 8, 1));
        assert!(guest.read(48 * MIB - 8, 8).unwrap() == pattern(48 * MIB - 8, 8, 7));
    }
}

/// One line each, and nothing has changed.
#[test]
fn what_cannot_grow_is_refused() {
    let volume = Volume::create(32, SLOTS);
    let before = || {
        let meta = fs::metadata(&volume.primary).unwrap();
        (meta.len(), meta.blocks())
    };
    let known = before();
    let server = volume.serve(&[]);
    for (words, why) in [
        (&["--size", "32M"][..], "can only grow"),
        (&["--size", "16M"], "can only grow"),
        (&["--size", "8191P"], "4096T"),
        // More than a file can have.
        (&["--size", "4095T"], "more than a file of its file system can have"),
        (&[], "no room for a larger disk"),
    ] {
        let told = server.refused(&[&["resize"], words].concat());
        assert!(told.contains("disk.img: ") && told.contains(why), "{words:?}: {told}");
    }
    let usage = server.ask(&["resize", "--size", "1000"]);
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
    // The label has no place at the new end: the file becomes as short again as it was.
    server.fault(&["--ops", "write", "--sectors", &format!("{}-{}", 64 * MIB, 65 * MIB)]);
    let told = server.refused(&["resize", "--size", "64M"]);
    assert!(told.contains("primary: Input/output error"), "{told}");
    assert_eq!(before().0, known.0);
    server.no_faults();
    let mut guest = server.guest(1);
    assert_eq!(guest.read(32 * MIB, 1), Err(Failed::IoErr));
    server.fault(&["--ops", "flush", "--count", "1"]);
    guest.write(8, pattern(8, 8, 1)).unwrap();
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    let told = server.refused(&["resize", "--size", "64M"]);
    assert!(told.contains("`clear` first"), "{told}");
    server.no_faults();
    server.order(&["clear"]);
    drop(guest);
    server.stop();
    let server = volume.serve(&["--read-only"]);
    let told = server.refused(&["resize", "--size", "64M"]);
    assert!(told.contains("read-only"), "{told}");
    assert_eq!(before().0, known.0);
    server.stop();
    volume.serve(&[]).order(&["resize", "--size", "64M"]);
}

/// A block device is extended by others, and then taken as it is.
#[test]
fn a_disk_grows_into_a_device_that_was_extended() {
    let name = "a_disk_grows_into_a_device_that_was_extended";
    let volume = Volume::absent();
    let beneath = volume.dir.path().join("beneath");
    let file = File::create(&beneath).unwrap();
    file.set_len(40 << 20).unwrap();
    let device = match Loop::attach(&beneath, &["--sector-size", "512"]) {
        Ok(device) => device,
        Err(reason) => return skip(name, reason),
    };
    let (primary, spare) = (device.path.to_str().unwrap().to_owned(), volume.spare.to_str().unwrap().to_owned());
    let create = ["create", "--primary", &primary, "--spare", &spare, "--size", "32M", "--max-remaps", "64"];
    done(&vhost_remap(&create));
    let volume = Volume { primary: device.path.clone(), ..volume };
    let server = volume.serve(&[]);
    // Into room that it has.
    server.order(&["resize", "--size", "36M"]);
    let why = server.refused(&["resize", "--size", "64M"]);
    assert!(why.contains("has 41943040 bytes, and 68157440 are needed; extend it first"), "{why}");
    assert_eq!(server.status().capacity_sectors, 36 * MIB);
    file.set_len(80 << 20).unwrap();
    device.update_size();
    server.order(&["resize", "--size", "64M"]);
    check_new_sectors(&server, 39 * MIB, 64 * MIB);
    server.kill();
    file.set_len(100 << 20).unwrap();
    device.update_size();
    // While nobody looked, too.
    let server = volume.serve(&[]);
    assert_eq!(server.causes("primary-grown").len(), 1);
    assert!(server.order(&["resize"]).contains(&format!("{} sectors", 99 * MIB)));
    let mut guest = server.guest(1);
    assert_eq!(guest.config.capacity.to_native(), 99 * MIB);
    assert!(guest.read(64 * MIB - 8, 8).unwrap() == pattern(64 * MIB - 8, 8, 7));
    assert!(guest.read(99 * MIB - 8, 8).is_ok());
}
