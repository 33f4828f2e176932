//! The rest of dm-remap's operator contract, row by row: formats, /proc, parameters, targets of make. Its status line,
//! messages and names for Prometheus are beside this.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use vhost_remap::control::client::Client;
use vhost_remap::runtime::report::StatusReport;

use crate::guest::{Failed, Guest};
use crate::model::pattern;
use crate::server::{Server, Volume, done, eventually, served, try_output_of, vhost_remap};
use crate::stats::stats;

/// Reads and writes, one block moved because it failed and one by order, one pending.
pub(crate) fn work(server: &Server, guest: &mut Guest) {
    for i in 0..5 {
        guest.write(960 + 8 * i, pattern(960 + 8 * i, 8, 1)).unwrap();
    }
    server.fault(&["--ops", "write", "--sectors", "1000"]);
    guest.write(1000, pattern(1000, 8, 1)).unwrap();
    server.order(&["remap", "3000"]);
    guest.read(960, 4).unwrap();
    guest.read(1000, 8).unwrap();
    guest.flush().unwrap();
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    assert_eq!(guest.read(2003, 1), Err(Failed::IoErr));
    let StatusReport { counters, blocks, .. } = server.status();
    assert_eq!((counters.reads, counters.writes, counters.remaps, blocks.pending), (3, 6, 2, 1));
}

/// `name=value` of a line.
#[track_caller]
pub(crate) fn value<'a>(line: &'a str, name: &str) -> &'a str {
    let words = line.split_whitespace();
    let mut found = words.filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    found.next().unwrap_or_else(|| panic!("{name} is not in {line}"))
}

fn mib(bytes: u64) -> String {
    format!("{:.2}", ((bytes * 100) >> 20) as f64 / 100.0)
}

/// Mean latency in microseconds.
fn mean_us(report: &StatusReport) -> String {
    let ns = report.mean_latency_ns().unwrap();
    format!("{}.{:03}", ns / 1000, ns % 1000)
}

// `dmremap-status -f`.

#[test]
fn format_human() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let (text, report) = (server.order(&["status", "-f", "human"]), server.status());
    assert!(text.starts_with("Volume  ") && text.lines().next().unwrap().ends_with(&report.volume), "{text}");
    for (name, count, lifetime) in [
        ("reads", report.counters.reads, report.lifetime.reads),
        ("writes", report.counters.writes, report.lifetime.writes),
        ("remaps", report.counters.remaps, report.lifetime.remaps),
        ("device errors", report.counters.device_errors, report.lifetime.device_errors),
    ] {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("  "));
        let numbers: Vec<&str> = line.unwrap_or_else(|| panic!("{text}")).split_whitespace().collect();
        assert_eq!(numbers, [count.to_string(), lifetime.to_string()], "{name}");
    }
}

#[test]
fn format_json() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let printed: StatusReport = serde_json::from_str(&server.order(&["status", "-f", "json"])).unwrap();
    let client = Client::new(&server.ctl).unwrap();
    let served: StatusReport = client.get("/v1/status", Duration::from_secs(60)).unwrap();
    // The clock goes on.
    assert_eq!(StatusReport { uptime_seconds: 0, ..printed }, StatusReport { uptime_seconds: 0, ..served });
}

