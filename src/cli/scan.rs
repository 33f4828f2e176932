//! `scan start`, `pause`, `resume`, `cancel` and `wait`.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::run::{CliError, Server};
use super::scan_args::{ScanCommand, ScanStartArgs, ScanWaitArgs};
use super::scan_text;
use crate::control::api::{Done, ScanStart, Sectors};
use crate::control::client::ClientError;
use crate::runtime::report::StatusReport;
use crate::runtime::scan_report::ScanReport;

/// How often the server is asked how its pass stands: often enough for a bar that moves.
const POLL: Duration = Duration::from_millis(200);

/// `scan …`.
pub(super) fn run(command: ScanCommand, out: &mut dyn Write) -> Result<(), CliError> {
    let nothing = serde_json::json!({});
    match command {
        ScanCommand::Start(args) => start(&args, out),
        ScanCommand::Pause(args) => Server::of(&args)?.order("/v1/scan/pause", &nothing, out),
        ScanCommand::Resume(args) => Server::of(&args)?.order("/v1/scan/resume", &nothing, out),
        ScanCommand::Cancel(args) => Server::of(&args)?.order("/v1/scan/cancel", &nothing, out),
        ScanCommand::Wait(ScanWaitArgs { control, timeout }) => {
            let server = Server::of(&control)?;
            let scan = scanner(&server)?;
            wait(&server, scan, timeout.map(Duration::from_secs), out)
        }
    }
}

fn start(args: &ScanStartArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let server = Server::of(&args.control)?;
    let range = args.range.map(|range| Sectors { start: range.start.0, count: range.count });
    let body = ScanStart { range, check_only: args.check_only };
    if !args.wait {
        return server.order("/v1/scan/start", &body, out);
    }
    let done: Done = server.post("/v1/scan/start", &body)?;
    if !server.prints_json() {
        writeln!(out, "{}", done.message)?;
        out.flush()?;
    }
    let begun = scanner(&server).map_err(stopped)?;
    wait(&server, begun, None, out)
}

/// The scanner of the server's volume, unless that has left.
fn scanner(server: &Server) -> Result<ScanReport, CliError> {
    let status: StatusReport = server.get("/v1/status")?;
    if status.scan.state.is_empty() {
        let why = status.messages.into_iter().next().unwrap_or_else(|| "the volume is away".into());
        return Err(CliError::Scan(format!("there is no scanner here: {why}")));
    }
    Ok(status.scan)
}

/// Wait for the end of the pass that stood like that.
fn wait(server: &Server, mut scan: ScanReport, timeout: Option<Duration>, out: &mut dyn Write) -> Result<(), CliError> {
    let begun = Instant::now();
    let pass = scan.pass;
    let bar = bar(server.prints_json());
    while scan.is_under_way() && scan.pass == pass {
        show(&bar, &scan);
        if let Some(timeout) = timeout.filter(|timeout| begun.elapsed() >= *timeout) {
            bar.finish_and_clear();
            let stands = scan_text::stands(&scan);
            return Err(CliError::Scan(format!(
                "not done within {} s: {stands}; only the waiting ends",
                timeout.as_secs()
            )));
        }
        std::thread::sleep(timeout.map_or(POLL, |timeout| POLL.min(timeout.saturating_sub(begun.elapsed()))));
        scan = scanner(server).map_err(|error| {
            bar.finish_and_clear();
            stopped(error)
        })?;
    }
    bar.finish_and_clear();
    let verdict = verdict(pass, &scan);
    if server.prints_json() {
        server.print(&scan, |_| String::new(), out)?;
    }
    match verdict {
        Ok(line) if !server.prints_json() => Ok(writeln!(out, "{line}")?),
        Ok(_) => Ok(()),
        Err(line) => Err(CliError::Scan(line)),
    }
}

/// It answered before: this is how a server ends.
fn stopped(error: CliError) -> CliError {
    match error {
        CliError::Client(ClientError::NoSocket(_) | ClientError::NotListening(_) | ClientError::Broken { .. }) => {
            let text = "the pass has not ended: the server has stopped; it goes on when that is started again";
            CliError::Scan(text.into())
        }
        other => other,
    }
}

