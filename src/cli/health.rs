//! `health`: what the rules say, the score, the trend, and what the drives say of themselves.

use std::fmt::Write as _;
use std::io::Write;

use serde::Serialize;

use super::report_args::{AnswerFormat, HealthArgs};
use super::run::{CliError, Server};
use super::smart::{self, DriveView};
use super::table::Align::Left;
use super::table::Table;
use super::watch;
use crate::runtime::health::{HealthReport, ScoreReport};
use crate::runtime::report::StatusReport;

/// The document of `health --json`.
#[derive(Serialize)]
struct HealthDocument<'a> {
    #[serde(flatten)]
    health: &'a HealthReport,
    /// What drives say of themselves; only where they were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    drives: Option<Vec<DriveView>>,
}

pub(super) fn run(args: &HealthArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let HealthArgs { control, .. } = args;
    let server = Server::of(control)?;
    let format = AnswerFormat::of(args.format, control);
    watch::print(&args.watch, out, |_| {
        let health: HealthReport = server.get("/v1/health")?;
        let asked = args.smart || !args.smart_device.is_empty();
        let drives = asked.then(|| smart::views(&health.devices, &args.smart_device));
        Ok(match format {
            AnswerFormat::Human => text(&health, drives.as_deref()),
            AnswerFormat::Json => {
                let document = HealthDocument { health: &health, drives };
                let json = serde_json::to_string(&document).expect("documents are plain data with string keys");
                format!("{json}\n")
            }
            AnswerFormat::Compact => {
                let status: StatusReport = server.get("/v1/status")?;
                format!("{}\n", compact(&health, &status))
            }
        })
    })
}

/// dm-remap's answer to the message `health`, with what the numbers are here.
fn compact(health: &HealthReport, status: &StatusReport) -> String {
    let trend = match (&health.trend.exhausted_in_days, &health.trend.slots_per_day) {
        (Some(_), _) => "growing",
        (None, Some(_)) => "stable",
        (None, None) => "unknown",
    };
    format!(
        "health_score={} scan_count={} hotspot_sectors={} consecutive_errors={} trend={trend} state={} rules={}",
        health.score.value,
        status.counters.health_scans,
        status.blocks.pending,
        status.failed_writes_in_a_row,
        health.state,
        match health.findings.is_empty() {
            true => "-".to_owned(),
            false => health.findings.iter().map(|finding| finding.rule.as_str()).collect::<Vec<_>>().join(","),
        },
    )
}

fn text(health: &HealthReport, drives: Option<&[DriveView]>) -> String {
    let mut out = String::new();
    let mut field = |name: &str, value: &str| {
        writeln!(out, "{name:<8} {value}").expect("writing to a String cannot fail");
    };
    field("Volume", &health.volume);
    field("State", &health.state);
    for finding in &health.findings {
        field(
            "",
            &format!(
                "! {}, {}, rule {}: {}: {} (from {} on); {}",
                finding.state, finding.device, finding.rule, finding.what, finding.value, finding.limit, finding.advice
            ),
        );
    }
    field("Score", &score(&health.score, &health.state));
    field("Trend", &health.trend.summary);
    let mut table = Table::new(&[("DEVICE", Left), ("STATE", Left), ("PATH", Left)]);
    for device in &health.devices {
        table.row([device.role.clone(), device.state.clone(), device.path.clone()]);
    }
    out.push('\n');
    out.push_str(&table.render(""));
    if let Some(drives) = drives {
        out.push_str("\nWHAT THE DRIVES SAY OF THEMSELVES (smartctl, not part of the state above)\n");
        drives.iter().for_each(|drive| out.push_str(&smart::text(drive)));
    }
    out
}

/// `75 of 100 (FAIR): 5 for pending blocks (3), 20 for lost sectors (2); AT_RISK has 79 at most`.
fn score(score: &ScoreReport, state: &str) -> String {
    let mut text = format!("{} of 100 ({})", score.value, score.word);
    let taken = score.deductions.iter().map(|part| format!("{} for {} ({})", part.points, part.input, part.value));
    let taken: Vec<String> = taken.collect();
    if !taken.is_empty() {
        let _ = write!(text, ": less {}", taken.join(", "));
    }
    if score.max < 100 {
        let _ = write!(text, "; {state} has {} at most", score.max);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted::{sample_health, sample_status};

    #[test]
    fn health_names_the_rules_and_their_numbers() {
        let expected = "\
Volume   6f1f4b1e-1f6c-4f0e-9b3e-3d5a9a1c2b3d
State    AT_RISK
         ! AT_RISK, primary, rule remapped-recently: blocks moved in the last 70 days because they failed: 12 \
(from 1 on); see that there is a backup
         ! WATCH, primary, rule pending: blocks whose last read failed: 3 (from 1 on); see `list --pending`
Score    75 of 100 (FAIR): less 5 for pending blocks (3), 20 for lost sectors (2); AT_RISK has 79 at most
Trend    not enough data: 2 daily samples over 1 days; 8 over 14 are needed

DEVICE   STATE    PATH
primary  AT_RISK  /srv/disk.img
spare    OK       /srv/disk.img.spare
";
        assert_eq!(text(&sample_health(), None), expected);
    }

    #[test]
    fn the_predecessors_answer_has_its_names() {
        let expected = "health_score=75 scan_count=0 hotspot_sectors=3 consecutive_errors=2 trend=unknown \
                        state=AT_RISK rules=remapped-recently,pending";
        assert_eq!(compact(&sample_health(), &sample_status()), expected);
    }
}
