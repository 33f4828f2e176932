//! What monitoring gets: metrics, alerts, documents with a schema, logs and events, from whoever may ask.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::Value;
use vhost_remap::control::schema::schema;

use crate::guest::Failed;
use crate::inputs::skip;
use crate::model::pattern;
use crate::server::{Server, Volume, eventually};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where a server with `--http-listen 0` answers.
pub(crate) fn http_address(server: &Server) -> String {
    let log = server.log_text();
    let found = log.lines().find_map(|line| line.split_once("reports at http://")?.1.strip_suffix("/metrics"));
    found.unwrap_or_else(|| panic!("{log}")).to_owned()
}

/// All that is only read.
const REPORTS: [&str; 11] = [
    "/v1/ping",
    "/v1/status",
    "/v1/stats",
    "/v1/list",
    "/v1/events",
    "/v1/faults",
    "/v1/health",
    "/v1/surface",
    "/metrics",
    "/metrics/dm-remap",
    "/proc",
];
const ORDERS: [(&str, &str); 14] = [
    ("POST", "/v1/clear"),
    ("POST", "/v1/save"),
    ("POST", "/v1/remap"),
    ("POST", "/v1/release"),
    ("POST", "/v1/resize"),
    ("POST", "/v1/scan/start"),
    ("POST", "/v1/scan/pause"),
    ("POST", "/v1/scan/resume"),
    ("POST", "/v1/scan/cancel"),
    ("POST", "/v1/clear-stats"),
    ("POST", "/v1/log-level"),
    ("POST", "/v1/faults"),
    ("DELETE", "/v1/faults"),
    ("DELETE", "/v1/faults/1"),
];

/// Status and all that follows, of a request.
fn exchange(stream: &mut (impl Read + Write), method: &str, target: &str, host: &str) -> (u16, String) {
    write!(stream, "{method} {target} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{answer}")), answer)
}

/// The same, to a server's port.
pub(crate) fn http(address: &str, method: &str, target: &str, host: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    exchange(&mut stream, method, target, host)
}

/// Give `promtool` a text, where it is there.
fn promtool(words: &[&str], input: &str) -> Option<Output> {
    let mut command = Command::new("promtool");
    command.args(words).current_dir(root()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().ok()?;
    child.stdin.take().expect("piped").write_all(input.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}

/// Two reads, one of which fails, and a write that moves a block.
pub(crate) fn work(server: &Server) {
    let mut guest = server.guest(1);
    guest.read(0, 8).unwrap();
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    assert_eq!(guest.read(2003, 1), Err(Failed::IoErr));
    server.fault(&["--ops", "write", "--sectors", "1000"]);
    guest.write(1000, pattern(1000, 8, 1)).unwrap();
}

#[test]
fn metrics_are_what_stats_say_and_promtool_finds_nothing_wrong_with_them() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--http-listen", "0"]);
    work(&server);
    let (status, text) = http(&http_address(&server), "GET", "/metrics", "localhost");
    assert_eq!(status, 200, "{text}");
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-type: text/plain; version=0.0.4\r\n"), "{head}");
    let value = |name: &str| {
        let line = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in\n{body}")).parse::<f64>().unwrap()
    };
    let metric = |name: &str, labels: &str| value(&format!("vhost_remap_{name}{{volume=\"disk.img\"{labels}}}"));
    assert_eq!(metric("requests_total", ",operation=\"read\""), 2.0);
    assert_eq!(metric("request_failures_total", ",operation=\"read\""), 1.0);
    assert_eq!(metric("request_errors_total", ",operation=\"read\",class=\"medium\""), 1.0);
    assert_eq!(metric("request_duration_seconds_count", ",operation=\"read\""), 2.0);
    assert_eq!(metric("request_duration_seconds_bucket", ",operation=\"read\",le=\"+Inf\""), 2.0);
    assert_eq!(metric("remapped_blocks", ""), 1.0);
    assert_eq!(metric("slots", ",state=\"free\""), 63.0);
    assert_eq!(metric("pending_blocks", ""), 1.0);
    assert_eq!(metric("device_up", ",device=\"spare\""), 1.0);
    assert_eq!(metric("volume_state", ",state=\"ok\""), 1.0);
    let errors = server.status().devices[0].read_errors;
    assert_eq!(metric("device_errors_total", ",device=\"primary\",operation=\"read\",class=\"io\""), errors as f64);
    // On the control socket the same, and dm-remap's names too.
    let (_, aliases) = http(&http_address(&server), "GET", "/metrics/dm-remap", "127.0.0.1");
    for line in ["dm_remap_total_reads{volume=\"disk.img\"} 2", "dm_remap_active_mappings{volume=\"disk.img\"} 1"] {
        assert!(aliases.contains(line), "{line} is not in\n{aliases}");
    }
    let Some(checked) = promtool(&["check", "metrics"], body) else {
        return skip("metrics_are_what_stats_say_and_promtool_finds_nothing_wrong_with_them", "no promtool");
    };
    assert!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}");
    let wrong = promtool(&["check", "metrics"], "x_total{ 1\n").unwrap();
    assert!(!wrong.status.success(), "promtool finds fault with nothing");
}

