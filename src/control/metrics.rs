//! Metrics in Prometheus' text format, made of the same documents that `status` and `stats` show.
//!
//! Counters begin at 0 when the server starts, as Prometheus expects of a process. The label `volume` is the volume's
//! name in its server (the primary's file name), `device` is `primary` or `spare`.

use prometheus::TextEncoder;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use crate::runtime::latency::seconds;
use crate::runtime::report::StatusReport;
use crate::runtime::stats::{LatencyReport, StatsReport};
use crate::units::{BLOCK_SIZE, SECTOR_SIZE, SECTORS_PER_BLOCK};

/// All that a volume can be at a time, beside other things.
const STATES: [&str; 10] = [
    "ok",
    "poisoned",
    "primary-gone",
    "degraded",
    "spare-down",
    "spare-full",
    "place-retired",
    "hung",
    "read-only",
    "away",
];

/// All that `health` can say.
const HEALTH_STATES: [&str; 4] = ["OK", "WATCH", "AT_RISK", "REPLACE"];

/// All that the scanner can be at.
const SCAN_STATES: [&str; 6] = ["off", "waiting", "running", "paused", "outside-window", "held"];

/// Limits of the buckets of latencies, as powers of two of nanoseconds: from 8.2 µs to 17 s.
const LATENCY_SHIFTS: std::ops::RangeInclusive<u32> = 13..=34;

/// What is known of one volume.
pub struct Sample {
    /// The label `volume`.
    pub name: String,
    /// Its state.
    pub status: StatusReport,
    /// Its numbers.
    pub stats: StatsReport,
}

impl Sample {
    /// Whether nothing is known of what is on its devices.
    fn is_away(&self) -> bool {
        self.status.state.iter().any(|state| state == "away")
    }

    /// The number, if it can be known.
    fn unless_away(&self, number: f64) -> Vec<(Labels, Value)> {
        if self.is_away() { Vec::new() } else { vec![(Vec::new(), Value::Number(number))] }
    }
}

/// Metrics under the names of this program.
pub fn render(volumes: &[Sample]) -> String {
    let mut out = Families::new(volumes);
    state(&mut out);
    blocks(&mut out);
    healing(&mut out);
    scanner(&mut out);
    devices(&mut out);
    requests(&mut out);
    out.encode()
}

/// The same facts, as far as dm-remap had them, under its names. Theirs had no labels; these have `volume`. What they
/// could not have said truthfully is said here: `total_errors` are failed device operations, `total_remaps` and
/// `active_mappings` live remapped blocks, `avg_latency_us` is that of requests, and all is counted since the server
/// started or the counters were cleared.
pub fn render_dm_remap(volumes: &[Sample]) -> String {
    let mut out = Families::new(volumes);
    let per_hour = |count: u64, s: &Sample| count as f64 * 3600.0 / s.status.counted_seconds().max(1) as f64;
    out.counter("dm_remap_total_reads", "Guest reads.", |s| s.status.counters.reads);
    out.counter("dm_remap_total_writes", "Guest writes.", |s| s.status.counters.writes);
    out.gauge("dm_remap_total_remaps", "Live remapped blocks.", |s| s.status.blocks.remapped as f64);
    out.counter("dm_remap_total_errors", "Failed device operations.", |s| s.status.counters.device_errors);
    out.gauge("dm_remap_active_mappings", "Live remapped blocks.", |s| s.status.blocks.remapped as f64);
    out.gauge("dm_remap_last_remap_time", "When a block last moved, seconds since the epoch; 0: not yet.", |s| {
        s.stats.last_remap.unwrap_or_default()
    });
    out.gauge("dm_remap_last_error_time", "When a device last failed, seconds since the epoch; 0: not yet.", |s| {
        s.stats.last_error.unwrap_or_default()
    });
    out.gauge("dm_remap_avg_latency_us", "Mean latency of requests, in microseconds.", |s| {
        s.status.request_ns as f64 / 1000.0 / s.status.counters.requests().max(1) as f64
    });
    out.gauge("dm_remap_remapped_sectors", "Sectors of live remapped blocks.", |s| {
        (s.status.blocks.remapped * SECTORS_PER_BLOCK) as f64
    });
    out.gauge("dm_remap_spare_sectors_used", "Sectors of slots in use or retired.", |s| {
        let blocks = &s.status.blocks;
        // While it is away none is known to be free.
        let used = if s.is_away() { 0 } else { blocks.remaps_max.saturating_sub(blocks.slots_free) };
        (used * SECTORS_PER_BLOCK) as f64
    });
    out.gauge("dm_remap_remap_rate_per_hour", "Blocks moved in an hour, on average.", |s| {
        per_hour(s.status.counters.remaps, s)
    });
    out.gauge("dm_remap_error_rate_per_hour", "Failed device operations in an hour, on average.", |s| {
        per_hour(s.status.counters.device_errors, s)
    });
    out.gauge("dm_remap_health_score", "What `health` makes of it, 0 to 100.", |s| s.status.health_score as f64);
    out.encode()
}

