//! Health, surface and the counters that can be cleared, as an operator sees them.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use vhost_remap::runtime::health::HealthReport;
use vhost_remap::runtime::report::EventRecord;
use vhost_remap::runtime::surface::SurfaceReport;

use crate::guest::Failed;
use crate::model::pattern;
use crate::server::{Server, Volume, done, served, try_output_of, vhost_remap};

fn health(server: &Server) -> HealthReport {
    serde_json::from_str(&server.order(&["health", "--json"])).unwrap()
}

/// The state, and the rules that hold with their numbers.
fn judged(server: &Server) -> (String, Vec<(String, u64)>) {
    let HealthReport { state, findings, .. } = health(server);
    (state, findings.into_iter().map(|finding| (finding.rule, finding.value)).collect())
}

fn found(state: &str, rules: &[(&str, u64)]) -> (String, Vec<(String, u64)>) {
    (state.to_owned(), rules.iter().map(|(rule, value)| ((*rule).to_owned(), *value)).collect())
}

fn health_events(server: &Server) -> Vec<EventRecord> {
    server.events().into_iter().filter(|event| event.kind == "health").collect()
}

/// How a device's state changed.
fn changes(server: &Server, device: &str) -> Vec<String> {
    let of_device = health_events(server).into_iter().filter(|event| event.device == device);
    of_device.map(|event| event.action.split(": ").next().unwrap().to_owned()).collect()
}

#[test]
fn health_follows_what_happens_and_says_why() {
    let (volume, server, mut guest) = served();
    guest.write(960, pattern(960, 256, 1)).unwrap();
    assert_eq!(judged(&server), found("OK", &[]));
    assert_eq!(health(&server).score.value, 100);
    // A read that fails, and a rewrite that heals it.
    server.fault(&["--ops", "read", "--sectors", "1003", "--until-rewritten"]);
    assert_eq!(guest.read(1003, 1), Err(Failed::IoErr));
    assert_eq!(judged(&server), found("WATCH", &[("pending", 1)]));
    guest.write(1000, pattern(1000, 8, 2)).unwrap();
    assert_eq!(judged(&server), found("OK", &[]));
    // A block that has to move, with two of its sectors lost.
    server.no_faults();
    server.fault(&["--ops", "write", "--sectors", "1016"]);
    server.fault(&["--ops", "read", "--sectors", "1022-1023"]);
    guest.write(1016, pattern(1016, 1, 2)).unwrap();
    let at_risk = found("AT_RISK", &[("remapped-recently", 1), ("lost-recently", 2), ("lost", 2)]);
    assert_eq!(judged(&server), at_risk);
    assert_eq!(changes(&server, "primary"), ["OK -> WATCH", "WATCH -> OK", "OK -> AT_RISK"]);
    let cause = server.causes("health").pop().unwrap();
    assert!(cause.starts_with("rule remapped-recently: ") && cause.contains(": 1 (from 1 on)"), "{cause}");
    let text = server.order(&["health"]);
    assert!(text.contains("\nState    AT_RISK\n") && text.contains("rule lost-recently: "), "{text}");
    assert!(text.contains("\nTrend    not enough data: 1 daily samples over 0 days; 8 over 14 are needed\n"), "{text}");
    assert!(text.contains("\nprimary  AT_RISK  /") && text.contains("\nspare    OK       /"), "{text}");
    assert!(server.order(&["status"]).contains("\nHealth    AT_RISK, score "));
    // It is remembered, and a restart is no change.
    drop(guest);
    server.stop();
    server_is_at_risk_still(&volume, &at_risk);
}

fn server_is_at_risk_still(volume: &Volume, at_risk: &(String, Vec<(String, u64)>)) {
    let server = volume.serve(&[]);
    assert_eq!(judged(&server), *at_risk);
    assert_eq!(server.causes("health"), [] as [&str; 0]);
    let [today] = &*health(&server).days else { panic!("one day, unless this ran over midnight") };
    assert_eq!((today.remaps, today.lost, today.slots_used), (1, 2, 1));
}

