//! `fault add`: from words to a rule, and back for `fault list`.

use std::fmt;
use std::io::Write;
use std::str::FromStr;

use super::args::{FaultAddArgs, FaultCommand};
use super::run::{CliError, Server};
use super::show;
use super::table::Align::{Left, Right};
use super::table::Table;
use crate::control::api::{FaultAdded, FaultList, FaultSpec, FaultsCleared, Sectors};

/// Errors by name: those the error policy tells apart.
const NAMES: [(&str, i32); 23] = [
    ("EIO", libc::EIO),
    ("ENODATA", libc::ENODATA),
    ("EILSEQ", libc::EILSEQ),
    ("ENODEV", libc::ENODEV),
    ("ENXIO", libc::ENXIO),
    ("ENOTCONN", libc::ENOTCONN),
    ("ESTALE", libc::ESTALE),
    ("ENOLINK", libc::ENOLINK),
    ("EROFS", libc::EROFS),
    ("ETIMEDOUT", libc::ETIMEDOUT),
    ("ENOSPC", libc::ENOSPC),
    ("EDQUOT", libc::EDQUOT),
    ("EFBIG", libc::EFBIG),
    ("EREMOTEIO", libc::EREMOTEIO),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("EINVAL", libc::EINVAL),
    ("EFAULT", libc::EFAULT),
    ("EAGAIN", libc::EAGAIN),
    ("ENOMEM", libc::ENOMEM),
    ("ECANCELED", libc::ECANCELED),
    ("EBADF", libc::EBADF),
    ("EPERM", libc::EPERM),
    ("EBUSY", libc::EBUSY),
];

/// The highest number Linux keeps for errors (MAX_ERRNO).
const ERRNO_MAX: i32 = 4095;

/// What a matching operation fails with; `none` where it is only delayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultErrno(pub Option<i32>);

impl FromStr for FaultErrno {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("none") {
            return Ok(FaultErrno(None));
        }
        let named = NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, number)| *number);
        let number = named.or_else(|| text.parse().ok().filter(|n| (1..=ERRNO_MAX).contains(n)));
        number.map(|n| FaultErrno(Some(n))).ok_or_else(|| {
            let names = NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ");
            format!("{text:?} is no error known here; use a number, none, or one of: {names}")
        })
    }
}

impl fmt::Display for FaultErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("none"),
            Some(number) => match NAMES.iter().find(|(_, n)| *n == number) {
                Some((name, _)) => f.write_str(name),
                None => number.fmt(f),
            },
        }
    }
}

/// `fault …`.
pub(super) fn run(command: FaultCommand, out: &mut dyn Write) -> Result<(), CliError> {
    match command {
        FaultCommand::Add(args) => {
            let server = Server::of(&args.control)?;
            let added: FaultAdded = server.post("/v1/faults", &spec(&args))?;
            server.print(&added, |added| format!("fault rule {} added", added.id), out)
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
            server.print(&cleared, |cleared| format!("{} fault rules removed", cleared.cleared), out)
        }
    }
}

fn spec(args: &FaultAddArgs) -> FaultSpec {
    FaultSpec {
        device: args.device.clone(),
        ops: args.ops.clone(),
        sectors: args.sectors.iter().map(|range| Sectors { start: range.start.0, count: range.count }).collect(),
        errno: args.errno.0,
        count: args.count,
        until_rewritten: args.until_rewritten,
        delay_ms: args.delay.unwrap_or(0),
        probability: args.probability,
        seed: args.seed,
        partial: args.partial,
    }
}

/// The rules as a table.
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
    for rule in &list.rules {
        let spec = &rule.spec;
        let ranges: Vec<_> = spec.sectors.iter().map(|s| show::sectors(s.start, s.count)).collect();
        let sectors = if ranges.is_empty() { "all".into() } else { ranges.join(",") };
        let errno = FaultErrno(spec.errno).to_string();
        table.row([
            rule.id.to_string(),
            spec.device.clone(),
            spec.ops.join(","),
            sectors,
            errno,
            rule.hits.to_string(),
            details(spec),
        ]);
    }
    table.render("")
}

fn details(spec: &FaultSpec) -> String {
    let mut parts = Vec::new();
    parts.extend(spec.count.map(|n| format!("{n} times")));
    parts.extend(spec.until_rewritten.then(|| "until rewritten".to_owned()));
    parts.extend((spec.delay_ms > 0).then(|| format!("delay {} ms", spec.delay_ms)));
    parts.extend(spec.probability.map(|p| format!("probability {p}")));
    parts.extend(spec.seed.map(|seed| format!("seed {seed}")));
    parts.extend(spec.partial.then(|| "partial effect".to_owned()));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_names_and_numbers() {
        assert_eq!("EIO".parse(), Ok(FaultErrno(Some(5))));
        assert_eq!("enospc".parse(), Ok(FaultErrno(Some(28))));
        assert_eq!("5".parse(), Ok(FaultErrno(Some(5))));
        assert_eq!("none".parse(), Ok(FaultErrno(None)));
        for text in ["EWHAT", "0", "-5", "4096", ""] {
            assert!(text.parse::<FaultErrno>().is_err(), "{text}");
        }
        assert_eq!(FaultErrno(Some(5)).to_string(), "EIO");
        assert_eq!(FaultErrno(Some(133)).to_string(), "133");
    }
}
