//! Scenarios of the predecessor's list that need a test of their own.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use vhost_remap::control::api::FaultList;
use vhost_remap::volume::layout::{Home, Layout, PAGE, Place, spare_size};
use vhost_remap::volume::table::{Page, PageSeat};

use crate::guest::{Guest, Io};
use crate::inputs::{Ground, create, skip};
use crate::model::{Model, Random, pattern};
use crate::server::{Server, Volume, try_output_of};

const SLOTS: u32 = 128;

fn layout(volume: &Volume, slots: u32) -> Layout {
    Layout::new(fs::metadata(&volume.spare).unwrap().len(), slots).unwrap()
}

/// How often each rule that is left has struck.
fn hits(server: &Server) -> Vec<u64> {
    let list: FaultList = serde_json::from_str(&server.order(&["fault", "list", "--json"])).unwrap();
    list.rules.iter().map(|rule| rule.hits).collect()
}

/// Scenario 2, with the predecessor's own sectors: the guest notices nothing, the mapping is durable before
/// the answer, and the primary is not written there again.
#[test]
fn bad_sectors_are_moved_durably_and_not_written_again() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 0, 512, 1);
    guest.flush().unwrap();
    let bad = [100, 101, 200, 300, 400];
    let texts = bad.map(|sector| sector.to_string());
    let rules: Vec<&str> = texts.iter().flat_map(|text| ["--sectors", text]).collect();
    server.fault(&[&["--ops", "write"], &rules[..]].concat());
    for sector in bad {
        let write = model.write(sector, pattern(sector, 1, 2));
        guest.queue().one(write).unwrap();
    }
    // Two of the sectors share a block.
    let blocks = [96, 200, 296, 400];
    assert_eq!(server.blocks("remapped"), blocks);
    let before = (hits(&server), server.status().devices[0].write_errors);
    for sector in bad {
        let write = model.write(sector - 3, pattern(sector - 3, 7, 3));
        guest.queue().one(write).unwrap();
    }
    model.check_all(guest.queue());
    assert_eq!((hits(&server), server.status().devices[0].write_errors), before);
    // Nothing was flushed by the guest since the faults began.
    server.kill();
    drop(guest);
    let server = volume.serve(&[]);
    assert_eq!(server.blocks("remapped"), blocks);
    assert_eq!(server.list().iter().map(|entry| entry.slot).collect::<BTreeSet<_>>().len(), 4);
    model.check_all(server.guest(1).queue());
}

/// Scenario 7: every size from 1 to 64 sectors, at, before and after the start of a remapped block.
#[test]
fn every_size_around_a_remapped_block_sees_the_same_bytes() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(2);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000-1007", "1016"]);
    for count in 1..=64 {
        for (i, start) in [1000, 997, 1001].into_iter().enumerate() {
            let stamp = count << 2 | i as u64;
            let write = model.write(start, pattern(start, count, stamp));
            guest.queues[i % 2].one(write).unwrap();
            model.check(&mut guest.queues[(i + 1) % 2], start, count);
            model.check(&mut guest.queues[i % 2], 990, 90);
        }
    }
    model.check_all(guest.queue());
}

/// Scenario 11: the smallest spare will do, and a sector less is refused with both numbers.
#[test]
fn the_smallest_spare_holds_every_slot_and_a_smaller_one_is_refused() {
    let ground = Ground::empty();
    let needed = spare_size(16);
    for (name, missing) in [("enough", 0), ("short", 512), ("shorter", 1 << 20)] {
        ground.zeros(name, needed - missing);
    }
    ground.zeros("image", 4 << 20);
    for (name, has) in [("short", needed - 512), ("shorter", needed - (1 << 20))] {
        let line = format!(
            "{name}: has {has} bytes, and 16 remaps need {needed}; use a larger one, or fewer with --max-remaps"
        );
        for words in ["create --primary new --size 4M", "adopt --primary image"] {
            ground.refuses(&format!("{words} --spare {name} --max-remaps 16"), &line);
        }
    }
    let volume = Volume { spare: ground.path("enough"), ..ground.volume };
    create(&volume.primary, &volume.spare, "4M");
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 0, 256, 1);
    server.order(&["remap", "0-127"]);
    for sector in 0..128 {
        let write = model.write(sector, pattern(sector, 1, 2));
        guest.queue().one(write).unwrap();
    }
    assert_eq!((server.list().len(), server.status().blocks.slots_free), (16, 0));
    drop(guest);
    server.stop();
    model.check_all(volume.serve(&[]).guest(1).queue());
}

