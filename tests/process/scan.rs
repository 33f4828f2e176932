//! The scanner: what it finds of what was hidden, how it is told what to do, and that it begins nothing anew.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_remap::runtime::report::StatusReport;
use vhost_remap::runtime::scan_report::ScanReport;

use crate::guest::{Failed, Guest, Io};
use crate::model::{Model, Random, pattern};
use crate::server::{Server, Volume, done, eventually, refusal};
use crate::stats::stats;
use crate::terminal::Terminal;

/// No pass of these tests takes longer, on a busy machine.
const PASS_LIMIT: Duration = Duration::from_secs(600);
const BLOCK: u64 = 8;
const MIB: u64 = 2048;

/// Passes begin only by order.
const BY_ORDER: [&str; 2] = ["--scan-interval", "off"];

fn scan(server: &Server) -> ScanReport {
    server.status().scan
}

/// Wait for the pass, for longer than one command may take.
fn wait(server: &Server) -> Output {
    let deadline = Instant::now() + PASS_LIMIT;
    loop {
        let output = server.ask(&["scan", "wait", "--timeout", "40"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        if output.status.success() || !stderr.contains("not done within 40 s") {
            return output;
        }
        assert!(Instant::now() < deadline, "no end within {PASS_LIMIT:?}: {stderr}");
    }
}

/// Says at its end that it is over, also when that is a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Wait for the pass, and work meanwhile.
fn wait_beside(server: &Server, mut work: impl FnMut()) -> Output {
    let over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let waiting = threads.spawn(|| {
            let _over = Over(&over);
            wait(server)
        });
        while !over.load(Ordering::Relaxed) {
            work();
        }
        waiting.join().expect("it says why")
    })
}

/// Bytes read from both devices, counted where operations are submitted, less those that the guest asked for.
fn device_bytes_read(server: &Server) -> u64 {
    let report = stats(server);
    let devices: u64 = report.devices.iter().filter(|row| row.operation == "read").map(|row| row.bytes).sum();
    let guest: u64 = report.operations.iter().filter(|row| row.operation == "read").map(|row| row.bytes).sum();
    devices - guest
}

/// Add a fault rule for each of the sectors.
fn faults(server: &Server, words: &[&str], sectors: &[u64]) {
    let texts: Vec<String> = sectors.iter().map(u64::to_string).collect();
    let of_sectors = texts.iter().flat_map(|text| ["--sectors", text]);
    server.fault(&words.iter().copied().chain(of_sectors).collect::<Vec<_>>());
}

/// Places that a pass is to find, none of which the guest has met: a sector of a block each.
struct Places {
    bad: Vec<u64>,
    slow: Vec<u64>,
    /// These are lost before the pass.
    lost: Vec<u64>,
}

const BAD: usize = 200;
const SLOW: usize = 50;
const LOST: usize = 20;
/// Places lie below; a guest may work above.
const PLACES_END: u64 = 40 * MIB;
const DISK_MIB: u64 = 48;

impl Places {
    fn seeded(seed: u64) -> Places {
        let mut random = Random(seed);
        let mut blocks = BTreeSet::new();
        let mut take = |count: usize| {
            let mut sectors = Vec::new();
            while sectors.len() < count {
                let block = random.below(PLACES_END / BLOCK);
                if blocks.insert(block) {
                    sectors.push(block * BLOCK + random.below(BLOCK));
                }
            }
            sectors.sort_unstable();
            sectors
        };
        Places { lost: take(LOST), bad: take(BAD), slow: take(SLOW) }
    }

    /// Write to the blocks of `lost` with the sector beside it, when neither can be written there nor it be read.
    fn lose(&self, server: &Server, guest: &mut Guest) {
        faults(server, &["--ops", "read,write"], &self.lost);
        let beside: Vec<u64> = self.lost.iter().map(|sector| sector / BLOCK * BLOCK + (sector + 1) % BLOCK).collect();
        faults(server, &["--ops", "write"], &beside);
        for sector in beside {
            guest.write(sector, pattern(sector, 1, 1)).unwrap();
            // Writes that fail all over a disk without one that succeeds are taken for a lost disk.
            guest.write(PLACES_END, pattern(PLACES_END, 8, 1)).unwrap();
        }
        let status = server.status();
        assert_eq!((status.blocks.remapped, status.blocks.lost_sectors), (LOST as u64, LOST as u64));
    }

