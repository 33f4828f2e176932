//! Pictures of scripted volumes, keys, and a server that goes and comes back.

use std::sync::mpsc;
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::json;

use super::app::{App, Wanted};
use super::feed::Feed;
use super::shot::{Scan, Shot, Status};
use super::view;
use crate::cli::report_args::TopArgs;
use crate::cli::surface::tests::scratched;
use crate::control::tests::Running;
use crate::control::volume::scripted::{ScriptedVolume, event, sample_health, sample_stats, sample_status};

fn scan() -> Scan {
    Scan {
        state: "running".into(),
        pass: 3,
        percent: 41.25,
        speed_now: 180 << 20,
        speed_average: 150 << 20,
        eta_seconds: Some(3_725),
        found: [("bad".into(), 4), ("healed".into(), 2), ("lost".into(), 1), ("slow".into(), 0)].into(),
    }
}

fn shot() -> Shot {
    let mut status = sample_status();
    status.devices[0].read_errors = 4;
    Shot {
        names: vec!["disk.img".into()],
        name: "disk.img".into(),
        status,
        scan: Some(scan()),
        stats: sample_stats(),
        health: Some(sample_health()),
        surface: Some(scratched()),
        events: (1..=30).map(event).collect(),
        events_anew: true,
    }
}

/// Two seconds later: 2000 more reads of 4096 bytes.
fn later() -> Shot {
    let mut later = Shot { events: vec![event(31)], events_anew: false, surface: None, ..shot() };
    let reads = &mut later.stats.operations[0];
    (reads.completed, reads.bytes) = (reads.completed + 2000, reads.bytes + 2000 * 4096);
    reads.latency.buckets[0].count += 2000;
    later
}

fn app_of(shots: impl IntoIterator<Item = Shot>) -> App {
    let mut app = App::new(Duration::from_secs(1));
    for (i, shot) in (0..).zip(shots) {
        app.take(Duration::from_secs(2 * i), Ok(shot));
    }
    app
}

/// The picture, a line a row, without blanks at the ends.
fn drawn(app: &App, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(frame, app)).unwrap();
    let buffer = terminal.backend().buffer();
    let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    (0..height).map(row).collect()
}

#[track_caller]
fn check_in_order(picture: &[String], wanted: &[&str]) {
    let mut rows = picture.iter();
    for part in wanted {
        assert!(
            rows.any(|row| row.contains(part)),
            "{part:?} is not there, or not in its place:\n{}",
            picture.join("\n")
        );
    }
}

#[test]
fn everything_has_its_place_at_80_by_24() {
    let picture = drawn(&app_of([shot(), later()]), 80, 24);
    check_in_order(
        &picture,
        &[
            "disk.img  ok  health AT_RISK 75  up 1d 2h  connected",
            "AT_RISK primary, remapped-recently: 12 blocks moved",
            "WATCH primary, pending: 3",
            "REQUESTS         IOPS         BYTES",
            "read             1000     3.9 MiB/s",
            "write               0         0 B/s",
            "flush               0         0 B/s",
            "DEVICE   STATE    SIZE  READ ERR  WRITE ERR  FLUSH ERR  PATH",
            "primary  up     10 GiB         4          0          0  /srv/disk.img",
            "spare    up     66 MiB",
            "BLOCKS  12 of 16384 remapped (< 0.1 %)  3 pending  2 lost  16371 free  1 retired",
            "SCANNER running, pass 3, 41.2 %, 180 MiB/s (average 150 MiB/s), 1h 2m to go; ",
            "SURFACE  512 KiB a letter  - not scanned yet s slow r remapped P pending L lost",
            ".........rPL........s..................-r-..................----",
            "EVENTS  31, newest first (UTC)",
            "00:00:00 warn #31 remapped primary 248-255: Input/output error",
            "00:00:00 warn #30 remapped",
            "q end  p pause  +/- interval  j/k scroll  ? help  every 1s",
        ],
    );
}

#[test]
fn at_120_by_40_there_are_curves_and_more_of_everything() {
    let mut app = app_of([shot(), later()]);
    let picture = drawn(&app, 120, 40);
    check_in_order(&picture, &["IOPS OVER TIME", "█"]);
    check_in_order(&picture, &["BLOCKS", "1 lost, 4 bad, 2 healed", "SURFACE", "EVENTS", "#31", "#22", "q end"]);
    assert_eq!(picture.len(), 40);
    // A second later nothing came: the curve goes on with nothing.
    app.take(Duration::from_secs(4), Ok(Shot { events: Vec::new(), ..later() }));
    assert_eq!(app.history["read"], [1000.0, 0.0]);
}

