//! `make bench`: vhost-remap, qemu-storage-daemon and fio in turn, on the same file, with the same client.
//!
//! A run is a backend started for it, 0.2 s of warm-up and the measured time; contenders follow each other A B A B …,
//! and ratios are those of runs of one round. Every status is checked and every sixteenth read compared with what was
//! written, byte by byte. Runs during which others used the machine are thrown away, and counted. Figures are
//! medians with intervals of order statistics, which hold the median with 95 % and more from six runs on.
//! One driver's thread a queue, each on a processor of its own; the backend has the others, or all where none is left.

mod backend;
mod cases;
mod content;
mod fio;
mod load;
mod machine;
mod options;
mod report;
mod ring;
mod rounds;
mod scan;
mod session;
mod single;
mod stage;
mod stats;
mod svg;
mod syscalls;
mod targets;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use machine::Machine;
use options::{Options, USAGE};
use report::Report;
use stage::Stage;

/// What takes another machine.
const NOT_MEASURED: [&str; 3] = [
    "8 and more queues: each worker has its own ring, shard and map snapshot, and shares no lock with the others",
    "NVMe: the device here is what the file system lies on",
    "a guest's own cost: the client is a driver without an operating system around it",
];

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether everything that was measured did what it should.
fn run() -> Result<bool, String> {
    // So does `cargo bench` call it. `cargo test --all-targets` does not, and is not to take hours.
    if !std::env::args().skip(1).eq(["--bench".to_owned()]) {
        return Err(format!("takes no arguments but cargo's own\n\n{USAGE}"));
    }
    let options = Options::from_env().map_err(|error| format!("{error}\n\n{USAGE}"))?;
    let wanted: Vec<_> = cases::cases().into_iter().filter(|case| options.wants(&case.name)).collect();
    if options.list {
        wanted.iter().for_each(|case| println!("{}", case.name));
        return Ok(true);
    }
    let single = options.wants("single");
    if wanted.is_empty() && !single {
        return Err(format!("no case is called {:?}\n\n{USAGE}", options.cases));
    }
    let (dir, files) = (PathBuf::from(&options.dir), PathBuf::from(&options.files));
    let problem = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
    std::fs::create_dir_all(&dir).map_err(|error| problem(&dir, error))?;
    let stage = Stage::new(&files, Path::new(&options.memory));
    let mut stage = stage.map_err(|error| problem(&files, error))?;
    let file_system = machine::file_system(&files);
    let machine = Machine::here();
    println!("{}, {} CPUs, Linux {}, {file_system}", machine.processor, machine.cpus, machine.kernel);
    println!("{}", machine.programs.join("; "));
    report::print_heading();
    let begin = Instant::now();
    let mut results = Vec::new();
    for case in wanted {
        let result = rounds::measure(case, &mut stage, &options);
        report::print_case(&result);
        let _ = io::stdout().flush();
        results.push(result);
    }
    let singles = if single { single::measure(&stage, &options) } else { Vec::new() };
    if single {
        report::print_singles(&singles);
    }
    let targets = targets::judge(&results, &singles);
    let failed = results.iter().flat_map(|result| &result.runs).filter(|runs| runs.failed).count()
        + singles.iter().filter(|single| single.failed).count();
    let mut not_measured = NOT_MEASURED.to_vec();
    if !results.iter().flat_map(|result| &result.runs).any(|runs| runs.syscalls_per_io.is_some()) {
        not_measured.push("system calls: perf is not there, or may not count them");
    }
    let report = Report { machine, file_system, options, cases: results, singles, targets, not_measured };
    report::print_targets(&report);
    report::write(&report, &dir).map_err(|error| problem(&dir, error))?;
    println!("\n{} s; bench.json and *.svg are in {}", begin.elapsed().as_secs(), dir.display());
    if failed > 0 {
        eprintln!("bench: {failed} of what was to be measured FAILED, see above");
    }
    Ok(failed == 0)
}
