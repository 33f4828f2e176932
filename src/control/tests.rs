//! The server and its client over a real socket, with scripted volumes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::api::{ListPage, REQUEST_BODY_MAX};
use super::client::{Client, ClientError, REPORT_TIMEOUT};
use super::server::{GRACE, ORDERS_MAX, ServedVolume, Server};
use super::socket::{SocketFile, bind_unix};
use super::volume::scripted::{ScriptedVolume, entry, event};
use super::volume::{Order, ScanOrder, ScanScope};
use crate::runtime::health::HealthReport;
use crate::runtime::report::{EventPage, StatusReport};
use crate::runtime::surface::SurfaceReport;
use crate::units::{Sector, SectorRange};

/// A server for some volumes on a socket in a directory of its own.
pub(crate) struct Running {
    server: Option<Server>,
    _file: SocketFile,
    dir: tempfile::TempDir,
}

impl Running {
    pub(crate) fn new(volumes: Vec<ScriptedVolume>) -> (Running, Vec<Arc<ScriptedVolume>>) {
        let dir = tempfile::tempdir().unwrap();
        let (listener, file) = bind_unix(&dir.path().join("ctl")).unwrap();
        let volumes: Vec<_> = volumes.into_iter().map(Arc::new).collect();
        let served = volumes.iter().enumerate().map(|(i, volume)| ServedVolume {
            name: format!("disk{i}"),
            uuid: format!("uuid-{i}"),
            volume: volume.clone(),
        });
        let server = Server::start(listener, served.collect()).unwrap();
        (Running { server: Some(server), _file: file, dir }, volumes)
    }

    pub(crate) fn one(volume: ScriptedVolume) -> (Running, Arc<ScriptedVolume>) {
        let (running, mut volumes) = Running::new(vec![volume]);
        (running, volumes.remove(0))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("ctl")
    }

    fn client(&self) -> Client {
        Client::new(&self.path()).unwrap()
    }

    fn get(&self, target: &str) -> Value {
        self.client().get(target, REPORT_TIMEOUT).unwrap()
    }