#[test]
fn format_csv() {
    let (volume, server, mut guest) = served();
    work(&server, &mut guest);
    let (before, csv, after) = (server.status(), server.order(&["status", "-f", "csv"]), server.status());
    let [head, row] = csv.lines().collect::<Vec<_>>()[..] else { panic!("{csv}") };
    assert!(head.starts_with("timestamp,device,health_score,avg_latency_us,throughput_mbps,errors,"), "{head}");
    let columns: Vec<(&str, &str)> = head.split(',').zip(row.split(',')).collect();
    let of = |name: &str| columns.iter().find(|(column, _)| *column == name).unwrap().1;
    let at = |report: &StatusReport| {
        let epoch = std::time::UNIX_EPOCH + Duration::from_secs(report.started + report.uptime_seconds);
        humantime::format_rfc3339_seconds(epoch).to_string()
    };
    assert!(*at(&before) <= *of("timestamp") && *of("timestamp") <= *at(&after), "{row}");
    let bytes = before.counters.read_bytes + before.counters.written_bytes;
    let rates = [&before, &after].map(|report| mib(bytes.checked_div(report.counted_seconds()).unwrap_or(0)));
    assert!(rates.contains(&of("throughput_mbps").to_owned()) || rates[0] != rates[1], "{rates:?}: {row}");
    let (counters, blocks) = (&before.counters, &before.blocks);
    let expected = [
        ("device", volume.primary.display().to_string()),
        ("health_score", before.health_score.to_string()),
        ("avg_latency_us", mean_us(&before)),
        ("errors", counters.device_errors.to_string()),
        ("health", before.health.clone()),
        ("state", before.state.join(" ")),
        ("reads", counters.reads.to_string()),
        ("writes", counters.writes.to_string()),
        ("read_bytes", counters.read_bytes.to_string()),
        ("written_bytes", counters.written_bytes.to_string()),
        ("guest_errors", counters.guest_errors.to_string()),
        ("remapped", blocks.remapped.to_string()),
        ("remaps_max", blocks.remaps_max.to_string()),
        ("pending", blocks.pending.to_string()),
        ("lost_sectors", blocks.lost_sectors.to_string()),
        ("slots_free", blocks.slots_free.to_string()),
        ("slots_retired", blocks.slots_retired.to_string()),
    ];
    assert_eq!(expected.len() + 2, columns.len(), "{head}");
    expected.iter().for_each(|(name, expected)| assert_eq!(of(name), expected, "{name}"));
    let sum: u64 = stats(&server).operations.iter().map(|row| row.latency.sum_ns).sum();
    assert_eq!(before.request_ns, sum, "/v1/stats");
}

#[test]
fn format_compact() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let (line, report) = (server.order(&["status", "-f", "compact"]), server.status());
    assert_eq!(line.lines().count(), 1);
    for (name, expected) in [
        ("health", format!("{}%", report.health_score)),
        ("latency", format!("{}us", mean_us(&report))),
        ("errors", report.counters.device_errors.to_string()),
        ("mappings", "2".into()),
        ("reads", "3".into()),
        ("writes", "6".into()),
        ("health_state", report.health.clone()),
        ("state", report.state.join(",")),
        ("remaps", "2/64".into()),
        ("pending", "1".into()),
        ("lost", report.blocks.lost_sectors.to_string()),
    ] {
        assert_eq!(value(&line, name), expected, "{line}");
    }
    assert!(value(&line, "throughput").ends_with("MB/s"), "{line}");
}

#[test]
fn format_raw() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let fields = |words: &[&str]| {
        let line = server.order(words);
        let mut fields: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        fields[14] = "bytes a second change with the clock".into();
        fields
    };
    assert_eq!(fields(&["status", "-f", "raw"]), fields(&["status", "--line"]));
    assert_eq!(vhost_remap(&["status", "--control-path", "x", "-f", "xml"]).status.code(), Some(2));
}

