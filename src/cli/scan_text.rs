//! How the scanner stands, as text for a person.

use std::time::Duration;

use super::show::{bytes, sectors, time};
use crate::runtime::scan_report::{Found, LastPass, ScanReport};

/// The most skipped parts that are named.
const SKIPPED_MAX: usize = 8;

/// For `status`: lines, or none while the volume is away.
pub(super) fn lines(scan: &ScanReport) -> Vec<String> {
    if scan.state.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![stands(scan)];
    if scan.pass > 0 {
        lines.push(format!("pass {} found {}", scan.pass, found(&scan.found)));
    }
    if scan.skipped_bytes > 0 {
        lines.push(format!("! {}", skipped(scan)));
    }
    if scan.releasable > 0 {
        lines.push(format!("remapped blocks whose old place reads well: {}; see `release`", scan.releasable));
    }
    let date = |seconds| time(seconds, humantime::format_rfc3339_seconds).unwrap_or_else(|| "-".into());
    if let Some(last) = scan.last {
        let complete = match (last.complete, last.cancelled) {
            (true, _) => "complete",
            (_, true) => "cancelled",
            _ if scan.pass == last.pass && scan.range.is_some() && scan.skipped_bytes == 0 => "of a range",
            _ => "not complete",
        };
        let mut line = format!("last: pass {}, {complete}, {} to {}", last.pass, date(last.started), date(last.ended));
        if let Some(ended) = scan.last_complete.filter(|_| !last.complete) {
            line.push_str(&format!("; the last complete one ended {}", date(ended)));
        }
        lines.push(line);
    }
    let next = scan.next.map(|next| format!("next: {}", date(next)));
    lines.push(next.into_iter().chain([told(scan)]).collect::<Vec<_>>().join("; "));
    lines
}

/// What the scanner was told.
fn told(scan: &ScanReport) -> String {
    let every = match scan.interval_seconds {
        Some(seconds) => format!("every {}", humantime::format_duration(Duration::from_secs(seconds))),
        None => "only by order".into(),
    };
    let rate = scan.rate_limit.map_or_else(String::new, |rate| format!(", at most {}/s", bytes(rate)));
    let window = if scan.window == "always" { String::new() } else { format!(", {}", scan.window) };
    let weak = if scan.move_weak { "move" } else { "stay" };
    format!("{every}{rate}{window}; weak blocks {weak}")
}

/// What it is at, and how far.
pub(super) fn stands(scan: &ScanReport) -> String {
    if !scan.is_under_way() {
        return match scan.state.as_str() {
            "waiting" => "waiting for the next pass".into(),
            other => other.into(),
        };
    }
    let range =
        scan.range.map_or_else(String::new, |range| format!(" of sectors {}", sectors(range.start, range.count)));
    let check_only = if scan.check_only { ", check only" } else { "" };
    format!(
        "pass {}{range}{check_only}: {}, {} of {}",
        scan.pass,
        progress(scan),
        bytes(scan.covered_bytes),
        bytes(scan.total_bytes)
    )
}

/// `25.0 %, 100 MiB/s now, 80 MiB/s on average, 1m 36s left`.
pub(super) fn progress(scan: &ScanReport) -> String {
    // Rounded down: what is not done is never shown as done.
    let percent = format!("{:.1} %", (scan.percent * 10.0).floor() / 10.0);
    let state = match (scan.state.as_str(), &scan.held) {
        ("running", _) => {
            let (now, average) = (bytes(scan.speed_now), bytes(scan.speed_average));
            let left = scan.eta_seconds.map(|seconds| humantime::format_duration(Duration::from_secs(seconds)));
            let left = left.map_or_else(String::new, |left| format!(", {left} left"));
            return format!("{percent}, {now}/s now, {average}/s on average{left}");
        }
        ("outside-window", _) => format!("waiting for its window ({})", scan.window),
        (state, Some(why)) => format!("{state}: {why}"),
        (state, None) => state.to_owned(),
    };
    format!("{percent}, {state}")
}