fn state(out: &mut Families<'_>) {
    out.many("vhost_remap_volume_info", "What serves the volume; always 1.", MetricType::GAUGE, |s| {
        let status = &s.status;
        let labels = [
            ("uuid", status.volume.as_str()),
            ("version", &status.version),
            ("io_engine", &status.io_engine),
            ("cache", &status.cache),
            ("transport", &status.transport),
        ];
        vec![(labels.map(|(name, value)| (name, value.to_owned())).into(), Value::Number(1.0))]
    });
    out.gauge("vhost_remap_start_time_seconds", "Start of the server, seconds since the epoch.", |s| {
        s.status.started as f64
    });
    let help = "1 for each state of the volume that holds, as `status` names them; 0 for the others.";
    out.many("vhost_remap_volume_state", help, MetricType::GAUGE, |s| {
        let holds = |state: &str| s.status.state.iter().any(|is| is == state);
        let row = |state: &&str| (vec![("state", (*state).to_owned())], Value::Number(f64::from(holds(state))));
        STATES.iter().map(row).collect()
    });
    let help = "1 for what `health` says of the volume, 0 for the others; absent while it is away.";
    out.many("vhost_remap_health_state", help, MetricType::GAUGE, |s| {
        let row =
            |state: &&str| (vec![("state", (*state).to_owned())], Value::Number(f64::from(s.status.health == *state)));
        HEALTH_STATES.iter().filter(|_| !s.is_away()).map(row).collect()
    });
    let help = "What `health` makes of the volume, 0 to 100; absent while it is away.";
    out.many("vhost_remap_health_score", help, MetricType::GAUGE, |s| s.unless_away(s.status.health_score as f64));
    out.gauge("vhost_remap_front_end_connected", "Whether a front-end is connected.", |s| {
        f64::from(s.status.connected)
    });
    out.gauge("vhost_remap_workers", "Worker threads.", |s| f64::from(s.status.workers));
    out.gauge("vhost_remap_capacity_bytes", "Size of the disk that the guest sees.", |s| {
        s.status.capacity_sectors as f64 * SECTOR_SIZE as f64
    });
    out.counter("vhost_remap_events_dropped_total", "Events dropped because the log was full.", |s| {
        s.status.events_dropped
    });
}

