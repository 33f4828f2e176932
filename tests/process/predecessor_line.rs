//! dm-remap's status line, field by field: `status --line` after something has happened that the field shows.

use vhost_remap::runtime::report::StatusReport;

use crate::guest::{Failed, Io};
use crate::model::pattern;
use crate::server::{Server, Volume, done, eventually, served, vhost_remap};
use crate::stats::stats;

/// A field of the line, counted from 1.
#[track_caller]
fn field(server: &Server, number: usize) -> String {
    let line = server.order(&["status", "--line"]);
    let fields: Vec<&str> = line.strip_suffix('\n').unwrap().split(' ').collect();
    assert_eq!(fields.len(), 31, "{line:?}");
    fields[number - 1].to_owned()
}

/// Fields that say this, and what the report says.
#[track_caller]
fn check(server: &Server, numbers: &[usize], expected: u64, of: impl Fn(&StatusReport) -> u64) {
    assert_eq!(of(&server.status()), expected, "/v1/status");
    for number in numbers {
        assert_eq!(field(server, *number), expected.to_string(), "field {number}");
    }
}

#[test]
fn fields_1_and_2_are_where_the_disk_begins_and_its_sectors() {
    let (_volume, server, _guest) = served();
    check(&server, &[1], 0, |_| 0);
    check(&server, &[2], 32 << 11, |report| report.capacity_sectors);
    server.order(&["resize", "--size", "40M"]);
    check(&server, &[2], 40 << 11, |report| report.capacity_sectors);
}

#[test]
fn fields_3_and_4_are_the_program_and_its_version() {
    let (_volume, server, _guest) = served();
    assert_eq!(field(&server, 3), "vhost-remap");
    assert_eq!(field(&server, 4), format!("v{}", server.status().version));
    assert_eq!(field(&server, 4), format!("v{}", env!("CARGO_PKG_VERSION")));
}

/// Each is one word, whatever it is called.
#[test]
fn fields_5_and_6_are_the_devices() {
    let mut volume = Volume::absent();
    volume.primary = volume.dir.path().join("my disk.img");
    volume.spare = volume.dir.path().join("a spare.img");
    let [primary, spare] = [&volume.primary, &volume.spare].map(|path| path.to_str().unwrap().to_owned());
    done(&vhost_remap(&["create", "--primary", &primary, "--spare", &spare, "--size", "32M"]));
    let server = volume.serve(&[]);
    let paths = server.status().devices.into_iter().map(|device| device.path).collect::<Vec<_>>();
    assert_eq!(paths, [&*primary, &*spare]);
    assert_eq!([5, 6].map(|number| field(&server, number).replace("\\040", " ")), [primary, spare]);
    // One that has no spare.
    let plain = Volume::absent();
    std::fs::write(&plain.primary, vec![0; 1 << 20]).unwrap();
    let server = plain.serve_with(&["--passthrough"]);
    assert_eq!([6, 17].map(|number| field(&server, number)), ["-", "0"]);
}

#[test]
fn fields_7_and_8_are_reads_and_writes() {
    let (_volume, server, mut guest) = served();
    check(&server, &[7, 8], 0, |report| report.counters.reads + report.counters.writes);
    for _ in 0..3 {
        guest.read(960, 4).unwrap();
    }
    for _ in 0..2 {
        guest.write(960, pattern(960, 8, 1)).unwrap();
    }
    guest.queue().one(Io::WriteZeroes(vec![(4160, 8, 0)])).unwrap();
    guest.queue().one(Io::WriteZeroes(vec![(4160, 8, 0)])).unwrap();
    check(&server, &[7], 3, |report| report.counters.reads);
    check(&server, &[8], 4, |report| report.counters.writes);
    let of = |names: &[&str]| {
        let operations = stats(&server).operations;
        operations.iter().filter(|row| names.contains(&&*row.operation)).map(|row| row.completed).sum::<u64>()
    };
    assert_eq!((of(&["read"]), of(&["write", "write_zeroes"])), (3, 4), "/v1/stats");
}

