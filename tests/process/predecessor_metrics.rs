//! dm-remap's thirteen names for Prometheus, one by one: `/metrics/dm-remap` after something has happened that the name
//! stands for.

use std::time::Duration;

use vhost_remap::control::client::Client;
use vhost_remap::runtime::report::StatusReport;

use crate::guest::{Failed, Guest};
use crate::model::pattern;
use crate::server::{Server, eventually, served};
use crate::spare::slot_sectors;
use crate::stats::stats;

/// All of them, in dm-remap's order.
const NAMES: [&str; 13] = [
    "total_reads",
    "total_writes",
    "total_remaps",
    "total_errors",
    "active_mappings",
    "last_remap_time",
    "last_error_time",
    "avg_latency_us",
    "remapped_sectors",
    "spare_sectors_used",
    "remap_rate_per_hour",
    "error_rate_per_hour",
    "health_score",
];

fn text(server: &Server) -> String {
    let client = Client::new(&server.ctl).unwrap();
    client.get_text("/metrics/dm-remap", Duration::from_secs(60)).unwrap()
}

#[track_caller]
fn value(server: &Server, name: &str) -> f64 {
    let text = text(server);
    let start = format!("dm_remap_{name}{{volume=\"disk.img\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_else(|| panic!("{name} is not in\n{text}")).parse().unwrap()
}

#[track_caller]
fn check(server: &Server, name: &str, expected: u64, of: impl Fn(&StatusReport) -> u64) {
    assert_eq!(of(&server.status()), expected, "/v1/status");
    assert_eq!(value(server, name), expected as f64, "{name}");
}

/// A metric that is an average over whole seconds, in a second that is known.
#[track_caller]
fn check_rate(server: &Server, name: &str, of: impl Fn(&StatusReport) -> u64) {
    eventually("a rate whose second is known", || {
        let (before, found, after) = (server.status(), value(server, name), server.status());
        let seconds = before.counted_seconds();
        if seconds == 0 || seconds != after.counted_seconds() {
            return false;
        }
        let expected = of(&before) as f64 * 3600.0 / seconds as f64;
        assert!(expected > 0.0 && (found - expected).abs() < 1e-6, "{name}: {found}, not {expected}");
        true
    });
}

fn move_a_block(server: &Server, guest: &mut Guest, sector: u64) {
    server.fault(&["--ops", "write", "--sectors", &sector.to_string()]);
    guest.write(sector, pattern(sector, 8, 1)).unwrap();
}

fn fail_a_read(server: &Server, guest: &mut Guest) {
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    assert_eq!(guest.read(2003, 1), Err(Failed::IoErr));
}

#[test]
fn each_name_is_there_once_with_help_and_type() {
    let (_volume, server, _guest) = served();
    let text = text(&server);
    let helped = text.lines().filter_map(|line| line.strip_prefix("# HELP dm_remap_")?.split(' ').next());
    let (mut helped, mut names) = (helped.collect::<Vec<_>>(), NAMES.to_vec());
    helped.sort_unstable();
    names.sort_unstable();
    assert_eq!(helped, names);
    assert_eq!(text.lines().filter(|line| line.starts_with("# TYPE dm_remap_")).count(), NAMES.len(), "{text}");
    NAMES.iter().for_each(|name| assert!(value(&server, name).is_finite(), "{name}"));
}

#[test]
fn total_reads() {
    let (_volume, server, mut guest) = served();
    (0..3).for_each(|i| _ = guest.read(960 + i, 1).unwrap());
    fail_a_read(&server, &mut guest);
    check(&server, "total_reads", 4, |report| report.counters.reads);
}

#[test]
fn total_writes() {
    let (_volume, server, mut guest) = served();
    (0..5).for_each(|i| guest.write(960 + i, pattern(960 + i, 1, 1)).unwrap());
    check(&server, "total_writes", 5, |report| report.counters.writes);
}

#[test]
fn total_remaps_and_active_mappings_and_remapped_sectors() {
    let (_volume, server, mut guest) = served();
    server.order(&["remap", "3000-3015"]);
    move_a_block(&server, &mut guest, 1000);
    server.order(&["release", "3000-3007"]);
    for name in ["total_remaps", "active_mappings"] {
        check(&server, name, 2, |report| report.blocks.remapped);
    }
    check(&server, "remapped_sectors", 16, |report| report.blocks.remapped * 8);
}

#[test]
fn total_errors() {
    let (_volume, server, mut guest) = served();
    fail_a_read(&server, &mut guest);
    let errors = server.status().devices[0].read_errors;
    assert!(errors > 0);
    check(&server, "total_errors", errors, |report| report.counters.device_errors);
}

/// Two times that are the same; a number may lose its last digit on its way.
#[track_caller]
fn check_times(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-3, "{found}, not {expected}");
}

