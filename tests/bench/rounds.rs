//! Contenders in turn, A B A B …, until each has as many undisturbed runs as were asked for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use vhost_remap::control::client::REPORT_TIMEOUT;

use crate::backend::Backend;
use crate::cases::{Beside, Case, Contender};
use crate::content::SECTORS_PER_BLOCK;
use crate::load::{self, Figures};
use crate::options::Options;
use crate::stage::{LEN, Peer, Stage, Trouble, WHOLE};
use crate::stats::{Estimate, estimate};
use crate::syscalls::Counter;
use crate::targets::Quantity;
use crate::{fio, machine};

/// Rounds at most, for each that was asked for: a machine that others use all the time gives nothing.
const TRIES: usize = 3;
/// Length of the run in which system calls are counted, which slows them down.
const COUNTED: Duration = Duration::from_millis(300);

/// A contender's runs.
#[derive(Debug, Serialize)]
pub(crate) struct Runs {
    pub(crate) contender: Contender,
    /// By round; those of a disturbed run are absent.
    pub(crate) rounds: Vec<Option<Figures>>,
    pub(crate) thrown_away: usize,
    pub(crate) syscalls_per_io: Option<f64>,
    /// Why there is nothing more, or nothing at all.
    pub(crate) missing: Option<String>,
    /// Whether that is because it did something wrong.
    pub(crate) failed: bool,
}

/// A case and what was measured.
#[derive(Debug, Serialize)]
pub(crate) struct CaseResult {
    pub(crate) case: Case,
    pub(crate) runs: Vec<Runs>,
}

impl CaseResult {
    fn of(&self, name: &str) -> &Runs {
        let found = self.runs.iter().find(|runs| runs.contender.name == name);
        found.expect("targets name contenders of their case")
    }

    pub(crate) fn why_missing(&self, name: &str) -> Option<&str> {
        self.of(name).missing.as_deref()
    }

    /// A contender's figures by round.
    pub(crate) fn series(&self, name: &str, quantity: Quantity) -> Vec<Option<f64>> {
        self.of(name).rounds.iter().map(|figures| quantity.of(figures.as_ref()?)).collect()
    }

    pub(crate) fn estimate(&self, name: &str, quantity: Quantity) -> Option<Estimate> {
        self.of(name).estimate(|figures| quantity.of(figures))
    }
}

impl Runs {
    /// The median over the rounds of some figure.
    pub(crate) fn estimate(&self, figure: impl Fn(&Figures) -> Option<f64>) -> Option<Estimate> {
        estimate(&self.rounds.iter().flatten().filter_map(figure).collect::<Vec<_>>())
    }

    fn good(&self) -> usize {
        self.rounds.iter().flatten().count()
    }

    fn give_up(&mut self, trouble: Trouble) {
        (self.missing, self.failed) = match trouble {
            Trouble::Missing(why) => (Some(why), false),
            Trouble::Failed(why) => (Some(why), true),
        };
    }
}

/// Measure a case.
pub(crate) fn measure(case: Case, stage: &mut Stage, options: &Options) -> CaseResult {
    let runs = case.contenders.iter().map(|contender| Runs {
        contender: *contender,
        rounds: Vec::new(),
        thrown_away: 0,
        syscalls_per_io: None,
        missing: None,
        failed: false,
    });
    let mut runs: Vec<Runs> = runs.collect();
    // Who spins must not spin where the other works.
    let (needed, cpus) = (2 * case.load.queues, machine::cpus().len());
    if case.load.polled && cpus < needed {
        let why = format!("a polled client takes {needed} processors, and there are {cpus}");
        runs.iter_mut().for_each(|runs| runs.give_up(Trouble::Missing(why.clone())));
    }
    for round in 0..options.rounds * TRIES {
        let open = |runs: &Runs| runs.missing.is_none() && runs.good() < options.rounds;
        // Where the first tries gave nothing, more would not.
        let hopeless = round >= options.rounds && runs.iter().all(|runs| runs.good() == 0);
        if hopeless || !runs.iter().any(open) {
            break;
        }
        for runs in runs.iter_mut().filter(|runs| runs.missing.is_none()) {
            match run(&case, runs.contender, stage, options.time()) {
                Ok(figures) if figures.disturbance_percent <= options.disturbance_percent => {
                    runs.rounds.push(Some(figures));
                }
                Ok(_) => {
                    runs.rounds.push(None);
                    runs.thrown_away += 1;
                }
                Err(trouble) => runs.give_up(trouble),
            }
        }
    }
    for runs in runs.iter_mut().filter(|runs| runs.missing.is_none() && runs.good() == 0) {
        runs.give_up(Trouble::Missing("others used the machine during each of its runs".into()));
    }
    for runs in runs.iter_mut().filter(|runs| runs.missing.is_none() && runs.contender.peer != Peer::Fio) {
        match count_syscalls(&case, runs.contender, stage) {
            Ok(count) => runs.syscalls_per_io = count,
            Err(trouble) => runs.give_up(trouble),
        }
    }
    CaseResult { case, runs }
}

