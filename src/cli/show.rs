//! Answers as text for a person. Pure functions of the documents.

use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

use super::scan_text;
use super::table::Align::{Left, Right};
use super::table::Table;
use crate::runtime::report::{Counters, EventRecord, ListEntry, StatusReport};
use crate::units::SECTOR_SIZE;

/// `status`.
pub(super) fn status(report: &StatusReport) -> String {
    let mut out = String::new();
    let mut field = |name: &str, value: &str| {
        writeln!(out, "{name:<9} {value}").expect("writing to a String cannot fail");
    };
    field("Volume", &report.volume);
    field("State", &report.state.join(", "));
    for message in &report.messages {
        field("", &format!("! {message}"));
    }
    if !report.health.is_empty() {
        field("Health", &format!("{}, score {} of 100; see `health`", report.health, report.health_score));
    }
    field(
        "Disk",
        &format!(
            "{} ({} sectors)",
            bytes(report.capacity_sectors.saturating_mul(SECTOR_SIZE)),
            report.capacity_sectors
        ),
    );
    field("Server", &format!("vhost-remap {}, {}", report.version, uptime(report)));
    let connected = if report.connected { "connected" } else { "not connected" };
    field("Front-end", &format!("{connected}, {} transport", report.transport));
    field("I/O", &io(report));
    for (i, line) in scan_text::lines(&report.scan).iter().enumerate() {
        field(if i == 0 { "Scanner" } else { "" }, line);
    }
    out.push('\n');
    out.push_str(&devices(report));
    out.push('\n');
    out.push_str(&blocks(report));
    out.push('\n');
    out.push_str(&counters(&report.counters, &report.lifetime));
    if report.events_dropped > 0 {
        let _ = writeln!(out, "\n{} events were dropped because the log was full", report.events_dropped);
    }
    out
}

fn uptime(report: &StatusReport) -> String {
    let up = humantime::format_duration(Duration::from_secs(report.uptime_seconds));
    match time(report.started, humantime::format_rfc3339_seconds) {
        Some(since) => format!("up {up}, since {since}"),
        None => format!("up {up}"),
    }
}

/// Seconds since the epoch in the given format, unless they are beyond the year 9999.
pub(super) fn time(seconds: u64, format: fn(std::time::SystemTime) -> humantime::Rfc3339Timestamp) -> Option<String> {
    const YEAR_10000: u64 = 253_402_300_800;
    (seconds < YEAR_10000).then(|| format(UNIX_EPOCH + Duration::from_secs(seconds)).to_string())
}

fn io(report: &StatusReport) -> String {
    let workers = if report.workers == 1 { "worker" } else { "workers" };
    let mut text = format!("{}, cache {}, {} {workers}", report.io_engine, report.cache, report.workers);
    if report.polling_us > 0 {
        let _ = write!(text, " that poll up to {} µs", report.polling_us);
    }
    if report.oldest_in_flight_ms > 0 {
        let _ = write!(text, ", oldest request in flight {} ms", report.oldest_in_flight_ms);
    }
    text
}

fn devices(report: &StatusReport) -> String {
    let mut table = Table::new(&[
        ("DEVICE", Left),
        ("STATE", Left),
        ("SIZE", Right),
        ("BLOCK", Right),
        ("READ ERRORS", Right),
        ("WRITE ERRORS", Right),
        ("FLUSH ERRORS", Right),
        ("PATH", Left),
    ]);
    for device in &report.devices {
        table.row([
            device.role.clone(),
            device.state.clone(),
            bytes(device.size),
            device.logical_block.to_string(),
            device.read_errors.to_string(),
            device.write_errors.to_string(),
            device.flush_errors.to_string(),
            device.path.clone(),
        ]);
    }
    table.render("")
}

fn blocks(report: &StatusReport) -> String {
    let blocks = &report.blocks;
    let used = format!(
        "of {} ({}), {} slots free, {} retired",
        blocks.remaps_max,
        percent(blocks.remapped, blocks.remaps_max),
        blocks.slots_free,
        blocks.slots_retired
    );
    let mut table = Table::new(&[("BLOCKS", Left), ("", Right), ("", Left)]);
    table.row(["remapped".into(), blocks.remapped.to_string(), used]);
    table.row(["pending".into(), blocks.pending.to_string(), String::new()]);
    table.row(["lost sectors".into(), blocks.lost_sectors.to_string(), String::new()]);
    table.row(["in doubt".into(), blocks.in_doubt.to_string(), String::new()]);
    table.render("")
}