#[test]
fn alerts_fire_on_what_they_are_for() {
    let Some(rules) = promtool(&["check", "rules", "ci/packaging/vhost-remap.rules.yml"], "") else {
        return skip("alerts_fire_on_what_they_are_for", "no promtool");
    };
    assert!(rules.status.success(), "{rules:?}");
    let tested = promtool(&["test", "rules", "tests/golden/alerts.yml"], "").unwrap();
    assert!(tested.status.success(), "{tested:?}");
}

/// An alert on a metric that is no more would never fire.
#[test]
fn alerts_name_metrics_that_there_are() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--http-listen", "127.0.0.1:0"]);
    work(&server);
    let (_, text) = http(&http_address(&server), "GET", "/metrics", "[::1]");
    let rules = fs::read_to_string(root().join("ci/packaging/vhost-remap.rules.yml")).unwrap();
    let mut names = 0;
    for line in rules.lines().filter_map(|line| line.trim().strip_prefix("expr: ")) {
        for name in line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| w.starts_with("vhost_remap_")) {
            assert!(text.contains(&format!("# TYPE {name} ")), "{name}");
            names += 1;
        }
    }
    assert!(names > 5, "{rules}");
}

#[test]
fn the_port_takes_only_reads_and_only_under_its_own_names() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--http-listen", "127.0.0.1:0"]);
    let address = http_address(&server);
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    for target in REPORTS {
        let (status, answer) = http(&address, "GET", target, &address);
        assert_eq!(status, 200, "{target}: {answer}");
        assert!(!answer.to_lowercase().contains("access-control"), "{answer}");
        let (status, answer) = http(&address, "GET", target, "evil.example");
        assert_eq!(status, 403, "{target}: {answer}");
        assert!(answer.contains("localhost"), "{answer}");
        assert_eq!(http(&address, "POST", target, "localhost").0, 405, "{target}");
    }
    for (method, target) in ORDERS {
        let (status, answer) = http(&address, method, target, "localhost");
        assert!([404, 405].contains(&status), "{method} {target}: {answer}");
    }
    // Another server cannot have it.
    let other = Volume::create(32, 64);
    let why = other.serve_refused(&["--http-listen", &address]);
    assert!(why.contains(&format!("--http-listen {address}")) && why.contains("choose another port"), "{why}");
}

/// Ask the control socket on a thread with other rights; the status, or why there is no connection.
fn ask_as(uid: u32, gid: u32, server: &Server, method: &str, target: &str) -> Result<(u16, String), io::ErrorKind> {
    // The way to the socket is root's.
    let place = rustix::fs::open(&server.ctl, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            let mut stream = UnixStream::connect(&path).map_err(|error| error.kind())?;
            Ok(exchange(&mut stream, method, target, "localhost"))
        });
        asking.join().unwrap()
    })
}

#[test]
fn members_of_the_control_group_read_and_give_no_orders() {
    const NOBODY: u32 = 65_534;
    const GROUP: u32 = 4_711;
    if !rustix::process::geteuid().is_root() {
        return skip("members_of_the_control_group_read_and_give_no_orders", "not root");
    }
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--control-group", &GROUP.to_string()]);
    for target in REPORTS {
        let (status, answer) = ask_as(NOBODY, GROUP, &server, "GET", target).unwrap();
        assert_eq!(status, 200, "{target}: {answer}");
    }
    for (method, target) in ORDERS {
        let (status, answer) = ask_as(NOBODY, GROUP, &server, method, target).unwrap();
        assert_eq!(status, 403, "{method} {target}: {answer}");
        assert!(answer.contains("group 4711 may only read"), "{answer}");
    }
    assert_eq!(ask_as(NOBODY, NOBODY, &server, "GET", "/v1/status"), Err(io::ErrorKind::PermissionDenied));
    server.order(&["save"]);
    let other = Volume::create(32, 64);
    let why = other.serve_refused(&["--control-group", "no-such-group-here"]);
    assert!(why.contains("no-such-group-here") && why.contains("groupadd"), "{why}");
}

fn committed_schema() -> PathBuf {
    root().join("ci/packaging/vhost-remap.schema.json")
}

/// With VHOST_REMAP_BLESS set, the committed file is written.
#[test]
fn the_committed_schema_is_that_of_the_documents() {
    let made = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
    if std::env::var_os("VHOST_REMAP_BLESS").is_some() {
        fs::write(committed_schema(), &made).unwrap();
    }
    let committed = fs::read_to_string(committed_schema()).unwrap_or_default();
    assert!(
        made == committed,
        "the documents have changed: run this with VHOST_REMAP_BLESS=1, and raise SCHEMA_VERSION \
         if a field is gone or means something else"
    );
}

