//! The operator contract of dm-remap, row by row, with true numbers.

use crate::model::pattern;
use crate::server::{Server, Volume, done, vhost_remap};

/// A server with some reads and writes, a remapped and a pending block behind it.
fn busy(volume: &Volume) -> Server {
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    for i in 0..5 {
        guest.write(960 + 8 * i, pattern(960 + 8 * i, 8, 1)).unwrap();
    }
    server.fault(&["--ops", "write", "--sectors", "1000"]);
    guest.write(1000, pattern(1000, 8, 1)).unwrap();
    guest.read(960, 4).unwrap();
    // Two to the block that has moved, and one to it and its neighbours.
    guest.read(1000, 8).unwrap();
    guest.write(1002, pattern(1002, 2, 2)).unwrap();
    guest.read(984, 40).unwrap();
    guest.flush().unwrap();
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    assert!(guest.read(2003, 1).is_err());
    drop(guest);
    server.await_status(|status| !status.connected);
    server
}

/// `dmsetup status`: 31 fields in its order.
#[test]
fn each_field_of_the_status_line_agrees_with_the_report() {
    let volume = Volume::create(32, 64);
    let server = busy(&volume);
    let report = server.status();
    let line = server.order(&["status", "--line"]);
    assert_eq!(server.order(&["status", "--format", "raw"]).split(' ').count(), 31);
    let fields: Vec<&str> = line.trim_end().split(' ').collect();
    let counters = &report.counters;
    let requests = counters.reads + counters.writes + counters.flushes + counters.discards;
    assert_eq!((counters.reads, counters.writes, counters.flushes, report.blocks.pending), (4, 7, 1, 1));
    let numbers = [
        (1, 0),
        (2, report.capacity_sectors),
        (7, counters.reads),
        (8, counters.writes),
        (9, counters.remaps),
        (10, counters.device_errors),
        (11, report.blocks.remapped),
        (12, requests),
        (13, 0),
        (14, 0),
        (16, 512),
        (17, report.devices[1].size / 512),
        (18, requests),
        (19, requests - 3),
        (20, 3),
        (21, 8),
        (22, 0),
        (23, 0),
        (24, requests - 3),
        (25, 3),
        (26, counters.health_scans),
        (27, report.health_score),
        (28, report.blocks.pending),
        (29, 0),
    ];
    for (field, expected) in numbers {
        assert_eq!(fields[field - 1], expected.to_string(), "field {field} of {line}");
    }
    let bytes_a_second: u64 = fields[14].parse().unwrap();
    assert!(bytes_a_second <= counters.read_bytes + counters.written_bytes, "{line}");
    let version = format!("v{}", env!("CARGO_PKG_VERSION"));
    let words = [
        (3, "vhost-remap"),
        (4, version.as_str()),
        (5, volume.primary.to_str().unwrap()),
        (6, volume.spare.to_str().unwrap()),
        (30, "operational"),
        (31, "real"),
    ];
    for (field, expected) in words {
        assert_eq!(fields[field - 1], expected, "field {field} of {line}");
    }
    assert_eq!(numbers.len() + words.len() + 1, 31);
}

/// `dmremap-status -f human|json|csv|raw|compact`.
#[test]
fn each_format_of_its_status_tool_is_printed() {
    let volume = Volume::create(32, 64);
    let server = busy(&volume);
    let format = |name: &str| server.order(&["status", "-f", name]);
    assert!(format("human").starts_with("Volume "));
    assert!(format("json").starts_with("{\"schema\":"));
    let csv = format("csv");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 2, "{csv}");
    assert!(lines[0].starts_with("timestamp,device,health_score,avg_latency_us,throughput_mbps,errors,"), "{csv}");
    let column = |name: &str| {
        let at = lines[0].split(',').position(|column| column == name).unwrap();
        lines[1].split(',').nth(at).unwrap().to_owned()
    };
    let report = server.status();
    assert_eq!(column("device"), volume.primary.display().to_string());
    assert_eq!(column("errors"), report.counters.device_errors.to_string());
    assert_eq!([column("reads"), column("writes"), column("remapped"), column("pending")], ["4", "7", "1", "1"]);
    let compact = format("compact");
    assert_eq!(compact.lines().count(), 1);
    for part in [format!(" health={}% ", report.health_score), " errors=".into(), " mappings=1 ".into()] {
        assert!(compact.contains(&part), "{part:?} is not in {compact}");
    }
    let raw = format("raw");
    assert!(raw.starts_with("0 65536 vhost-remap v"), "{raw}");
    let words = ["status", "--control-path", "x", "--format", "xml"];
    assert_eq!(vhost_remap(&words).status.code(), Some(2));
}

/// Messages: `ping`, `status`, `health`, `remap`, `verify`, `remove_remap`, `add_remap`, `save`, `sync`, `clear_stats`.
#[test]
fn each_of_its_verbs_is_taken() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let check = |words: &[&str], expected: &str| {
        let answer = server.order(words);
        assert!(answer.contains(expected), "{words:?}: {answer}");
    };
    check(&["ping"], "pong");
    check(&["status", "--format", "compact"], "mappings=0 reads=0 writes=0");
    check(&["health", "--format", "compact"], "health_score=100 scan_count=0 hotspot_sectors=0 trend=unknown");
    check(&["remap", "1000"], "blocks moved to the spare: 1");
    check(&["verify", "1000"], "sector 1000 -> slot 0");
    check(&["verify", "2000"], "sector 2000 is not remapped");
    check(&["release", "1000"], "1");
    check(&["add_remap", "2000"], "blocks moved to the spare: 1");
    check(&["remove_remap", "2000"], "1");
    check(&["save"], "saved");
    check(&["sync"], "saved");
    check(&["clear-stats"], "begin anew");
    check(&["clear_stats"], "begin anew");
    assert_eq!(server.list(), []);
    check(&["status", "--proc"], "\n  Total remaps:   0\n");
    done(&vhost_remap(&["help"]));
    done(&vhost_remap(&["help", "remap"]));
}

/// What has no meaning here is no verb: the map is read at each start, there is no cache, and no remap without data.
#[test]
fn verbs_of_it_that_mean_nothing_here_are_refused() {
    for verb in ["restore", "cache_stats", "test_remap", "clear_all", "metadata_status"] {
        let output = vhost_remap(&[verb, "--control-path", "x"]);
        assert_eq!(output.status.code(), Some(2), "{verb}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(verb), "{output:?}");
    }
    let help = done(&vhost_remap(&["--help"]));
    for verb in ["status", "health", "surface", "remap", "verify", "release", "clear-stats", "save", "ping"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{verb} "))), "{verb}: {help}");
    }
    for alias in ["clear_stats", "add_remap", "remove_remap", "sync"] {
        assert!(!help.contains(alias), "{alias}: {help}");
    }
}

/// Parameters: `dm_remap_debug` and `debug_level` 0 to 3, `max_remaps`.
#[test]
fn its_parameters_are_taken_where_there_is_such_a_thing() {
    let volume = Volume::absent();
    let server = volume.serve(&["--create", "--size", "32M", "--max_remaps", "32", "--dm_remap_debug", "3"]);
    assert_eq!(server.status().blocks.remaps_max, 32);
    for level in ["0", "1", "2", "3"] {
        assert_eq!(server.order(&["log-level", level]), format!("log level {level}\n"));
    }
    server.stop();
    let why = volume.serve(&["--debug_level", "0"]).ask(&["log-level", "4"]);
    assert_eq!(why.status.code(), Some(2));
}
