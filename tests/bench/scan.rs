//! A pass of the scanner on an idle volume, against raw sequential reads of the same file.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::backend::{Cache, vhost_remap};
use crate::fio;
use crate::load::{Load, Pattern};
use crate::options::Options;
use crate::single::{serve, status};

pub(crate) const IDLE_PASS: &str = "an idle pass, in the time of raw sequential reads";

/// Bytes of the disk.
const LEN: u64 = 1 << 30;
const PIECE: usize = 1 << 20;
/// No pass takes longer.
const LIMIT: Duration = Duration::from_secs(300);

/// Times of a pass over those of raw reads, in rounds.
///
/// # Errors
/// When one of them does not do what it should.
pub(crate) fn idle(parent: &Path, options: &Options) -> Result<Vec<f64>, String> {
    let dir = tempfile::tempdir_in(parent).map_err(|error| error.to_string())?;
    let [primary, spare] = ["disk.img", "disk.spare"].map(|name| dir.path().join(name));
    fill(&primary).map_err(|error| format!("{}: {error}", primary.display()))?;
    let [disk, slots] = [&primary, &spare].map(|path| path.display().to_string());
    vhost_remap(&["adopt", "--primary", &disk, "--spare", &slots])?;
    let load =
        Load { pattern: Pattern::SequentialRead, size: PIECE, depth: 4, queues: 1, polled: false, indirect: false };
    let once = || {
        let raw = fio::run(&primary, LEN, true, load, options.time())?.megabytes_per_second;
        Ok(raw / pass(dir.path())?)
    };
    (0..options.rounds).map(|_| once()).collect()
}

/// Data and not holes, which no device would be asked for.
fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let piece: Vec<u8> = (0..PIECE).map(|at| u8::try_from(at % 251).expect("a byte")).collect();
    for _ in 0..LEN / PIECE as u64 {
        file.write_all(&piece)?;
    }
    file.sync_all()
}

/// Megabytes of a second that a pass is over, its first part left out, in which it finds out that nobody is there.
fn pass(dir: &Path) -> Result<f64, String> {
    let server = serve(dir, Cache::None)?;
    server.order("/v1/scan/start", &json!({ "check_only": false }))?;
    let began = Instant::now();
    let mut first: Option<(Instant, f64)> = None;
    let mut last: Option<(Instant, f64)> = None;
    let speed = loop {
        let report = status(&server)?;
        let (now, scan) = (Instant::now(), &report["scan"]);
        if scan["state"] != "running" {
            if scan["last"]["complete"] != true {
                return Err(format!("the pass is not complete: {scan}"));
            }
            let ((from, before), (to, after)) = first.zip(last).ok_or("the pass was over before it was seen")?;
            break (after - before) / 1e6 / (to - from).as_secs_f64();
        }
        let covered = scan["covered_bytes"].as_f64().ok_or_else(|| format!("what it covered is not told: {scan}"))?;
        if covered * 20.0 > LEN as f64 {
            first.get_or_insert((now, covered));
            last = Some((now, covered));
        }
        if began.elapsed() > LIMIT {
            return Err(format!("a pass takes more than {LIMIT:?}: {scan}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    server.stop()?;
    Ok(speed)
}
