//! The `vhost-remap` program: see `vhost-remap --help`.

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use vhost_remap::cli;
use vhost_remap::control::log_level;
use vhost_remap::runtime::signals;

fn main() -> ExitCode {
    let argv: Vec<_> = std::env::args_os().collect();
    let mut out = BufWriter::new(io::stdout());
    if cli::capabilities_asked_for(&argv) {
        return exit(writeln!(out, "{}", cli::CAPABILITIES).and_then(|()| out.flush()).map_err(Into::into));
    }
    let argv = cli::with_subcommand(argv);
    let args = match cli::parse_args(&argv) {
        Ok(args) => args,
        Err(error) => match cli::wrong_usage(&error, &argv) {
            Some(line) => return exit(Err(cli::run::CliError::Usage(line))),
            None => error.exit(),
        },
    };
    signals::ignore_file_size_limit();
    let level = log_level::filter(cli::run::log_level(&args)).unwrap_or(log::LevelFilter::Trace);
    cli::logging::init(level, cli::run::log_format(&args));
    let result = cli::run::run(args, &mut out);
    // What was done before an error is said before it.
    let flushed = out.flush();
    exit(result.and_then(|()| Ok(flushed?)))
}

fn exit(result: Result<(), cli::run::CliError>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let status = error.exit_status();
    if status != 0 {
        // One line, whatever the parts it was made of.
        let line = error.to_string().replace('\n', " ");
        eprintln!("vhost-remap: {line}");
    }
    ExitCode::from(status)
}