/// The bytes of both places that change only with the map.
fn tables(volume: &Volume, layout: &Layout) -> Vec<Vec<u8>> {
    let file = fs::File::open(&volume.spare).unwrap();
    let homes = Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| layout.table(place, home, 0)));
    homes.map(|offset| read_page(&file, offset)).collect()
}

fn read_page(file: &fs::File, offset: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    file.read_exact_at(&mut page, offset).unwrap();
    page
}

/// Scenario 12: slots and metadata have nothing in common, whatever is written into either.
#[test]
fn a_hundred_remaps_and_a_thousand_commits_do_not_touch_each_other() {
    let volume = Volume::create(32, SLOTS);
    let layout = layout(&volume, SLOTS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 8192, 2048, 1);
    server.order(&["remap", "8192-8991"]);
    let slots: BTreeSet<u64> = server.list().iter().map(|entry| u64::from(entry.slot.unwrap())).collect();
    assert_eq!(slots.len(), 100);
    for slot in slots {
        let start = layout.slots_start + slot * 4096;
        for place in Place::ALL {
            let metadata = layout.place_start(place)..layout.place_start(place) + layout.place_len();
            assert!(start + 4096 <= metadata.start || start >= metadata.end, "slot {slot} lies in the {place:?}");
        }
    }
    // The second home of a page follows its first at leisure.
    server.order(&["save"]);
    server.order(&["remap", "10000"]);
    server.order(&["release", "10000"]);
    let before = server.status().counters.commits;
    let known = tables(&volume, &layout);
    let mut random = Random(12);
    for stamp in 2..300 {
        let count = 1 + random.below(40);
        let sector = 8192 + random.below(800 - count);
        let write = model.write(sector, pattern(sector, count, stamp));
        guest.queue().one(write).unwrap();
    }
    guest.flush().unwrap();
    assert_eq!(server.status().counters.commits, before, "writes to slots commit nothing");
    let homes = Place::ALL.len() * Home::ALL.len();
    let changed = tables(&volume, &layout).iter().zip(&known).filter(|(now, then)| now != then).count();
    assert!(changed <= homes / 2, "{changed} of {homes} homes changed; half may follow the other half");
    model.check_all(guest.queue());
    while server.status().counters.commits < before + 1000 {
        server.order(&["remap", "10000-10199"]);
        server.order(&["release", "10000-10199"]);
    }
    model.check_all(guest.queue());
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    assert_eq!((server.list().len(), server.status().counters.metadata_repairs), (100, 0));
    model.check_all(server.guest(1).queue());
}