fn blocks(out: &mut Families<'_>) {
    out.gauge("vhost_remap_remapped_bytes", "Data that lives in slots, in blocks of 4096 bytes.", |s| {
        s.status.blocks.remapped as f64 * BLOCK_SIZE as f64
    });
    out.gauge("vhost_remap_remapped_blocks", "Blocks that live in slots.", |s| s.status.blocks.remapped as f64);
    out.gauge("vhost_remap_pending_blocks", "Blocks whose last read failed.", |s| s.status.blocks.pending as f64);
    out.gauge("vhost_remap_lost_sectors", "Sectors that no device holds.", |s| s.status.blocks.lost_sectors as f64);
    out.gauge("vhost_remap_in_doubt_blocks", "Blocks whose commit is in doubt.", |s| s.status.blocks.in_doubt as f64);
    out.many("vhost_remap_slots", "Slots of the spare, by what they are.", MetricType::GAUGE, |s| {
        let blocks = &s.status.blocks;
        let used = blocks.remaps_max.saturating_sub(blocks.slots_free + blocks.slots_retired);
        let rows = [("free", blocks.slots_free), ("used", used), ("retired", blocks.slots_retired)];
        let rows = rows.into_iter().filter(|_| !s.is_away());
        rows.map(|(state, count)| (vec![("state", state.to_owned())], Value::Number(count as f64))).collect()
    });
    let help = "Part of the slots that is used or retired; absent while the volume is away.";
    out.many("vhost_remap_spare_used_ratio", help, MetricType::GAUGE, |s| {
        let blocks = &s.status.blocks;
        s.unless_away(blocks.remaps_max.saturating_sub(blocks.slots_free) as f64 / blocks.remaps_max.max(1) as f64)
    });
}

fn healing(out: &mut Families<'_>) {
    out.counter("vhost_remap_remaps_total", "Blocks moved to a slot.", |s| s.status.counters.remaps);
    out.counter("vhost_remap_rewrites_total", "Blocks rewritten in place after a failure.", |s| {
        s.status.counters.rewritten
    });
    out.counter("vhost_remap_recovered_reads_total", "Blocks read only after retries.", |s| {
        s.status.counters.recovered_reads
    });
    out.counter("vhost_remap_sectors_lost_total", "Sectors recorded as lost.", |s| s.status.counters.lost);
    out.counter("vhost_remap_healed_total", "Lost sectors and rewritten blocks since proven readable.", |s| {
        s.status.counters.healed
    });
    out.counter("vhost_remap_scans_completed_total", "Completed scanner passes.", |s| s.status.counters.health_scans);
    out.counter("vhost_remap_commits_total", "Commits of the map.", |s| s.status.counters.commits);
    out.counter("vhost_remap_metadata_repairs_total", "Damaged copies of metadata rewritten.", |s| {
        s.status.counters.metadata_repairs
    });
}

fn scanner(out: &mut Families<'_>) {
    let help = "1 for what the scanner is at, as `status` names it; 0 for the others.";
    out.many("vhost_remap_scan_state", help, MetricType::GAUGE, |s| {
        let row = |state: &&str| {
            (vec![("state", (*state).to_owned())], Value::Number(f64::from(s.status.scan.state == *state)))
        };
        SCAN_STATES.iter().map(row).collect()
    });
    out.gauge("vhost_remap_scan_progress_ratio", "Part of the scanner's pass that is done.", |s| {
        s.status.scan.percent / 100.0
    });
    out.gauge("vhost_remap_scan_covered_bytes", "What the scanner's pass has been over.", |s| {
        s.status.scan.covered_bytes as f64
    });
    out.gauge("vhost_remap_scan_pass_bytes", "What the scanner's pass is to go over, as it is now.", |s| {
        s.status.scan.total_bytes as f64
    });
    out.gauge("vhost_remap_scan_skipped_bytes", "What the scanner's pass could not look at.", |s| {
        s.status.scan.skipped_bytes as f64
    });
    out.gauge("vhost_remap_scan_speed_bytes_per_second", "What the scanner has covered in a second lately.", |s| {
        s.status.scan.speed_now as f64
    });
    let help = "What the scanner's pass has come upon: blocks; lost ones are sectors.";
    out.many("vhost_remap_scan_found", help, MetricType::GAUGE, |s| {
        let kinds = s.status.scan.found.kinds();
        kinds.map(|(kind, count)| (vec![("kind", kind.to_owned())], Value::Number(count as f64))).into()
    });
    let help = "End of the last pass that was of the whole volume and skipped nothing, since the epoch; 0: none was.";
    out.gauge("vhost_remap_scan_last_completed_timestamp_seconds", help, |s| {
        s.status.scan.last_complete.unwrap_or(0) as f64
    });
    let help = "From the end of a pass to the start of the next one; absent where they begin only by order.";
    out.many("vhost_remap_scan_interval_seconds", help, MetricType::GAUGE, |s| {
        let interval = s.status.scan.interval_seconds.iter();
        interval.map(|seconds| (Vec::new(), Value::Number(*seconds as f64))).collect()
    });
}