    fn hide(&self, server: &Server) {
        faults(server, &["--ops", "read"], &self.bad);
        faults(server, &["--ops", "read", "--delay", "120"], &self.slow);
    }

    /// What the pass must have found, and left as it was.
    #[track_caller]
    fn check(&self, status: &StatusReport, read: u64) {
        let scan = &status.scan;
        assert_eq!((scan.found.bad, scan.found.lost), (BAD as u64, LOST as u64), "{scan:?}");
        assert_eq!((scan.found.slow, scan.found.moved, scan.found.metadata), (SLOW as u64, 0, 0), "{scan:?}");
        assert_eq!((status.blocks.remapped, status.blocks.lost_sectors), (LOST as u64, LOST as u64));
        let last = scan.last.expect("a pass has ended");
        assert!(last.complete && last.pass == scan.pass && last.found == scan.found, "{scan:?}");
        assert!(scan.skipped.is_empty() && scan.skipped_bytes == 0, "{scan:?}");
        // Each block where it lives, on the primary or in its slot, and metadata.
        assert!(
            scan.covered_bytes > status.capacity_sectors * 512 && scan.covered_bytes == scan.total_bytes,
            "{scan:?}"
        );
        assert!(read >= scan.covered_bytes, "{read} bytes were read: {scan:?}");
        assert_eq!(status.counters.health_scans, 1);
        let (seconds, guest) = (last.ended - last.started, status.counters.reads + status.counters.writes);
        println!(
            "{:?} in {seconds} s: {} bytes covered, {read} read, {guest} requests",
            last.found, scan.covered_bytes
        );
    }
}

/// Scenario 27, idle. P2.
#[test]
fn a_pass_finds_200_bad_50_slow_and_20_lost_places() {
    let volume = Volume::create(DISK_MIB, 64);
    let server = volume.serve(&BY_ORDER);
    assert!(server.announcement.contains(", scanning off, "), "{}", server.announcement);
    let places = Places::seeded(7);
    places.lose(&server, &mut server.guest(1));
    places.hide(&server);
    let before = device_bytes_read(&server);
    let line = server.order(&["scan", "start"]);
    assert!(line.contains("pass 1"), "{line}");
    let line = done(&wait(&server));
    assert!(line.starts_with("pass 1 has ended after ") && line.lines().count() == 1, "{line}");
    let status = server.status();
    places.check(&status, device_bytes_read(&server) - before);
    // What is bad is pending, each sector by its name, and nobody but the pass has asked for it.
    let pending: Vec<u64> = server.list().iter().flat_map(|entry| entry.pending.clone()).collect();
    assert_eq!(pending, places.bad);
    assert_eq!(status.counters.guest_errors, 0);
    // It is told wherever one looks.
    assert!(server.order(&["status"]).contains("pass 1 found 200 bad, "));
    assert_eq!(server.order(&["status", "--line"]).split(' ').nth(25), Some("1"));
    assert!(server.order(&["health", "--format", "compact"]).contains(" scan_count=1 "));
}

/// Scenario 27, beside a guest with four requests at a time.
#[test]
fn a_pass_beside_a_guest_finds_the_same_and_the_guest_gets_what_it_wrote() {
    let volume = Volume::create(DISK_MIB, 64);
    let server = volume.serve(&BY_ORDER);
    let places = Places::seeded(8);
    let mut guest = server.guest(1);
    places.lose(&server, &mut guest);
    places.hide(&server);
    let mut model = Model::written(&mut guest, PLACES_END, 8 * MIB, 1);
    let before = device_bytes_read(&server);
    server.order(&["scan", "start"]);
    let mut random = Random(9);
    let mut stamp = 1;
    let output = wait_beside(&server, || {
        let mut request = |part: u64| {
            // Each in a part of its own: they run at the same time.
            let sector = PLACES_END + part * 2 * MIB + random.below(2 * MIB - 16);
            stamp += 1;
            match random.below(3) {
                0 => model.write(sector, pattern(sector, 16, stamp)),
                _ => Io::Read { sector, count: 8 },
            }
        };
        let ios: Vec<Io> = (0..4).map(&mut request).collect();
        assert!(guest.queue().run(&ios).iter().all(Result::is_ok));
    });
    done(&output);
    let (status, read) = (server.status(), device_bytes_read(&server) - before);
    model.check_all(guest.queue());
    places.check(&status, read);
    assert!(status.counters.reads > 0 && status.counters.guest_errors == 0, "{status:?}");
}

