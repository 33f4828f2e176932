//! Requests to the control socket.
//!
//! Whatever comes, each answer is well-formed HTTP, an answer with an error is JSON with one line of text, no
//! handler panics, and nothing but an order changes the volume.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde_json::Value;
use vhost_remap::control::api::Failure;
use vhost_remap::control::server::{ServedVolume, Server};
use vhost_remap::control::volume::{Order, Scanned, Volume};
use vhost_remap::device::fault::FaultTable;
use vhost_remap::runtime::handle::Refused;
use vhost_remap::runtime::health::HealthReport;
use vhost_remap::runtime::report::{
    BlockReport, Counters, DeviceReport, EventPage, EventRecord, ListEntry, ListFilter, SCHEMA_VERSION, StatusReport,
};
use vhost_remap::runtime::scan_report::ScanReport;
use vhost_remap::runtime::stats::StatsReport;
use vhost_remap::units::Block;

use super::program::Program;

/// A server that lets so much time pass without a byte hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests of one input.
const REQUESTS_MAX: usize = 6;

/// Ends a connection whose last request was whole.
const LAST: &[u8] = b"GET /v1/ping HTTP/1.1\r\nHost: last\r\nConnection: close\r\n\r\n";

const METHODS: [&str; 8] = ["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH", "get"];
const ROUTES: [&str; 19] = [
    "/v1/ping",
    "/v1/status",
    "/v1/list",
    "/v1/events",
    "/v1/faults",
    "/v1/faults/1",
    "/v1/clear",
    "/v1/save",
    "/v1/remap",
    "/v1/release",
    "/v1/log-level",
    "/proc",
    "/",
    "/v1/resize",
    "/v1/faults/",
    "*",
    "/v1/health",
    "/v1/surface",
    "/v1/clear-stats",
];
const KEYS: [&str; 9] = ["volume", "filter", "from", "limit", "after", "wait", "", "x", "cells"];
const VALUES: [&str; 14] = [
    "disk0",
    "disk1",
    "lost",
    "pending",
    "all",
    "0",
    "1",
    "18446744073709551615",
    "-1",
    "18446744073709551616",
    "%00",
    "%0A",
    "%FF",
    "",
];
const BODIES: [&str; 12] = [
    r#"{"start":8,"count":16}"#,
    r#"{"start":18446744073709551615,"count":2}"#,
    r#"{"start":0,"count":0}"#,
    r#"{"level":3}"#,
    r#"{"level":256}"#,
    r#"{"device":"primary","ops":["read"],"errno":"EIO"}"#,
    r#"{"device":"spare","ops":["write","flush"],"errno":"EIO","sectors":[[0,8],[100,1]],"count":1,"delay_ms":5}"#,
    "{}",
    r#"{"size":1048576}"#,
    "null",
    r#"{"start":1e300,"count":-1}"#,
    "{\"a\\nb\":1}",
];

/// A volume that notes its orders.
#[derive(Default)]
struct Noting {
    faults: Option<Arc<FaultTable>>,
    orders: Mutex<Vec<Order>>,
}

impl Noting {
    fn orders(&self) -> Vec<Order> {
        std::mem::take(&mut *self.orders.lock().expect("no holder of this lock panics"))
    }
}

impl Volume for Noting {
    fn status(&self) -> StatusReport {
        let device =
            |role: &str| DeviceReport { role: role.into(), path: format!("/{role}"), ..DeviceReport::default() };
        StatusReport {
            schema: SCHEMA_VERSION,
            version: "0".into(),
            volume: "uuid".into(),
            state: vec!["ok".into()],
            messages: Vec::new(),
            devices: vec![device("primary"), device("spare")],
            capacity_sectors: 4096,
            blocks: BlockReport::default(),
            counters: Counters::default(),
            lifetime: Counters::default(),
            uptime_seconds: 1,
            started: 1,
            io_engine: "memory".into(),
            cache: "none".into(),
            workers: 1,
            polling_us: 0,
            transport: "own".into(),
            connected: false,
            oldest_in_flight_ms: 0,
            malformed_requests: 0,
            events_dropped: 0,
            health: "OK".into(),
            health_score: 100,
            counters_since: 1,
            scan: ScanReport::default(),
            request_ns: 0,
            failed_writes_in_a_row: 0,
        }
    }

    fn stats(&self) -> StatsReport {
        StatsReport::default()
    }

    fn list(&self, _filter: ListFilter, from: u64, limit: usize) -> Result<Vec<ListEntry>, Refused> {
        let sectors = (0..6).map(|block| if block < 5 { block * 8 } else { u64::MAX - 7 });
        let entries = sectors.filter(|sector| *sector >= from).take(limit).map(|sector| ListEntry {
            sector,
            sectors: 8,
            state: vec!["remapped".into()],
            slot: Some(7),
            lost: vec![sector + 1],
            pending: Vec::new(),
            primary_stale: true,
        });
        Ok(entries.collect())
    }

