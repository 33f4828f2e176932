//! `events`: what happened, and running a command for it.

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::args::EventsArgs;
use super::run::{CliError, Server};
use super::show;
use crate::control::client::{ClientError, REPORT_TIMEOUT};
use crate::runtime::report::{EVENT_KINDS, EventPage, EventRecord};

/// How long the server puts off its answer while `events --follow` waits for something to happen.
const WAIT_SECONDS: u64 = 30;
/// How often a server that has gone is looked for.
const AGAIN: Duration = Duration::from_millis(500);

/// Names for several kinds, as `--on` takes them.
const GROUPS: [(&str, &[&str]); 4] = [
    (
        "health",
        &[
            "health",
            "poisoned",
            "cleared",
            "device-gone",
            "device-back",
            "spare-down",
            "spare-back",
            "place-retired",
            "place-restored",
            "degraded",
        ],
    ),
    ("lost", &["lost"]),
    ("exhausted", &["spare-filling", "spare-full"]),
    (
        "errors",
        &[
            "guest-error",
            "read-error",
            "flush-failed",
            "in-doubt",
            "slot-failed",
            "metadata-damaged",
            "label-failed",
            "fence-given-up",
            "close",
        ],
    ),
];

/// A word of `--on`.
///
/// # Errors
/// When it names neither a kind nor a group of them.
pub(super) fn parse_kind(word: &str) -> Result<String, String> {
    let groups = || GROUPS.iter().map(|(group, _)| *group);
    if groups().any(|group| group == word) || EVENT_KINDS.contains(&word) {
        return Ok(word.to_owned());
    }
    let groups: Vec<&str> = groups().collect();
    Err(format!("no events are called so; there are {}, and {}", groups.join(", "), EVENT_KINDS.join(", ")))
}

/// Whether `--on` wants an event of that kind.
fn is_wanted(kind: &str, on: &[String]) -> bool {
    let names =
        |name: &String| name == kind || GROUPS.iter().any(|(group, kinds)| group == name && kinds.contains(&kind));
    on.is_empty() || on.iter().any(names)
}