#[test]
fn at_40_by_10_the_most_important_is_left() {
    let picture = drawn(&app_of([shot(), later()]), 40, 10);
    check_in_order(
        &picture,
        &[
            "disk.img  ok  health AT_RISK 75",
            "AT_RISK primary, remapped-recently",
            "read  1000/s 3.9 MiB/s p99 81.9 µs",
            "write 0/s 0 B/s p99 -",
            "BLOCKS  12 of 16384 remapped",
            "SCANNER running, pass 3, 41.2 %",
            "#31",
            "q end",
        ],
    );
}

#[test]
fn no_size_is_too_small_or_too_large_for_any_picture() {
    let mut gone = app_of([shot(), later()]);
    gone.take(Duration::from_secs(9), Err("nobody answers".into()));
    gone.shows_help = true;
    let bare = Shot { scan: None, health: None, surface: None, events: Vec::new(), ..shot() };
    for app in [App::new(Duration::from_secs(1)), app_of([shot()]), app_of([shot(), later()]), app_of([bare]), gone] {
        for (width, height) in (1..=130).step_by(3).flat_map(|width| (1..=60).step_by(3).map(move |h| (width, h))) {
            drawn(&app, width, height);
        }
        for (width, height) in [(1, 500), (500, 1), (400, 200)] {
            drawn(&app, width, height);
        }
    }
}

#[test]
fn a_server_that_is_gone_is_said_and_what_is_shown_is_dated() {
    let mut app = app_of([shot(), later()]);
    app.take(Duration::from_secs(5), Err("/run/ctl: nobody answers".into()));
    app.take(Duration::from_secs(9), Err("/run/ctl: nobody answers".into()));
    let picture = drawn(&app, 120, 24);
    let said = "NO ANSWER for 4 s, what is below is 7 s old, asking on: /run/ctl: nobody answers";
    check_in_order(&picture, &[said, "read                -             -", "EVENTS"]);
    check_in_order(&drawn(&app, 40, 10), &["NO ANSWER for 4 s"]);
    // It comes back: no rate over the time it was away.
    app.take(Duration::from_secs(10), Ok(later()));
    assert!(app.gone.is_none() && app.rates.is_none());
    app.take(Duration::from_secs(11), Ok(later()));
    assert!(app.rates.is_some());
}

#[test]
fn what_others_wrote_neither_moves_the_cursor_nor_turns_lines_around() {
    let mut shot = shot();
    shot.status.devices[0].path = "/srv/\x1b[2Jdi\u{202e}sk\n.img".into();
    shot.name = "\x07bell".into();
    shot.status.messages = vec!["spare\r\x1b]0;title\x07 gone".into()];
    shot.events[29].cause = "\x1b[31mred".into();
    let picture = drawn(&app_of([shot]), 120, 40).join("\n");
    assert!(!picture.contains(['\x1b', '\x07', '\r', '\u{202e}']), "{picture}");
    assert!(
        picture.contains("/srv/\u{fffd}[2Jdi\u{fffd}sk\u{fffd}.img") && picture.contains("\u{fffd}bell"),
        "{picture}"
    );
}

fn key(code: KeyCode) -> KeyEvent {
    KeyEvent::new(code, KeyModifiers::NONE)
}

