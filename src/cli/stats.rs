//! `stats`: requests and device operations, as tables for people.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use super::report_args::{AnswerFormat, StatsArgs};
use super::run::{CliError, Server};
use super::show::bytes;
use super::table::Align::{Left, Right};
use super::table::Table;
use super::watch;
use crate::runtime::report::StatusReport;
use crate::runtime::stats::StatsReport;
use crate::units::SECTORS_PER_BLOCK;

pub(super) fn run(args: &StatsArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let server = Server::of(&args.control)?;
    watch::print(&args.watch, out, |_| {
        let stats: StatsReport = server.get("/v1/stats")?;
        Ok(match AnswerFormat::of(args.format, &args.control) {
            AnswerFormat::Human => show(&stats),
            AnswerFormat::Json => {
                let json = serde_json::to_string(&stats).expect("documents are plain data with string keys");
                format!("{json}\n")
            }
            AnswerFormat::Compact => format!("{}\n", compact(&stats, &server.get("/v1/status")?)),
        })
    })
}

/// dm-remap's answer to the message `stats`. All but the longest latency, which is that since the server started,
/// begins where counters were cleared.
fn compact(stats: &StatsReport, status: &StatusReport) -> String {
    let counters = &status.counters;
    let requests = counters.requests();
    format!(
        "total_ios={requests} normal={} remapped={} errors={} remapped_sectors={} avg_latency_ns={} max_latency_ns={}",
        requests.saturating_sub(counters.slot_requests),
        counters.slot_requests,
        counters.device_errors,
        status.blocks.remapped * SECTORS_PER_BLOCK,
        status.mean_latency_ns().unwrap_or(0),
        stats.operations.iter().map(|operation| operation.latency.max_ns).max().unwrap_or(0),
    )
}

/// The tables, for a person.
fn show(report: &StatsReport) -> String {
    let up = humantime::format_duration(Duration::from_secs(report.uptime_seconds));
    let mut out = format!("Volume {}, counted for {up}\n\n", report.volume);
    out.push_str(&requests(report));
    out.push('\n');
    out.push_str(&devices(report));
    if report.malformed_requests > 0 {
        out.push_str(&format!("\n{} malformed requests were given back unserved\n", report.malformed_requests));
    }
    out
}

fn requests(report: &StatsReport) -> String {
    let mut table = Table::new(&[
        ("REQUESTS", Left),
        ("DONE", Right),
        ("BYTES", Right),
        ("IN FLIGHT", Right),
        ("OLDEST", Right),
        ("p50", Right),
        ("p99", Right),
        ("p99.9", Right),
        ("MAX", Right),
        ("FAILED", Right),
        ("WHY", Left),
    ]);
    for operation in &report.operations {
        let latency = &operation.latency;
        let quantile = |ns: Option<u64>| ns.map_or("-".into(), time);
        table.row([
            operation.operation.clone(),
            operation.completed.to_string(),
            bytes(operation.bytes),
            operation.in_flight.to_string(),
            if operation.in_flight > 0 { time(operation.oldest_in_flight_ns) } else { "-".into() },
            quantile(latency.p50_ns),
            quantile(latency.p99_ns),
            quantile(latency.p999_ns),
            quantile((operation.completed > 0).then_some(latency.max_ns)),
            operation.failed.to_string(),
            causes(&operation.errors),
        ]);
    }
    table.render("")
}

fn devices(report: &StatsReport) -> String {
    let mut table =
        Table::new(&[("DEVICE", Left), ("OPERATION", Left), ("SENT", Right), ("BYTES", Right), ("ERRORS", Left)]);
    for device in report.devices.iter().filter(|device| device.submitted > 0 || !device.errors.is_empty()) {
        table.row([
            device.device.clone(),
            device.operation.clone(),
            device.submitted.to_string(),
            bytes(device.bytes),
            causes(&device.errors),
        ]);
    }
    table.render("")
}

/// `2 medium, 1 gone`.
fn causes(errors: &BTreeMap<String, u64>) -> String {
    errors.iter().map(|(class, count)| format!("{count} {class}")).collect::<Vec<_>>().join(", ")
}

/// `870 ns`, `12.3 µs`, `4.0 ms`, `1.5 s`.
pub(super) fn time(ns: u64) -> String {
    let tenths = |unit: u64| format!("{}.{}", ns / unit, ns % unit / (unit / 10));
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{} µs", tenths(1_000)),
        1_000_000..1_000_000_000 => format!("{} ms", tenths(1_000_000)),
        _ => format!("{} s", tenths(1_000_000_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted::{sample_stats, sample_status};

    #[test]
    fn the_predecessors_answer_has_its_names() {
        let mut status = sample_status();
        status.counters.slot_requests = 81;
        let expected = "total_ios=1581 normal=1500 remapped=81 errors=4 remapped_sectors=96 avg_latency_ns=100000 \
                        max_latency_ns=6000000000";
        assert_eq!(compact(&sample_stats(), &status), expected);
    }

    #[test]
    fn stats_are_aligned_tables() {
        let expected = "\
Volume 6f1f4b1e-1f6c-4f0e-9b3e-3d5a9a1c2b3d, counted for 1day 2h 3m 4s

REQUESTS      DONE    BYTES  IN FLIGHT  OLDEST      p50      p99    p99.9     MAX  FAILED  WHY
read             3    8 KiB          1  2.5 ms  81.9 µs  6.0 s    6.0 s   6.0 s       1  1 medium
";
        let text = show(&sample_stats());
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(squeezed(&text).starts_with(&squeezed(expected)), "{text}");
        assert!(text.contains("primary  read"), "{text}");
        for line in text.lines() {
            assert_eq!(line, line.trim_end());
        }
    }

    #[test]
    fn times_have_a_unit() {
        let check = |ns, text| assert_eq!(time(ns), text);
        check(0, "0 ns");
        check(1_000, "1.0 µs");
        check(999_999, "999.9 µs");
        check(4_000_000, "4.0 ms");
        check(61_500_000_000, "61.5 s");
    }
}