/// Scenario 17: of copies with different sequences the newest is taken, and all are brought up to it.
#[test]
fn the_newest_of_differing_copies_is_taken_and_copied_to_the_others() {
    let volume = Volume::create(32, SLOTS);
    let layout = layout(&volume, SLOTS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000-1015"]);
    drop(guest);
    server.stop();
    let old = tables(&volume, &layout);
    let server = volume.serve(&[]);
    server.order(&["remap", "1100"]);
    server.order(&["release", "1008"]);
    let write = model.write(1100, pattern(1100, 2, 2));
    server.guest(1).queue().one(write).unwrap();
    let (list, set) = (server.order(&["list", "--json"]), server.status().volume.parse().unwrap());
    server.stop();
    let homes: Vec<_> = Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| (place, home))).collect();
    let sequences = || -> Vec<u64> {
        let pages = tables(&volume, &layout);
        let decoded = homes.iter().zip(&pages).map(|(&(place, home), page)| {
            Page::decode(page, set, 0, PageSeat::Spare(place, home)).expect("a valid page").sequence
        });
        decoded.collect()
    };
    let newest = *sequences().iter().max().unwrap();
    // All that leave one newest copy at least.
    for stale in 1..(1 << homes.len()) - 1_u32 {
        let file = fs::OpenOptions::new().write(true).open(&volume.spare).unwrap();
        let mut count = 0;
        for (i, (place, home)) in homes.iter().enumerate().filter(|(i, _)| stale >> i & 1 == 1) {
            file.write_all_at(&old[i], layout.table(*place, *home, 0)).unwrap();
            count += 1;
        }
        let server = volume.serve(&[]);
        assert_eq!(server.order(&["list", "--json"]), list, "stale homes {stale:04b}");
        assert_eq!(server.status().counters.metadata_repairs, count, "stale homes {stale:04b}");
        model.check_all(server.guest(1).queue());
        server.stop();
        assert_eq!(sequences(), vec![newest; homes.len()], "stale homes {stale:04b}");
    }
}

/// Scenario 19: a volume is found by what it is, wherever its halves have gone.
#[test]
fn renamed_swapped_and_copied_halves_are_known_again() {
    let mut volume = Volume::create(32, SLOTS);
    let server = volume.serve(&["--io-engine", "threads"]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000"]);
    let uuid = server.status().volume;
    drop(guest);
    server.stop();
    let check = |volume: &Volume| {
        let server = volume.serve(&["--io-engine", "threads"]);
        assert_eq!((server.status().volume, server.blocks("remapped")), (uuid.clone(), vec![1000]));
        model.check_all(server.guest(1).queue());
        server.stop();
    };
    // As device nodes do when disks are found in another order: each has the other's name.
    let between = volume.dir.path().join("between");
    fs::rename(&volume.primary, &between).unwrap();
    fs::rename(&volume.spare, &volume.primary).unwrap();
    fs::rename(&between, &volume.spare).unwrap();
    let why = volume.serve_refused(&[]);
    assert!(why.contains("no vhost-remap volume"), "{why}");
    let Volume { primary, spare, .. } = &mut volume;
    std::mem::swap(primary, spare);
    check(&volume);
    // In other places, and under names that only lead there.
    let elsewhere = tempfile::tempdir().unwrap();
    for path in [&mut volume.primary, &mut volume.spare] {
        let moved = elsewhere.path().join(format!("moved.{}", path.file_name().unwrap().display()));
        fs::rename(&path, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &path).unwrap();
    }
    check(&volume);
    // Other files with the same content, as after a copy to another disk.
    for path in [&volume.primary, &volume.spare] {
        let copy = fs::read(path).unwrap();
        fs::remove_file(path).unwrap();
        fs::write(path, copy).unwrap();
    }
    check(&volume);
}

/// Scenario 23: connections come and go under I/O, and the log's level changes; the map stays, and no
/// answered write is lost.
#[test]
fn reconnecting_under_load_leaves_the_map_and_every_answered_write() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(2);
    let mut model = Model::written(&mut guest, 960, 512, 0);
    server.order(&["remap", "1000-1015", "1100", "1200-1231"]);
    let list = server.order(&["list", "--json"]);
    server.fault(&["--ops", "write", "--delay", "40", "--errno", "none"]);
    server.fault(&["--device", "spare", "--ops", "write", "--delay", "40", "--errno", "none"]);
    for round in 1..=6 {
        // One in eight stays unanswered when the connection ends: its sectors are old or new.
        let ios: Vec<Io> = (0..32)
            .map(|i| (960 + 16 * i, pattern(960 + 16 * i, 9, round)))
            .map(|(sector, data)| Io::Write { sector, data })
            .collect();
        let (left, waited): (Vec<_>, Vec<_>) = ios.into_iter().enumerate().partition(|(i, _)| i % 8 == 3);
        let waited: Vec<Io> = waited.into_iter().map(|(_, io)| io).collect();
        assert!(guest.queues[0].run(&waited).iter().all(Result::is_ok));
        for io in &waited {
            let Io::Write { sector, data } = io else { unreachable!() };
            let _ = model.write(*sector, data.clone());
        }
        for (_, io) in &left {
            guest.queues[1].submit(io);
        }
        server.order(&["log-level", &(round % 3).to_string()]);
        drop(guest);
        guest = server.guest(2);
        assert_eq!(server.order(&["list", "--json"]), list);
        for (_, io) in left {
            let Io::Write { sector, data } = io else { unreachable!() };
            for (sector, new) in (sector..).zip(data.chunks(512)) {
                let found = guest.read(sector, 1).unwrap();
                assert!(found == new || found == model.sectors(sector, 1), "sector {sector}: {:x?}", &found[..16]);
                let _ = model.write(sector, found);
            }
        }
        model.check_all(guest.queue());
    }
    assert_eq!(server.status().counters.guest_errors, 0);
}