    fn scanned(&self) -> Option<(Arc<BTreeSet<Block>>, Scanned)> {
        None
    }

    fn health(&self) -> Result<HealthReport, Refused> {
        Err(Refused("away".into()))
    }

    fn events(&self, after: u64, limit: usize) -> EventPage {
        let numbers = (1..=3).filter(|seq| *seq > after).take(limit);
        let events = numbers.map(|seq| EventRecord {
            seq,
            time: 1.5,
            severity: "warn".into(),
            kind: "remapped".into(),
            device: "primary".into(),
            sector: Some(8),
            sectors: 8,
            cause: "EIO".into(),
            action: "moved".into(),
        });
        EventPage { events: events.collect(), last_seq: 3.max(after), ..EventPage::default() }
    }

    fn faults(&self) -> Option<&Arc<FaultTable>> {
        self.faults.as_ref()
    }

    fn order(&self, order: Order) -> Result<String, Refused> {
        self.orders.lock().expect("no holder of this lock panics").push(order);
        if order == Order::Clear { Err(Refused("there is nothing to clear".into())) } else { Ok("done".into()) }
    }
}

/// A server of one volume, or of two, for the life of the process.
struct Bench {
    address: SocketAddr,
    volumes: Vec<Arc<Noting>>,
    _server: Server,
}

impl Bench {
    fn new(volumes: usize) -> Bench {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // An abstract name: nothing is left behind.
        let name = format!("vhost-remap-fuzz-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a short name");
        let listener = UnixListener::bind_addr(&address).expect("a socket of our own");
        // With one volume there is fault injection, with two there is not.
        let faults = || (volumes == 1).then(Arc::default);
        let volumes: Vec<_> =
            (0..volumes).map(|_| Arc::new(Noting { faults: faults(), ..Noting::default() })).collect();
        let served = volumes.iter().enumerate().map(|(index, volume)| ServedVolume {
            name: format!("disk{index}"),
            uuid: format!("uuid-{index}"),
            volume: volume.clone(),
        });
        let server = Server::start(listener, served.collect()).expect("a thread of its own");
        Bench { address, volumes, _server: server }
    }
}

/// What is sent.
struct Requests {
    bytes: Vec<u8>,
    /// Every request is whole and none waits: each is answered.
    whole: bool,
    /// None of them is an order.
    harmless: bool,
}

impl Requests {
    fn read(program: &mut Program<'_>) -> Requests {
        let mut requests = Requests { bytes: Vec::new(), whole: true, harmless: true };
        for _ in 0..REQUESTS_MAX {
            if program.is_done() {
                break;
            }
            requests.add(program);
        }
        requests
    }

    /// One request, most of it from tables; a high first byte lets the input say a part itself.
    fn add(&mut self, program: &mut Program<'_>) {
        let flags = program.u8();
        let method = program.pick(&METHODS);
        let mut target = program.pick(&ROUTES).as_bytes().to_vec();
        if flags & 1 != 0 {
            target = own_words(program);
        }
        for number in 0..program.below(4) {
            target.push(if number == 0 { b'?' } else { b'&' });
            let own = if flags & 2 != 0 { own_words(program) } else { program.pick(&VALUES).as_bytes().to_vec() };
            target.extend([program.pick(&KEYS).as_bytes(), b"=", &own].concat());
        }
        let body = match flags >> 2 & 3 {
            0 => Vec::new(),
            1 => program.pick(&BODIES).as_bytes().to_vec(),
            2 => own_words(program),
            _ => vec![b'['; 16 * usize::from(program.u16())],
        };
        self.harmless &= method != "POST" && flags & 3 == 0;
        // Who waits for events is answered late, if at all.
        self.whole &= flags & 3 == 0 && !["HEAD", "get"].contains(&method) && !target.windows(5).any(|w| w == b"wait=");
        self.bytes.extend([method.as_bytes(), b" ", &target, b" HTTP/1.1\r\nHost: fuzz\r\n"].concat());
        if flags & 0x10 != 0 {
            let header = own_words(program);
            self.whole = false;
            self.bytes.extend([&header[..], b"\r\n"].concat());
        }
        let mut len = body.len();
        if flags & 0x20 != 0 {
            len = usize::from(program.u16());
            self.whole = false;
        }
        if !body.is_empty() || flags & 0x20 != 0 {
            self.bytes.extend(format!("Content-Length: {len}\r\n").bytes());
        }
        // A body that is too long is refused unread, and then the connection ends.
        self.whole &= len <= 4096;
        self.bytes.extend([b"\r\n", &body[..]].concat());
    }
}

fn own_words(program: &mut Program<'_>) -> Vec<u8> {
    let len = program.below(64);
    program.bytes(len).to_vec()
}