#[test]
fn field_9_is_blocks_moved_and_fields_11_and_21_what_lives_in_slots_of_them() {
    let (_volume, server, mut guest) = served();
    server.order(&["remap", "1000-1023"]);
    server.fault(&["--ops", "write", "--sectors", "2000"]);
    guest.write(2000, pattern(2000, 8, 1)).unwrap();
    server.order(&["release", "1008"]);
    check(&server, &[9], 4, |report| report.counters.remaps);
    check(&server, &[11], 3, |report| report.blocks.remapped);
    check(&server, &[21], 24, |report| report.blocks.remapped * 8);
    assert_eq!(server.blocks("remapped"), [1000, 1016, 2000]);
}

#[test]
fn field_10_is_failed_operations_of_both_devices() {
    let (_volume, server, mut guest) = served();
    server.order(&["remap", "1000"]);
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    server.fault(&["--device", "spare", "--ops", "read"]);
    assert_eq!([guest.read(2003, 1), guest.read(1000, 8)], [Err(Failed::IoErr), Err(Failed::IoErr)]);
    let report = server.status();
    let errors: Vec<u64> = report.devices.iter().map(|d| d.read_errors + d.write_errors + d.flush_errors).collect();
    assert!(errors[0] > 0 && errors[1] > 0, "{errors:?}");
    check(&server, &[10], errors.iter().sum(), |report| report.counters.device_errors);
    let by_class = stats(&server).devices.iter().map(|row| row.errors.values().sum::<u64>()).sum::<u64>();
    assert_eq!(by_class, errors.iter().sum::<u64>(), "/v1/stats");
}

/// Two reads, three writes (one of them of zeros), a flush, a discard.
#[test]
fn fields_12_and_18_are_requests() {
    let (_volume, server, mut guest) = served();
    guest.write(960, pattern(960, 8, 1)).unwrap();
    guest.write(968, pattern(968, 8, 1)).unwrap();
    guest.read(960, 16).unwrap();
    guest.queue().one(Io::WriteZeroes(vec![(4160, 8, 0)])).unwrap();
    guest.queue().one(Io::Discard(vec![(4096, 64, 0)])).unwrap();
    guest.flush().unwrap();
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    assert_eq!(guest.read(2003, 1), Err(Failed::IoErr));
    check(&server, &[12, 18], 7, |report| report.counters.requests());
    assert_eq!(stats(&server).operations.iter().map(|row| row.completed).sum::<u64>(), 7, "/v1/stats");
}

#[test]
fn fields_13_and_14_are_how_long_requests_took_together_and_on_average() {
    let (_volume, server, mut guest) = served();
    check(&server, &[13, 14], 0, |report| report.request_ns);
    server.fault(&["--ops", "read", "--sectors", "800", "--delay", "60"]);
    let work = |guest: &mut crate::guest::Guest| {
        guest.write(960, pattern(960, 8, 1)).unwrap();
        guest.read(800, 8).unwrap();
        guest.flush().unwrap();
    };
    let sum_ns = || stats(&server).operations.iter().map(|row| row.latency.sum_ns).sum::<u64>();
    work(&mut guest);
    assert!(sum_ns() >= 60_000_000, "{}", sum_ns());
    check(&server, &[13], sum_ns(), |report| report.request_ns);
    check(&server, &[14], sum_ns() / 3, |report| report.mean_latency_ns().unwrap());
    let before = sum_ns();
    server.order(&["clear-stats"]);
    check(&server, &[13, 14], 0, |report| report.request_ns);
    work(&mut guest);
    check(&server, &[13], sum_ns() - before, |report| report.request_ns);
    check(&server, &[14], (sum_ns() - before) / 3, |report| report.mean_latency_ns().unwrap());
}

