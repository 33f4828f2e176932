//! dm-remap's messages, one by one: the verb that does the same, or that there is none.

use vhost_remap::runtime::report::StatusReport;

use crate::guest::Failed;
use crate::model::pattern;
use crate::predecessor::{value, work};
use crate::server::{done, served, vhost_remap};
use crate::stats::stats;

#[test]
fn message_ping() {
    let (_volume, server, _guest) = served();
    assert_eq!(server.order(&["ping"]), format!("pong from vhost-remap {}\n", server.status().version));
}

/// `mappings= reads= writes= errors= health=`.
#[test]
fn message_status() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let (line, report) = (server.order(&["status", "--format", "compact"]), server.status());
    let numbers = ["mappings", "reads", "writes", "errors"].map(|name| value(&line, name).parse::<u64>().unwrap());
    let StatusReport { counters, blocks, .. } = &report;
    assert_eq!(numbers, [blocks.remapped, counters.reads, counters.writes, counters.device_errors]);
    assert_eq!(value(&line, "health"), format!("{}%", report.health_score));
}

#[test]
fn message_stats() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let (line, report) = (server.order(&["stats", "--format", "compact"]), server.status());
    let longest = stats(&server).operations.iter().map(|row| row.latency.max_ns).max().unwrap();
    assert!(longest >= report.mean_latency_ns().unwrap() && longest > 0);
    for (name, expected) in [
        ("total_ios", 10),
        ("normal", 9),
        ("remapped", 1),
        ("errors", report.counters.device_errors),
        ("remapped_sectors", 16),
        ("avg_latency_ns", report.mean_latency_ns().unwrap()),
        ("max_latency_ns", longest),
    ] {
        assert_eq!(value(&line, name), expected.to_string(), "{name} of {line}");
    }
}

/// `health_score= scan_count= hotspot_sectors= consecutive_errors= trend=`.
#[test]
fn message_health() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let line = || server.order(&["health", "--format", "compact"]);
    let report = server.status();
    assert_eq!(value(&line(), "health_score"), report.health_score.to_string());
    assert_eq!(value(&line(), "scan_count"), report.counters.health_scans.to_string());
    assert_eq!(value(&line(), "hotspot_sectors"), "1");
    assert_eq!(value(&line(), "trend"), "unknown");
    server.fault(&["--ops", "write", "--sectors", "4000-4023"]);
    for (i, sector) in [4000, 4008, 4016].into_iter().enumerate() {
        guest.write(sector, pattern(sector, 8, 1)).unwrap();
        // The first one of `work` is among them.
        let expected = u64::try_from(i).unwrap() + 2;
        assert_eq!(value(&line(), "consecutive_errors"), expected.to_string());
        assert_eq!(server.status().failed_writes_in_a_row, expected);
    }
    guest.write(5000, pattern(5000, 8, 1)).unwrap();
    assert_eq!(value(&line(), "consecutive_errors"), "0");
}

#[test]
fn message_remap_and_add_remap() {
    let (_volume, server, mut guest) = served();
    guest.write(1000, pattern(1000, 24, 1)).unwrap();
    assert_eq!(server.order(&["remap", "1003"]), "blocks moved to the spare: 1\n");
    assert_eq!(server.order(&["add_remap", "1008-1023"]), "blocks moved to the spare: 2\n");
    assert_eq!(server.blocks("remapped"), [1000, 1008, 1016]);
    assert_eq!(server.status().counters.remaps, 3);
    assert!(server.refused(&["remap", "1000"]).contains("already remapped"));
    assert!(guest.read(1000, 24).unwrap() == pattern(1000, 24, 1));
}

#[test]
fn message_verify() {
    let (_volume, server, _guest) = served();
    server.order(&["remap", "1000"]);
    let slot = server.list()[0].slot.unwrap();
    assert_eq!(server.order(&["verify", "1000"]), format!("sector 1000 -> slot {slot}\n"));
    assert_eq!(server.order(&["verify", "2000"]), "sector 2000 is not remapped\n");
}

#[test]
fn message_release_and_remove_remap() {
    let (_volume, server, mut guest) = served();
    server.order(&["remap", "1000-1015"]);
    guest.write(1000, pattern(1000, 16, 2)).unwrap();
    server.order(&["release", "1000"]);
    assert_eq!(server.blocks("remapped"), [1008]);
    server.order(&["remove_remap", "1008"]);
    assert_eq!((server.list(), server.status().blocks.slots_free), (vec![], 64));
    assert!(guest.read(1000, 16).unwrap() == pattern(1000, 16, 2));
}