#[test]
fn health_words() {
    let volume = Volume::create(32, 1024);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let help = done(&vhost_remap(&["health", "--help"]));
    let check = |least: u64, most: u64, expected: &str| {
        let health: Value = serde_json::from_str(&server.order(&["health", "--json"])).unwrap();
        let (score, word) = (health["score"]["value"].as_u64().unwrap(), health["score"]["word"].as_str().unwrap());
        assert!((least..=most).contains(&score) && word == expected, "{score} is {word}, not {expected}: {health}");
        // What it is made of is documented.
        for taken in health["score"]["deductions"].as_array().unwrap() {
            assert!(help.contains(taken["input"].as_str().unwrap()), "{taken} is not in\n{help}");
        }
    };
    check(95, 100, "EXCELLENT");
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    assert_eq!(guest.read(2003, 1), Err(Failed::IoErr));
    check(80, 94, "GOOD");
    server.fault(&["--ops", "write", "--sectors", "1000"]);
    guest.write(1000, pattern(1000, 8, 1)).unwrap();
    check(60, 79, "FAIR");
    // A sector is lost, and more requests meet errors.
    server.fault(&["--ops", "write", "--sectors", "3000"]);
    server.fault(&["--ops", "read", "--sectors", "3006"]);
    guest.write(3000, pattern(3000, 1, 1)).unwrap();
    server.fault(&["--ops", "read", "--sectors", "4000-4031"]);
    (4000..4032).step_by(8).for_each(|sector| assert_eq!(guest.read(sector, 1), Err(Failed::IoErr)));
    check(40, 59, "POOR");
    server.no_faults();
    server.fault(&["--ops", "flush", "--count", "1"]);
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    check(0, 39, "CRITICAL");
}

// /proc.

#[test]
fn proc_text() {
    let (volume, server, mut guest) = served();
    work(&server, &mut guest);
    let report = server.status();
    let (counters, version) = (&report.counters, &report.version);
    let (errors, scans) = (counters.device_errors, counters.health_scans);
    assert!(errors > 0);
    let expected = format!(
        "vhost-remap {version}\n\
         ==================================\n\
         \n\
         Global Statistics:\n  \
           Active devices: 1\n  \
           Total reads:    3\n  \
           Total writes:   6\n  \
           Total remaps:   2\n  \
           Total errors:   {errors}\n  \
           Health scans:   {scans}\n\
         \n\
         Device Details:\n  \
           Device: {} -> {}\n    \
             Reads:  3\n    \
             Writes: 6\n    \
             Remaps: 2\n    \
             Active mappings: 2\n    \
             Health scans: {scans}\n",
        volume.primary.display(),
        volume.spare.display()
    );
    assert_eq!(server.order(&["status", "--proc"]), expected);
    let client = Client::new(&server.ctl).unwrap();
    assert_eq!(client.get_text("/proc", Duration::from_secs(60)).unwrap(), expected);
}

// Parameters.

/// 0 to 3, from the start and later.
#[test]
fn parameter_dm_remap_debug_and_debug_level() {
    for name in ["--dm_remap_debug", "--debug_level"] {
        for (level, says_more) in [("0", false), ("1", true), ("2", true), ("3", true)] {
            let volume = Volume::create(32, 64);
            let server = volume.serve(&[name, level]);
            drop(server.guest(1));
            server.await_status(|report| !report.connected);
            assert_eq!(server.log_text().contains(" INFO "), says_more, "{name} {level}: {}", server.log_text());
            server.order(&["log-level", "3"]);
            drop(server.guest(1));
            eventually("more is said", || server.log_text().contains(" INFO "));
        }
    }
    let (_volume, server, _guest) = served();
    for level in ["0", "1", "2", "3"] {
        assert_eq!(server.order(&["log-level", level]), format!("log level {level}\n"));
    }
    assert_eq!(server.ask(&["log-level", "4"]).status.code(), Some(2));
}

#[test]
fn parameter_max_remaps() {
    let volume = Volume::absent();
    let server = volume.serve(&["--create", "--size", "32M", "--max_remaps", "32"]);
    assert_eq!((server.status().blocks.remaps_max, server.status().blocks.slots_free), (32, 32));
}

/// Read-only counters: `global_write_errors`, `global_read_errors`, `global_auto_remaps`, `perf_*`.
#[test]
fn parameters_that_count_are_in_the_reports() {
    let (_volume, server, mut guest) = served();
    work(&server, &mut guest);
    let document: Value = serde_json::from_str(&server.order(&["status", "--json"])).unwrap();
    let primary = &document["devices"][0];
    assert!(primary["write_errors"].as_u64() >= Some(1) && primary["read_errors"].as_u64() >= Some(1), "{document}");
    assert_eq!(document["counters"]["remaps"], 2);
    // Sectors: 5 and 1 writes of 8, reads of 4 and 8.
    assert_eq!(document["counters"]["written_bytes"], 48 * 512);
    assert_eq!(document["counters"]["read_bytes"], 12 * 512);
    assert!(document["request_ns"].as_u64() > Some(0), "{document}");
}