fn counters(now: &Counters, lifetime: &Counters) -> String {
    let mut table = Table::new(&[("COUNTERS", Left), ("SINCE START", Right), ("LIFETIME", Right)]);
    let mut row = |name: &str, now: String, lifetime: String| table.row([name.into(), now, lifetime]);
    let mut count = |name, of: fn(&Counters) -> u64| row(name, of(now).to_string(), of(lifetime).to_string());
    count("reads", |c| c.reads);
    count("writes", |c| c.writes);
    count("flushes", |c| c.flushes);
    count("discards", |c| c.discards);
    row("read", bytes(now.read_bytes), bytes(lifetime.read_bytes));
    row("written", bytes(now.written_bytes), bytes(lifetime.written_bytes));
    let mut count = |name, of: fn(&Counters) -> u64| row(name, of(now).to_string(), of(lifetime).to_string());
    count("guest errors", |c| c.guest_errors);
    count("device errors", |c| c.device_errors);
    count("recovered reads", |c| c.recovered_reads);
    count("rewritten", |c| c.rewritten);
    count("remaps", |c| c.remaps);
    count("lost sectors", |c| c.lost);
    count("healed", |c| c.healed);
    count("health scans", |c| c.health_scans);
    count("commits", |c| c.commits);
    count("metadata repairs", |c| c.metadata_repairs);
    count("slot requests", |c| c.slot_requests);
    table.render("")
}

/// `12` of `16384` as `0.1 %`; what is not zero is never shown as zero.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    let tenths = u128::from(part) * 1000 / u128::from(whole);
    match tenths {
        0 if part > 0 => "< 0.1 %".into(),
        _ => format!("{}.{} %", tenths / 10, tenths % 10),
    }
}

/// `10 GiB`, `1.5 MiB`, `512 B`: at most one decimal, rounded down.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let reached = |(exponent, _): &(u32, &str)| *exponent == 0 || bytes >> (10 * exponent) > 0;
    let (exponent, unit) = (0..).zip(UNITS).take_while(reached).last().expect("B is always reached");
    let tenths = (u128::from(bytes) * 10) >> (10 * exponent);
    match tenths % 10 {
        0 => format!("{} {unit}", tenths / 10),
        tenth => format!("{}.{tenth} {unit}", tenths / 10),
    }
}

/// The head of `list`.
pub(super) fn list_head() -> String {
    list_row("SECTORS", "STATE", "SLOT", "PENDING SECTORS", "LOST SECTORS")
}

/// One row of `list`.
pub(super) fn list_entry(entry: &ListEntry) -> String {
    let slot = entry.slot.map_or("-".into(), |slot| slot.to_string());
    let runs = |list: &[u64]| if list.is_empty() { "-".into() } else { sector_runs(list) };
    let (pending, mut lost) = (runs(&entry.pending), runs(&entry.lost));
    if entry.primary_stale {
        lost.push_str(" (primary stale)");
    }
    list_row(&sectors(entry.sector, u64::from(entry.sectors)), &entry.state.join(","), &slot, &pending, &lost)
}

/// Fixed widths, as rows are printed while more come.
fn list_row(sectors: &str, state: &str, slot: &str, pending: &str, lost: &str) -> String {
    format!("{sectors:<23}  {state:<16}  {slot:>8}  {pending:<23}  {lost}")
}

/// `count` sectors from `start`, as they are typed.
pub(super) fn sectors(start: u64, count: u64) -> String {
    match count {
        0 | 1 => start.to_string(),
        _ => format!("{start}-{}", start.saturating_add(count - 1)),
    }
}

/// Sorted sectors with neighbours joined: `9,11-12`.
fn sector_runs(sorted: &[u64]) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &sector in sorted {
        match runs.last_mut() {
            Some((start, count)) if start.checked_add(*count) == Some(sector) => *count += 1,
            _ => runs.push((sector, 1)),
        }
    }
    runs.iter().map(|(start, count)| sectors(*start, *count)).collect::<Vec<_>>().join(",")
}