fn devices(out: &mut Families<'_>) {
    let device = |name: &str| vec![("device", name.to_owned())];
    out.many("vhost_remap_device_up", "Whether the device can be used.", MetricType::GAUGE, |s| {
        let up = |state: &str| Value::Number(f64::from(state == "up"));
        s.status.devices.iter().map(|d| (device(&d.role), up(&d.state))).collect()
    });
    out.many("vhost_remap_device_size_bytes", "Size of the device.", MetricType::GAUGE, |s| {
        s.status.devices.iter().map(|d| (device(&d.role), Value::Number(d.size as f64))).collect()
    });
    let of = |name: &str, operation: &str| vec![("device", name.to_owned()), ("operation", operation.to_owned())];
    out.many("vhost_remap_device_operations_total", "Sent to the device.", MetricType::COUNTER, |s| {
        let rows = s.stats.devices.iter();
        rows.map(|d| (of(&d.device, &d.operation), Value::Number(d.submitted as f64))).collect()
    });
    let help = "Bytes of operations sent to the device.";
    out.many("vhost_remap_device_bytes_total", help, MetricType::COUNTER, |s| {
        s.stats.devices.iter().map(|d| (of(&d.device, &d.operation), Value::Number(d.bytes as f64))).collect()
    });
    let help = "Operations that failed on the device, by what the error number means.";
    out.many("vhost_remap_device_errors_total", help, MetricType::COUNTER, |s| {
        let mut rows = Vec::new();
        for device in &s.stats.devices {
            for (class, count) in &device.errors {
                let labels = [of(&device.device, &device.operation), vec![("class", class.clone())]].concat();
                rows.push((labels, Value::Number(*count as f64)));
            }
        }
        rows
    });
}

fn requests(out: &mut Families<'_>) {
    let of = |operation: &str| vec![("operation", operation.to_owned())];
    out.many("vhost_remap_requests_total", "Requests of the guest that were answered.", MetricType::COUNTER, |s| {
        s.stats.operations.iter().map(|o| (of(&o.operation), Value::Number(o.completed as f64))).collect()
    });
    let help = "Bytes of requests that were answered well.";
    out.many("vhost_remap_request_bytes_total", help, MetricType::COUNTER, |s| {
        s.stats.operations.iter().map(|o| (of(&o.operation), Value::Number(o.bytes as f64))).collect()
    });
    let help = "Requests that the guest got an error for.";
    out.many("vhost_remap_request_failures_total", help, MetricType::COUNTER, |s| {
        s.stats.operations.iter().map(|o| (of(&o.operation), Value::Number(o.failed as f64))).collect()
    });
    let help = "Requests that the guest got an error for, by why; since the volume was last opened here.";
    out.many("vhost_remap_request_errors_total", help, MetricType::COUNTER, |s| {
        let mut rows = Vec::new();
        for operation in &s.stats.operations {
            for (class, count) in &operation.errors {
                let labels = [of(&operation.operation), vec![("class", class.clone())]].concat();
                rows.push((labels, Value::Number(*count as f64)));
            }
        }
        rows
    });
    out.counter("vhost_remap_malformed_requests_total", "What the guest sent that was no valid request.", |s| {
        s.stats.malformed_requests
    });
    out.many("vhost_remap_requests_in_flight", "Taken and not yet answered.", MetricType::GAUGE, |s| {
        s.stats.operations.iter().map(|o| (of(&o.operation), Value::Number(o.in_flight as f64))).collect()
    });
    let help = "Age of the oldest request not yet answered; 0 where there is none.";
    out.many("vhost_remap_oldest_request_seconds", help, MetricType::GAUGE, |s| {
        let rows = s.stats.operations.iter();
        rows.map(|o| (of(&o.operation), Value::Number(seconds(o.oldest_in_flight_ns)))).collect()
    });
    let help = "From the taking of a request to its answer.";
    out.many("vhost_remap_request_duration_seconds", help, MetricType::HISTOGRAM, |s| {
        s.stats.operations.iter().map(|o| (of(&o.operation), Value::Latency(histogram(&o.latency)))).collect()
    });
}

