//! `status` in its formats.

use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

use super::args::StatusArgs;
use super::report_args::StatusFormat;
use super::run::{CliError, Server};
use super::{show, watch};
use crate::runtime::report::{DeviceReport, StatusReport};
use crate::units::{SECTOR_SIZE, SECTORS_PER_BLOCK};

/// States in which guests get errors for healthy blocks, or nothing at all.
pub(super) const NOT_OPERATIONAL: [&str; 4] = ["poisoned", "primary-gone", "hung", "away"];

const CSV_HEAD: &str = "timestamp,device,health_score,avg_latency_us,throughput_mbps,errors,health,state,reads,writes,\
read_bytes,written_bytes,guest_errors,remapped,remaps_max,pending,lost_sectors,slots_free,slots_retired";

pub(super) fn run(args: &StatusArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let server = Server::of(&args.control)?;
    let format = match (args.output.format, args.output.line, args.control.json) {
        (Some(format), ..) => format,
        (_, true, _) => StatusFormat::Raw,
        (.., true) => StatusFormat::Json,
        _ => StatusFormat::Human,
    };
    watch::print(&args.output.watch, out, |first| {
        if args.proc {
            return server.get_text("/proc");
        }
        let report: StatusReport = server.get("/v1/status")?;
        Ok(match format {
            StatusFormat::Human => show::status(&report),
            StatusFormat::Json => {
                let json = serde_json::to_string(&report).expect("documents are plain data with string keys");
                format!("{json}\n")
            }
            StatusFormat::Csv if first => format!("{CSV_HEAD}\n{}\n", csv(&report)),
            StatusFormat::Csv => format!("{}\n", csv(&report)),
            StatusFormat::Compact => format!("{}\n", compact(&report)),
            StatusFormat::Raw => format!("{}\n", line(&report)),
        })
    })
}

/// Seconds since the epoch at which the report was made.
fn made_at(report: &StatusReport) -> u64 {
    report.started.saturating_add(report.uptime_seconds)
}

/// Bytes read and written a second, on average since the counters began.
fn throughput(report: &StatusReport) -> u64 {
    let bytes = report.counters.read_bytes.saturating_add(report.counters.written_bytes);
    bytes.checked_div(report.counted_seconds()).unwrap_or(0)
}

/// MiB with two decimals: dm-remap's "MB".
fn mib(bytes: u64) -> String {
    let hundredths = (u128::from(bytes) * 100) >> 20;
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

/// Mean latency in microseconds, with the nanoseconds; empty where there were no requests.
fn latency_us(report: &StatusReport) -> String {
    report.mean_latency_ns().map_or(String::new(), |ns| format!("{}.{:03}", ns / 1000, ns % 1000))
}

fn device<'a>(report: &'a StatusReport, role: &str) -> Option<&'a DeviceReport> {
    report.devices.iter().find(|device| device.role == role)
}

/// A path as one word: blanks and backslashes in octal, as in /proc/mounts; `-` where there is no such device.
fn path_word(device: Option<&DeviceReport>) -> String {
    let Some(device) = device else { return "-".into() };
    let escaped = |c: char| c.is_whitespace() || c == '\\' || c.is_control();
    let mut word = String::new();
    for c in device.path.chars() {
        let mut bytes = [0; 4];
        match escaped(c) {
            true => c.encode_utf8(&mut bytes).bytes().for_each(|byte| word.push_str(&format!("\\{byte:03o}"))),
            false => word.push(c),
        }
    }
    word
}

/// dm-remap's status line: the 31 fields of `dmsetup status`, in its order.
fn line(report: &StatusReport) -> String {
    let counters = &report.counters;
    let requests = counters.requests();
    let plain = requests.saturating_sub(counters.slot_requests);
    let spare = device(report, "spare");
    let operational = !report.state.iter().any(|state| NOT_OPERATIONAL.contains(&state.as_str()));
    let nothing = "0".to_owned();
    let fields: [String; 31] = [
        nothing.clone(),                                                // 1 first sector of the target
        report.capacity_sectors.to_string(),                            // 2 its sectors
        "vhost-remap".into(),                                           // 3 target
        format!("v{}", report.version),                                 // 4 version
        path_word(device(report, "primary")),                           // 5 main device
        path_word(spare),                                               // 6 spare device
        counters.reads.to_string(),                                     // 7 reads
        counters.writes.to_string(),                                    // 8 writes
        counters.remaps.to_string(),                                    // 9 blocks moved
        counters.device_errors.to_string(),                             // 10 failed device operations
        report.blocks.remapped.to_string(),                             // 11 blocks that live in slots
        requests.to_string(),                                           // 12 requests answered
        report.request_ns.to_string(),                                  // 13 how long they took together, in ns
        report.mean_latency_ns().unwrap_or(0).to_string(),              // 14 and on average
        throughput(report).to_string(),                                 // 15 bytes a second, on average
        SECTOR_SIZE.to_string(),                                        // 16 bytes in a sector
        spare.map_or(0, |spare| spare.size / SECTOR_SIZE).to_string(),  // 17 sectors of the spare
        requests.to_string(),                                           // 18 requests answered
        plain.to_string(),                                              // 19 to plain blocks
        counters.slot_requests.to_string(),                             // 20 to remapped blocks
        (report.blocks.remapped * SECTORS_PER_BLOCK).to_string(),       // 21 sectors that live in slots
        nothing.clone(),                                                // 22 cache hits: there is no cache
        nothing.clone(),                                                // 23 cache misses
        plain.to_string(),                                              // 24 fast path: to plain blocks
        counters.slot_requests.to_string(),                             // 25 slow path: to remapped blocks
        counters.health_scans.to_string(),                              // 26 completed passes
        report.health_score.to_string(),                                // 27 health score
        report.blocks.pending.to_string(),                              // 28 hot spots: pending blocks
        nothing,                                                        // 29 cache hit rate in percent
        if operational { "operational" } else { "maintenance" }.into(), // 30
        "real".into(),                                                  // 31
    ];
    fields.join(" ")
}