/// What a server's process holds.
#[derive(Debug)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    anonymous_kib: u64,
}

impl Holdings {
    /// Of a server with a front-end of two queues, in each of which a request has been served: the session
    /// before has ended by then, and everything of this one has been handed over.
    fn of(server: &Server) -> Holdings {
        let mut guest = server.guest(2);
        guest.queues.iter_mut().for_each(|queue| drop(queue.one(Io::Read { sector: 0, count: 1 }).unwrap()));
        let proc = Path::new("/proc").join(server.pid().to_string());
        let count = |name| fs::read_dir(proc.join(name)).unwrap().count();
        let status = fs::read_to_string(proc.join("status")).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next());
        Holdings {
            descriptors: count("fd"),
            threads: count("task"),
            mappings: fs::read_to_string(proc.join("maps")).unwrap().lines().count(),
            anonymous_kib: kib.and_then(|kib| kib.parse().ok()).expect("a number of KiB"),
        }
    }

    /// Not more than `then`; threads and memory may vary a little, as pools and allocators keep what may be
    /// of use again.
    fn is_within(&self, then: &Holdings) -> bool {
        self.descriptors <= then.descriptors
            && self.threads <= then.threads + 8
            && self.mappings <= then.mappings + 24
            && self.anonymous_kib <= then.anonymous_kib + 1024
    }

    /// Soon at the latest: what a pool has done with goes after a moment.
    #[track_caller]
    fn check(server: &Server, then: &Holdings, what: &str) {
        let mut now = Holdings::of(server);
        for _ in 0..100 {
            if now.is_within(then) {
                return;
            }
            now = Holdings::of(server);
        }
        panic!("{what}: {now:?} after {then:?}");
    }
}

fn some_work(server: &Server, model: &mut Model, stamp: u64) {
    let mut guest = server.guest(2);
    for sector in (960..1200).step_by(24) {
        let write = model.write(sector, pattern(sector, 20, stamp));
        guest.queue().one(write).unwrap();
    }
    guest.flush().unwrap();
    model.check_all(guest.queue());
}

/// Scenario 32: ten servers after each other, and thirty front-ends of one, take no more than the first.
#[test]
fn ten_starts_and_stops_take_no_more_than_the_first() {
    let volume = Volume::create(32, SLOTS);
    let mut model = Model::zeros(960, 256);
    let server = volume.serve(&[]);
    server.order(&["remap", "1000-1015"]);
    server.stop();
    let mut first: Option<Holdings> = None;
    for run in 0..10 {
        let server = volume.serve(&[]);
        // All its threads have begun when the control socket answers.
        server.status();
        let start = Holdings::of(&server);
        some_work(&server, &mut model, run);
        Holdings::check(&server, &start, &format!("server {run}, since its start"));
        // Descriptors that other tests were about to close are inherited, and differ.
        let descriptors = usize::MAX;
        let first = first.get_or_insert(Holdings { descriptors, ..Holdings::of(&server) });
        Holdings::check(&server, first, &format!("server {run}, since the first"));
        server.stop();
    }
    let server = volume.serve(&[]);
    (0..10).for_each(|run| some_work(&server, &mut model, 100 + run));
    let settled = Holdings::of(&server);
    (10..40).for_each(|run| some_work(&server, &mut model, 100 + run));
    Holdings::check(&server, &settled, "thirty sessions later");
}

