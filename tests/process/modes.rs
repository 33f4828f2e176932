//! Read-only, passthrough and writeback service, and block devices beneath.

use std::fs;

use crate::disks::{Loop, skip};
use crate::guest::{Failed, Io};
use crate::model::{Model, Random, pattern};
use crate::server::{Volume, done, vhost_remap};

/// E4: `--read-only` writes nothing to either device.
#[test]
fn a_read_only_server_serves_everything_and_writes_nothing() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000-1015"]);
    let write = model.write(1004, pattern(1004, 1, 2));
    guest.queue().one(write).unwrap();
    drop(guest);
    // Not closed: what an open for writing would repair, this one leaves alone.
    server.kill();
    let content = || (fs::read(&volume.primary).unwrap(), fs::read(&volume.spare).unwrap());
    let before = content();
    for options in [&["--read-only"][..], &["--read-only", "--io-engine", "threads"]] {
        let server = volume.serve(options);
        assert!(server.announcement.contains("read-only"), "{}", server.announcement);
        let mut guest = server.guest(1);
        assert_ne!(guest.features & (1 << 5), 0, "VIRTIO_BLK_F_RO");
        model.check_all(guest.queue());
        for io in [
            Io::Write { sector: 1000, data: pattern(1000, 8, 3) },
            Io::WriteZeroes(vec![(1000, 8, 0)]),
            Io::Discard(vec![(1000, 8, 0)]),
        ] {
            assert_eq!(guest.queue().one(io.clone()), Err(Failed::IoErr), "{io:?}");
        }
        // Firmware flushes read-only disks too.
        guest.flush().unwrap();
        for order in [&["remap", "2000"][..], &["release", "1000"], &["save"]] {
            let why = server.refused(order);
            assert!(why.contains("read-only"), "{why}");
        }
        // A bad sector is still found and told.
        server.fault(&["--ops", "read", "--sectors", "970"]);
        assert_eq!(guest.read(968, 8), Err(Failed::IoErr));
        assert_eq!(server.status().state, ["read-only"]);
        drop(guest);
        server.stop();
        assert!(content() == before, "something was written");
    }
    model.check_all(volume.serve(&[]).guest(1).queue());
}

/// Two read-only servers share what one writer has for itself.
#[test]
fn read_only_servers_share_a_volume() {
    let volume = Volume::create(32, 64);
    let first = volume.serve(&["--read-only"]);
    let (second, _dir) = volume.serve_elsewhere(&["--read-only"]).join().unwrap();
    for server in [&first, &second] {
        assert_eq!(server.guest(1).read(0, 8), Ok(vec![0; 4096]));
    }
    let why = volume.serve_elsewhere_refused(&["--lock-wait", "0"]);
    assert!(why.contains("disk.img"), "{why}");
}

/// The predecessor's Minimal edition: no spare, no metadata, errors as they are.
#[test]
fn passthrough_serves_any_file_as_it_is() {
    let volume = Volume::absent();
    fs::write(&volume.primary, pattern(0, 8 * 2048, 1)).unwrap();
    let server = volume.serve_with(&["--passthrough", "--fault-injection"]);
    let mut guest = server.guest(2);
    let mut model = Model { start: 0, bytes: pattern(0, 8 * 2048, 1) };
    model.check_all(guest.queue());
    for (sector, count) in [(0, 1), (8 * 2048 - 1, 1), (1000, 300), (77, 9)] {
        let write = model.write(sector, pattern(sector, count, 2));
        guest.queue().one(write).unwrap();
    }
    model.zero(4000, 100);
    guest.queue().one(Io::WriteZeroes(vec![(4000, 100, 0)])).unwrap();
    guest.flush().unwrap();
    model.check_all(guest.queue());
    server.fault(&["--ops", "read,write", "--sectors", "1003"]);
    assert_eq!(guest.read(1003, 1), Err(Failed::IoErr));
    assert_eq!(guest.write(1000, pattern(1000, 8, 3)), Err(Failed::IoErr));
    model.check(guest.queue(), 1004, 200);
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.blocks.remaps_max, status.counters.guest_errors), (0, 0, 2));
    // There is no reserve that could be used up.
    let get_lifetime = Io::Raw { kind: 10, sector: 0, readable: Vec::new(), writable: 6 };
    assert_eq!(guest.queue().one(get_lifetime), Ok(vec![0; 6]));
    server.no_faults();
    model.check_all(guest.queue());
    drop(guest);
    server.stop();
    assert!(fs::read(&volume.primary).unwrap() == model.bytes);
    assert_eq!(fs::read_dir(volume.dir.path()).unwrap().count(), 2, "the image and the log, no spare");
}