/// A spare that goes while the volume is at risk already, by its primary, is an event like one that changes the volume.
#[test]
fn a_change_of_one_device_is_told_with_its_name_also_where_the_volume_stays_as_it_is() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    server.order(&["remap", "1000"]);
    server.stop();
    // Nothing is written any more when the spare goes.
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let states = || health(&server).devices.into_iter().map(|device| device.state).collect::<Vec<_>>();
    // Ten blocks: one that is pending is no news.
    server.fault(&["--ops", "read", "--sectors", "2000-2079"]);
    for block in 0..10 {
        assert_eq!(guest.read(2003 + 8 * block, 1), Err(Failed::IoErr));
    }
    assert_eq!((states(), health(&server).state), (vec!["AT_RISK".into(), "OK".into()], "AT_RISK".into()));
    server.fault(&["--device", "spare", "--ops", "read,write,identify", "--errno", "ENODEV"]);
    assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    server.await_event("spare-down");
    assert_eq!((states(), health(&server).state), (vec!["AT_RISK".into(), "AT_RISK".into()], "AT_RISK".into()));
    server.no_faults();
    server.await_event("spare-back");
    guest.read(1000, 8).unwrap();
    assert_eq!(states(), ["AT_RISK", "OK"]);
    assert_eq!(changes(&server, "primary"), ["OK -> WATCH", "WATCH -> AT_RISK"]);
    assert_eq!(changes(&server, "spare"), ["OK -> AT_RISK", "AT_RISK -> OK"]);
    let [watch, at_risk, down, back] = &health_events(&server)[..] else { panic!("{:?}", health_events(&server)) };
    assert!(watch.action.ends_with("; the volume: OK -> WATCH"), "{watch:?}");
    assert!(at_risk.action.ends_with("; the volume: WATCH -> AT_RISK"), "{at_risk:?}");
    assert!(down.cause.starts_with("rule not-answering: ") && down.severity == "warn", "{down:?}");
    assert!(back.cause == "no rule holds any more" && back.severity == "info", "{back:?}");
    assert!(!down.action.contains("the volume") && !back.action.contains("the volume"), "{down:?} {back:?}");
}

#[test]
fn a_scratch_is_seen_on_the_surface_in_letters_numbers_and_as_a_picture() {
    let (volume, server, mut guest) = served();
    guest.write(960, pattern(960, 2048, 1)).unwrap();
    // Six blocks over the border of two cells: 64 cells have 1024 sectors each.
    server.fault(&["--ops", "write", "--sectors", "1000-1047"]);
    guest.write(1000, pattern(1000, 48, 2)).unwrap();
    server.fault(&["--ops", "read", "--sectors", "2100"]);
    assert_eq!(guest.read(2100, 1), Err(Failed::IoErr));
    let surface: SurfaceReport = serde_json::from_str(&server.order(&["surface", "--cells", "64", "--json"])).unwrap();
    assert_eq!((surface.cells, surface.sectors_per_cell, surface.capacity_sectors), (64, 1024, 65_536));
    let cells: Vec<_> =
        surface.marked.iter().map(|cell| (cell.cell, cell.first, cell.last, cell.pending, cell.remapped)).collect();
    assert_eq!(cells, [(0, 1000, 1023, 0, 3), (1, 1024, 1047, 0, 3), (2, 2096, 2103, 1, 0)]);
    let text = server.order(&["surface", "--width", "16", "--cells", "64"]);
    assert!(text.contains("\n    0  rrP-------------\n16384  ----------------\n"), "{text}");
    let row = text.lines().find(|line| line.starts_with("1000-2103 ")).unwrap_or_else(|| panic!("{text}"));
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["1000-2103", "3", "pending", "0", "1", "6", "0"]);
    assert!(!text.contains('\x1b'), "{text:?}");
    server.order(&["scan", "start", "--wait"]);
    let text = server.order(&["surface", "--width", "16", "--cells", "64"]);
    assert!(text.contains("\n    0  rrP.............\n16384  ................\n"), "{text}");
    let picture = volume.dir.path().join("disk.svg");
    let line = server.order(&["surface", "--cells", "64", "--svg", picture.to_str().unwrap()]);
    assert!(line.ends_with(": 64 cells, 3 marked\n"), "{line}");
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.contains(
        "<title>1024-2047: 0 lost sectors, 0 pending, 3 remapped and 0 slow blocks, from 1024 to 1047</title>"
    ));
    let why = server.refused(&["surface", "--svg", "/no/such/folder/disk.svg"]);
    assert!(why.contains("/no/such/folder/disk.svg"), "{why}");
}

#[test]
fn cleared_counters_begin_anew_and_the_lifetime_and_the_days_go_on() {
    let (_volume, server, mut guest) = served();
    guest.write(1000, pattern(1000, 8, 1)).unwrap();
    server.fault(&["--ops", "write", "--sectors", "1000"]);
    guest.write(1000, pattern(1000, 8, 2)).unwrap();
    let before = server.status();
    assert!(before.counters.writes == 2 && before.devices[0].write_errors > 0, "{before:?}");
    assert_eq!(before.counters_since, before.started);
    assert!(server.order(&["clear-stats"]).contains("begin anew"));
    let after = server.status();
    assert_eq!((after.counters.clone(), after.devices[0].write_errors), (Default::default(), 0));
    assert!(after.counters_since >= before.counters_since);
    assert_eq!((after.lifetime.writes, after.lifetime.remaps, after.blocks.remapped), (2, 1, 1));
    assert_eq!((after.health.as_str(), health(&server).days[0].remaps), ("AT_RISK", 1));
    let event = server.await_event("stats-cleared");
    assert!(event.action.contains("after 0 reads, 2 writes"), "{event:?}");
    guest.read(1000, 8).unwrap();
    let status = server.status();
    assert_eq!((status.counters.reads, status.counters.writes, status.lifetime.reads), (1, 0, 1));
}