/// Write an image of a file system to the disk, and read the disk back.
fn copy_through(guest: &mut Guest, image: &[u8]) -> Vec<u8> {
    const PIECE: u64 = 96;
    let sectors = image.len() as u64 / 512;
    let pieces = (0..sectors).step_by(usize::try_from(PIECE).unwrap()).map(|start| (start, PIECE.min(sectors - start)));
    let bytes = |(start, count): (u64, u64)| {
        usize::try_from(start * 512).unwrap()..usize::try_from((start + count) * 512).unwrap()
    };
    let writes: Vec<Io> =
        pieces.clone().map(|piece| Io::Write { sector: piece.0, data: image[bytes(piece)].to_vec() }).collect();
    assert!(guest.queue().run(&writes).iter().all(Result::is_ok));
    guest.flush().unwrap();
    let reads: Vec<Io> = pieces.map(|(sector, count)| Io::Read { sector, count }).collect();
    guest.queue().run(&reads).into_iter().flat_map(|reply| reply.unwrap()).collect()
}

/// Scenario 31, from the host: a file system goes onto a disk whose sectors 0 and 2 take no writes, and is
/// sound and the same at every stage of the disk's further decay.
#[test]
fn a_file_system_is_sound_at_every_stage_of_decay() {
    let name = "a_file_system_is_sound_at_every_stage_of_decay";
    let volume = Volume::create(16, 512);
    let (scratch, mut random) = (tempfile::tempdir().unwrap(), Random(31));
    let (image, back) = (scratch.path().join("image"), scratch.path().join("back"));
    let files = scratch.path().join("files");
    fs::create_dir(&files).unwrap();
    let mut bad = vec!["0".to_owned(), "2".to_owned()];
    for stage in 0..4 {
        fs::write(files.join(format!("file{stage}")), pattern(stage, 2000, stage)).unwrap();
        let _ = fs::remove_file(&image);
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        match try_output_of(mkfs.args(["-q", "-F", "-d"]).arg(&files).arg(&image)) {
            Ok(output) if output.status.success() => {}
            Ok(output) => return skip(name, String::from_utf8_lossy(&output.stderr)),
            Err(error) => return skip(name, format_args!("mkfs.ext4: {error}")),
        }
        let server = volume.serve(&[]);
        bad.extend((0..24 * stage).map(|_| random.below(32_768).to_string()));
        let rules: Vec<&str> = bad.iter().flat_map(|sector| ["--sectors", sector]).collect();
        server.fault(&[&["--ops", "write"], &rules[..]].concat());
        let mut guest = server.guest(1);
        let bytes = fs::read(&image).unwrap();
        let found = copy_through(&mut guest, &bytes);
        assert!(found == bytes, "stage {stage}: the disk differs");
        fs::write(&back, &found).unwrap();
        let fsck = try_output_of(Command::new("e2fsck").arg("-fn").arg(&back)).unwrap();
        assert!(fsck.status.success(), "stage {stage}: {}", String::from_utf8_lossy(&fsck.stdout));
        let remapped = server.blocks("remapped");
        for sector in &bad {
            let block = sector.parse::<u64>().unwrap() / 8 * 8;
            assert!(remapped.contains(&block), "stage {stage}: {sector} was not moved");
        }
        assert_eq!((server.status().counters.guest_errors, server.status().state), (0, vec!["ok".to_owned()]));
        drop(guest);
        server.kill();
        let server = volume.serve(&[]);
        let mut guest = server.guest(1);
        let model = Model { start: 0, bytes };
        model.check_all(guest.queue());
        drop(guest);
        server.stop();
    }
}