/// Everything a volume does, on the given server: for options that must not matter.
fn check_core(volume: &Volume, options: &[&str]) {
    let server = volume.serve(options);
    let mut guest = server.guest(2);
    let start = 2048;
    let mut model = Model::written(&mut guest, start, 2048, 1);
    server.fault(&["--ops", "write", "--sectors", "2100-2107", "--sectors", "2300-2330"]);
    server.fault(&["--ops", "read", "--sectors", "2500", "--until-rewritten"]);
    assert_eq!(guest.read(2496, 16), Err(Failed::IoErr));
    let mut random = Random(3);
    for round in 0..150 {
        let count = 1 + random.below(64);
        let sector = start + random.below(900 - count);
        let write = model.write(sector, pattern(sector, count, round));
        guest.queues[usize::try_from(round % 2).unwrap()].one(write).unwrap();
    }
    let write = model.write(2500, pattern(2500, 1, 9));
    guest.queue().one(write).unwrap();
    model.zero(2290, 60);
    guest.queue().one(Io::WriteZeroes(vec![(2290, 60, 0)])).unwrap();
    guest.flush().unwrap();
    model.check_all(guest.queue());
    assert!(server.blocks("remapped").len() >= 5, "{:?}", server.list());
    let list = server.order(&["list", "--json"]);
    drop(guest);
    server.stop();
    let server = volume.serve(options);
    assert_eq!(server.order(&["list", "--json"]), list);
    let mut guest = server.guest(1);
    model.check_all(guest.queue());
    drop(guest);
    server.kill();
    let server = volume.serve(options);
    assert_eq!(server.order(&["list", "--json"]), list);
    model.check_all(server.guest(1).queue());
}

#[test]
fn the_core_works_with_threads() {
    let volume = Volume::create(32, 64);
    check_core(&volume, &["--io-engine", "threads"]);
}

#[test]
fn the_core_works_with_the_framework() {
    check_core(&Volume::create(32, 64), &["--transport", "framework"]);
}

#[test]
fn the_core_works_with_polling() {
    let volume = Volume::create(32, 64);
    check_core(&volume, &["--poll-us", "1000"]);
    assert_eq!(volume.serve(&["--poll-us", "1000"]).status().polling_us, 1000);
    assert_eq!(volume.serve(&["--poll-us", "0"]).status().polling_us, 0);
}

#[test]
fn the_core_works_with_one_worker() {
    check_core(&Volume::create(32, 64), &["--workers", "1", "--io-engine", "io_uring"]);
}

#[test]
fn the_core_works_with_the_page_cache() {
    let volume = Volume::create(32, 64);
    check_core(&volume, &["--cache", "writeback"]);
    let server = volume.serve(&["--cache", "writeback"]);
    assert_eq!(server.status().cache, "writeback");
    assert!(server.log_text().contains("write errors are only seen at flush"));
}

/// The size on offer, in queues.
#[test]
fn as_many_queues_are_offered_as_the_operator_said() {
    let volume = Volume::create(32, 64);
    for (options, expected) in [(&[][..], 64), (&["--num-queues", "2"], 2)] {
        let server = volume.serve(options);
        let guest = server.guest(1);
        assert_eq!((guest.max_queues, u16::from(guest.config.num_queues)), (expected.into(), expected));
        drop(guest);
        server.stop();
    }
}