#[test]
fn keys_do_what_the_help_says() {
    let mut app = app_of([shot()]);
    let mut typed = |code| app.typed(key(code));
    assert_eq!(typed(KeyCode::Char('q')), Some(Wanted::End));
    assert_eq!(typed(KeyCode::Esc), Some(Wanted::End));
    assert_eq!(typed(KeyCode::Char('p')), Some(Wanted::Pause(true)));
    assert_eq!(typed(KeyCode::Char('p')), Some(Wanted::Pause(false)));
    assert_eq!(typed(KeyCode::Char('+')), Some(Wanted::Interval(Duration::from_secs(2))));
    assert_eq!(typed(KeyCode::Char('-')), Some(Wanted::Interval(Duration::from_secs(1))));
    assert_eq!(typed(KeyCode::Tab), None, "there is one volume");
    assert_eq!(typed(KeyCode::Char('?')), None);
    check_in_order(&drawn(&app, 80, 24), &["keys", "q, Esc, Ctrl-C  end", "scroll the events", "this help"]);
    assert_eq!(app.typed(key(KeyCode::Esc)), None, "the help goes first");
    assert_eq!(app.typed(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Some(Wanted::End));
    let mut typed = |code| {
        app.typed(key(code));
        app.scroll
    };
    let scrolled =
        [KeyCode::Up, KeyCode::Down, KeyCode::Char('j'), KeyCode::Char('k'), KeyCode::PageDown, KeyCode::End];
    assert_eq!(scrolled.map(&mut typed), [0, 1, 2, 1, 11, 29]);
    check_in_order(&drawn(&app, 80, 24), &["EVENTS  30 to 30 of 30", "#1 "]);
    // What is read stays, as more comes.
    app.take(Duration::from_secs(2), Ok(later()));
    assert_eq!(app.scroll, 30);
    assert_eq!((app.typed(key(KeyCode::Home)), app.scroll), (None, 0));
}

#[test]
fn volumes_are_chosen_in_turn_or_by_number() {
    let names: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
    let at = |name: &str| app_of([Shot { names: names.clone(), name: name.into(), ..shot() }]);
    let wanted = |name: &str| Some(Wanted::Volume(name.into()));
    assert_eq!(at("a").typed(key(KeyCode::Tab)), wanted("b"));
    assert_eq!(at("c").typed(key(KeyCode::Tab)), wanted("a"));
    assert_eq!(at("a").typed(key(KeyCode::BackTab)), wanted("c"));
    assert_eq!(at("a").typed(key(KeyCode::Char('3'))), wanted("c"));
    assert_eq!(at("a").typed(key(KeyCode::Char('1'))), None);
    assert_eq!(at("a").typed(key(KeyCode::Char('4'))), None);
    assert_eq!(at("its-uuid").typed(key(KeyCode::Tab)), wanted("a"));
    check_in_order(&drawn(&at("b"), 80, 24), &["b (2/3)  ok"]);
}

#[test]
fn a_status_with_a_scanner_and_one_without_are_both_understood() {
    let read = |scan: Option<serde_json::Value>| {
        let mut document = serde_json::to_value(sample_status()).unwrap();
        document.as_object_mut().unwrap().remove("scan");
        if let Some(scan) = scan {
            document["scan"] = scan;
        }
        let document = serde_json::to_string(&document).unwrap();
        serde_json::from_str::<Status>(&document).map(|status| status.scan)
    };
    assert_eq!(read(None).unwrap(), None);
    let full = json!({
        "state": "running", "pass": 3, "percent": 41.25, "speed_now": 180 << 20, "speed_average": 150 << 20,
        "eta_seconds": 3725, "found": {"bad": 4, "healed": 2, "lost": 1, "slow": 0}, "of_a_later_version": [],
    });
    // Where reports have a scanner of their own, what they say of it must be whole.
    if let Ok(found) = read(Some(full)) {
        assert_eq!(found, Some(scan()));
    }
    assert_eq!(scan().finds(), "1 lost, 4 bad, 2 healed");
}

fn feed_of(running: &Running, volume: Option<&str>) -> Feed {
    let args = TopArgs {
        control_path: running.path(),
        volume: volume.map(str::to_owned),
        interval: Duration::from_millis(100),
    };
    Feed::new(&args).unwrap()
}

#[test]
fn a_server_is_asked_for_all_and_then_for_what_is_new() {
    let mut volume = ScriptedVolume::new();
    volume.events = vec![event(1), event(2)].into();
    let (running, volumes) = Running::new(vec![volume, ScriptedVolume::new()]);
    let mut feed = feed_of(&running, None);
    let first = feed.ask().unwrap();
    assert_eq!((first.names.len(), first.name.as_str(), first.events.len()), (2, "disk0", 2));
    assert!(first.surface.is_some() && first.health.is_some() && first.events_anew);
    volumes[0].events.lock().unwrap().push(event(3));
    let second = feed.ask().unwrap();
    assert_eq!(second.events.iter().map(|event| event.seq).collect::<Vec<_>>(), [3]);
    assert!(second.surface.is_none() && !second.events_anew);
    let error = feed_of(&running, Some("no-such")).ask().unwrap_err().to_string();
    assert!(error.contains("no volume \"no-such\"; there are: disk0, disk1"), "{error}");
}

#[test]
fn the_feed_follows_orders_and_says_when_the_server_is_gone() {
    let (running, _) = Running::new(vec![ScriptedVolume::new(), ScriptedVolume::new()]);
    let feed = feed_of(&running, None);
    let (orders, ordered) = mpsc::channel();
    let (told, answers) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        feed.run(Duration::from_millis(20), &ordered, |answer| told.send(answer).is_ok());
    });
    assert_eq!(answers.recv().unwrap().unwrap().name, "disk0");
    orders.send(Wanted::Volume("disk1".into())).unwrap();
    while answers.recv().unwrap().unwrap().name != "disk1" {}
    drop(running);
    while answers.recv().unwrap().is_ok() {}
    orders.send(Wanted::End).unwrap();
    thread.join().unwrap();
}
