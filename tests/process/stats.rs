//! What is counted and how long it takes, as operators and monitoring see it.

use vhost_remap::runtime::stats::{OperationReport, StatsReport};

use crate::guest::{Failed, Io};
use crate::model::pattern;
use crate::server::{Server, TRANSPORTS, Volume, eventually};

pub(crate) fn stats(server: &Server) -> StatsReport {
    let text = server.order(&["stats", "--json"]);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn of(report: &StatsReport, name: &str) -> OperationReport {
    let found = report.operations.iter().find(|operation| operation.operation == name);
    found.unwrap_or_else(|| panic!("{report:?}")).clone()
}

/// Seven writes, eleven reads, three of which fail, two flushes, one discard and one zeroing.
fn work(server: &Server) {
    let mut guest = server.guest(1);
    for i in 0..7 {
        guest.write(960 + 16 * i, pattern(960 + 16 * i, 2, 1)).unwrap();
    }
    for i in 0..8 {
        guest.read(960 + i, 4).unwrap();
    }
    guest.flush().unwrap();
    guest.flush().unwrap();
    guest.queue().one(Io::Discard(vec![(4096, 64, 0)])).unwrap();
    guest.queue().one(Io::WriteZeroes(vec![(4160, 8, 0), (8192, 8, 0)])).unwrap();
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    for _ in 0..2 {
        assert_eq!(guest.read(2003, 1), Err(Failed::IoErr));
    }
    assert_eq!(guest.read(1 << 20, 1), Err(Failed::IoErr), "beyond the end");
}

/// P2, scenario 30: N reads, M writes and E errors are N, M and E.
#[test]
fn stats_count_what_the_guest_did() {
    for transport in TRANSPORTS {
        let volume = Volume::create(32, 64);
        let server = volume.serve(&["--transport", transport]);
        work(&server);
        let report = stats(&server);
        let counts = |name| {
            let operation = of(&report, name);
            let counted: u64 = operation.latency.buckets.iter().map(|bucket| bucket.count).sum();
            assert_eq!(operation.completed, counted, "{name}");
            assert_eq!((operation.in_flight, operation.oldest_in_flight_ns), (0, 0), "{name}");
            (operation.completed, operation.failed, operation.bytes)
        };
        assert_eq!(counts("read"), (11, 3, 8 * 2048), "{transport}");
        assert_eq!(counts("write"), (7, 0, 7 * 1024), "{transport}");
        assert_eq!(counts("flush"), (2, 0, 0), "{transport}");
        assert_eq!(counts("discard"), (1, 0, 64 * 512), "{transport}");
        assert_eq!(counts("write_zeroes"), (1, 0, 16 * 512), "{transport}");
        let causes: Vec<_> = of(&report, "read").errors.into_iter().collect();
        assert_eq!(causes, [("medium".to_owned(), 2), ("refused".to_owned(), 1)], "{transport}");
        // What devices say of the same.
        let status = server.status();
        let sent = |name: &str, operation: &str| {
            let found = report.devices.iter().find(|row| (row.device.as_str(), &*row.operation) == (name, operation));
            found.cloned().unwrap_or_else(|| panic!("{report:?}"))
        };
        let reads = sent("primary", "read");
        assert_eq!(reads.errors.values().sum::<u64>(), status.devices[0].read_errors, "{transport}");
        assert_eq!(reads.errors.keys().collect::<Vec<_>>(), ["io"], "{transport}");
        assert!(reads.submitted >= 11 + 2 && reads.bytes >= 8 * 2048, "{reads:?}");
        assert!(sent("primary", "write").bytes >= 7 * 1024 && sent("primary", "flush").submitted >= 2);
        let text = server.order(&["stats"]);
        let line = text.lines().find(|line| line.starts_with("read ")).unwrap_or_else(|| panic!("{text}"));
        assert!(line.contains(" 11 ") && line.ends_with("3  2 medium, 1 refused"), "{line}");
    }
}

#[test]
fn a_request_under_way_and_then_its_latency_are_seen() {
    for transport in TRANSPORTS {
        let volume = Volume::create(32, 64);
        let server = volume.serve(&["--transport", transport]);
        let mut guest = server.guest(1);
        guest.read(0, 1).unwrap();
        server.fault(&["--ops", "read", "--sectors", "800", "--delay", "2000"]);
        let queue = guest.queue();
        queue.submit(&Io::Read { sector: 800, count: 8 });
        eventually("the request is under way", || {
            let reads = of(&stats(&server), "read");
            reads.in_flight == 1 && reads.oldest_in_flight_ns > 0
        });
        assert_eq!(queue.wait().len(), 1);
        let reads = of(&stats(&server), "read");
        assert_eq!((reads.completed, reads.in_flight), (2, 0), "{transport}");
        let latency = &reads.latency;
        assert!(latency.max_ns >= 2_000_000_000 && latency.sum_ns > latency.max_ns, "{latency:?}");
        assert!(latency.p50_ns.unwrap() < 2_000_000_000 && latency.p99_ns == Some(latency.max_ns), "{latency:?}");
    }
}