/// A volume on a loop device of that block size with a spare of its own kind of block, or a file.
fn on_loop(test: &str, block: u32, spare_block: Option<u32>) -> Option<(Volume, Vec<Loop>)> {
    let mut volume = Volume::absent();
    let mut loops = Vec::new();
    let mut attach = |name: &str, mib: u64, block: u32| {
        let file = volume.dir.path().join(name);
        fs::File::create(&file).unwrap().set_len(mib << 20).unwrap();
        let attached = Loop::attach(&file, &["--direct-io=on", "--sector-size", &block.to_string()]);
        let attached = attached.map_err(|reason| skip(test, reason)).ok()?;
        let path = attached.path.clone();
        loops.push(attached);
        Some(path)
    };
    let primary = attach("primary.raw", 40, block)?;
    let spare = match spare_block {
        Some(block) => attach("spare.raw", 8, block)?,
        None => volume.spare.clone(),
    };
    (volume.primary, volume.spare) = (primary, spare);
    let paths = [&volume.primary, &volume.spare].map(|path| path.to_str().unwrap());
    let words = ["create", "--primary", paths[0], "--spare", paths[1], "--size", "32M", "--max-remaps", "64"];
    done(&vhost_remap(&words));
    Some((volume, loops))
}

#[test]
fn block_devices_serve_as_primary_and_spare() {
    let Some((volume, _loops)) = on_loop("block_devices_serve_as_primary_and_spare", 512, Some(512)) else { return };
    check_core(&volume, &[]);
    check_core_again(&volume);
}

/// Block devices have no modification time: a change from outside is found by samples.
fn check_core_again(volume: &Volume) {
    let server = volume.serve(&["--io-engine", "threads"]);
    assert!(!server.list().is_empty());
    let mut guest = server.guest(1);
    assert_eq!(u32::from(guest.config.blk_size), 512);
    guest.queue().one(Io::Discard(vec![(8192, 2048, 0)])).unwrap();
    drop(guest);
    server.stop();
}

/// Scenario 33: 4Kn beneath, and a guest that sends what it likes.
#[test]
fn a_disk_of_4096_byte_sectors_takes_512_byte_requests() {
    let name = "a_disk_of_4096_byte_sectors_takes_512_byte_requests";
    for spare in [None, Some(4096)] {
        let Some((volume, _loops)) = on_loop(name, 4096, spare) else { return };
        let server = volume.serve(&[]);
        let guest = server.guest(1);
        assert_eq!(u32::from(guest.config.blk_size), 4096);
        drop(guest);
        server.stop();
        check_core_of_4kn(&volume);
    }
}

/// As [`check_core`], but faults and what they take with them are whole blocks.
fn check_core_of_4kn(volume: &Volume) {
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 2048, 2048, 1);
    let mut random = Random(5);
    let queue = guest.queue();
    for round in 0..100 {
        let count = 1 + random.below(40);
        let sector = 2048 + random.below(1000);
        queue.shape.skew = [0, 512, 1][usize::try_from(round % 3).unwrap()];
        let write = model.write(sector, pattern(sector, count, round));
        queue.one(write).unwrap();
        if round == 50 {
            server.fault(&["--ops", "write", "--sectors", "2200-2207", "--sectors", "2400-2430"]);
        }
    }
    model.check_all(queue);
    for (sector, count) in [(2049, 1), (2201, 3), (2199, 10), (2406, 2)] {
        let write = model.write(sector, pattern(sector, count, 200));
        queue.one(write).unwrap();
        model.check(queue, sector - 1, count + 2);
    }
    queue.one(Io::Flush).unwrap();
    assert!(server.blocks("remapped").contains(&2200), "{:?}", server.list());
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    model.check_all(server.guest(1).queue());
}
