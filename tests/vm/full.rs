//! A spare without a free slot under a file system.

use std::time::{Duration, Instant};

use crate::area::Area;
use crate::guest::{Guest, guests};
use crate::server::Server;

/// The fewest a volume can have.
const SLOTS: &str = "16";
const LIMIT: Duration = Duration::from_secs(120);

fn start(policy: &str) -> (Server, Guest, Area, Area) {
    let server = Server::start_with("256M", 1, &["--max-remaps", SLOTS], &["--on-spare-full", policy]);
    let mut guest = Guest::start(&server, "full.sh", &[policy, SLOTS], &[], LIMIT);
    let (data, journal) = (Area::parse(&guest.line()), Area::parse(&guest.line()));
    (server, guest, data, journal)
}

#[test]
fn a_full_spare_costs_ext4_only_the_writes_that_need_a_slot() {
    let Some(_turn) = guests() else { return };
    let (server, mut guest, data, journal) = start("fail");
    data.fault(&server, &["--ops", "write"]);
    guest.say("go");

    let failed = guest.line();
    let status = server.status();
    assert_eq!(status.state, ["spare-full"], "{status:?}");
    assert_eq!(
        (status.blocks.remapped, status.blocks.slots_free, status.blocks.lost_sectors),
        (16, 0, 0),
        "{status:?}"
    );
    assert_eq!(failed, format!("failed {}", status.counters.guest_errors));
    let errors: Vec<_> = server.events().into_iter().filter(|event| event.kind == "guest-error").collect();
    assert_eq!(u64::try_from(errors.len()).expect("few"), status.counters.guest_errors, "{errors:?}");
    for event in errors {
        assert!(data.contains(event.sector.expect("an error has a place")), "{event:?}");
        assert!(event.cause.contains("slot"), "{event:?}");
    }
    journal.fault(&server, &["--ops", "write"]);
    guest.say("go");

    assert_eq!(guest.line(), "stopped");
    server.vhost_remap("fault", &["clear"]);
    guest.say("go");
    guest.finish();
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.blocks.in_doubt, status.blocks.lost_sectors), (16, 0, 0), "{status:?}");
}

#[test]
fn writes_held_by_a_full_spare_go_on_when_blocks_are_released() {
    let Some(_turn) = guests() else { return };
    let (server, mut guest, data, _) = start("hold");
    let start = data.ranges[0].0;
    // Two rules: one for the blocks that get a slot, one for four more.
    let (first, rest) = ((start, start + 16 * 8 - 1), (start + 16 * 8, start + 20 * 8 - 1));
    for (from, to) in [first, rest] {
        server.fault(&["--ops", "write", "--sectors", &format!("{from}-{to}")]);
    }
    guest.say("go");

    assert_eq!(guest.line(), "others");
    // All else is done and flushed. The one request left has waited for longer than any repair takes.
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.status().oldest_in_flight_ms < 3000 {
        assert!(Instant::now() < deadline, "no request is held: {:?}", server.status());
        std::thread::sleep(Duration::from_millis(100));
    }
    let status = server.status();
    assert!(status.state.iter().any(|state| state == "spare-full"), "{status:?}");
    assert_eq!((status.blocks.remapped, status.blocks.slots_free), (16, 0), "{status:?}");
    assert_eq!(server.remapped().last(), Some(&(start + 15 * 8)));

    server.vhost_remap("fault", &["clear", "1"]);
    server.vhost_remap("release", &[&format!("{start}-{}", start + 4 * 8 - 1)]);
    guest.finish();
    let status = server.status();
    assert_eq!(status.counters.guest_errors, 0, "{status:?}");
    let moved: Vec<u64> = (4..20).map(|block| start + block * 8).collect();
    assert_eq!(server.remapped(), moved);
}