#[test]
fn field_15_is_bytes_a_second() {
    let (_volume, server, mut guest) = served();
    guest.write(960, pattern(960, 1000, 1)).unwrap();
    guest.read(960, 500).unwrap();
    eventually("a line whose second is known", || {
        let (before, found, after) = (server.status(), field(&server, 15), server.status());
        let seconds = before.counted_seconds();
        if seconds == 0 || seconds != after.counted_seconds() {
            return false;
        }
        assert_eq!(before.counters.read_bytes + before.counters.written_bytes, 1500 * 512);
        assert_eq!(found, (1500 * 512 / seconds).to_string(), "{seconds} seconds");
        true
    });
}

#[test]
fn fields_16_and_17_are_the_size_of_a_sector_and_sectors_of_the_spare() {
    let (volume, server, _guest) = served();
    let spare = std::fs::metadata(&volume.spare).unwrap().len();
    assert_eq!(field(&server, 16), "512");
    check(&server, &[17], spare / 512, |report| report.devices[1].size / 512);
}

#[test]
fn fields_19_and_24_are_requests_to_plain_blocks_and_20_and_25_those_to_slots() {
    let (_volume, server, mut guest) = served();
    guest.write(960, pattern(960, 256, 1)).unwrap();
    server.order(&["remap", "1000"]);
    // To the block, a part of it, and over it.
    guest.read(1000, 8).unwrap();
    guest.write(1002, pattern(1002, 2, 2)).unwrap();
    guest.read(984, 40).unwrap();
    guest.read(960, 8).unwrap();
    guest.flush().unwrap();
    check(&server, &[20, 25], 3, |report| report.counters.slot_requests);
    check(&server, &[19, 24], 3, |report| report.counters.requests() - report.counters.slot_requests);
}

/// There is no cache, so nothing is found in it.
#[test]
fn fields_22_23_and_29_are_of_a_cache() {
    let (_volume, server, mut guest) = served();
    server.order(&["remap", "1000"]);
    for _ in 0..2 {
        guest.read(1000, 8).unwrap();
    }
    assert_eq!([22, 23, 29].map(|number| field(&server, number)), ["0", "0", "0"]);
}

#[test]
fn field_26_is_passes_of_the_scanner() {
    let (_volume, server, _guest) = served();
    assert_eq!(field(&server, 26), server.status().counters.health_scans.to_string());
}

#[test]
fn field_27_is_the_score_and_field_28_the_pending_blocks() {
    let (_volume, server, mut guest) = served();
    check(&server, &[27], 100, |report| report.health_score);
    check(&server, &[28], 0, |report| report.blocks.pending);
    server.fault(&["--ops", "read", "--sectors", "2003", "--sectors", "3003"]);
    assert_eq!([guest.read(2003, 1), guest.read(3003, 1)], [Err(Failed::IoErr), Err(Failed::IoErr)]);
    check(&server, &[28], 2, |report| report.blocks.pending);
    let health: serde_json::Value = serde_json::from_str(&server.order(&["health", "--json"])).unwrap();
    let score = health["score"]["value"].as_u64().unwrap();
    assert!(score < 95, "{health}");
    check(&server, &[27], score, |report| report.health_score);
}

#[test]
fn field_30_is_whether_the_disk_works() {
    let (_volume, server, mut guest) = served();
    assert_eq!((field(&server, 30).as_str(), &server.status().state[..]), ("operational", &["ok".to_owned()][..]));
    guest.write(960, pattern(960, 8, 1)).unwrap();
    server.fault(&["--ops", "flush", "--count", "1"]);
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    assert_eq!(
        (field(&server, 30).as_str(), &server.status().state[..]),
        ("maintenance", &["poisoned".to_owned()][..])
    );
    server.order(&["clear"]);
    assert_eq!(field(&server, 30), "operational");
}

#[test]
fn field_31_is_that_this_is_no_demonstration() {
    let (_volume, server, mut guest) = served();
    guest.write(960, pattern(960, 8, 1)).unwrap();
    assert!(guest.read(960, 8).unwrap() == pattern(960, 8, 1));
    assert_eq!(field(&server, 31), "real");
}
