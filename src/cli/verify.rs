//! `verify`: which slots sectors live in, as the predecessor's message of that name told.

use std::io::Write;

use serde::Serialize;

use super::args::SectorsArgs;
use super::run::{CliError, Server};
use super::show;
use crate::control::api::ListPage;
use crate::runtime::report::StatusReport;
use crate::units::SectorRange;

/// Neighbouring sectors that live in one slot, or in none.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Run {
    sector: u64,
    sectors: u64,
    /// `null`: on the primary.
    slot: Option<u32>,
}

pub(super) fn run(args: &SectorsArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let server = Server::of(&args.control)?;
    let status: StatusReport = server.get("/v1/status")?;
    for range in &args.sectors {
        if range.end().0 > status.capacity_sectors {
            return Err(CliError::BeyondEnd {
                disk: status.devices.first().map_or_else(String::new, |primary| primary.path.clone()),
                start: range.start.0,
                count: range.count,
                last: status.capacity_sectors.saturating_sub(1),
            });
        }
        for run in runs(&server, *range)? {
            server.print(&run, text, out)?;
        }
    }
    Ok(())
}

fn runs(server: &Server, range: SectorRange) -> Result<Vec<Run>, CliError> {
    let (mut next, end) = (range.start.0, range.end().0);
    let mut runs = Vec::new();
    // The list is one of blocks, and the first sector may lie within one.
    let mut from = Some(range.start.block().start().0);
    while let Some(start) = from {
        let page: ListPage = server.get_with("/v1/list", &[("from", start.to_string())])?;
        for entry in page.entries.iter().filter(|entry| entry.slot.is_some()) {
            let entry_end = entry.sector.saturating_add(u64::from(entry.sectors));
            let (first, last) = (entry.sector.max(next), entry_end.min(end));
            if first >= last {
                continue;
            }
            push(&mut runs, next, first, None);
            push(&mut runs, first, last, entry.slot);
            next = last;
        }
        // A server that would send us back ends the list rather than looping for ever.
        from = page.next.filter(|next| *next > start && *next < end);
    }
    push(&mut runs, next, end, None);
    Ok(runs)
}

fn push(runs: &mut Vec<Run>, start: u64, end: u64, slot: Option<u32>) {
    if start < end {
        runs.push(Run { sector: start, sectors: end - start, slot });
    }
}

fn text(run: &Run) -> String {
    let (name, are) = if run.sectors == 1 { ("sector", "is") } else { ("sectors", "are") };
    let sectors = show::sectors(run.sector, run.sectors);
    match run.slot {
        Some(slot) => format!("{name} {sectors} -> slot {slot}"),
        None => format!("{name} {sectors} {are} not remapped"),
    }
}