fn histogram(latency: &LatencyReport) -> Histogram {
    let within = |limit: u64| {
        let counted = latency.buckets.iter().filter(|bucket| bucket.le_ns.is_some_and(|le| le <= limit));
        counted.map(|bucket| bucket.count).sum()
    };
    let bucket = |shift: u32| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(seconds(1 << shift));
        bucket.set_cumulative_count(within(1 << shift));
        bucket
    };
    let mut histogram = Histogram::default();
    histogram.set_bucket(LATENCY_SHIFTS.map(bucket).collect());
    histogram.set_sample_count(latency.buckets.iter().map(|bucket| bucket.count).sum());
    histogram.set_sample_sum(seconds(latency.sum_ns));
    histogram
}

enum Value {
    Number(f64),
    Latency(Histogram),
}

type Labels = Vec<(&'static str, String)>;

/// Families of metrics, for all volumes.
struct Families<'a> {
    volumes: &'a [Sample],
    families: Vec<MetricFamily>,
}

impl Families<'_> {
    fn new(volumes: &[Sample]) -> Families<'_> {
        Families { volumes, families: Vec::new() }
    }

    fn counter(&mut self, name: &str, help: &str, of: impl Fn(&Sample) -> u64) {
        self.many(name, help, MetricType::COUNTER, |sample| vec![(Vec::new(), Value::Number(of(sample) as f64))]);
    }

    fn gauge(&mut self, name: &str, help: &str, of: impl Fn(&Sample) -> f64) {
        self.many(name, help, MetricType::GAUGE, |sample| vec![(Vec::new(), Value::Number(of(sample)))]);
    }

    /// A family with any number of metrics a volume; it is left out where there is none.
    fn many(&mut self, name: &str, help: &str, kind: MetricType, of: impl Fn(&Sample) -> Vec<(Labels, Value)>) {
        let mut metrics = Vec::new();
        for sample in self.volumes {
            for (labels, value) in of(sample) {
                metrics.push(metric(&sample.name, labels, value, kind));
            }
        }
        if metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.families.push(family);
    }

    fn encode(&self) -> String {
        TextEncoder::new().encode_to_string(&self.families).expect("each family has a name and metrics")
    }
}

