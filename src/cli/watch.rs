//! Printing a report once, or again and again.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use super::report_args::WatchArgs;
use super::run::CliError;
use crate::control::client::ClientError;

/// Erase the screen and go to its first line (ECMA-48 ED and CUP).
const REDRAW: &str = "\x1b[2J\x1b[H";

/// Print what `report` gives: once, or until the server has ended. It is told whether it is the first time.
pub(super) fn print(
    args: &WatchArgs,
    out: &mut dyn Write,
    mut report: impl FnMut(bool) -> Result<String, CliError>,
) -> Result<(), CliError> {
    let Some(seconds) = args.watch else { return Ok(out.write_all(report(true)?.as_bytes())?) };
    let redraw = std::io::stdout().is_terminal();
    let mut first = true;
    loop {
        let text = match report(first || redraw) {
            // It was there before: this is how a server ends.
            Err(CliError::Client(
                ClientError::NoSocket(_) | ClientError::NotListening(_) | ClientError::Broken { .. },
            )) if !first => return Ok(()),
            text => text?,
        };
        if redraw {
            out.write_all(REDRAW.as_bytes())?;
        }
        out.write_all(text.as_bytes())?;
        out.flush()?;
        first = false;
        std::thread::sleep(Duration::from_secs(seconds));
    }
}