/// Scenario 27, beside a guest with 32 requests at a time: so much work hides which blocks are slow, and not which are
/// bad. The rate that was told holds.
#[test]
fn a_pass_beside_a_full_queue_finds_what_is_bad_at_the_rate_it_was_told() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--scan-interval", "off", "--scan-rate", "4M"]);
    let mut random = Random(10);
    let bad: BTreeSet<u64> = (0..64).map(|_| random.below(24 * MIB)).collect();
    let bad: Vec<u64> = bad.into_iter().collect();
    faults(&server, &["--ops", "read"], &bad);
    let mut guest = server.guest(1);
    server.order(&["scan", "start"]);
    done(&wait_beside(&server, || {
        let ios: Vec<Io> =
            (0..32).map(|_| Io::Read { sector: 24 * MIB + random.below(8 * MIB - 8), count: 8 }).collect();
        assert!(guest.queue().run(&ios).iter().all(Result::is_ok));
    }));
    let pending: Vec<u64> = server.list().iter().flat_map(|entry| entry.pending.clone()).collect();
    assert_eq!(pending, bad);
    let report = scan(&server);
    let blocks: BTreeSet<u64> = bad.iter().map(|sector| sector / BLOCK).collect();
    assert_eq!(report.found.bad, blocks.len() as u64, "{report:?}");
    let last = report.last.expect("it has ended");
    let seconds = last.ended - last.started + 1;
    assert!(report.covered_bytes <= seconds * (4 << 20) * 11 / 10, "{} bytes in {seconds} s", report.covered_bytes);
}

/// Scenario 28.
#[test]
fn a_disk_of_zeros_is_found_in_good_health() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&BY_ORDER);
    let writes = |server: &Server| {
        let rows = stats(server).devices;
        let primary = rows.into_iter().find(|row| row.device == "primary" && row.operation == "write");
        primary.map(|row| row.submitted)
    };
    let before = writes(&server);
    server.order(&["scan", "start", "--wait"]);
    let status = server.status();
    assert_eq!(status.scan.found.kinds().iter().map(|(_, count)| count).sum::<u64>(), 0, "{:?}", status.scan);
    assert_eq!((status.health.as_str(), status.health_score), ("OK", 100));
    assert!(server.list().is_empty());
    assert_eq!(writes(&server), before, "where nothing is wrong nothing is written");
}

/// W1.
#[test]
fn a_block_rewritten_in_place_is_healed_once_a_pass_has_read_it() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&BY_ORDER);
    let mut guest = server.guest(1);
    server.fault(&["--ops", "read", "--sectors", "1003", "--until-rewritten"]);
    assert_eq!(guest.read(1003, 1), Err(Failed::IoErr));
    guest.write(1000, pattern(1000, 8, 2)).unwrap();
    let counters = server.status().counters;
    assert_eq!((counters.rewritten, counters.healed), (1, 0));
    server.order(&["scan", "start", "--wait"]);
    let status = server.status();
    assert_eq!((status.counters.healed, status.scan.found.healed, status.scan.found.bad), (1, 1, 0));
}

#[test]
fn who_waits_for_a_pass_on_a_terminal_sees_how_far_it_is() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&SLOWLY);
    let words = ["scan", "start", "--wait", "--control-path"].map(OsStr::new);
    let terminal = Terminal::start(&[&words[..], &[server.ctl.as_os_str()]].concat(), 120, 24);
    terminal.eventually_shows(&["pass 1 [=", " %, ", "/s on average"]);
    server.order(&["scan", "cancel"]);
    terminal.eventually_shows(&["pass 1 was cancelled"]);
    assert_eq!(terminal.ended().code(), Some(1));
}