/// There it forgets all remaps; here it lifts the poison of a failed flush, and no block is lost by it.
#[test]
fn message_clear() {
    let (_volume, server, mut guest) = served();
    server.order(&["remap", "1000"]);
    assert!(server.refused(&["clear"]).contains("nothing to clear"));
    guest.write(2000, pattern(2000, 8, 1)).unwrap();
    server.fault(&["--ops", "flush", "--count", "1"]);
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    assert!(server.order(&["clear"]).contains("writes are taken again"));
    assert_eq!((server.blocks("remapped"), server.status().state), (vec![1000], vec!["ok".into()]));
}

#[test]
fn message_clear_stats() {
    for verb in ["clear-stats", "clear_stats"] {
        let (_volume, server, mut guest) = served();
        work(&server, &mut guest);
        let before = server.status();
        server.order(&[verb]);
        let after = server.status();
        assert_eq!((after.counters, after.request_ns), (Default::default(), 0), "{verb}");
        assert_eq!((after.lifetime.reads, after.lifetime.remaps), (before.lifetime.reads, 2), "{verb}");
        assert_eq!((after.blocks, after.health), (before.blocks, before.health), "{verb}");
    }
}

/// What was counted is on the spare then, so that a kill does not lose it.
#[test]
fn message_save_and_sync() {
    for verb in ["save", "sync"] {
        let (volume, server, mut guest) = served();
        work(&server, &mut guest);
        assert!(server.order(&[verb]).contains("saved"));
        let lifetime = server.status().lifetime;
        server.kill();
        drop(guest);
        let found = volume.serve(&[]).status().lifetime;
        assert_eq!((found.reads, found.writes, found.remaps), (lifetime.reads, lifetime.writes, lifetime.remaps));
    }
}

/// `list` of debugfs.
#[test]
fn message_list() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let list = server.list();
    let rows: Vec<_> = list.iter().map(|entry| (entry.sector, &*entry.state[0], entry.slot.is_some())).collect();
    assert_eq!(rows, [(1000, "remapped", true), (2000, "pending", false), (3000, "remapped", true)]);
    let text = server.order(&["list"]);
    assert_eq!(text.lines().count(), 4, "{text}");
}

#[test]
fn message_help() {
    let help = done(&vhost_remap(&["help"]));
    for verb in
        ["status", "stats", "health", "list", "remap", "verify", "release", "clear", "clear-stats", "save", "ping"]
    {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{verb} "))), "{verb}: {help}");
        assert!(done(&vhost_remap(&["help", verb])).contains("\nExample"), "{verb}");
    }
    // Its spellings are taken and not taught.
    for alias in ["clear_stats", "add_remap", "remove_remap", "sync"] {
        assert!(!help.contains(alias), "{alias}: {help}");
    }
}

#[track_caller]
fn check_is_no_verb(verb: &str) {
    let output = vhost_remap(&[verb, "--control-path", "x"]);
    assert_eq!(output.status.code(), Some(2), "{verb}");
    assert!(String::from_utf8_lossy(&output.stderr).contains(verb), "{output:?}");
}

/// The map is read at each start.
#[test]
fn message_restore_means_nothing_here() {
    check_is_no_verb("restore");
    let (volume, server, guest) = served();
    server.order(&["remap", "1000"]);
    let list = server.list();
    drop(guest);
    server.kill();
    assert_eq!(volume.serve(&[]).list(), list);
}

/// What it said of the metadata is in `status`.
#[test]
fn message_metadata_status_is_part_of_status() {
    check_is_no_verb("metadata_status");
    let (_volume, server, _guest) = served();
    let before = server.status().counters.commits;
    server.order(&["remap", "1000"]);
    let report = server.status();
    assert!(report.counters.commits > before, "{report:?}");
    let text = server.order(&["status"]);
    let line = text.lines().find(|line| line.starts_with("commits ")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains(&report.counters.commits.to_string()), "{line}");
}

#[test]
fn message_cache_stats_means_nothing_here() {
    check_is_no_verb("cache_stats");
}

/// A remap without the data would be one.
#[test]
fn message_test_remap_means_nothing_here() {
    check_is_no_verb("test_remap");
}

/// Documented there, and absent.
#[test]
fn message_clear_all_and_those_of_the_spare_pool_mean_nothing_here() {
    ["clear_all", "spare_add", "spare_remove", "spare_stats"].into_iter().for_each(check_is_no_verb);
}