/// Print what there is, and with `--follow` what comes; a command is not run again for what was before.
pub(super) fn events(server: &Server, args: &EventsArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let (mut after, mut run) = (0, None);
    if args.follow && args.exec.is_some() {
        let newest = next_page(server, false, u64::MAX)?;
        (after, run) = (newest.last_seq, Some(newest.run));
    }
    let mut is_away = false;
    loop {
        let page = match next_page(server, args.follow, after) {
            Ok(page) => page,
            // The server is restarted, or replaced by a newer one: what it says goes on.
            Err(error) if args.follow && run.is_some() && is_passing(&error) => {
                if !std::mem::replace(&mut is_away, true) {
                    eprintln!("vhost-remap: {error}; waiting for it");
                }
                std::thread::sleep(AGAIN);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        is_away = false;
        if run.as_ref().is_some_and(|run| *run != page.run) && after > 0 {
            // Its numbers begin anew.
            (after, run) = (0, Some(page.run));
            continue;
        }
        let dropped = page.events.first().map_or(0, |event| event.seq.saturating_sub(after + 1));
        if dropped > 0 {
            let lost = format!("{dropped} events dropped because the log was full");
            // Whoever reads objects, or has a command run for each event, is told beside them.
            match server.prints_json() || args.exec.is_some() {
                true => eprintln!("vhost-remap: {lost}"),
                false => writeln!(out, "({lost})")?,
            }
        }
        for event in page.events.iter().filter(|event| is_wanted(&event.kind, &args.on)) {
            server.print(event, show::event, out)?;
            if let Some(command) = &args.exec {
                out.flush()?;
                execute(command, &page, event);
            }
        }
        out.flush()?;
        if page.events.is_empty() && !args.follow {
            return Ok(());
        }
        after = page.last_seq.max(after);
        run = Some(page.run);
    }
}

fn next_page(server: &Server, follow: bool, after: u64) -> Result<EventPage, ClientError> {
    let wait = if follow { WAIT_SECONDS } else { 0 };
    let query = [("after", after.to_string()), ("wait", wait.to_string())];
    server.ask("/v1/events", &query, REPORT_TIMEOUT + Duration::from_secs(wait))
}

/// Whether the server may be there again soon.
fn is_passing(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::NoSocket(_)
            | ClientError::NotListening(_)
            | ClientError::Timeout { .. }
            | ClientError::Broken { .. }
    )
}

/// Run a command for an event and wait for its end. One that fails is reported, and that is all.
fn execute(command: &str, page: &EventPage, event: &EventRecord) {
    if let Err(why) = try_execute(command, page, event) {
        eprintln!("vhost-remap: --exec {command}: event {} ({}): {why}", event.seq, event.kind);
    }
}

fn try_execute(command: &str, page: &EventPage, event: &EventRecord) -> Result<(), String> {
    let sector = event.sector.map(|sector| sector.to_string()).unwrap_or_default();
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .env("VHOST_REMAP_VOLUME", &page.volume)
        .env("VHOST_REMAP_SEQ", event.seq.to_string())
        .env("VHOST_REMAP_SEVERITY", &event.severity)
        .env("VHOST_REMAP_EVENT", &event.kind)
        .env("VHOST_REMAP_DEVICE", &event.device)
        .env("VHOST_REMAP_SECTOR", sector)
        .env("VHOST_REMAP_SECTORS", event.sectors.to_string())
        .env("VHOST_REMAP_CAUSE", &event.cause)
        .env("VHOST_REMAP_ACTION", &event.action)
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let mut json = serde_json::to_string(event).expect("documents are plain data with string keys");
    json.push('\n');
    let written = child.stdin.take().expect("piped").write_all(json.as_bytes());
    let status = child.wait().map_err(|error| format!("cannot be waited for: {error}"))?;
    match written {
        // It need not read.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(format!("takes no event: {error}")),
        _ => {}
    }
    if status.success() { Ok(()) } else { Err(format!("failed: {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_wanted_by_kind_or_group() {
        let on = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert!(is_wanted("remapped", &[]));
        assert!(is_wanted("lost", &on(&["health", "lost"])));
        assert!(is_wanted("spare-full", &on(&["exhausted"])) && is_wanted("spare-filling", &on(&["exhausted"])));
        assert!(is_wanted("remapped", &on(&["remapped"])));
        assert!(!is_wanted("remapped", &on(&["health", "lost", "exhausted"])));
        // No word that is taken is one that no event ever has.
        let of_groups = GROUPS.iter().flat_map(|(_, kinds)| *kinds);
        of_groups.clone().for_each(|kind| assert!(EVENT_KINDS.contains(kind), "{kind}"));
        let alone: Vec<_> = EVENT_KINDS.iter().filter(|kind| !of_groups.clone().any(|other| other == *kind)).collect();
        let expected = [
            "handed-over",
            "healed",
            "malformed",
            "metadata-repaired",
            "old-label",
            "primary-grown",
            "read-only",
            "recovered-read",
            "released",
            "remapped",
            "resized",
            "rewritten",
            "scan",
            "slow-block",
            "stats-cleared",
            "taken-over",
        ];
        assert_eq!(alone, expected.each_ref(), "in a group, or among these");
        assert!(parse_kind("exhausted").is_ok() && parse_kind("remapped").is_ok());
        assert!(parse_kind("helth").unwrap_err().contains("there are health, lost, exhausted, errors, and cleared, "));
    }

    #[test]
    fn a_command_that_fails_says_so_and_one_that_does_not_read_is_fine() {
        let event = crate::control::volume::scripted::event(7);
        let page = EventPage::default();
        let run = |command: &str| try_execute(command, &page, &event);
        assert_eq!(run("true"), Ok(()));
        assert_eq!(run("test \"$VHOST_REMAP_EVENT $VHOST_REMAP_SECTOR\" = 'remapped 56'"), Ok(()));
        assert_eq!(run("grep -q '\"seq\":7,'"), Ok(()));
        assert!(run("exit 3").unwrap_err().contains("exit status: 3"));
        assert!(run("no-such-program-anywhere 2>/dev/null").unwrap_err().contains("127"));
    }
}