/// One line of `events`.
pub(super) fn event(event: &EventRecord) -> String {
    let when = match Duration::try_from_secs_f64(event.time) {
        Ok(since) => time(since.as_secs(), humantime::format_rfc3339_seconds)
            .map(|text| format!("{}.{:03}Z", text.trim_end_matches('Z'), since.subsec_millis())),
        Err(_) => None,
    };
    let when = when.unwrap_or_else(|| "-".into());
    let place = match event.sector {
        Some(start) => format!("{} {}", event.device, sectors(start, event.sectors)),
        None => event.device.clone(),
    };
    let text = [place.trim(), &event.cause, &event.action].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>();
    format!("{when}  {:<5}  #{:<5} {:<17}  {}", event.severity, event.seq, event.kind, text.join(": "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted;

    #[test]
    fn status_is_aligned_and_complete() {
        let mut report = scripted::sample_status();
        report.state = vec!["spare-down".into()];
        report.messages = vec!["spare /srv/disk.img.spare: gone; bring it back".into()];
        report.devices[0].read_errors = 4;
        let text = status(&report);
        let expected = "\
Volume    6f1f4b1e-1f6c-4f0e-9b3e-3d5a9a1c2b3d
State     spare-down
          ! spare /srv/disk.img.spare: gone; bring it back
Health    AT_RISK, score 75 of 100; see `health`
Disk      10 GiB (20971520 sectors)
Server    vhost-remap 0.1.0, up 1day 2h 3m 4s, since 2026-01-01T00:00:00Z
Front-end connected, own transport
I/O       io_uring, cache none, 2 workers
Scanner   pass 3: 25.0 %, 100 MiB/s now, 80 MiB/s on average, 1m 36s left, 2.5 GiB of 10 GiB
          pass 3 found 3 bad, 0 recovered and 2 slow blocks, 2 lost sectors, 0 damaged copies of metadata; \
0 rewritten, 0 healed, 1 moved
          last: pass 2, complete, 2025-12-29T09:20:00Z to 2025-12-29T10:20:00Z
          next: 2026-01-16T01:40:00Z; every 14days; weak blocks stay

DEVICE   STATE    SIZE  BLOCK  READ ERRORS  WRITE ERRORS  FLUSH ERRORS  PATH
primary  up     10 GiB    512            4             0             0  /srv/disk.img
spare    up     66 MiB    512            0             0             0  /srv/disk.img.spare

BLOCKS
remapped      12  of 16384 (< 0.1 %), 16371 slots free, 1 retired
pending        3
lost sectors   2
in doubt       0

COUNTERS          SINCE START  LIFETIME
reads                    1204    998877
writes                    377     54321
";
        assert!(text.starts_with(expected), "{text}");
        for line in text.lines() {
            assert_eq!(line, line.trim_end());
        }
    }

    #[test]
    fn a_part_is_never_shown_as_nothing() {
        assert_eq!(percent(0, 16_384), "0.0 %");
        assert_eq!(percent(1, 16_384), "< 0.1 %");
        assert_eq!(percent(8_192, 16_384), "50.0 %");
        assert_eq!(percent(16_384, 16_384), "100.0 %");
        assert_eq!(percent(0, 0), "-");
    }

    #[test]
    fn bytes_have_a_unit() {
        let check = |number, text| assert_eq!(bytes(number), text);
        check(0, "0 B");
        check(512, "512 B");
        check(1536, "1.5 KiB");
        check(10 << 30, "10 GiB");
        check((1 << 30) - 1, "1023.9 MiB");
        check(u64::MAX, "15.9 EiB");
    }

    #[test]
    fn list_rows_line_up_and_join_neighbouring_lost_sectors() {
        let mut entry = scripted::entry(8, "remapped", &[9, 11, 12]);
        entry.primary_stale = true;
        assert_eq!(
            list_head(),
            "SECTORS                  STATE                 SLOT  PENDING SECTORS          LOST SECTORS"
        );
        let row =
            "8-15                     remapped                 7  -                        9,11-12 (primary stale)";
        assert_eq!(list_entry(&entry), row);
        let mut entry = scripted::entry(16, "pending", &[]);
        entry.pending = vec![18, 19];
        assert_eq!(
            list_entry(&entry),
            "16-23                    pending                  -  18-19                    -"
        );
    }

    #[test]
    fn events_are_one_line_each() {
        let expected = "2026-01-01T00:00:00.250Z  warn   #1     remapped           \
                        primary 8-15: Input/output error (os error 5): moved to slot 7";
        assert_eq!(event(&scripted::event(1)), expected);
        let mut odd = scripted::event(1);
        odd.time = f64::INFINITY;
        odd.sector = None;
        odd.device.clear();
        odd.cause.clear();
        assert_eq!(event(&odd), "-  warn   #1     remapped           moved to slot 7");
    }
}