/// Slow enough to be met on its way.
const SLOWLY: [&str; 4] = ["--scan-interval", "off", "--scan-rate", "1M"];

#[test]
fn a_pass_is_paused_resumed_and_cancelled() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&SLOWLY);
    let refused = |words: &[&str], part: &str| {
        let why = server.refused(&[&["scan"], words].concat());
        assert!(why.contains(part) && why.lines().count() == 1, "{words:?}: {why}");
    };
    for words in ["pause", "resume", "cancel"] {
        refused(&[words], "no pass");
    }
    refused(&["wait"], "no pass is under way");
    assert_eq!((scan(&server).state.as_str(), scan(&server).rate_limit), ("off", Some(1 << 20)));
    server.order(&["scan", "start"]);
    refused(&["start"], "pass 1");
    refused(&["resume"], "paused");
    refused(&["wait", "--timeout", "0"], "pass 1: ");
    assert!(server.order(&["status"]).contains("\nScanner   pass 1: "));
    server.order(&["scan", "pause"]);
    let paused = server.await_status(|status| status.scan.state == "paused").scan;
    assert!(paused.percent < 100.0 && paused.eta_seconds.is_none(), "{paused:?}");
    refused(&["pause"], "paused");
    refused(&["start"], "pass 1");
    refused(&["wait", "--timeout", "1"], "paused");
    // Reads that were under way have ended by now.
    let stands = scan(&server).covered_bytes;
    refused(&["wait", "--timeout", "1"], "paused");
    assert_eq!(scan(&server).covered_bytes, stands);
    server.order(&["scan", "resume"]);
    eventually("it goes on", || scan(&server).covered_bytes > stands);
    server.order(&["scan", "cancel"]);
    assert!(!scan(&server).is_under_way());
    refused(&["wait"], "pass 1 was cancelled");
    assert_eq!(server.status().counters.health_scans, 0);
    // The next one is another one.
    assert!(server.order(&["scan", "start"]).contains("pass 2"));
    assert_eq!((scan(&server).pass, scan(&server).last_complete), (2, None));
}

#[test]
fn a_pass_covers_the_range_it_was_told_and_nothing_beyond() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&BY_ORDER);
    faults(&server, &["--ops", "read"], &[1000, 3000, 9000]);
    for range in ["65536-65543", "0-65536"] {
        let why = server.refused(&["scan", "start", "--range", range]);
        assert!(why.contains("65535") && why.contains("disk.img"), "{why}");
    }
    let before = device_bytes_read(&server);
    let text = server.order(&["scan", "start", "--range", "2048-4095", "--wait"]);
    assert_eq!(text.lines().count(), 2, "{text}");
    let report = scan(&server);
    assert_eq!((report.found.bad, report.range.map(|range| (range.start, range.count))), (1, Some((2048, 2048))));
    assert!(report.last.is_some_and(|last| !last.complete) && report.last_complete.is_none(), "{report:?}");
    assert!(device_bytes_read(&server) - before >= 2048 * 512);
    assert_eq!(server.blocks("pending"), [3000]);
    assert_eq!(server.status().counters.health_scans, 0, "a part is no pass");
}

#[test]
fn a_pass_that_only_looks_leaves_everything_as_it_is() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[&BY_ORDER[..], &["--move-weak", "on"]].concat());
    let mut guest = server.guest(1);
    // A lost sector, which will read again, and a slot that will not read well.
    faults(&server, &["--ops", "read"], &[1001]);
    faults(&server, &["--ops", "write"], &[1000]);
    guest.write(1000, pattern(1000, 1, 1)).unwrap();
    assert_eq!(server.status().blocks.lost_sectors, 1);
    server.no_faults();
    faults(&server, &["--ops", "read", "--delay", "120"], &[20_000]);
    let before = (server.list(), server.status());
    server.order(&["scan", "start", "--check-only", "--wait"]);
    let after = server.status();
    assert!(after.scan.check_only && after.scan.found.moved + after.scan.found.healed == 0, "{:?}", after.scan);
    let counted = |status: &StatusReport| (status.counters.remaps, status.counters.healed, status.blocks.clone());
    assert_eq!((server.list(), counted(&after)), (before.0, counted(&before.1)));
    // One that may act does.
    server.order(&["scan", "start", "--wait"]);
    let after = server.status();
    assert_eq!((after.blocks.lost_sectors, after.scan.found.healed), (0, 1), "{:?}", after.scan);
    assert_eq!((after.scan.found.slow, after.scan.found.moved), (1, 1), "{:?}", after.scan);
    assert_eq!(server.blocks("remapped"), [1000, 20_000]);
}

