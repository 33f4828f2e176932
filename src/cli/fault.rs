//! `fault add`, `fault list` and `fault clear`.

use std::io::Write;
use std::str::FromStr;

use super::args::{FaultAddArgs, FaultCommand};
use super::run::{CliError, Server};
use super::show;
use super::table::Align::{Left, Right};
use super::table::Table;
use crate::control::api::{FaultAdded, FaultList, FaultsCleared};
use crate::device::fault::{FaultOp, FaultReport, FaultRule};
use crate::device::{DeviceIndex, Errno};
use crate::units::SectorRange;

/// What a matching operation fails with; `none` where it is only delayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultErrno(pub Option<Errno>);

impl FromStr for FaultErrno {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("none") {
            return Ok(FaultErrno(None));
        }
        text.parse().map(|errno| FaultErrno(Some(errno))).map_err(|e: crate::device::UnknownErrno| e.to_string())
    }
}

const DEVICES: [(&str, DeviceIndex); 2] = [("primary", DeviceIndex::PRIMARY), ("spare", DeviceIndex::SPARE)];

const OPS: [(&str, FaultOp); 5] = [
    ("read", FaultOp::Read),
    ("write", FaultOp::Write),
    ("flush", FaultOp::Flush),
    ("discard", FaultOp::Discard),
    ("identify", FaultOp::Identify),
];

pub(super) fn device(name: &str) -> Result<DeviceIndex, String> {
    named(&DEVICES, name)
}

pub(super) fn op(name: &str) -> Result<FaultOp, String> {
    named(&OPS, name)
}

fn named<T: Copy>(names: &[(&str, T)], name: &str) -> Result<T, String> {
    let found = names.iter().find(|(known, _)| *known == name);
    found.map(|(_, value)| *value).ok_or_else(|| format!("{name:?} is not known"))
}

fn op_name(op: FaultOp) -> &'static str {
    OPS.iter().find(|(_, known)| *known == op).map_or("?", |(name, _)| name)
}

/// `fault …`.
pub(super) fn run(command: FaultCommand, out: &mut dyn Write) -> Result<(), CliError> {
    match command {
        FaultCommand::Add(args) => {
            let server = Server::of(&args.control)?;
            for rule in rules(&args) {
                let added: FaultAdded = server.post("/v1/faults", &rule)?;
                server.print(&added, |added| format!("fault rule {} added", added.id), out)?;
            }
            Ok(())
        }
        FaultCommand::List(args) => {
            let server = Server::of(&args)?;
            let list: FaultList = server.get("/v1/faults")?;
            server.print(&list, table, out)
        }
        FaultCommand::Clear(args) => {
            let server = Server::of(&args.control)?;
            let route = args.id.map_or("/v1/faults".to_owned(), |id| format!("/v1/faults/{id}"));
            let cleared: FaultsCleared = server.delete(&route)?;
            server.print(&cleared, |cleared| format!("fault rules removed: {}", cleared.cleared), out)
        }
    }
}

/// One rule a range, or one for the whole device.
fn rules(args: &FaultAddArgs) -> Vec<FaultRule> {
    let errno = match (args.errno, args.delay) {
        (Some(FaultErrno(errno)), _) => errno,
        (None, Some(_)) => None,
        (None, None) => Some(Errno(libc::EIO)),
    };
    let rule = |range: Option<SectorRange>| FaultRule {
        range,
        errno,
        count: args.count,
        until_rewritten: args.until_rewritten,
        delay_ms: args.delay.unwrap_or(0),
        probability: args.probability,
        seed: args.seed,
        partial: args.partial,
        ..FaultRule::new(args.device, &args.ops)
    };
    if args.sectors.is_empty() {
        return vec![rule(None)];
    }
    args.sectors.iter().map(|range| rule(Some(*range))).collect()
}

fn table(list: &FaultList) -> String {
    if list.rules.is_empty() {
        return "no fault rules".into();
    }
    let mut table = Table::new(&[
        ("ID", Right),
        ("DEVICE", Left),
        ("OPS", Left),
        ("SECTORS", Left),
        ("ERROR", Left),
        ("HITS", Right),
        ("DETAILS", Left),
    ]);
    for FaultReport { rule, hits } in &list.rules {
        let ops: Vec<_> = rule.ops.iter().copied().map(op_name).collect();
        let sectors = rule.range.map_or("all".into(), |range| show::sectors(range.start.0, range.count));
        let error = match rule.errno {
            None => "none".into(),
            Some(errno) => errno.name().map_or_else(|| errno.0.to_string(), str::to_owned),
        };
        table.row([
            rule.id.to_string(),
            rule.device.to_string(),
            ops.join(","),
            sectors,
            error,
            hits.to_string(),
            details(rule),
        ]);
    }
    table.render("")
}

fn details(rule: &FaultRule) -> String {
    let mut parts = Vec::new();
    parts.extend(rule.count.map(|n| format!("{n} more times")));
    parts.extend(rule.until_rewritten.then(|| "until rewritten".to_owned()));
    parts.extend((rule.delay_ms > 0).then(|| format!("delay {} ms", rule.delay_ms)));
    parts.extend((rule.probability < 1.0).then(|| format!("probability {} (seed {})", rule.probability, rule.seed)));
    parts.extend(rule.partial.then(|| "partial effect".to_owned()));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_names_numbers_or_none() {
        assert_eq!("EIO".parse(), Ok(FaultErrno(Some(Errno(libc::EIO)))));
        assert_eq!("5".parse(), Ok(FaultErrno(Some(Errno(libc::EIO)))));
        assert_eq!("none".parse(), Ok(FaultErrno(None)));
        assert!("EWHAT".parse::<FaultErrno>().unwrap_err().contains("EIO"));
    }
}