#[test]
fn last_remap_time() {
    let (_volume, server, mut guest) = served();
    assert_eq!((value(&server, "last_remap_time"), stats(&server).last_remap), (0.0, None));
    let mut seq = 0;
    for sector in [1000, 2000] {
        move_a_block(&server, &mut guest, sector);
        let moved = server.await_event_after("remapped", seq);
        check_times(value(&server, "last_remap_time"), moved.time);
        check_times(stats(&server).last_remap.unwrap(), moved.time);
        seq = moved.seq;
    }
}

#[test]
fn last_error_time() {
    let (_volume, server, mut guest) = served();
    assert_eq!((value(&server, "last_error_time"), stats(&server).last_error), (0.0, None));
    fail_a_read(&server, &mut guest);
    let last = stats(&server).last_error.unwrap();
    assert!(last >= server.status().started as f64, "{last}");
    check_times(value(&server, "last_error_time"), last);
}

#[test]
fn avg_latency_us() {
    let (_volume, server, mut guest) = served();
    server.fault(&["--ops", "read", "--sectors", "800", "--delay", "60"]);
    guest.read(800, 8).unwrap();
    guest.read(960, 8).unwrap();
    let sum: u64 = stats(&server).operations.iter().map(|row| row.latency.sum_ns).sum();
    let found = value(&server, "avg_latency_us");
    assert!(found >= 30_000.0 && (found - sum as f64 / 2000.0).abs() < 1e-3, "{found}, of {sum} ns");
    assert_eq!(server.status().request_ns, sum);
}

/// Of slots in use, and of one that failed.
#[test]
fn spare_sectors_used() {
    let (volume, server, mut guest) = served();
    server.fault(&["--device", "spare", "--ops", "write", "--sectors", &slot_sectors(&volume, 0)]);
    move_a_block(&server, &mut guest, 1000);
    let blocks = server.status().blocks;
    assert_eq!((blocks.remapped, blocks.slots_retired), (1, 1));
    check(&server, "spare_sectors_used", 16, |report| (report.blocks.remaps_max - report.blocks.slots_free) * 8);
}

#[test]
fn remap_rate_per_hour() {
    let (_volume, server, mut guest) = served();
    move_a_block(&server, &mut guest, 1000);
    server.order(&["remap", "3000-3015"]);
    check_rate(&server, "remap_rate_per_hour", |report| report.counters.remaps);
    // The time before does not count either.
    server.order(&["clear-stats"]);
    assert_eq!(value(&server, "remap_rate_per_hour"), 0.0);
    server.order(&["remap", "4000"]);
    check_rate(&server, "remap_rate_per_hour", |report| report.counters.remaps);
}

#[test]
fn error_rate_per_hour() {
    let (_volume, server, mut guest) = served();
    fail_a_read(&server, &mut guest);
    check_rate(&server, "error_rate_per_hour", |report| report.counters.device_errors);
}

#[test]
fn health_score() {
    let (_volume, server, mut guest) = served();
    check(&server, "health_score", 100, |report| report.health_score);
    fail_a_read(&server, &mut guest);
    let score = server.status().health_score;
    assert!(score < 95, "{score}");
    check(&server, "health_score", score, |report| report.health_score);
}
