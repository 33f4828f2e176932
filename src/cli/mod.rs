//! The command line: [`args`] says what can be typed, [`run`] does it, the rest renders answers.

pub mod args;
mod capabilities;
mod fault;
mod follow;
mod health;
pub mod logging;
mod parse;
pub mod report_args;
pub mod run;
mod scan;
pub mod scan_args;
mod scan_text;
mod show;
mod smart;
mod stats;
mod status;
mod surface;
mod surface_svg;
mod table;
#[cfg(test)]
mod tests;
mod top;
mod usage;
mod verify;
mod watch;

pub use args::Args;
pub use capabilities::{CAPABILITIES, asked_for as capabilities_asked_for};
pub use usage::{parse_args, wrong_usage};

use std::ffi::OsString;

/// The arguments with `serve` filled in where the first one is an option: management layers start a
/// vhost-user backend as `BINARY --socket-path=… --blk-file=…` (QEMU, docs/interop/vhost-user.rst,
/// "Backend program conventions").
pub fn with_subcommand(mut argv: Vec<OsString>) -> Vec<OsString> {
    const OURS: [&str; 4] = ["-h", "--help", "-V", "--version"];
    let is_option = |arg: &OsString| arg.as_encoded_bytes().starts_with(b"-") && !OURS.iter().any(|ours| arg == ours);
    if argv.get(1).is_some_and(is_option) {
        argv.insert(1, "serve".into());
    }
    argv
}