/// Thresholds at which a block may move, ways to serve it faster, modes in which nothing is done: there is one way.
#[test]
fn parameters_without_a_successor_are_refused() {
    let names = [
        "real_device_mode",
        "spare_overhead_percent",
        "strict_spare_sizing",
        "metadata_version",
        "error_threshold",
        "auto_remap_enabled",
        "dm_remap_autosave_interval",
        "dm_remap_autosave_enabled",
        "enable_production_mode",
        "max_retries_production",
        "emergency_threshold",
        "enable_fast_path",
        "fast_path_threshold",
        "minimal_tracking",
    ];
    for name in names {
        let option = format!("--{name}");
        let output = vhost_remap(&["serve", "--primary", "x", "--socket-path", "y", &option, "1"]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(&option), "{output:?}");
    }
}

/// `setup-dm-remap-test.sh`: bad sectors are added to a disk in use, by place and by chance, and taken away.
#[test]
fn bad_sectors_on_purpose() {
    let (_volume, server, mut guest) = served();
    guest.write(960, pattern(960, 64, 1)).unwrap();
    server.fault(&["--ops", "read", "--sectors", "962", "--sectors", "990"]);
    for (sector, expected) in [(962, false), (963, true), (990, false)] {
        assert_eq!(guest.read(sector, 1).is_ok(), expected, "{sector}");
    }
    server.no_faults();
    assert!(guest.read(960, 64).unwrap() == pattern(960, 64, 1));
    server.fault(&["--ops", "read", "--sectors", "1000", "--probability", "1", "--seed", "7"]);
    assert_eq!(guest.read(1000, 1), Err(Failed::IoErr));
}

// Targets of make.

#[test]
fn targets_of_make() {
    let makefile = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Makefile")).unwrap();
    for target in ["all", "clean", "test", "load", "unload", "status", "install", "help", "demo"] {
        assert!(
            makefile.lines().any(|line| line.starts_with(&format!("{target}:")) && line.contains(" ## ")),
            "{target}"
        );
    }
}

/// Stops what `make load` has started, also where the test fails.
struct Loaded<'a>(&'a dyn Fn(&str) -> Output);

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        let _ = (self.0)("unload");
    }
}

#[test]
fn targets_load_status_and_unload() {
    let volume = Volume::absent();
    let target = volume.dir.path().join("target");
    fs::create_dir_all(target.join("release")).unwrap();
    symlink(env!("CARGO_BIN_EXE_vhost-remap"), target.join("release/vhost-remap")).unwrap();
    let socket = volume.dir.path().join("vm.sock");
    let make = |target_name: &str| {
        let mut command = Command::new("make");
        command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("--no-print-directory").arg(target_name);
        command.env("CARGO_TARGET_DIR", &target).env("XDG_RUNTIME_DIR", volume.dir.path()).env_remove("MAKEFLAGS");
        command.arg(format!("PRIMARY={}", volume.primary.display())).arg(format!("SOCKET={}", socket.display()));
        command.arg("OPTIONS=--create --size 32M --max-remaps 64");
        try_output_of(&mut command).unwrap_or_else(|error| panic!("make: {error}"))
    };
    let loaded = Loaded(&make);
    done(&make("load"));
    let mut guest = Guest::connect(&socket, 1);
    guest.write(960, pattern(960, 8, 1)).unwrap();
    let text = done(&make("status"));
    let line = text.lines().find(|line| line.starts_with("writes ")).unwrap_or_else(|| panic!("{text}"));
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["writes", "1", "1"]);
    drop(guest);
    done(&make("unload"));
    assert!(!make("status").status.success());
    drop(loaded);
}