fn run(case: &Case, contender: Contender, stage: &mut Stage, time: Duration) -> Result<Figures, Trouble> {
    stage.settle(case.medium, contender.peer)?;
    if contender.peer == Peer::Fio {
        let direct = case.medium == crate::stage::Medium::Direct;
        let file = &stage.disk(case.medium, contender.peer)?.file;
        return fio::run(file, LEN, direct, case.load, time).map_err(|why| match why.starts_with("fio: No such") {
            true => Trouble::Missing(why),
            false => Trouble::Failed(why),
        });
    }
    let backend = stage.start(case.medium, contender.peer, case.load.queues)?;
    let content = stage.disk(case.medium, contender.peer)?.content(contender.peer, contender.area);
    let figures = beside(contender.beside, &backend, || {
        load::run(&backend.socket, backend.pid(), case.load, contender.area, content, time)
    });
    let figures = figures.map_err(Trouble::Failed)?;
    backend.stop().map_err(Trouble::Failed)?;
    Ok(figures)
}

/// Do something while a backend is measured.
fn beside<T>(what: Beside, backend: &Backend, measure: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let ended = AtomicBool::new(false);
    let go_on = || !ended.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| -> Result<u64, String> {
            let mut times = 0;
            while what != Beside::Nothing && go_on() {
                if what == Beside::Status {
                    let status = backend.control().get::<Value>("/v1/status", REPORT_TIMEOUT);
                    status.map_err(|error| error.to_string())?;
                    std::thread::sleep(Duration::from_millis(100));
                } else if what == Beside::Scan {
                    // Refused while one is under way, as that of an earlier run may be, which goes on by itself.
                    let _ = backend.order("/v1/scan/start", &json!({ "check_only": false }));
                    let status = backend.control().get::<Value>("/v1/status", REPORT_TIMEOUT);
                    let status = status.map_err(|error| error.to_string())?;
                    if status["scan"]["state"] != "running" {
                        return Err(format!("no pass is under way: {}", status["scan"]));
                    }
                    std::thread::sleep(Duration::from_millis(100));
                } else {
                    // The last block: of all that are read it is one.
                    let start = (WHOLE.count - 1) * SECTORS_PER_BLOCK;
                    let sectors = json!({ "start": start, "count": SECTORS_PER_BLOCK });
                    backend.order("/v1/remap", &sectors)?;
                    backend.order("/v1/release", &sectors)?;
                }
                times += 1;
            }
            Ok(times)
        });
        let measured = measure();
        ended.store(true, Ordering::Relaxed);
        let times = other.join().expect("it says what is wrong")?;
        if what != Beside::Nothing && times == 0 {
            return Err(format!("{what:?}: nothing was done beside the load"));
        }
        measured
    })
}

/// System calls of a backend for each request, in a run of its own. `None` where they cannot be counted.
fn count_syscalls(case: &Case, contender: Contender, stage: &mut Stage) -> Result<Option<f64>, Trouble> {
    stage.settle(case.medium, contender.peer)?;
    let backend = stage.start(case.medium, contender.peer, case.load.queues)?;
    let Some(counter) = Counter::start(stage.dir(), backend.pid()) else {
        backend.stop().map_err(Trouble::Failed)?;
        return Ok(None);
    };
    let content = stage.disk(case.medium, contender.peer)?.content(contender.peer, contender.area);
    let figures = load::run(&backend.socket, backend.pid(), case.load, contender.area, content, COUNTED);
    let figures = figures.map_err(Trouble::Failed)?;
    let count = counter.stop();
    backend.stop().map_err(Trouble::Failed)?;
    Ok(count.map(|count| count as f64 / figures.requests as f64))
}