    /// Send bytes as they are, and return all that comes back.
    fn raw(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

#[track_caller]
fn check_refused<T: std::fmt::Debug>(result: Result<T, ClientError>, expected: u16, part: &str) {
    match result.unwrap_err() {
        ClientError::Refused { status, message } => {
            assert_eq!(status, expected, "{message}");
            assert!(message.contains(part), "{message}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn reports_arrive_as_they_were_made() {
    let (running, volume) = Running::one(ScriptedVolume::new());
    let status: StatusReport = running.client().get("/v1/status", REPORT_TIMEOUT).unwrap();
    assert_eq!(status, volume.status);
    assert_eq!(running.get("/v1/ping")["pong"], json!(true));
    let text = running.client().get_text("/proc", REPORT_TIMEOUT).unwrap();
    assert!(text.contains("  Device: /srv/disk.img -> /srv/disk.img.spare\n"), "{text}");
}

#[test]
fn health_and_surface_have_routes() {
    let mut volume = ScriptedVolume::new();
    volume.entries = (0..10_000).map(|i| entry(8 * i, "remapped", &[])).collect();
    volume.entries.push(entry(20_971_512, "pending", &[]));
    let (running, volume) = Running::one(volume);
    let health: HealthReport = running.client().get("/v1/health", REPORT_TIMEOUT).unwrap();
    assert_eq!(health, volume.health);
    let surface: SurfaceReport = running.client().get("/v1/surface?cells=100", REPORT_TIMEOUT).unwrap();
    let cells: Vec<_> = surface.marked.iter().map(|cell| (cell.cell, cell.remapped, cell.pending)).collect();
    assert_eq!((surface.cells, cells), (100, vec![(0, 10_000, 0), (99, 0, 1)]));
    assert_eq!(running.get("/v1/surface")["cells"], json!(1024));
    for (query, part) in [("cells=0", "0 cells"), ("cells=65537", "65537 cells"), ("cells=x", "cells"), ("x=1", "x")] {
        let answer = running.client().get::<Value>(&format!("/v1/surface?{query}"), REPORT_TIMEOUT);
        check_refused(answer, 400, part);
    }
}

#[test]
fn list_comes_in_pages_until_the_last() {
    let mut volume = ScriptedVolume::new();
    volume.entries = (0..5).map(|i| entry(8 * i, "remapped", &[])).chain([entry(80, "pending", &[])]).collect();
    let (running, _) = Running::one(volume);
    let mut seen = Vec::new();
    let mut from = Some(0);
    while let Some(sector) = from {
        let target = format!("/v1/list?filter=all&from={sector}&limit=2");
        let page: ListPage = running.client().get(&target, REPORT_TIMEOUT).unwrap();
        seen.extend(page.entries.iter().map(|e| e.sector));
        from = page.next;
    }
    assert_eq!(seen, [0, 8, 16, 24, 32, 80]);
    assert_eq!(running.get("/v1/list?filter=pending")["entries"].as_array().unwrap().len(), 1);
    assert_eq!(running.get("/v1/list?filter=lost")["entries"], json!([]));
}

#[test]
fn waiting_for_events_ends_with_the_first_one() {
    let (running, volume) = Running::one(ScriptedVolume::new());
    let started = Instant::now();
    assert_eq!(running.get("/v1/events?after=0")["events"], json!([]));
    assert_eq!(running.get("/v1/events?after=0&wait=1")["events"], json!([]));
    assert!(started.elapsed() >= Duration::from_secs(1));
    let client = running.client();
    let waiting = std::thread::spawn(move || client.get::<EventPage>("/v1/events?wait=60", Duration::from_secs(60)));
    std::thread::sleep(Duration::from_millis(50));
    volume.events.lock().unwrap().extend([event(1), event(2)]);
    let page = waiting.join().unwrap().unwrap();
    assert_eq!(page.last_seq, page.events.last().unwrap().seq);
    assert_eq!(running.get("/v1/events?after=1&limit=1&wait=60")["events"][0]["seq"], json!(2));
}

#[test]
fn orders_reach_the_volume() {
    let (running, volume) = Running::one(ScriptedVolume::new());
    let post = |target: &str, body: Value| running.client().post::<Value>(target, &body, REPORT_TIMEOUT);
    for (target, body) in [
        ("/v1/clear", json!({})),
        ("/v1/save", json!({})),
        ("/v1/remap", json!({"start": 8, "count": 16})),
        ("/v1/release", json!({"start": 8, "count": 1})),
        ("/v1/resize", json!({"size": 1024})),
        ("/v1/resize", json!({})),
        ("/v1/scan/start", json!({})),
        ("/v1/scan/start", json!({"range": {"start": 8, "count": 16}, "check_only": true})),
        ("/v1/scan/pause", json!({})),
        ("/v1/scan/resume", json!({})),
        ("/v1/scan/cancel", json!({})),
    ] {
        assert_eq!(post(target, body).unwrap(), json!({"message": "done as told"}));
    }
    let range = |count| SectorRange { start: Sector(8), count };
    let moves = [Order::Remap(range(16)), Order::Release(range(1))];
    let sizes = [Order::Resize(Some(1024)), Order::Resize(None)];
    let part = ScanScope { range: Some(range(16)), check_only: true };
    let scans = [
        ScanOrder::Start(ScanScope::default()),
        ScanOrder::Start(part),
        ScanOrder::Pause,
        ScanOrder::Resume,
        ScanOrder::Cancel,
    ];
    let expected = [&[Order::Clear, Order::Save][..], &moves, &sizes, &scans.map(Order::Scan)].concat();
    assert_eq!(*volume.orders.lock().unwrap(), expected);
}

#[test]
fn an_order_the_volume_refuses_is_answered_with_its_reason() {
    let mut volume = ScriptedVolume::new();
    volume.refuse = Some("the spare is full: 16384 of 16384 slots in use; add a spare");
    let (running, _) = Running::one(volume);
    check_refused(running.client().post::<Value>("/v1/clear", &json!({}), REPORT_TIMEOUT), 409, "16384 of 16384");
}

#[test]
fn what_makes_no_sense_is_refused_in_one_line_of_json() {
    let (running, volume) = Running::one(ScriptedVolume::new());
    let client = running.client();
    let get = |target: &str| client.get::<Value>(target, REPORT_TIMEOUT);
    let post = |target: &str, body: Value| client.post::<Value>(target, &body, REPORT_TIMEOUT);
    check_refused(get("/v2/status"), 404, "no such route: GET /v2/status");
    check_refused(get("/v1/clear"), 405, "/v1/clear does not take GET");
    check_refused(get("/v1/list?filter=some"), 400, "unknown variant `some`");
    check_refused(get("/v1/list?limit=-1"), 400, "invalid digit");
    check_refused(get("/v1/events?afetr=3"), 400, "unknown field `afetr`");
    check_refused(get("/v1/status?volume=other"), 404, "there are: disk0");
    check_refused(post("/v1/remap", json!({"start": 8})), 400, "missing field `count`");
    check_refused(post("/v1/scan/start", json!({"range": {"start": 8, "count": 0}})), 400, "0 sectors from 8");
    check_refused(post("/v1/scan/start", json!({"ranges": []})), 400, "unknown field `ranges`");
    check_refused(get("/v1/scan/start"), 405, "/v1/scan/start does not take GET");
    check_refused(post("/v1/scan/stop", json!({})), 404, "no such route: POST /v1/scan/stop");
    check_refused(post("/v1/resize", json!({"size": 1000})), 400, "1000 bytes is no multiple of 512");
    check_refused(post("/v1/resize", json!({"size": 0})), 400, "0 bytes");
    check_refused(post("/v1/remap", json!({"start": 8, "count": 0})), 400, "is no range");
    check_refused(post("/v1/remap", json!({"start": u64::MAX, "count": 2})), 400, "is no range");
    check_refused(post("/v1/remap", json!("x".repeat(REQUEST_BODY_MAX))), 413, "longer than 65536 bytes");
    check_refused(post("/v1/log-level", json!({"level": 4})), 400, "not between 0 and 3");
    assert!(volume.orders.lock().unwrap().is_empty());
    assert!(running.raw("nonsense\r\n\r\n").starts_with("HTTP/1.1 400 "));
}

#[test]
fn words_with_line_breaks_are_quoted_in_one_line() {
    let (running, _) = Running::one(ScriptedVolume::new());
    let client = running.client();
    let body = client.post::<Value>("/v1/remap", &json!({"a\nb": 1}), REPORT_TIMEOUT);
    check_refused(body, 400, r"unknown field `a\nb`");
    check_refused(client.get::<Value>("/v1/list?a%0D%0Ab=1", REPORT_TIMEOUT), 400, r"unknown field `a\r\nb`");
}

#[test]
fn faults_need_a_server_started_for_them() {
    let (running, _) = Running::one(ScriptedVolume::new());
    let client = running.client();
    check_refused(client.get::<Value>("/v1/faults", REPORT_TIMEOUT), 404, "restart it with --fault-injection");
    check_refused(client.post::<Value>("/v1/faults", &json!({}), REPORT_TIMEOUT), 404, "--fault-injection");
    check_refused(client.delete::<Value>("/v1/faults", REPORT_TIMEOUT), 404, "--fault-injection");
    check_refused(client.delete::<Value>("/v1/faults/1", REPORT_TIMEOUT), 404, "--fault-injection");
}

#[test]
fn of_several_volumes_the_named_one_answers() {
    let mut volumes = vec![ScriptedVolume::new(), ScriptedVolume::new()];
    volumes[1].status.uptime_seconds = 7;
    let (running, _) = Running::new(volumes);
    assert_eq!(running.get("/v1/status?volume=disk1")["uptime_seconds"], json!(7));
    assert_eq!(running.get("/v1/status?volume=uuid-1")["uptime_seconds"], json!(7));
    assert_eq!(running.get("/v1/list?volume=disk1&filter=lost")["entries"], json!([]));
    let unnamed = running.client().get::<Value>("/v1/status", REPORT_TIMEOUT);
    check_refused(unnamed, 400, "say which volume: disk0, disk1");
    assert!(running.client().get_text("/proc", REPORT_TIMEOUT).unwrap().contains("  Active devices: 2\n"));
}

#[test]
fn the_log_level_changes_at_run_time() {
    let (running, _) = Running::one(ScriptedVolume::new());
    let before = log::max_level();
    running.client().post::<Value>("/v1/log-level", &json!({"level": 3}), REPORT_TIMEOUT).unwrap();
    assert_eq!(log::max_level(), log::LevelFilter::Trace);
    log::set_max_level(before);
}

#[test]
fn the_end_of_the_server_answers_those_who_wait_for_events() {
    let (mut running, _) = Running::one(ScriptedVolume::new());
    let client = running.client();
    let waiting = std::thread::spawn(move || client.get::<Value>("/v1/events?wait=60", Duration::from_secs(60)));
    std::thread::sleep(Duration::from_millis(100));
    // An idle connection must not hold it up either.
    let _idle = UnixStream::connect(running.path()).unwrap();
    let started = Instant::now();
    running.server.take().unwrap().shutdown();
    assert!(started.elapsed() < GRACE + Duration::from_secs(2));
    assert_eq!(waiting.join().unwrap().unwrap()["events"], json!([]));
}

#[test]
fn orders_that_hang_leave_room_for_reports() {
    let (release, held) = std::sync::mpsc::channel();
    let mut volume = ScriptedVolume::new();
    volume.hold = Some(held.into());
    let (running, _) = Running::one(volume);
    let order = |timeout| running.client().post::<Value>("/v1/save", &json!({}), timeout);
    for _ in 0..ORDERS_MAX {
        assert!(matches!(order(Duration::from_millis(100)), Err(ClientError::Timeout { .. })));
    }
    check_refused(order(REPORT_TIMEOUT), 503, "still under way");
    running.get("/v1/status");
    drop(release);
}