/// dm-remap's summary, with what matters here.
fn compact(report: &StatusReport) -> String {
    let (counters, blocks) = (&report.counters, &report.blocks);
    format!(
        "vhost-remap v{}: health={}% latency={}us throughput={}MB/s errors={} mappings={} reads={} writes={} \
         health_state={} state={} remaps={}/{} pending={} lost={}",
        report.version,
        report.health_score,
        latency_us(report),
        mib(throughput(report)),
        counters.device_errors,
        blocks.remapped,
        counters.reads,
        counters.writes,
        if report.health.is_empty() { "-" } else { &report.health },
        report.state.join(","),
        blocks.remapped,
        blocks.remaps_max,
        blocks.pending,
        blocks.lost_sectors,
    )
}

/// A field that may have a comma in it (RFC 4180).
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

/// A row below [`CSV_HEAD`]; the latency is empty where there were no requests.
fn csv(report: &StatusReport) -> String {
    let (counters, blocks) = (&report.counters, &report.blocks);
    let time =
        humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(made_at(report).min(u64::from(u32::MAX))));
    let path = device(report, "primary").map_or("", |device| device.path.as_str());
    let fields = [
        time.to_string(),
        quoted(path),
        report.health_score.to_string(),
        latency_us(report),
        mib(throughput(report)),
        counters.device_errors.to_string(),
        report.health.clone(),
        report.state.join(" "),
        counters.reads.to_string(),
        counters.writes.to_string(),
        counters.read_bytes.to_string(),
        counters.written_bytes.to_string(),
        counters.guest_errors.to_string(),
        blocks.remapped.to_string(),
        blocks.remaps_max.to_string(),
        blocks.pending.to_string(),
        blocks.lost_sectors.to_string(),
        blocks.slots_free.to_string(),
        blocks.slots_retired.to_string(),
    ];
    fields.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted::sample_status;

    #[test]
    fn the_line_has_the_predecessors_31_fields_in_its_order() {
        let mut report = sample_status();
        report.devices[0].path = "/srv/my disk\\1.img".into();
        report.counters.read_bytes = 93_784 * 3;
        report.counters.flushes = 5;
        report.counters.remaps = 14;
        report.counters.health_scans = 6;
        report.counters.slot_requests = 9;
        let expected = "0 20971520 vhost-remap v0.1.0 /srv/my\\040disk\\1341.img /srv/disk.img.spare 1204 377 14 4 12 1586 \
                        158100000 99684 3 512 135168 1586 1577 9 96 0 0 1577 9 6 75 3 0 operational real";
        assert_eq!(line(&report), expected);
        assert_eq!(line(&report).split(' ').count(), 31);
    }

    #[test]
    fn a_volume_that_does_not_serve_is_not_operational() {
        let mut report = sample_status();
        let field = |report: &StatusReport| line(report).split(' ').nth(29).map(str::to_owned).unwrap();
        for (state, expected) in [("ok", "operational"), ("spare-full", "operational"), ("spare-down", "operational")] {
            report.state = vec![state.into()];
            assert_eq!(field(&report), expected, "{state}");
        }
        for state in NOT_OPERATIONAL {
            report.state = vec!["read-only".into(), state.into()];
            assert_eq!(field(&report), "maintenance", "{state}");
        }
        report.devices.truncate(1);
        assert_eq!(line(&report).split(' ').nth(5), Some("-"));
        assert_eq!(line(&report).split(' ').nth(16), Some("0"));
    }

    #[test]
    fn a_row_of_csv_has_a_field_for_each_column() {
        let mut report = sample_status();
        report.devices[0].path = "/srv/a,b.img".into();
        report.counters.written_bytes = 93_784 << 21;
        let row = csv(&report);
        assert!(
            row.starts_with("2026-01-02T02:03:04Z,\"/srv/a,b.img\",75,100.000,2.00,4,AT_RISK,ok,1204,377,"),
            "{row}"
        );
        let columns = row.replace("\"/srv/a,b.img\"", "path").split(',').count();
        assert_eq!(columns, CSV_HEAD.split(',').count());
    }

    #[test]
    fn the_summary_is_one_line_of_names_and_values() {
        let text = compact(&sample_status());
        let expected = "vhost-remap v0.1.0: health=75% latency=100.000us throughput=0.00MB/s errors=4 mappings=12 \
                        reads=1204 writes=377 health_state=AT_RISK state=ok remaps=12/16384 pending=3 lost=2";
        assert_eq!(text, expected);
    }
}
