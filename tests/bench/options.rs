//! What is set by the environment, so that `make bench` and `cargo bench` take it alike.

use std::env;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

pub(crate) const USAGE: &str = "\
make bench measures vhost-remap, qemu-storage-daemon and fio in turn. It obeys, each with its default:
  BENCH_ROUNDS=6            undisturbed runs of each contender (fewer than 6 give no 95 % intervals)
  BENCH_SECONDS=1.2         length of a run, beside 0.2 s of warm-up
  BENCH_CASES=              only cases whose name contains this (`single` has those that are no load)
  BENCH_DISTURBANCE=5       throw runs away during which others took more than this percent of one processor
  BENCH_DIR=target/bench    where results go
  BENCH_FILES=              where files are made [BENCH_DIR]; some 6 GiB, and its file system is measured
  BENCH_MEMORY=/dev/shm     a tmpfs where files are made; 1 GiB
  BENCH_LIST=               anything: print the names of the cases, and measure nothing";

/// What was asked for.
#[derive(Debug, Serialize)]
pub(crate) struct Options {
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    pub(crate) cases: String,
    pub(crate) disturbance_percent: f64,
    pub(crate) dir: String,
    pub(crate) files: String,
    pub(crate) memory: String,
    pub(crate) list: bool,
}

impl Options {
    /// # Errors
    /// One line, when a value is no number or of no use.
    pub(crate) fn from_env() -> Result<Options, String> {
        let dir = path("BENCH_DIR", "target/bench");
        let options = Options {
            rounds: number("BENCH_ROUNDS", 6)?,
            seconds: number("BENCH_SECONDS", 1.2)?,
            cases: env::var("BENCH_CASES").unwrap_or_default(),
            disturbance_percent: number("BENCH_DISTURBANCE", 5.0)?,
            files: path("BENCH_FILES", &dir),
            memory: path("BENCH_MEMORY", "/dev/shm"),
            dir,
            list: words("BENCH_LIST").is_some(),
        };
        match options {
            Options { rounds: 0, .. } => Err("BENCH_ROUNDS has to be at least 1".into()),
            Options { seconds, .. } if !(0.05..=3600.0).contains(&seconds) => {
                Err("BENCH_SECONDS has to be between 0.05 and 3600".into())
            }
            options => Ok(options),
        }
    }

    pub(crate) fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// Whether something of that name was asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.cases)
    }
}

fn number<T: std::str::FromStr>(name: &str, default: T) -> Result<T, String> {
    match env::var(name) {
        Ok(text) if !text.is_empty() => text.parse().map_err(|_| format!("{name}: {text:?} is no number")),
        _ => Ok(default),
    }
}

/// Under the root of the tree, where it is not absolute.
fn path(name: &str, default: &str) -> String {
    let text = env::var(name).ok().filter(|text| !text.is_empty());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(text.as_deref().unwrap_or(default));
    path.display().to_string()
}

fn words(name: &str) -> Option<Vec<String>> {
    let text = env::var(name).unwrap_or_default();
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    (!words.is_empty()).then_some(words)
}
