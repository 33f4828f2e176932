//! fio on the file itself: what the device gives without any of us between.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::load::{Figures, Load, Pattern};
use crate::machine::{Placement, Watch, process_time};

/// Have fio do the same to a file, with io_uring as it comes: one submission a system call. It runs on the processors
/// that a backend would have. What it writes goes to the bytes behind the first `len`, which only it uses.
///
/// # Errors
/// When there is no fio, or it reports an error.
pub(crate) fn run(file: &Path, len: u64, direct: bool, load: Load, time: Duration) -> Result<Figures, String> {
    let (rw, writes) = match load.pattern {
        Pattern::RandomRead => ("randread", false),
        Pattern::RandomWrite => ("randwrite", true),
        Pattern::SequentialRead => ("read", false),
        Pattern::SequentialWrite => ("write", true),
        Pattern::Mixed => ("randrw", true),
        Pattern::FlushHeavy => return Err("fio has no flush that does not wait".into()),
    };
    let mut command = Command::new("fio");
    command.args(["--name=run", "--ioengine=io_uring", "--thread", "--group_reporting", "--time_based"]);
    command.args(["--invalidate=0", "--norandommap", "--rwmixread=70", "--output-format=json", "--lat_percentiles=1"]);
    command.args(["--clat_percentiles=0", "--ramp_time=200ms"]);
    command.arg(format!("--filename={}", file.display())).arg(format!("--rw={rw}"));
    command.arg(format!("--bs={}", load.size)).arg(format!("--iodepth={}", load.depth));
    command.arg(format!("--numjobs={}", load.queues)).arg(format!("--direct={}", u8::from(direct)));
    command.arg(format!("--offset={}", if writes { len } else { 0 })).arg(format!("--size={len}"));
    command.arg(format!("--runtime={}ms", time.as_millis()));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let watch = Watch::start();
    let child = Placement::of(load.queues).spawn(&mut command).map_err(|error| format!("fio: {error}"))?;
    // What it reports of itself leaves out the threads of the kernel that work for it: so look at it while it works.
    std::thread::sleep(Duration::from_millis(400) + time / 4);
    let (middle, before) = (Instant::now(), process_time(child.id()));
    std::thread::sleep(time / 2);
    let (elapsed, after) = (middle.elapsed(), process_time(child.id()));
    let busy =
        after.zip(before).map(|(after, before)| after.saturating_sub(before).as_secs_f64() / elapsed.as_secs_f64());
    let output = child.wait_with_output().map_err(|error| format!("fio: {error}"))?;
    let disturbance_percent = watch.disturbance();
    let text = String::from_utf8_lossy(&output.stdout);
    // It may say something before the document.
    let document = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(document)
        .map_err(|error| format!("fio: {error}: {}", String::from_utf8_lossy(&output.stderr).trim()))?;
    figures(&report["jobs"][0], load, busy, disturbance_percent)
}

/// `busy` is how many processors it kept busy.
fn figures(job: &Value, load: Load, busy: Option<f64>, disturbance_percent: f64) -> Result<Figures, String> {
    if job["error"] != 0 {
        return Err(format!("fio: error {}", job["error"]));
    }
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let parts = [&job["read"], &job["write"]];
    let requests: f64 = parts.iter().map(|part| number(&part["total_ios"])).sum();
    let iops: f64 = parts.iter().map(|part| number(&part["iops"])).sum();
    if requests == 0.0 {
        return Err("fio: no request ended".into());
    }
    // Of mixed loads: as reads are, which are the larger part.
    let most = if number(&job["read"]["total_ios"]) > 0.0 { parts[0] } else { parts[1] };
    let micros = |name: &str| number(&most["lat_ns"]["percentile"][name]) / 1000.0;
    Ok(Figures {
        iops,
        megabytes_per_second: iops * load.size as f64 / 1e6,
        p50_us: micros("50.000000"),
        p99_us: micros("99.000000"),
        p999_us: micros("99.900000"),
        cpu_us_per_io: busy.map(|busy| busy * 1e6 / iops),
        resident_bytes: None,
        disturbance_percent,
        requests: requests as u64,
        checked: 0,
    })
}
