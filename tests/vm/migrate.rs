//! A guest that is migrated from one QEMU to another, and its volume from one server to the other.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::guest::{Guest, guests};
use crate::server::Server;
use crate::{Dice, block_in_use};

/// Without KVM, under load.
const LIMIT: Duration = Duration::from_secs(180);
/// A migration alone.
const MIGRATION_MAX: Duration = Duration::from_secs(100);

/// QEMU's monitor (QEMU's `docs/interop/qmp-spec.rst`).
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn connect(path: &Path) -> Monitor {
        let stream = UnixStream::connect(path).expect("QEMU listens");
        stream.set_read_timeout(Some(MIGRATION_MAX)).expect("no zero");
        let mut monitor = Monitor(BufReader::new(stream));
        monitor.line();
        monitor.execute("qmp_capabilities", &json!({}));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let order = json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{order}").expect("QEMU listens");
        loop {
            // Events come at any time.
            let mut answer = self.line();
            if answer.get("event").is_none() {
                assert!(answer.get("error").is_none(), "{command}: {answer}");
                return answer["return"].take();
            }
        }
    }

    /// Have the guest go to the QEMU that listens there, and wait until it has gone.
    fn migrate(&mut self, to: &Path) {
        self.execute("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 30, "downtime-limit": 2000 }));
        self.execute("migrate", &json!({ "uri": format!("unix:{}", to.display()) }));
        let deadline = Instant::now() + MIGRATION_MAX;
        loop {
            let state = self.execute("query-migrate", &json!({}));
            match state["status"].as_str() {
                Some("completed") => return,
                Some("failed" | "cancelled") => panic!("{state}"),
                _ => assert!(Instant::now() < deadline, "not within {MIGRATION_MAX:?}: {state}"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Where a guest of that server is ordered about, and where one comes to it.
fn sockets(server: &Server) -> [PathBuf; 2] {
    ["monitor", "migration"].map(|name| server.dir().join(name))
}

fn start(server: &Server, comes: bool) -> Guest {
    let [monitor, migration] = sockets(server);
    let monitor = format!("unix:{},server=on,wait=off", monitor.display());
    let migration = format!("unix:{}", migration.display());
    let mut options = vec!["--smp", "4", "--qemu-arg", "-qmp", "--qemu-arg", &monitor];
    if comes {
        options.extend(["--qemu-arg", "-incoming", "--qemu-arg", &migration]);
    }
    Guest::start(server, "fio.sh", &[], &options, LIMIT)
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + MIGRATION_MAX;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {MIGRATION_MAX:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The guest writes, reads back and compares all the time, while blocks of its disk fail.
#[test]
fn a_guest_is_migrated_with_its_volume_and_back() {
    let Some(_turn) = guests() else { return };
    let here = Server::start("512M", 4);
    let there = Server::incoming(&here);
    let mut dice = Dice(13);
    let mut guest = start(&here, false);
    assert_eq!(guest.line(), "running");
    let mut remapped = 0;
    for (from, to) in [(&here, &there), (&there, &here)] {
        for _ in 0..8 {
            let block = block_in_use(&mut dice);
            from.fault(&["--ops", "write", "--sectors", &format!("{block}-{}", block + 31)]);
        }
        let next = start(to, true);
        let [monitor, _] = sockets(from);
        let [_, migration] = sockets(to);
        wait_until("QEMU listens for the guest", || migration.exists());
        wait_until("a write meets a fault", || from.remapped().len() > remapped);
        from.assert_unnoticed();
        Monitor::connect(&monitor).migrate(&migration);
        assert_eq!(from.status().state, ["away"]);
        drop(std::mem::replace(&mut guest, next));
        to.await_requests();
        to.assert_unnoticed();
        let found = to.remapped().len();
        assert!(found > remapped, "{found} blocks are remapped, of more than {remapped}");
        remapped = found;
    }
    guest.say("stop");
    guest.finish();
    here.assert_unnoticed();
}