#[test]
fn real_answers_fit_the_committed_schema() {
    let text = fs::read_to_string(committed_schema()).unwrap();
    let of = |name: &str| {
        let mut schema: Value = serde_json::from_str(&text).unwrap();
        schema["$ref"] = format!("#/$defs/{name}").into();
        jsonschema::validator_for(&schema).unwrap()
    };
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--http-listen", "0"]);
    work(&server);
    let check = |name: &str, document: &str| {
        let document: Value = serde_json::from_str(document).unwrap();
        let errors: Vec<String> = of(name).iter_errors(&document).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{name}: {errors:?}: {document}");
        document
    };
    let mut status = check("StatusReport", &server.order(&["status", "--json"]));
    check("StatsReport", &server.order(&["stats", "--json"]));
    let list = server.order(&["list", "--json"]);
    assert_eq!(list.lines().count(), 2, "{list}");
    list.lines().for_each(|line| _ = check("ListEntry", line));
    let events = server.order(&["events", "--json"]);
    assert!(events.lines().count() > 2, "{events}");
    events.lines().for_each(|line| _ = check("EventRecord", line));
    for (name, target) in [
        ("ListPage", "/v1/list"),
        ("EventPage", "/v1/events"),
        ("HealthReport", "/v1/health"),
        ("SurfaceReport", "/v1/surface"),
        ("Failure", "/no/such"),
    ] {
        let (_, answer) = http(&http_address(&server), "GET", target, "localhost");
        check(name, answer.split_once("\r\n\r\n").unwrap().1);
    }
    status.as_object_mut().unwrap().remove("blocks");
    assert!(!of("StatusReport").is_valid(&status), "a schema that takes anything");
}

#[test]
fn log_lines_are_json_objects_where_that_is_wanted() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--log-format", "json"]);
    work(&server);
    server.await_event("remapped");
    let lines = || {
        let log = server.log_text();
        let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        log.lines().map(parse).collect::<Vec<_>>()
    };
    let moved = |line: &Value| line["event"] == "remapped";
    eventually("the event is logged", || lines().iter().any(moved));
    let lines = lines();
    let line = lines.iter().find(|line| moved(line)).unwrap();
    assert_eq!((&line["device"], &line["sector"], &line["sectors"]), (&"primary".into(), &1000.into(), &8.into()));
    assert_eq!(line["volume"], volume.primary.to_str().unwrap());
    for name in ["time", "level", "cause", "action"] {
        assert!(line[name].as_str().is_some_and(|text| !text.is_empty()), "{name}: {line}");
    }
    // What is no event has a message.
    assert!(lines.iter().any(|line| line["message"] == "a front-end connected"), "{lines:?}");
}

#[test]
fn a_log_line_of_an_event_names_volume_device_sector_cause_and_action() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    work(&server);
    server.await_event("remapped");
    let cause_and_action = "the block failed again: moved to slot 0";
    let end = format!(" WARN  {}: remapped: primary sector 1000+8: {cause_and_action}", volume.primary.display());
    eventually("the event is logged", || server.log_text().lines().any(|line| line.ends_with(&end)));
}

/// The hook runs for what it was asked for, and goes on over its own failures and a restart of the server.
#[test]
fn a_hook_runs_for_each_wanted_event_also_after_a_restart() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let (hooked, ctl) = (volume.dir.path().join("hooked"), server.ctl.clone());
    let hook = format!("cat >>{0}; echo \"$VHOST_REMAP_EVENT $VHOST_REMAP_SECTOR\" >>{0}; exit 1", hooked.display());
    let errors = fs::File::create(volume.dir.path().join("errors")).unwrap();
    server.order(&["remap", "4000"]);
    let mut follower = Command::new(env!("CARGO_BIN_EXE_vhost-remap"))
        .args(["events", "--follow", "--on", "remapped,health", "--exec", &hook, "--control-path"])
        .arg(&ctl)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .unwrap();
    let ran = |what: &str| fs::read_to_string(&hooked).is_ok_and(|text| text.lines().any(|line| line == what));
    eventually("the follower is there", || {
        server.order(&["remap", "6000"]);
        server.order(&["release", "6000"]);
        hooked.exists()
    });
    work(&server);
    eventually("the hook ran", || ran("remapped 1000"));
    let hooked_text = || fs::read_to_string(&hooked).unwrap();
    eventually("it ran for health", || hooked_text().lines().any(|line| line.starts_with("health")));
    assert!(!ran("guest-error 2003") && !ran("remapped 4000"), "neither for others nor for what was before");
    server.stop();
    let server = volume.serve(&[]);
    server.order(&["remap", "5000"]);
    eventually("the hook ran for the next server", || ran("remapped 5000"));
    follower.kill().unwrap();
    follower.wait().unwrap();
    let text = fs::read_to_string(&hooked).unwrap();
    let json = text.lines().find(|line| line.starts_with('{')).unwrap();
    assert_eq!(serde_json::from_str::<Value>(json).unwrap()["kind"], "remapped");
    assert_eq!(text.lines().filter(|line| *line == "remapped 1000").count(), 1, "{text}");
    let said = fs::read_to_string(volume.dir.path().join("errors")).unwrap();
    assert!(said.contains("failed: exit status: 1") && said.contains("waiting for it"), "{said}");
}