fn metric(volume: &str, labels: Labels, value: Value, kind: MetricType) -> Metric {
    let pair = |(name, value): (&str, String)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value);
        pair
    };
    let volume = ("volume", volume.to_owned());
    let mut metric = Metric::from_label(std::iter::once(volume).chain(labels).map(pair).collect());
    match value {
        Value::Latency(histogram) => metric.set_histogram(histogram),
        Value::Number(number) if kind == MetricType::COUNTER => {
            let mut counter = Counter::default();
            counter.set_value(number);
            metric.set_counter(counter);
        }
        Value::Number(number) => {
            let mut gauge = Gauge::default();
            gauge.set_value(number);
            metric.set_gauge(gauge);
        }
    }
    metric
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted::{sample_stats, sample_status};

    fn sample(name: &str) -> Sample {
        Sample { name: name.into(), status: sample_status(), stats: sample_stats() }
    }

    #[track_caller]
    fn check(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn metrics_say_what_status_and_stats_say() {
        let text = render(&[sample("a.img"), sample("b \"2\".img")]);
        check(
            &text,
            &[
                "# HELP vhost_remap_requests_total Requests of the guest that were answered.",
                "# TYPE vhost_remap_requests_total counter",
                "vhost_remap_requests_total{volume=\"a.img\",operation=\"read\"} 3",
                "vhost_remap_requests_total{volume=\"b \\\"2\\\".img\",operation=\"read\"} 3",
                "vhost_remap_request_errors_total{volume=\"a.img\",operation=\"read\",class=\"medium\"} 1",
                "vhost_remap_device_errors_total{volume=\"a.img\",device=\"primary\",operation=\"read\",class=\"io\"} 4",
                "vhost_remap_volume_state{volume=\"a.img\",state=\"ok\"} 1",
                "vhost_remap_volume_state{volume=\"a.img\",state=\"poisoned\"} 0",
                "vhost_remap_slots{volume=\"a.img\",state=\"used\"} 12",
                "vhost_remap_scan_state{volume=\"a.img\",state=\"running\"} 1",
                "vhost_remap_scan_state{volume=\"a.img\",state=\"paused\"} 0",
                "vhost_remap_scan_progress_ratio{volume=\"a.img\"} 0.25",
                "vhost_remap_scan_found{volume=\"a.img\",kind=\"bad\"} 3",
                "vhost_remap_scan_last_completed_timestamp_seconds{volume=\"a.img\"} 1767003600",
                "vhost_remap_scan_interval_seconds{volume=\"a.img\"} 1209600",
                "vhost_remap_oldest_request_seconds{volume=\"a.img\",operation=\"read\"} 0.0025",
                "# TYPE vhost_remap_request_duration_seconds histogram",
                "vhost_remap_request_duration_seconds_bucket{volume=\"a.img\",operation=\"read\",le=\"0.000065536\"} 0",
                "vhost_remap_request_duration_seconds_bucket{volume=\"a.img\",operation=\"read\",le=\"0.000131072\"} 2",
                "vhost_remap_request_duration_seconds_bucket{volume=\"a.img\",operation=\"read\",le=\"+Inf\"} 3",
                "vhost_remap_request_duration_seconds_count{volume=\"a.img\",operation=\"read\"} 3",
                "vhost_remap_request_duration_seconds_sum{volume=\"a.img\",operation=\"read\"} 6.000159",
            ],
        );
    }

    #[test]
    fn of_a_volume_that_is_away_no_slot_is_called_used() {
        let mut away = sample("a.img");
        check(&render(&[sample("a.img")]), &["vhost_remap_health_state{volume=\"a.img\",state=\"AT_RISK\"} 1"]);
        (away.status.state, away.status.health) = (vec!["away".into()], String::new());
        let text = render(&[away]);
        for family in ["vhost_remap_slots", "vhost_remap_spare_used_ratio", "vhost_remap_health"] {
            assert!(!text.lines().any(|line| line.starts_with(family)), "{text}");
        }
    }

    #[test]
    fn dm_remap_s_names_have_true_values() {
        let text = render_dm_remap(&[sample("a.img")]);
        check(
            &text,
            &[
                "dm_remap_total_reads{volume=\"a.img\"} 1204",
                "dm_remap_total_writes{volume=\"a.img\"} 377",
                "dm_remap_total_remaps{volume=\"a.img\"} 12",
                "dm_remap_total_errors{volume=\"a.img\"} 4",
                "dm_remap_active_mappings{volume=\"a.img\"} 12",
                "dm_remap_last_remap_time{volume=\"a.img\"} 1767225700.5",
                "dm_remap_last_error_time{volume=\"a.img\"} 0",
                "dm_remap_avg_latency_us{volume=\"a.img\"} 100",
                "dm_remap_health_score{volume=\"a.img\"} 75",
                "dm_remap_remapped_sectors{volume=\"a.img\"} 96",
                "dm_remap_spare_sectors_used{volume=\"a.img\"} 104",
                "dm_remap_remap_rate_per_hour{volume=\"a.img\"} 0",
            ],
        );
        assert!(text.contains("dm_remap_error_rate_per_hour{volume=\"a.img\"} 0.153"), "{text}");
    }
}
