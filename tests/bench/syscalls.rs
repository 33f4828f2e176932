//! Counting the system calls of a process, with perf where it is there and may.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Longest that perf takes to begin.
const LIMIT: Duration = Duration::from_secs(10);

/// A count under way. Ended when dropped.
pub(crate) struct Counter {
    perf: Child,
    output: PathBuf,
}

impl Counter {
    /// Count from now on, for all threads there are and will be. `None` where that cannot be done.
    pub(crate) fn start(dir: &Path, pid: u32) -> Option<Counter> {
        let [orders, answers, output] = ["perf.orders", "perf.answers", "perf.count"].map(|name| dir.join(name));
        for fifo in [&orders, &answers] {
            let _ = fs::remove_file(fifo);
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mkfifoat(rustix::fs::CWD, fifo, mode).ok()?;
        }
        // Both ways, so that opening them waits for nobody.
        let open = |path: &Path| File::options().read(true).write(true).open(path).ok();
        let (mut orders_end, answers_end) = (open(&orders)?, open(&answers)?);
        let mut command = Command::new("perf");
        command.args(["stat", "--event=raw_syscalls:sys_enter", "--field-separator=,", "--delay=-1"]);
        command.arg(format!("--pid={pid}")).arg("--output").arg(&output);
        command.arg(format!("--control=fifo:{},{}", orders.display(), answers.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let counter = Counter { perf: command.spawn().ok()?, output };
        orders_end.write_all(b"enable\n").ok()?;
        let (sender, answer) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(answers_end).read_line(&mut line);
            let _ = sender.send(line);
        });
        let said = answer.recv_timeout(LIMIT);
        if said.is_err() {
            // Ends the wait of the thread above.
            let _ = File::options().write(true).open(&answers).and_then(|mut fifo| fifo.write_all(b"\n"));
        }
        said.is_ok_and(|line| line.starts_with("ack")).then_some(counter)
    }

    /// End it; the count.
    pub(crate) fn stop(mut self) -> Option<u64> {
        kill_process(Pid::from_child(&self.perf), Signal::INT).ok()?;
        self.perf.wait().ok()?;
        let text = fs::read_to_string(&self.output).ok()?;
        let line = text.lines().find(|line| line.contains("raw_syscalls"))?;
        line.split(',').next()?.parse().ok()
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        // Nothing, where it has been waited for.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}