/// Send requests: the lowest bit of the first byte chooses the server, the next whether the rest is sent as it is.
pub(crate) fn control(data: &[u8]) {
    static BENCHES: OnceLock<[Bench; 4]> = OnceLock::new();
    let benches = BENCHES.get_or_init(|| [1, 2, 1, 2].map(Bench::new));
    let mut program = Program::new(data);
    let first = program.u8();
    let mut requests = if first & 2 == 0 {
        Requests::read(&mut program)
    } else {
        Requests { bytes: program.rest().to_vec(), whole: false, harmless: false }
    };
    // Clients that hang up early have servers of their own.
    let bench = &benches[usize::from(first & 1) + if requests.whole { 0 } else { 2 }];
    if requests.whole {
        requests.bytes.extend_from_slice(LAST);
    }
    let level = log::max_level();
    let answers = exchange(bench, &requests);
    let answered = check_answers(&answers, requests.whole);
    assert!(!requests.whole || answered > 0, "whole requests are answered");
    let changed_level = log::max_level() != level;
    log::set_max_level(level);
    let posted = requests.bytes.windows(5).any(|window| window == b"POST ");
    for volume in &bench.volumes {
        let orders = volume.orders();
        // An order goes on when its client hangs up, and may arrive with the next input.
        let ordered = !requests.whole || (posted && !requests.harmless);
        assert!(orders.is_empty() || ordered, "nobody ordered {orders:?}");
        if let Some(faults) = &volume.faults {
            assert!(faults.list().is_empty() || posted || !requests.whole, "nobody added a fault rule");
            faults.clear(None);
        }
    }
    assert!(!changed_level || !requests.harmless, "nobody asked for another log level");
}

/// Everything the server says until it closes the connection, which it must.
fn exchange(bench: &Bench, requests: &Requests) -> Vec<u8> {
    let mut socket = UnixStream::connect_addr(&bench.address).expect("the server listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a limit above zero");
    socket.set_write_timeout(Some(PATIENCE)).expect("a limit above zero");
    // It may have closed its end after the first nonsense; what it said before counts.
    let _ = socket.write_all(&requests.bytes);
    if !requests.whole {
        let _ = socket.shutdown(std::net::Shutdown::Write);
    }
    let mut answers = Vec::new();
    if let Err(error) = socket.read_to_end(&mut answers) {
        let reset = error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(reset, "the server neither answers nor closes the connection: {error}");
    }
    answers
}

/// See that these are answers, and how many; those to a HEAD have a length and no body.
fn check_answers(mut bytes: &[u8], whole: bool) -> usize {
    let mut count = 0;
    while !bytes.is_empty() {
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
            assert!(!whole, "half an answer: {:?}", String::from_utf8_lossy(bytes));
            return count;
        };
        let head = std::str::from_utf8(&bytes[..end]).expect("headers are text");
        let status = head.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|code| code.parse().ok());
        let status: u16 = status.unwrap_or_else(|| panic!("no status: {head}"));
        let header = |name: &str| {
            let lines = head.lines().skip(1).filter_map(|line| line.split_once(": "));
            lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
        };
        bytes = &bytes[end + 4..];
        count += 1;
        if status == 100 {
            continue;
        }
        assert!(status < 500 || status == 503, "the server failed: {head}");
        let len = header("content-length").map_or(0, |len| len.parse().expect("a length is a number"));
        if bytes.len() < len || bytes.starts_with(b"HTTP/1.") {
            // To a HEAD, or cut off by the end of a connection that the client had closed.
            assert!(!whole, "half a body: {head}");
            continue;
        }
        let (body, rest) = bytes.split_at(len);
        bytes = rest;
        check_body(status, header("content-type").as_deref(), body);
    }
    count
}

fn check_body(status: u16, kind: Option<&str>, body: &[u8]) {
    let shown = String::from_utf8_lossy(body);
    match kind {
        Some("application/json") if status >= 400 => {
            let failure: Failure = serde_json::from_slice(body).unwrap_or_else(|e| panic!("{e}: {shown}"));
            assert!(!failure.error.is_empty() && !failure.error.contains(['\n', '\r']), "not one line: {failure:?}");
        }
        Some("application/json") => {
            serde_json::from_slice::<Value>(body).unwrap_or_else(|e| panic!("{e}: {shown}"));
        }
        Some("text/plain; charset=utf-8") => assert!(status == 200, "{status}: {shown}"),
        // The page.
        Some("text/html; charset=utf-8") => {
            assert!(status == 200 && shown.ends_with("</html>\n"), "{status}: {shown}");
        }
        // What is not even HTTP is answered by the HTTP library, without a word.
        None => assert!(body.is_empty() && [400, 414, 431].contains(&status), "{status}: {shown}"),
        Some(kind) => panic!("{kind} with status {status}: {shown}"),
    }
}