/// What a pass came upon.
fn found(found: &Found) -> String {
    let Found { bad, recovered, slow, lost, healed, moved, rewritten, metadata } = found;
    format!(
        "{bad} bad, {recovered} recovered and {slow} slow blocks, {lost} lost sectors, {metadata} damaged copies of \
         metadata; {rewritten} rewritten, {healed} healed, {moved} moved"
    )
}

/// What a pass could not look at.
pub(super) fn skipped(scan: &ScanReport) -> String {
    let part = |part: &crate::runtime::scan_report::SkippedReport| {
        let last = part.offset.saturating_add(part.len).saturating_sub(1);
        format!("{} bytes {}-{last} ({})", part.device, part.offset, part.why)
    };
    let parts: Vec<String> = scan.skipped.iter().take(SKIPPED_MAX).map(part).collect();
    let named: u64 = scan.skipped.iter().take(SKIPPED_MAX).map(|part| part.len).sum();
    let more = if named < scan.skipped_bytes { ", …" } else { "" };
    format!("skipped {}: {}{more}", bytes(scan.skipped_bytes), parts.join(", "))
}

/// A pass that read everything; its report, where that is still there.
pub(super) fn ended(last: &LastPass, scan: Option<&ScanReport>) -> String {
    let took = humantime::format_duration(Duration::from_secs(last.ended.saturating_sub(last.started)));
    let read = scan.map_or_else(String::new, |scan| {
        format!("{} covered, {} read; ", bytes(scan.covered_bytes), bytes(scan.read_bytes))
    });
    format!("pass {} has ended after {took}: {read}found {}", last.pass, found(&last.found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted::sample_scan;
    use crate::runtime::scan_report::{ScanRange, SkippedReport};

    #[test]
    fn a_pass_is_told_in_a_few_lines() {
        let mut scan = sample_scan();
        let expected = [
            "pass 3: 25.0 %, 100 MiB/s now, 80 MiB/s on average, 1m 36s left, 2.5 GiB of 10 GiB",
            "pass 3 found 3 bad, 0 recovered and 2 slow blocks, 2 lost sectors, 0 damaged copies of metadata; \
             0 rewritten, 0 healed, 1 moved",
            "last: pass 2, complete, 2025-12-29T09:20:00Z to 2025-12-29T10:20:00Z",
            "next: 2026-01-16T01:40:00Z; every 14days; weak blocks stay",
        ];
        assert_eq!(lines(&scan), expected);
        scan.state = "paused".into();
        scan.percent = 99.99;
        (scan.range, scan.check_only) = (Some(ScanRange { start: 8, count: 16 }), true);
        scan.skipped = vec![SkippedReport { device: "spare".into(), offset: 512, len: 512, why: "gone".into() }];
        scan.skipped_bytes = 1024;
        (scan.interval_seconds, scan.next, scan.rate_limit) = (None, None, Some(50 << 20));
        (scan.window, scan.move_weak) = ("mon 22:00-06:00".into(), true);
        let text = lines(&scan);
        assert_eq!(text[0], "pass 3 of sectors 8-23, check only: 99.9 %, paused, 2.5 GiB of 10 GiB");
        assert_eq!(text[2], "! skipped 1 KiB: spare bytes 512-1023 (gone), …");
        assert_eq!(text[4], "only by order, at most 50 MiB/s, mon 22:00-06:00; weak blocks move");
        scan.releasable = 2;
        assert_eq!(lines(&scan)[3], "remapped blocks whose old place reads well: 2; see `release`");
    }

    #[test]
    fn what_keeps_a_pass_is_said() {
        let mut scan = sample_scan();
        let mut stands_at = |state: &str, held: Option<&str>| {
            (scan.state, scan.held, scan.window) =
                (state.into(), held.map(str::to_owned), "sat,sun 00:00-00:00".into());
            stands(&scan)
        };
        assert!(stands_at("held", Some("the primary is gone")).contains("25.0 %, held: the primary is gone, "));
        assert!(stands_at("outside-window", None).contains("waiting for its window (sat,sun 00:00-00:00)"));
        assert_eq!(stands_at("waiting", None), "waiting for the next pass");
        assert_eq!(stands_at("off", None), "off");
        assert_eq!(lines(&ScanReport::default()), [] as [String; 0]);
    }
}