#[test]
fn a_watched_status_goes_on_until_its_server_ends() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut watching = Command::new(env!("CARGO_BIN_EXE_vhost-remap"))
        .args(["status", "--format", "csv", "--watch", "1", "--control-path"])
        .arg(&server.ctl)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines().map(Result::unwrap);
    // One head, and then a row each time.
    assert!(lines.next().unwrap().starts_with("timestamp,device,health_score,"));
    for _ in 0..2 {
        let row = lines.next().unwrap();
        assert!(row.contains(",100,,") && row.contains(volume.primary.to_str().unwrap()), "{row}");
    }
    server.stop();
    assert!(lines.all(|row| row.contains(",100,,")));
    assert!(watching.wait().unwrap().success());
    // One that was never there is an error.
    let ctl = volume.dir.path().join("none");
    let never = vhost_remap(&["status", "--watch", "1", "--control-path", ctl.to_str().unwrap()]);
    assert_eq!(never.status.code(), Some(1), "{never:?}");
}

#[test]
fn stats_and_health_are_watched_too() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    for verb in ["stats", "health"] {
        let mut watching = Command::new(env!("CARGO_BIN_EXE_vhost-remap"))
            .args([verb, "-w", "1", "--control-path"])
            .arg(&server.ctl)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(watching.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut heads = lines.filter(|line| line.starts_with("Volume "));
        assert!(heads.next().is_some() && heads.next().is_some(), "{verb}");
        watching.kill().unwrap();
        watching.wait().unwrap();
    }
}

/// `health` with a stand-in for smartctl on the PATH that prints this, or none.
fn with_smartctl(volume: &Volume, server: &Server, answer: Option<(&str, u8)>, words: &[&str]) -> String {
    let dir = tempfile::tempdir_in(volume.dir.path()).unwrap();
    if let Some((json, status)) = answer {
        let script = dir.path().join("smartctl");
        let text = format!(
            "#!/bin/sh\necho \"$@\" > '{}/words'\ncat <<'END'\n{json}\nEND\nexit {status}\n",
            dir.path().display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
    }
    let path = match answer {
        Some(_) => format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap()),
        None => dir.path().display().to_string(),
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
    command.arg("health").arg("--control-path").arg(&server.ctl).args(words).env("PATH", path);
    let text = done(&try_output_of(&mut command).unwrap());
    if answer.is_some() {
        assert_eq!(fs::read_to_string(dir.path().join("words")).unwrap(), "--json --all /dev/sdx\n");
    }
    text
}

#[test]
fn the_drives_own_view_is_shown_beside_and_a_missing_tool_is_one_line() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let ata = include_str!("../../src/cli/smart/ata.json");
    let words = ["--smart", "--smart-device", "/dev/sdx"];
    let text = with_smartctl(&volume, &server, Some((ata, 0)), &words);
    let own = "\nWHAT THE DRIVES SAY OF THEMSELVES (smartctl, not part of the state above)\n\
               /dev/sdx: passed, WDC WD20EFRX-68EUZN0, 47657 h in use, 34 °C\n";
    assert!(text.contains(own) && text.contains("  ! 197 Current_Pending_Sector: 3\n"), "{text}");
    assert!(text.contains("\nState    OK\n"), "{text}");
    let nvme = include_str!("../../src/cli/smart/nvme.json");
    let json = with_smartctl(&volume, &server, Some((nvme, 0)), &[&words[..], &["--json"]].concat());
    let document: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&document["state"], &document["drives"][0]["passed"]), (&json!("OK"), &json!(true)));
    assert_eq!(document["drives"][0]["values"][2]["value"], json!("16 %"));
    let gone = r#"{"smartctl": {"messages": [{"string": "No such device", "severity": "error"}]}}"#;
    let text = with_smartctl(&volume, &server, Some((gone, 2)), &words);
    assert!(text.ends_with("/dev/sdx: no view: smartctl got no answer: No such device\n"), "{text}");
    let text = with_smartctl(&volume, &server, None, &words);
    assert!(text.ends_with("/dev/sdx: no view: smartctl is not installed; it is part of smartmontools\n"), "{text}");
    // Who does not ask gets none.
    assert!(!server.order(&["health"]).contains("DRIVES"));
}