/// How a pass ended that is not under way any more: one line, an error unless all of it was read.
fn verdict(pass: u64, scan: &ScanReport) -> Result<String, String> {
    if pass == 0 {
        return Err("no pass is under way, and there was none; begin one with `scan start`".into());
    }
    // What it covered and skipped is known until the next one begins.
    let known = Some(scan).filter(|scan| scan.pass == pass && scan.total_bytes > 0);
    match (scan.last.filter(|last| last.pass == pass), known) {
        (Some(last), _) if last.cancelled => {
            Err(format!("pass {pass} was cancelled before it had read everything; `scan start` begins another"))
        }
        (Some(last), known) if last.complete => Ok(scan_text::ended(&last, known)),
        (Some(last), Some(scan)) if scan.skipped_bytes == 0 => Ok(scan_text::ended(&last, Some(scan))),
        (Some(_), Some(scan)) => Err(format!("pass {pass} is not complete: {}", scan_text::skipped(scan))),
        (Some(_), None) => Err(format!("pass {pass} was of a part, or skipped something; `events` says which")),
        (None, _) => Err(format!("pass {pass} has ended, and others after it; see `events`")),
    }
}

/// Drawn on a terminal only.
fn bar(hidden: bool) -> ProgressBar {
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {msg}").expect("a template");
    ProgressBar::with_draw_target(Some(0), target).with_style(style.progress_chars("=> "))
}

fn show(bar: &ProgressBar, scan: &ScanReport) {
    // Words first: the first of these draws it.
    bar.set_prefix(format!("pass {}", scan.pass));
    bar.set_message(scan_text::progress(scan));
    bar.set_length(scan.total_bytes.max(1));
    bar.set_position(scan.covered_bytes.min(scan.total_bytes));
    bar.tick();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted::sample_scan;
    use crate::runtime::scan_report::{LastPass, ScanRange, SkippedReport};

    /// Pass 3, when it is over.
    fn over(complete: bool) -> ScanReport {
        let mut scan = sample_scan();
        scan.state = "waiting".into();
        scan.last = Some(LastPass { pass: 3, started: 100, ended: 223, complete, cancelled: false, found: scan.found });
        scan
    }

    #[test]
    fn a_complete_pass_is_success_in_one_line() {
        let line = verdict(3, &over(true)).unwrap();
        assert!(line.starts_with("pass 3 has ended after 2m 3s: ") && line.contains("3 bad"), "{line}");
        // Also when the next one has begun meanwhile.
        let mut next = over(true);
        next.pass = 4;
        assert!(verdict(3, &next).is_ok());
    }

    #[test]
    fn a_pass_over_a_range_is_success_when_nothing_of_it_was_skipped() {
        let mut scan = over(false);
        scan.range = Some(ScanRange { start: 8, count: 16 });
        assert!(verdict(3, &scan).is_ok());
        // After a restart nobody knows.
        scan.total_bytes = 0;
        assert!(verdict(3, &scan).unwrap_err().contains("`events`"));
    }

    #[test]
    fn what_was_skipped_is_listed_and_an_error() {
        let mut scan = over(false);
        let part = |offset| SkippedReport { device: "primary".into(), offset, len: 4096, why: "gone".into() };
        scan.skipped = vec![part(0), part(1 << 20)];
        scan.skipped_bytes = 8192;
        let line = verdict(3, &scan).unwrap_err();
        assert_eq!(
            line,
            "pass 3 is not complete: skipped 8 KiB: primary bytes 0-4095 (gone), primary bytes 1048576-1052671 (gone)"
        );
    }

    #[test]
    fn a_pass_that_was_cancelled_or_is_forgotten_is_an_error() {
        let mut scan = over(false);
        scan.last = scan.last.map(|last| LastPass { cancelled: true, ..last });
        assert!(verdict(3, &scan).unwrap_err().contains("pass 3 was cancelled"));
        assert!(verdict(1, &scan).unwrap_err().contains("pass 1 has ended, and others after it"));
        assert!(verdict(0, &ScanReport::default()).unwrap_err().contains("`scan start`"));
    }
}
