//! Figures for people and for programs.

use std::io;
use std::path::Path;

use serde::Serialize;

use crate::load::Figures;
use crate::machine::Machine;
use crate::options::Options;
use crate::rounds::{CaseResult, Runs};
use crate::single::Single;
use crate::stage::Medium;
use crate::stats::Estimate;
use crate::svg::{chart, figure};
use crate::targets::{Judgement, NOT_ASKED};

/// All there is, as it is written to `bench.json`.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) file_system: String,
    pub(crate) options: Options,
    pub(crate) cases: Vec<CaseResult>,
    pub(crate) singles: Vec<Single>,
    pub(crate) targets: Vec<Judgement>,
    pub(crate) not_measured: Vec<&'static str>,
}

fn interval(estimate: Option<Estimate>, scale: f64) -> String {
    estimate.map_or("-".into(), |e| {
        format!("{} [{}, {}]", figure(e.median * scale), figure(e.low * scale), figure(e.high * scale))
    })
}

fn median(runs: &Runs, of: impl Fn(&Figures) -> Option<f64>) -> String {
    runs.estimate(of).map_or("-".into(), |estimate| figure(estimate.median))
}

/// The heading of the tables that [`print_case`] prints.
pub(crate) fn print_heading() {
    println!(
        "{:38}{:>26}{:>8}{:>8}{:>8}{:>9}{:>24}{:>9}{:>9}",
        "", "kIOPS [interval]", "MB/s", "p50 us", "p99 us", "p99.9 us", "CPU us/IO [interval]", "calls/IO", "runs"
    );
}

/// A case, one line a contender.
pub(crate) fn print_case(result: &CaseResult) {
    println!("{}", result.case.name);
    for runs in &result.runs {
        let name = runs.contender.name;
        if let Some(why) = &runs.missing {
            println!("  {name:36}{}: {why}", if runs.failed { "FAILED" } else { "not measured" });
            continue;
        }
        let iops = interval(runs.estimate(|figures| Some(figures.iops)), 1e-3);
        let cpu = interval(runs.estimate(|figures| figures.cpu_us_per_io), 1.0);
        let good = runs.rounds.iter().flatten().count();
        let thrown = if runs.thrown_away == 0 { String::new() } else { format!(" (-{})", runs.thrown_away) };
        println!(
            "  {name:36}{iops:>26}{:>8}{:>8}{:>8}{:>9}{cpu:>24}{:>9}{:>9}",
            median(runs, |figures| Some(figures.megabytes_per_second)),
            median(runs, |figures| Some(figures.p50_us)),
            median(runs, |figures| Some(figures.p99_us)),
            median(runs, |figures| Some(figures.p999_us)),
            runs.syscalls_per_io.map_or("-".into(), figure),
            format!("{good}{thrown}"),
        );
    }
}

/// Everything that is no load.
pub(crate) fn print_singles(singles: &[Single]) {
    println!("single");
    for single in singles {
        let result = match (&single.figure, single.failed) {
            (Some(_), _) => format!("{} {}  ({})", interval(single.figure, 1.0), single.unit, single.note),
            (None, true) => format!("FAILED: {}", single.note),
            (None, false) => format!("not measured: {}", single.note),
        };
        println!("  {:60}{result}", single.name);
    }
}

/// What should be, and what is.
pub(crate) fn print_targets(report: &Report) {
    println!("\ntargets");
    for judgement in report.targets.iter().filter(|judgement| judgement.verdict != NOT_ASKED) {
        println!("  {}: {}", judgement.case, judgement.what);
        println!("      {:30}{:24}{}", judgement.target, interval(judgement.figure, 1.0), judgement.verdict);
    }
    let count = |verdict: &str| report.targets.iter().filter(|judgement| judgement.verdict == verdict).count();
    let [met, missed, open] = ["met", "missed", "open"].map(count);
    let rest = report.targets.len() - met - missed - open;
    println!("  {met} met, {missed} missed, {open} open (the interval holds the target), {rest} not measured");
    let figures = report.targets.iter().filter_map(|judgement| judgement.figure);
    let least = figures.map(|figure| figure.confidence_percent).fold(100.0, f64::min);
    if least < 95.0 {
        println!("  few runs: some of these intervals hold the median with {least:.0} % only");
    }
    println!("\nnot measured here");
    report.not_measured.iter().for_each(|what| println!("  {what}"));
}

/// Write `bench.json` and the pictures.
///
/// # Errors
/// When a file cannot be written.
pub(crate) fn write(report: &Report, dir: &Path) -> io::Result<()> {
    std::fs::write(dir.join("bench.json"), serde_json::to_string_pretty(report).expect("plain data"))?;
    type Pick = fn(&Figures) -> Option<f64>;
    let quantities: [(&str, &str, Pick); 3] = [
        ("iops", "thousand I/Os a second", |figures| Some(figures.iops / 1e3)),
        ("cpu", "microseconds of the backend's CPU for an I/O", |figures| figures.cpu_us_per_io),
        ("p99", "99th percentile of latency in microseconds", |figures| Some(figures.p99_us)),
    ];
    for medium in [Medium::Cached, Medium::Tmpfs, Medium::Direct] {
        for (short, title, pick) in quantities {
            let of_medium = report.cases.iter().filter(|result| result.case.medium == medium);
            let panels = of_medium.map(|result| {
                let bars = result.runs.iter().filter_map(|runs| Some((runs.contender.name, runs.estimate(pick)?)));
                (result.case.name.as_str(), bars.collect::<Vec<_>>())
            });
            let panels: Vec<_> = panels.filter(|(_, bars)| !bars.is_empty()).collect();
            let path = dir.join(format!("{short}-{medium:?}.svg").to_lowercase());
            if panels.is_empty() {
                // One from another time would pass for this one's.
                let _ = std::fs::remove_file(path);
            } else {
                std::fs::write(path, chart(title, &panels))?;
            }
        }
    }
    Ok(())
}
