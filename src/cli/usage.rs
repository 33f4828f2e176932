//! Taking what was typed, and saying in one line what is wrong with it.

use std::ffi::OsString;

use clap::{Command, CommandFactory, FromArgMatches};

use super::Args;

/// What was typed, understood.
///
/// # Errors
/// When it cannot be, or asks for help or the version.
pub fn parse_args(argv: &[OsString]) -> Result<Args, clap::Error> {
    let matches = taking_negative_numbers(Args::command()).try_get_matches_from(argv)?;
    Args::from_arg_matches(&matches)
}

/// `--size -1` is a wrong size and not an option of its own: the line is to say which numbers are possible.
fn taking_negative_numbers(command: Command) -> Command {
    let command = command.mut_args(|arg| {
        let takes_values = arg.get_action().takes_values();
        arg.allow_negative_numbers(takes_values)
    });
    command.mut_subcommands(taking_negative_numbers)
}

/// What is wrong with a command line that was not understood, and where the right one is described. One
/// line, as for every other failure; `None` where the answer is help or a version.
pub fn wrong_usage(error: &clap::Error, argv: &[OsString]) -> Option<String> {
    if !error.use_stderr() || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return None;
    }
    let text = error.render().to_string();
    let text = text.split("\n\nUsage:").next().unwrap_or_default();
    let text = text.split("\n\nFor more information").next().unwrap_or_default();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    let mut line = first.strip_prefix("error: ").unwrap_or(first).to_owned();
    for (i, more) in lines.enumerate() {
        // A list of options follows a colon, possible values come in brackets, a tip is a sentence of its own.
        line.push_str(match (i, first.ends_with(':'), more.starts_with('[')) {
            (0, true, _) | (_, false, true) => " ",
            (_, true, _) => ", ",
            _ => "; ",
        });
        line.push_str(more);
    }
    Some(format!("{line}; see `{} --help`", command_of(argv)))
}

/// The program with the subcommands that were named.
fn command_of(argv: &[OsString]) -> String {
    let program = Args::command();
    let mut words = vec![program.get_name()];
    let mut command = &program;
    for word in argv.iter().skip(1) {
        let Some(named) = command.find_subcommand(word) else { break };
        words.push(named.get_name());
        command = named;
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &str, expected: &str) {
        let argv: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        let error = parse_args(&argv).unwrap_err();
        assert_eq!(wrong_usage(&error, &argv).as_deref(), Some(expected), "{words}");
    }

    #[test]
    fn every_kind_of_mistake_is_one_line() {
        check(
            "x create --primary p",
            "the following required arguments were not provided: --size <SIZE>; see `vhost-remap create --help`",
        );
        check(
            "x serve --primary p",
            "the following required arguments were not provided: <--socket-path <SOCK>|--fd <N>>; see `vhost-remap serve --help`",
        );
        check(
            "x create",
            "the following required arguments were not provided: --primary <P>, --size <SIZE>; see `vhost-remap create --help`",
        );
        check(
            "x fault add --control-path c --device disk",
            "invalid value 'disk' for '--device <DEVICE>' [possible values: primary, spare]; see `vhost-remap fault add --help`",
        );
        check(
            "x ping --control-pathh c",
            "unexpected argument '--control-pathh' found; tip: a similar argument exists: '--control-path'; see `vhost-remap ping --help`",
        );
        check(
            "x create --primary p --size -1",
            "invalid value '-1' for '--size <SIZE>': \"-1\" is no size; write it like 10G, 512M, 1T or in bytes; see `vhost-remap create --help`",
        );
        check(
            "x remap --control-path c -8",
            "invalid value '-8' for '<SECTOR>...': \"-8\" is no sector or range of sectors; write it like 17 or 8-15 (both included); see `vhost-remap remap --help`",
        );
        check("x frobnicate", "unrecognized subcommand 'frobnicate'; see `vhost-remap --help`");
    }

    #[test]
    fn help_is_not_a_mistake() {
        for words in ["x --help", "x", "x fault", "x status --help", "x --version"] {
            let argv: Vec<OsString> = words.split(' ').map(OsString::from).collect();
            let error = parse_args(&argv).unwrap_err();
            assert_eq!(wrong_usage(&error, &argv), None, "{words}");
        }
    }
}