#[test]
fn a_pass_goes_on_where_it_was_when_its_server_is_started_again() {
    let volume = Volume::create(64, 64);
    let bad = [1, 2, 3, 50, 51, 52].map(|mib| mib * MIB + 1000);
    let (read, paused) = {
        let server = volume.serve(&["--scan-interval", "off", "--scan-rate", "8M"]);
        faults(&server, &["--ops", "read"], &bad);
        let before = device_bytes_read(&server);
        server.order(&["scan", "start"]);
        eventually("a third is done", || scan(&server).percent > 33.0);
        server.order(&["scan", "pause"]);
        let paused = server.await_status(|status| status.scan.state == "paused").scan;
        let read = device_bytes_read(&server) - before;
        server.stop();
        (read, paused)
    };
    assert!(paused.found.bad >= 3 && paused.percent < 100.0, "{paused:?}");
    let server = volume.serve(&BY_ORDER);
    faults(&server, &["--ops", "read"], &bad);
    let found = scan(&server);
    assert_eq!((found.state.as_str(), found.pass, found.started), ("paused", 1, paused.started));
    // What has been covered stays so, but for what was under way.
    assert!(found.covered_bytes <= paused.covered_bytes, "{found:?} after {paused:?}");
    if paused.found.bad == 3 {
        assert!(found.covered_bytes + (4 << 20) >= paused.covered_bytes, "{found:?} after {paused:?}");
        assert_eq!(found.found, paused.found);
    }
    let before = device_bytes_read(&server);
    server.order(&["scan", "resume"]);
    done(&wait(&server));
    let over = scan(&server);
    let rest = device_bytes_read(&server) - before;
    assert!(over.last.is_some_and(|last| last.complete && last.pass == 1), "{over:?}");
    assert_eq!((over.found.bad, over.covered_bytes), (6, over.total_bytes), "{over:?}");
    assert!(read + rest >= over.total_bytes, "{read} and {rest} bytes of {}", over.total_bytes);
    assert!(rest < over.total_bytes, "it began anew: {rest} bytes of {}", over.total_bytes);
}

#[test]
fn who_waits_is_told_when_the_server_stops() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&SLOWLY);
    let mut waiting = Command::new(env!("CARGO_BIN_EXE_vhost-remap"))
        .args(["scan", "start", "--wait", "--control-path"])
        .arg(&server.ctl)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(waiting.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("pass 1 has begun"), "{line}");
    server.stop();
    let output = waiting.wait_with_output().unwrap();
    let why = refusal(&output);
    assert!(why.contains("the pass has not ended: the server has stopped"), "{why}");
    // It goes on by itself.
    let server = volume.serve(&BY_ORDER);
    done(&wait(&server));
    assert_eq!(scan(&server).pass, 1);
}

#[test]
fn passes_begin_by_themselves_where_they_may() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--scan-window", "sat,sun", "--scan-interval-hours", "1"]);
    assert!(server.announcement.contains(", scanning on, "), "{}", server.announcement);
    let report = scan(&server);
    assert_eq!((report.interval_seconds, report.window.as_str()), (Some(3600), "sat,sun 00:00-00:00"));
    assert!(!report.move_weak && ["waiting", "running", "outside-window"].contains(&&*report.state), "{report:?}");
    server.stop();
    let server = volume.serve_with(&["--read-only"]);
    assert!(server.announcement.contains(", scanning off, "), "{}", server.announcement);
    assert_eq!(scan(&server).interval_seconds, None);
}
